"""The options that several commands have, by the same names and with the same meaning everywhere."""

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..image_presets import PRESETS

PROGRAM = "image-encoder-vit"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

OPTIONS: dict[str, dict[str, Any]] = {
    "--checkpoint": {
        "metavar": "FOLDER_OR_HUB_ID",
        "default": "sample",
        "help": 'where the encoder is; "sample" (default): the small one that the package brings; "random"',
    },
    "--revision": {"metavar": "NAME", "help": "branch, tag or commit of a Hub repository; default: main"},
    "--device": {"default": "auto", "help": '"auto" (default: an accelerator before the CPU), "cpu", "cuda:1", ...'},
    "--dtype": {"choices": [*DTYPES], "help": "of the model; default: the checkpoint's"},
    "--preset": {"choices": [*PRESETS], "help": "views of each image; gundam adds tiles (default: the checkpoint's)"},
    "--tokens": {
        "action": "store_true",
        "help": "of a DeepEncoder: keep the token sequence that its decoder reads too",
    },
    "--output": {"required": True, "type": Path},
    "--overwrite": {"action": "store_true", "help": "replace the output where it exists"},
}


def command_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of the command `name`, which its help and errors call by its full name however it was started."""
    return argparse.ArgumentParser(
        prog=f"{PROGRAM} {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_option(parser: argparse.ArgumentParser, name: str, **settings: Any) -> None:
    """Adds one of `OPTIONS`; `settings` say what is particular here."""
    parser.add_argument(name, **(OPTIONS[name] | settings))


def check_output(path: Path, overwrite: bool) -> None:
    """
    To be asked before the work begins.

    Raises:
        FileExistsError: If `path` exists and may not be replaced.
    """
    if path.exists() and not overwrite:
        raise FileExistsError(f"{str(path)!r} exists already: add --overwrite to replace it, or choose another name.")


def picture_format(path: Path) -> str:
    """
    The format of a picture by the name of its file.

    Raises:
        ValueError: If Pillow writes none of that name.
    """
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(f"--plot {str(path)!r}: unknown kind of picture; use a name such as page.png.")
    return str(kind)
