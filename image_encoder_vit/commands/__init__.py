"""The command line: one module for each command; its `main(argv)` gives the exit status."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from .. import __version__
from ..support import message_of
from .options import PROGRAM

COMMANDS = {
    "pull": "take the encoder out of a checkpoint on the Hub or on this disk",
    "push": "publish a folder, or export its weights",
    "encode": "encode images and save their features",
    "extract": "features of whole corpora",
    "plot": "draw what the encoder makes of a page",
    "search": "pages of a feature store most like a page, an image, or a region of one",
    "export": "write the encoder as an ONNX file",
    "finetune": "train a classifier on images in one folder for each class",
    "benchmark": "time the encoder beside others",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that `argv` (the program's arguments) begins with; its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in COMMANDS:
        try:
            module = importlib.import_module(f".{arguments[0]}", __name__)
        except ImportError as error:  # names the extra that the command comes with
            print(f"error: {message_of(error)}", file=sys.stderr)
            return 2
        return int(module.main(arguments[1:]))
    table = "\n".join(f"  {name:<{max(map(len, COMMANDS))}}  {does}" for name, does in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="SAM's ViT image encoder, as DeepSeek-OCR uses it.",
        epilog=f"commands:\n{table}\n\n{PROGRAM} COMMAND --help lists what a command takes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    parser.parse_args(arguments or ["--help"])
    raise AssertionError("unreachable: the parser has shown help or an error")


__all__ = ["COMMANDS", "main"]
