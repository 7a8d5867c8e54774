"""Resolve a model name to a model's folder, the model in a run's folder, or a model shipped in the package.

The package ships models so that there is something to generate with right after installing.
"""

from importlib.resources import files
from pathlib import Path

from calm.storage.disk import expand_user

MODEL_FILES = ("config.json", "adapter_config.json")


def shipped_models() -> dict[str, Path]:
    """Model folders inside the package, by name."""
    root = Path(str(files("calm"))) / "shipped"
    if not root.is_dir():
        return {}
    return {path.name: path for path in sorted(root.iterdir()) if (path / "config.json").is_file()}


def folder_of(name: str) -> str:
    """The folder of a model: the named one, the one in the named run, or a shipped one; else the name as is.

    A leading ~ is expanded.
    """
    path = expand_user(name)
    for folder in (path, path / "model"):
        if holds_model(folder):
            return str(folder)
    return str(shipped_models().get(name, path))


def tokenizer_of(name: str) -> str:
    """The folder of a tokenizer if a run or a shipped model is named; any other name as it is."""
    if Path(name).exists() and not holds_model(Path(name) / "model"):
        return name
    location = folder_of(name)
    return name if Path(location) == Path(name) else location


def holds_model(folder: Path) -> bool:
    """Whether a folder holds a model, an autoencoder or adapters."""
    return any((folder / file).is_file() for file in MODEL_FILES)
