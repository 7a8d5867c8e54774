"""Where a model is that was named: in its folder, in a run, or in the package itself.

The package comes with a model, so that there is something to write with right after installing.
"""

from importlib.resources import files
from pathlib import Path

MODEL_FILES = ("config.json", "adapter_config.json")


def shipped_models() -> dict[str, Path]:
    """Model folders inside the package, by name."""
    root = Path(str(files("calm"))) / "shipped"
    if not root.is_dir():
        return {}
    return {path.name: path for path in sorted(root.iterdir()) if (path / "config.json").is_file()}


def folder_of(name: str) -> str:
    """The folder of a model: its own, that in its run, or that of the package; other names stay."""
    path = expanded(name)
    for folder in (path, path / "model"):
        if holds_model(folder):
            return str(folder)
    return str(shipped_models().get(name, path))


def expanded(name: str) -> Path:
    """A path with ~ for the home folder."""
    try:
        return Path(name).expanduser()
    except RuntimeError:  # There is no such user.
        return Path(name)


def holds_model(folder: Path) -> bool:
    """Whether a folder is that of a model, an autoencoder or adapters."""
    return any((folder / file).is_file() for file in MODEL_FILES)
