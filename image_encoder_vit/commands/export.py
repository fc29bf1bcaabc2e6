"""
Exports an encoder to an ONNX file for images of one size and any batch, checked in ONNX Runtime before it is put in its
place; weights above 2 GB go to a second file beside it. OpenVINO reads the same file. With --format transformers.js it
becomes a folder for the browser and Node. SOURCE is a folder or Hub id that AutoModel loads.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import ImageEncoderViTModel
from ..runtimes.onnx_export import data_file, export_onnx
from ..runtimes.transformers_js import export_transformers_js
from .frame import run_command
from .loading import load_model, load_processor
from .options import add_option, command_parser

PROVENANCE_FILE = "provenance.json"
ONNX, TRANSFORMERS_JS = "onnx", "transformers.js"


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(export, parse_arguments(argv), after_interrupt="nothing was written")


def export(arguments: argparse.Namespace) -> int:
    if arguments.output.exists():
        raise FileExistsError(f"{str(arguments.output)!r} exists already: remove it, or choose another name.")
    model = load_model(arguments.source, torch.float32, arguments.revision)
    size = arguments.size or (model.config.image_size, model.config.image_size)
    source = describe_source(arguments.source, model)
    if arguments.format == TRANSFORMERS_JS:
        processor = load_processor(arguments.source, arguments.revision)
        variants = export_transformers_js(model, processor, arguments.output, size, source)
        print(f"Wrote {arguments.output} for pages on {size[0]} x {size[1]} px; README.md there shows its use")
        for dtype, size_bytes, errors in variants:
            print(f"{dtype:>5}: {size_bytes / 1e6:.1f} MB, largest relative error {max(errors.values()):.1e}")
        return 0
    error = export_onnx(model, arguments.output, size, source)
    files = [path for path in (arguments.output, data_file(arguments.output)) if path.exists()]
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    print(f"Wrote {' and '.join(map(str, files))}: {megabytes:.0f} MB, {size[0]} x {size[1]} px, any batch")
    print(f"Largest relative error of ONNX Runtime against the model: {error:.1e}")
    return 0


def describe_source(source: str, model: ImageEncoderViTModel) -> dict[str, Any]:
    """Where the weights come from: what `pull` recorded, or the commit that the Hub gave."""
    provenance = Path(source) / PROVENANCE_FILE
    if provenance.is_file():
        recorded = json.loads(provenance.read_text())
        return {key: value for key, value in recorded.items() if key != "tensors"}
    commit = getattr(model.config, "_commit_hash", None)
    if Path(source).exists():
        return {}
    return {"source": source, "commit": commit}


def size_px(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH in px, such as 1024x768, got {text!r}")
    return int(match[1]), int(match[2])


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("export", __doc__)
    parser.add_argument("source", help="folder that pull or save_pretrained wrote, or a Hub id")
    parser.add_argument(
        "output", metavar="OUTPUT", type=Path, help="file to write, or folder for transformers.js; must not exist"
    )
    parser.add_argument("--format", choices=[ONNX, TRANSFORMERS_JS], default=ONNX, help="default: onnx")
    parser.add_argument("--size", type=size_px, metavar="HxW", help="image size in px; default: the training size")
    add_option(parser, "--revision")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
