"""What `calm doctor` reports about the machine."""

import os

from calm.doctor import examine
from calm.hardware import processor_name


def test_processor_is_reported_by_its_name():
    description = examine()["hardware"]["processor"]
    assert description.startswith(f"{processor_name()}, {os.cpu_count()} cores seen, ")
