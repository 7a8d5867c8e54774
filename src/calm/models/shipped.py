"""Models that come with the package, so that there is something to write with right after installing."""

from importlib.resources import files
from pathlib import Path


def shipped_models() -> dict[str, Path]:
    """Model folders inside the package, by name."""
    root = Path(str(files("calm"))) / "shipped"
    if not root.is_dir():
        return {}
    return {path.name: path for path in sorted(root.iterdir()) if (path / "config.json").is_file()}


def folder_of(name: str) -> str:
    """The folder of a model of the package; any other name, and a model's folder here, stays as it is."""
    here = any((Path(name) / file).is_file() for file in ("config.json", "adapter_config.json"))
    return name if here or name not in shipped_models() else str(shipped_models()[name])
