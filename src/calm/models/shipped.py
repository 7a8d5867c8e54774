"""Resolve a model name: to its folder, to a run's model, or to a model shipped in the package.

The package ships models, so that there is something to generate with right after installing.
"""

from importlib.resources import files
from pathlib import Path

from calm.storage.disk import expanded

MODEL_FILES = ("config.json", "adapter_config.json")


def shipped_models() -> dict[str, Path]:
    """Model folders inside the package, by name."""
    root = Path(str(files("calm"))) / "shipped"
    if not root.is_dir():
        return {}
    return {path.name: path for path in sorted(root.iterdir()) if (path / "config.json").is_file()}


def folder_of(name: str) -> str:
    """A model's folder: its own, the one in its run, or the shipped one; other names stay as they are."""
    path = expanded(name)
    for folder in (path, path / "model"):
        if holds_model(folder):
            return str(folder)
    return str(shipped_models().get(name, path))


def holds_model(folder: Path) -> bool:
    """Whether a folder holds a model, an autoencoder or adapters."""
    return any((folder / file).is_file() for file in MODEL_FILES)
