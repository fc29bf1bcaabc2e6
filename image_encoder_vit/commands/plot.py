"""
Draws what the encoder makes of a page: every stage in PCA colours, what is similar to one cell, and where the attention
of that cell goes, over the page.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..corpora.pages import PageReader, ReadOptions, find_pages
from ..corpora.pictures import (
    attention_of_cell,
    cell_at,
    heat_over_page,
    mark_cell,
    pca_over_page,
    sheet,
    valid_cells,
)
from ..corpora.pictures import similarity_to_cell as similarity
from ..image_geometry import Region
from ..storage.atomic_file import atomic_file
from .frame import run_command
from .loading import RANDOM_WEIGHTS_NOTICE, choose_device, load_model, load_processor
from .options import DTYPES, add_option, check_output, command_parser

STAGE_COLUMNS, STAGE_WIDTH_PX = 6, 300
PANEL_WIDTH_PX = 520
HEAD_COLUMNS, HEAD_WIDTH_PX = 7, 260
BRIGHTEST_SHARE = 0.995  # Attention has few high values: the scale ends where all but these few lie.


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(draw, parse_arguments(argv), after_interrupt="the pictures that are there are whole")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("plot", __doc__)
    parser.add_argument("input", metavar="INPUT", help="an image file, PDF, or anything that extract takes")
    parser.add_argument("--page", type=int, default=0, help="which page of the input, from 0 (default: 0)")
    parser.add_argument("--dpi", type=float, default=144.0, help="of a rendered PDF page (default: 144)")
    for name in ("--checkpoint", "--revision", "--device", "--dtype", "--preset"):
        add_option(parser, name)
    add_option(parser, "--output", metavar="DIR", help="where the pictures go")
    add_option(parser, "--overwrite", help="replace pictures that are there")
    parser.add_argument(
        "--at", type=float, nargs=2, metavar=("X", "Y"), help="point of the page in px; default: its middle"
    )
    parser.add_argument("--block", type=int, help="block of the attention, from 0; default: the last with global one")
    return parser.parse_args(argv)


def draw(arguments: argparse.Namespace) -> int:
    """
    Writes stages.png, similarity.png and attention.png.

    Raises:
        OSError, ValueError, ImportError: With a message for the user.
    """
    stages_file, similarity_file, attention_file = (
        arguments.output / f"{name}.png" for name in ("stages", "similarity", "attention")
    )
    for path in (stages_file, similarity_file, attention_file):
        check_output(path, arguments.overwrite)
    page = read_page(arguments)
    dtype = DTYPES[arguments.dtype] if arguments.dtype else None
    model = load_model(arguments.checkpoint, dtype, arguments.revision).to(choose_device(arguments.device))
    processor = load_processor(arguments.checkpoint, arguments.revision, preset=arguments.preset)
    if arguments.checkpoint is None:
        print(RANDOM_WEIGHTS_NOTICE)
    block = chosen_block(arguments.block, model)
    inputs = processor(page, return_tensors="pt").to(model.device)
    region: Region = tuple(inputs["valid_regions"][0].tolist())
    point = (arguments.at[1], arguments.at[0]) if arguments.at else (page.height / 2, page.width / 2)
    patch_px, stride = model.config.patch_size, model.encoder.stride
    size = (page.height, page.width)
    patch, cell = (cell_at(point, size, region, side) for side in (patch_px, stride))

    stages, block_input = run_stages(model, inputs["pixel_values"], block)
    canvas_px = inputs["pixel_values"].shape[-1]
    small_page = page.resize((region[3], region[2]), Image.Resampling.LANCZOS)
    panels = [("page", small_page)]
    for name, features in stages.items():
        shown = f"{name}: {features.shape[1]} x {features.shape[2]} cells, {features.shape[0]} channels"
        panels.append((shown, pca_over_page(features, region, canvas_px // features.shape[2])))
    arguments.output.mkdir(parents=True, exist_ok=True)
    save(sheet(panels, STAGE_COLUMNS, STAGE_WIDTH_PX), stages_file)

    last = list(stages)[-1]
    maps = {"neck": (patch, patch_px), last: (cell, stride)} if last != "neck" else {"neck": (patch, patch_px)}
    panels = []
    for name, (query, side) in maps.items():
        values = similarity(stages[name], query, region, side)
        panel = heat_over_page(page, values, region, side, low=-0.2, high=1)
        mark_cell(panel, query, region, side)
        panels.append((f"{name}: similar to the framed cell", panel))
    save(sheet([("page", small_page), *panels], 3, PANEL_WIDTH_PX), similarity_file)

    weights = attention_of_cell(model.encoder.blocks[block], block_input, patch)
    rows, columns = valid_cells(region, patch_px)
    panels = []
    for name, values in [("mean of heads", weights.mean(dim=0)), *((f"head {n}", w) for n, w in enumerate(weights))]:
        seen = values[rows, columns]
        brightest = torch.quantile(seen[seen > 0], BRIGHTEST_SHARE).item() if bool((seen > 0).any()) else 1.0
        panel = heat_over_page(page, values.sqrt(), region, patch_px, low=0, high=brightest**0.5)
        mark_cell(panel, patch, region, patch_px)
        panels.append((f"block {block}, {name}", panel))
    save(sheet(panels, HEAD_COLUMNS, HEAD_WIDTH_PX), attention_file)
    return 0


def read_page(arguments: argparse.Namespace) -> Image.Image:
    """The page of the command as an RGB image."""
    options = ReadOptions(dpi=arguments.dpi)
    pages = list(find_pages([arguments.input], options))
    if not 0 <= arguments.page < len(pages):
        raise ValueError(f"--page {arguments.page}: {arguments.input!r} has {len(pages)} page(s), counted from 0.")
    try:
        return PageReader(options).read(pages[arguments.page]).image
    except Exception as error:  # A damaged file makes decoders raise nearly anything.
        raise ValueError(f"Cannot read {pages[arguments.page].id!r}: {error}") from error


def chosen_block(number: int | None, model: Any) -> int:
    """The block asked for; else the last one that attends to the whole page, or the last."""
    depth = len(model.encoder.blocks)
    if number is None:
        return max(model.config.global_attn_indexes, default=depth - 1)
    if not 0 <= number < depth:
        raise ValueError(f"--block {number}: the encoder has blocks 0 to {depth - 1}.")
    return number


@torch.inference_mode()
def run_stages(model: Any, pixel_values: torch.Tensor, block: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """
    One pass through the encoder: the feature map (C, h, w) after each stage by its name, and the input (1, H, W, C) of
    `block`.
    """
    encoder = model.encoder
    stages: dict[str, torch.Tensor] = {}
    inputs: list[torch.Tensor] = []

    def keep(name: str, channels_last: bool) -> Any:
        def hook(module: Any, arguments: Any, output: torch.Tensor) -> None:
            stages[name] = (output.permute(0, 3, 1, 2) if channels_last else output)[0].float()

        return hook

    handles = [encoder.patch_embed.register_forward_hook(keep("patches", True))]
    handles += [b.register_forward_hook(keep(f"block {n}", True)) for n, b in enumerate(encoder.blocks)]
    handles += [
        encoder.get_submodule(name).register_forward_hook(keep(name, False))
        for name in ("neck", *encoder.downsample_names)
    ]
    handles.append(encoder.blocks[block].register_forward_pre_hook(lambda module, given: inputs.append(given[0])))
    try:
        encoder(pixel_values)
    finally:
        for handle in handles:
            handle.remove()
    return stages, inputs[0]


def save(picture: Image.Image, path: Path) -> None:
    with atomic_file(path) as partial:
        picture.save(partial, format="PNG")
    print(f"Drew {path}")


if __name__ == "__main__":
    raise SystemExit(main())
