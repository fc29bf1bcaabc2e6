"""Encodes images and saves their features: the main job of the package, as a command."""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors.torch import save_file

from ..corpora.pictures import page_beside_features
from ..image_geometry import Region, Size
from ..image_processing_image_encoder_vit import open_image, to_rgb
from ..modeling_deep_encoder import DeepEncoderModel
from ..storage.atomic_file import atomic_file
from ..support import message_of
from .frame import ERROR_LINES, progress_bar, run_command
from .loading import NO_TOKENS, RANDOM_SEED, RANDOM_WEIGHTS_NOTICE, choose_device, load_model, load_processor
from .options import DTYPES, add_option, check_output, command_parser

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp"}
MAX_PLOT_ROWS = 16


class Encoded(NamedTuple):
    """
    One image's features (C, h, w) on the host, and what the processor said about its place on the canvas. `local` is
    the stitched map of its tiles, None if it has none; `tokens` (n, C) what a decoder reads of it, None if the model
    has none.
    """

    name: str
    page: Image.Image
    features: torch.Tensor
    original_size: Size
    valid_region: Region
    local: torch.Tensor | None
    tokens: torch.Tensor | None


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(encode, parse_arguments(argv), after_interrupt="nothing was written")


def encode(arguments: argparse.Namespace) -> int:
    for path in filter(None, (arguments.output, arguments.plot)):
        check_output(path, arguments.overwrite)
    paths = find_images(arguments.images)
    device = choose_device(arguments.device)
    dtype = DTYPES[arguments.dtype] if arguments.dtype else None
    model = load_model(arguments.checkpoint, dtype, arguments.revision).to(device)
    if arguments.tokens and not isinstance(model, DeepEncoderModel):
        raise ValueError(NO_TOKENS)
    processor = load_processor(arguments.checkpoint, arguments.revision, preset=arguments.preset)
    if arguments.checkpoint is None:
        print(RANDOM_WEIGHTS_NOTICE)
    print(f"{len(paths)} image(s), {model.dtype} on {device}".replace("torch.", ""))
    encoded: list[Encoded] = []
    failures = 0
    with progress_bar(len(paths), "image") as progress:
        for path in paths:
            try:
                result, report = encode_image(path, processor, model, do_pad=arguments.pad)
            except (OSError, ValueError) as error:
                failures += 1
                progress.write(f"{path}: skipped: {message_of(error, ERROR_LINES)}", file=sys.stderr)
            else:
                encoded.append(result)
                progress.write(report)
            progress.update()

    if encoded:
        write_features(encoded, arguments.output, arguments.checkpoint, with_tokens=arguments.tokens)
        print(f"Wrote the features of {len(encoded)} image(s) to {arguments.output}")
        if arguments.plot:
            draw(encoded[:MAX_PLOT_ROWS], model.encoder.stride).save(arguments.plot)
            print(f"Drew {min(len(encoded), MAX_PLOT_ROWS)} of {len(encoded)} image(s) to {arguments.plot}")
    if failures:
        print(f"error: {failures} of {len(paths)} image(s) could not be encoded, see above", file=sys.stderr)
    return 1 if failures else 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("encode", __doc__)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files, or folders of them")
    for name in ("--checkpoint", "--revision", "--device", "--dtype", "--preset"):
        add_option(parser, name)
    add_option(parser, "--output", metavar="FILE.safetensors", help="where features go")
    add_option(parser, "--overwrite")
    parser.add_argument("--no-pad", dest="pad", action="store_false", help="keep the aspect ratio without padding")
    add_option(parser, "--tokens")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="draw each page beside its features")
    return parser.parse_args(argv)


def find_images(arguments: Iterable[Path]) -> list[Path]:
    """
    The files named, and the image files below the folders named, sorted, each once.

    Raises:
        ValueError: If a folder holds no image.
    """
    paths: dict[Path, None] = {}
    for argument in arguments:
        if not argument.is_dir():
            paths[argument] = None
            continue
        found = sorted(path for path in argument.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise ValueError(f"No image in folder {str(argument)!r}: looked for {', '.join(sorted(IMAGE_SUFFIXES))}.")
        paths.update(dict.fromkeys(found))
    return list(paths)


@torch.inference_mode()
def encode_image(path: Path, processor: Any, model: Any, *, do_pad: bool) -> tuple[Encoded, str]:
    """Encodes one image file; returns its features and a line to print about it."""
    page = to_rgb(open_image(path))
    start = time.perf_counter()
    inputs = processor(page, return_tensors="pt", do_pad=do_pad)
    outputs = model(**inputs.to(model.device))
    features = outputs.last_hidden_state[0].cpu()
    local = outputs.local_feature_maps[0] if outputs.local_feature_maps else None
    elapsed_s = time.perf_counter() - start
    height_px, width_px = inputs["pixel_values"].shape[2:]
    patch_px = model.config.patch_size
    report = (
        f"{path}: {page.height} x {page.width} px -> {height_px} x {width_px} px, "
        f"grid {height_px // patch_px} x {width_px // patch_px}, "
        f"features {tuple(features.shape)}, {outputs.patch_embeds.shape[1]} tokens, {elapsed_s:.2f} s"
    )
    if local is not None:
        rows, columns = inputs["tile_grids"][0].tolist()
        report += f", {rows} x {columns} tiles, features {tuple(local.shape)}"
    height, width = inputs["original_sizes"][0].tolist()
    top, left, valid_height, valid_width = inputs["valid_regions"][0].tolist()
    region = (top, left, valid_height, valid_width)
    local = local.cpu() if local is not None else None
    tokens = getattr(outputs, "vision_tokens", None)
    if tokens is not None:
        report += f", {len(tokens[0])} vision tokens"
        tokens = tokens[0].cpu()
    return Encoded(str(path), page, features, (height, width), region, local, tokens), report


def write_features(encoded: list[Encoded], output: Path, checkpoint: str | None, with_tokens: bool = False) -> None:
    """
    Writes one tensor (C, h, w) an image, named by its path, one more with ":tiles" after the name where it has tiles,
    one (n, C) with ":tokens" where they are wanted, and where each image lies on its canvas as metadata.
    """
    images = {e.name: {"original_size": e.original_size, "valid_region": e.valid_region} for e in encoded}
    metadata = {"images": json.dumps(images), "checkpoint": checkpoint or f"random weights, seed {RANDOM_SEED}"}
    tensors = {e.name: e.features.contiguous() for e in encoded}
    tensors |= {f"{e.name}:tiles": e.local.contiguous() for e in encoded if e.local is not None}
    if with_tokens:
        tensors |= {f"{e.name}:tokens": e.tokens.contiguous() for e in encoded if e.tokens is not None}
    with atomic_file(output) as partial:
        save_file(tensors, partial, metadata=metadata)


def draw(encoded: list[Encoded], stride: int) -> Image.Image:
    """The pages beside their features, one below the other."""
    rows = [page_beside_features(e.page, e.features, e.valid_region, stride) for e in encoded]
    gap_px = 16
    height = sum(row.height for row in rows) + gap_px * (len(rows) - 1)
    picture = Image.new("RGB", (max(row.width for row in rows), height), (255, 255, 255))
    top = 0
    for row in rows:
        picture.paste(row, (0, top))
        top += row.height + gap_px
    return picture


if __name__ == "__main__":
    raise SystemExit(main())
