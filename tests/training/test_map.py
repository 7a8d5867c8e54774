"""The map of the room, for whoever opens it."""

import re
from pathlib import Path

from calm import training


def test_the_map_names_every_file_and_no_other():
    files = {path.name for path in Path(training.__file__).parent.glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"\w+\.py", training.__doc__)) == files
