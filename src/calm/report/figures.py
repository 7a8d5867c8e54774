"""All figures of a report as JSON."""

import json
import math
from pathlib import Path
from typing import Any

from calm.storage.disk import write_file_whole


def write_figures(values: dict[str, Any], path: Path) -> None:
    """Write figures as JSON, with null for what is not a number."""
    write_file_whole(path, as_json(values) + "\n")


def as_json(values: dict[str, Any]) -> str:
    """Figures as JSON, with null for what is not a number."""
    return json.dumps(_without_nan(values), indent=1, allow_nan=False)


def _without_nan(value: Any) -> Any:
    """The same with null for errors that are not known, which JSON has no number for."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
