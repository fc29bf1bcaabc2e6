"""
Exports an encoder to an ONNX file for images of one size and any batch, checked in ONNX Runtime before it is put in its
place; weights above 2 GB go to a second file beside it. OpenVINO reads the same file. With --format transformers.js it
becomes a folder for the browser and Node. SOURCE is a folder or Hub id that AutoModel loads.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from .. import ImageEncoderViTModel
from ..runtimes.onnx_export import data_file, export_onnx
from ..runtimes.transformers_js import export_transformers_js
from ..weights.hub_repository import one_line
from .loading import load_processor

PROVENANCE_FILE = "provenance.json"
ONNX, TRANSFORMERS_JS = "onnx", "transformers.js"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        if Path(arguments.output).exists():
            raise FileExistsError(f"{arguments.output!r} exists already: remove it, or choose another name.")
        model = ImageEncoderViTModel.from_pretrained(
            arguments.source, revision=arguments.revision, dtype=torch.float32
        ).eval()
        size = arguments.size or (model.config.image_size, model.config.image_size)
        source = describe_source(arguments.source, model)
        if arguments.format == TRANSFORMERS_JS:
            processor = load_processor(arguments.source, revision=arguments.revision)
            variants = export_transformers_js(model, processor, arguments.output, size, source)
        else:
            error = export_onnx(model, arguments.output, size, source)
    except (OSError, ValueError, ImportError, ArithmeticError) as error_seen:
        print(f"error: {one_line(error_seen)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    if arguments.format == TRANSFORMERS_JS:
        print(f"Wrote {arguments.output} for pages on {size[0]} x {size[1]} px; README.md there shows its use")
        for dtype, size_bytes, errors in variants:
            print(f"{dtype:>5}: {size_bytes / 1e6:.1f} MB, largest relative error {max(errors.values()):.1e}")
        return 0
    files = [path for path in (Path(arguments.output), data_file(Path(arguments.output))) if path.exists()]
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="folder that pull_from_hub.py or save_pretrained wrote, or a Hub id")
    parser.add_argument("output", metavar="OUTPUT", help="file to write, or folder for transformers.js; must not exist")
    parser.add_argument("--format", choices=[ONNX, TRANSFORMERS_JS], default=ONNX, help="default: onnx")
    parser.add_argument("--size", type=size_px, metavar="HxW", help="image size in px; default: the training size")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of a Hub id")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
