"""Packages that only some commands need."""

import importlib.util

from calm.errors import InputError


def require(what: str, *packages: str) -> None:
    """Check that packages are installed.

    Args:
        what: What needs them, for the message.
        packages: Their names in the package index.

    Raises:
        InputError: If any of them is missing.
    """
    if missing := [package for package in packages if not is_installed(package)]:
        raise not_installed(what, *missing)


def is_installed(package: str) -> bool:
    """Whether a package whose module has the same name can be imported."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    return spec is not None and spec.origin is not None  # A folder has none, such as one of wandb's logs.


def not_installed(what: str, *packages: str) -> InputError:
    """The error for packages that are missing. It names them, not our extras: those have no index entry."""
    names, verb = " and ".join(packages), "is" if len(packages) == 1 else "are"
    return InputError(f"{what} needs {names}, which {verb} not installed: pip install {' '.join(packages)}")
