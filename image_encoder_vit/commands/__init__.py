"""The command line: one module for each command, `main(argv)` of each gives the exit status."""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "pull": "take the encoder out of a checkpoint on the Hub or on this disk",
    "push": "publish a folder, or export its weights",
    "encode": "encode images and save their features",
    "extract": "features of whole corpora",
    "plot": "draw what the encoder makes of a page",
    "search": "pages of a feature store most like a page, an image, or a region of one",
    "export": "write the encoder as an ONNX file",
    "finetune": "train a classifier on images in one folder for each class",
    "benchmark": "the encoder beside others",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that `argv` (the program's arguments) begins with; its exit status."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in COMMANDS:
        module = importlib.import_module(f".{name}", __name__)
        return int(module.main(rest))
    lines = ["usage: image-encoder-vit COMMAND ...", "", *(f"  {name:<10} {does}" for name, does in COMMANDS.items())]
    if name in ("-h", "--help"):
        print("\n".join(lines))
        return 0
    print(f"error: no command {name!r}\n" + "\n".join(lines), file=sys.stderr)
    return 2
