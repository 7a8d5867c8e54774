"""What is told of this machine."""

import os

from calm.doctor import examine
from calm.hardware import processor_name


def test_the_processor_is_called_by_its_name():
    told = examine()["hardware"]["processor"]
    assert told.startswith(f"{processor_name()}, {os.cpu_count()} cores seen, ")
