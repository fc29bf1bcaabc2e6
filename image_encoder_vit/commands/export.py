"""
Exports an encoder to one ONNX file for images of one size and any batch, checked in ONNX Runtime before it is put in
its place. SOURCE is a folder or Hub id that AutoModel loads. OpenVINO reads the same file.
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
from ..runtimes.onnx_export import export_onnx
from ..weights.hub_repository import one_line

PROVENANCE_FILE = "provenance.json"


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
        error = export_onnx(model, arguments.output, size, describe_source(arguments.source, model))
    except (OSError, ValueError, ImportError, ArithmeticError) as error_seen:
        print(f"error: {one_line(error_seen)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    megabytes = Path(arguments.output).stat().st_size / 1e6
    print(f"Wrote {arguments.output}: {megabytes:.0f} MB, {size[0]} x {size[1]} px, any batch")
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
    parser.add_argument("output", metavar="OUTPUT.onnx", help="file to write; it must not exist")
    parser.add_argument("--size", type=size_px, metavar="HxW", help="image size in px; default: the training size")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of a Hub id")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
