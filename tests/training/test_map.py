"""The list of modules in the docstring of `calm.training`."""

import re
from pathlib import Path

from calm import training


def test_docstring_of_the_package_names_every_file_and_no_other():
    files = {path.name for path in Path(training.__file__).parent.glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"\w+\.py", training.__doc__)) == files
