"""Imports packages that come with an extra, or says how to get them."""

import importlib
from typing import Any


def import_extra(name: str, extra: str) -> Any:
    """
    The module `name`, which the package's `extra` installs.

    Raises:
        ImportError: If it is not installed, naming the extra.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0] and error.name != name:
            raise
        raise ImportError(
            f"{error.name} is not installed: it comes with the extra '{extra}', "
            f"pip install 'image-encoder-vit[{extra}]'.",
            name=error.name,
        ) from None
