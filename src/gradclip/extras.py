"""Packages that only a part of gradclip needs, and how to get them."""

import importlib
from typing import Any


def needed(extra: str, *packages: str) -> Any:
    """Import the first of some packages that is installed, or say how to get it.

    Args:
        extra: The extra of gradclip that brings the package.
        packages: The modules that would do, best first.

    Returns:
        The module.

    Raises:
        ModuleNotFoundError: If none is installed; the message has the install line.
    """
    for package in packages:
        try:
            return importlib.import_module(package)
        except ModuleNotFoundError as error:
            # Something inside of an installed package is missing: not ours to explain.
            if error.name is None or not f"{package}.".startswith(f"{error.name}."):
                raise
    message = missing("this part of gradclip", " or ".join(packages), extra)
    raise ModuleNotFoundError(message, name=packages[0])


def missing(what: str, package: str | None, extra: str) -> str:
    """Say what needs a package that is not there, and how to install it."""
    return (
        f"{what} needs {package}, which is not installed: "
        f'pip install "gradclip[{extra}]"'
    )
