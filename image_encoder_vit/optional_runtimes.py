"""Imports the runtimes that come with the extra `export`, or says how to get them."""

import importlib
from typing import Any


def import_runtime(name: str) -> Any:
    """
    The module `name` of the extra `export`.

    Raises:
        ImportError: If it is not installed, naming the extra.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ImportError(
            f"{name} is not installed: it comes with the extra 'export', pip install 'image-encoder-vit[export]'.",
            name=name,
        ) from None
