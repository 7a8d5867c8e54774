"""Packages and programs that only some commands need."""

import importlib.util
import os
import shutil

from calm.errors import InputError

_COMPILERS = ("c++", "g++", "clang++", "cl")


def require(feature: str, *packages: str) -> None:
    """Check that packages are installed.

    Args:
        feature: What needs them, for the message.
        packages: Their names in the package index.

    Raises:
        InputError: If any of them is missing.
    """
    if missing := [package for package in packages if not is_installed(package)]:
        raise not_installed(feature, *missing)


def require_compiler(feature: str, otherwise: str) -> None:
    """Check that there is a C++ compiler.

    Args:
        feature: What needs one, for the message.
        otherwise: What to do without one, for the message.

    Raises:
        InputError: If there is none.
    """
    compiler = os.environ.get("CXX")
    if not any(map(shutil.which, [compiler] if compiler else _COMPILERS)):
        raise InputError(
            f"{feature} needs a C++ compiler, but none was found ({compiler or ', '.join(_COMPILERS)}); "
            f"install one, or {otherwise}."
        )


def is_installed(package: str) -> bool:
    """Whether a package whose module has the same name can be imported."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    return spec is not None and spec.origin is not None  # A plain folder, such as wandb's logs, has none.


def not_installed(feature: str, *packages: str) -> InputError:
    """The error for missing packages. It names them, not our extras, which are not in the package index."""
    names, verb = " and ".join(packages), "is" if len(packages) == 1 else "are"
    return InputError(
        f"{feature} needs {names}, which {verb} not installed: pip install {' '.join(packages)}"
    )
