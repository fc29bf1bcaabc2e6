"""
Draws what the encoder makes of pages.

For one page: every stage in PCA colours, what is similar to one cell, and where the attention of that cell goes, over
the page. For several: one sheet with a row for each. With an output that ends in .html: one file to open in a browser,
which shows what is similar to any region that one clicks.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..corpora.explorer import explorer_html
from ..corpora.pages import PageReader, ReadOptions, find_pages
from ..corpora.pictures import (
    LAYOUT_EXPLANATION,
    PCA_EXPLANATION,
    EncodedPage,
    Heading,
    Legend,
    attention_of_cell,
    cell_at,
    heat_over_page,
    layout_panel,
    mark_cell,
    overview,
    pca_panel,
    sheet,
    shrunk,
    valid_cells,
)
from ..corpora.pictures import similarity_to_cell as similarity
from ..image_geometry import Region
from ..storage.atomic_file import atomic_file
from ..weights.layout_head import LayoutHead
from .frame import run_command
from .loading import (
    choose_device,
    encoder_config,
    load_head,
    load_model,
    load_processor,
    print_notice,
    shown_name,
    warning_of,
)
from .options import DTYPES, add_option, check_output, command_parser

MAX_PAGES = 16
STAGE_COLUMNS, STAGE_WIDTH_PX = 5, 330
OVERVIEW_WIDTH_PX = 420
PANEL_WIDTH_PX = 520
HEAD_COLUMNS, HEAD_WIDTH_PX = 5, 400
LOWEST_SIMILARITY = -0.2
BRIGHTEST_SHARE = 0.995  # Attention has few high values: the scale ends where all but these few lie.


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(draw, parse_arguments(argv), after_interrupt="the pictures that are there are whole")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("plot", __doc__)
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="an image file, PDF, or anything that extract takes; or several"
    )
    parser.add_argument(
        "--page",
        type=int,
        action="append",
        help=f"page of the input, from 0; may be repeated (default: first {MAX_PAGES})",
    )
    parser.add_argument("--dpi", type=float, default=144.0, help="of a rendered PDF page (default: 144)")
    for name in ("--checkpoint", "--revision", "--device", "--dtype", "--preset"):
        add_option(parser, name)
    add_option(parser, "--output", metavar="DIR|FILE.html", help="folder for the pictures, or one file for a browser")
    add_option(parser, "--overwrite", help="replace pictures that are there")
    parser.add_argument(
        "--at", type=float, nargs=2, metavar=("X", "Y"), help="point of the page in px; default: its middle"
    )
    parser.add_argument("--block", type=int, help="block of the attention, from 0; default: the last with global one")
    return parser.parse_args(argv)


def draw(arguments: argparse.Namespace) -> int:
    """
    Writes the HTML file; or pages.png; or stages.png, similarity.png and attention.png.

    Raises:
        OSError, ValueError, ImportError: With a message for the user.
    """
    as_html = arguments.output.suffix.lower() in (".html", ".htm")
    pages = read_pages(arguments)
    names = [arguments.output] if as_html else [arguments.output / name for name in picture_names(len(pages))]
    for path in names:
        check_output(path, arguments.overwrite)
    dtype = DTYPES[arguments.dtype] if arguments.dtype else None
    model = load_model(arguments.checkpoint, dtype, arguments.revision).to(choose_device(arguments.device))
    processor = load_processor(arguments.checkpoint, arguments.revision, preset=arguments.preset)
    head = load_head(arguments.checkpoint)
    print_notice(arguments.checkpoint)
    block = chosen_block(arguments.block, model)
    encoded = [encode_page(name, page, processor, model) for name, page in pages]
    finest_first = list(dict.fromkeys(("neck", encoder_config(model).stage_names[-1])))
    title = encoded[0].name if len(encoded) == 1 else f"{len(encoded)} pages"
    heading = Heading(
        f"{title}: features of {shown_name(arguments.checkpoint)}", warning=warning_of(arguments.checkpoint)
    )
    if as_html:
        content = explorer_html(
            encoded,
            title=title,
            checkpoint=shown_name(arguments.checkpoint),
            warning=heading.warning,
            searchable=finest_first,
            head=head,
        )
        with atomic_file(arguments.output) as partial:
            partial.write_text(content, encoding="utf-8")
        print(f"Wrote {arguments.output}: open it in a browser")
    elif len(encoded) > 1:
        save(overview(encoded, finest_first, head, heading, OVERVIEW_WIDTH_PX), names[0])
    else:
        page = encoded[0]
        point = (arguments.at[1], arguments.at[0]) if arguments.at else (page.image.height / 2, page.image.width / 2)
        pictures = (
            stages_sheet(page, finest_first, head, heading),
            similarity_sheet(page, finest_first, point, heading),
            attention_sheet(page, model, block, point, heading),
        )
        for picture, path in zip(pictures, names, strict=True):
            save(picture, path)
    return 0


def picture_names(num_pages: int) -> list[str]:
    return ["stages.png", "similarity.png", "attention.png"] if num_pages == 1 else ["pages.png"]


def read_pages(arguments: argparse.Namespace) -> list[tuple[str, Image.Image]]:
    """The pages of the command by name, as RGB images."""
    options = ReadOptions(dpi=arguments.dpi)
    found = list(find_pages(arguments.inputs, options))
    shown = ", ".join(map(repr, arguments.inputs))
    for number in arguments.page or []:
        if not 0 <= number < len(found):
            raise ValueError(f"--page {number}: {shown} has {len(found)} page(s), counted from 0.")
    chosen = [found[number] for number in arguments.page] if arguments.page else found[:MAX_PAGES]
    if len(found) > len(chosen) and not arguments.page:
        print(f"Showing the first {MAX_PAGES} of {len(found)} pages; --page chooses others.")
    reader = PageReader(options)
    return [(shown_page(page.id), read_page(reader, page)) for page in chosen]


def shown_page(page_id: str) -> str:
    """The name of a page in a picture: of its file, and its number from the second on."""
    return Path(page_id).name.removesuffix("#0")


def read_page(reader: PageReader, page: Any) -> Image.Image:
    try:
        return reader.read(page).image
    except Exception as error:  # A damaged file makes decoders raise nearly anything.
        raise ValueError(f"Cannot read {page.id!r}: {error}") from error


def chosen_block(number: int | None, model: Any) -> int:
    """The block asked for; else the last one that attends to the whole page, or the last."""
    depth = len(model.encoder.blocks)
    if number is None:
        return max(encoder_config(model).global_attn_indexes, default=depth - 1)
    if not 0 <= number < depth:
        raise ValueError(f"--block {number}: the encoder has blocks 0 to {depth - 1}.")
    return number


@torch.inference_mode()
def encode_page(name: str, page: Image.Image, processor: Any, model: Any) -> EncodedPage:
    """One pass through the encoder: the feature maps after all its stages."""
    inputs = processor(page, return_tensors="pt").to(model.device)
    pixels = inputs["pixel_values"]
    stages = encoder_config(model).stage_names
    maps = model.encoder(pixels, stages=stages)
    features = {stage: found[0].float().cpu() for stage, found in zip(stages, maps, strict=True)}
    region: Region = tuple(inputs["valid_regions"][0].tolist())
    return EncodedPage(name, page, features, region, tuple(pixels.shape[2:]))


def stages_sheet(
    page: EncodedPage, finest_first: Sequence[str], head: LayoutHead | None, heading: Heading
) -> Image.Image:
    """The page, its layout classes, and every stage: the finest useful map first, then the way to it."""
    panels = [("page", shrunk(page))]
    if head is not None:
        panels.append(layout_panel(page, head))
    order = dict.fromkeys([*finest_first, *page.stages])
    panels += [pca_panel(page, stage) for stage in order]
    explanation = f"{PCA_EXPLANATION} Each stage has its own colours."
    explanation += f" {LAYOUT_EXPLANATION}" if head else ""
    legend = Legend(head.classes) if head else None
    return sheet(panels, STAGE_COLUMNS, STAGE_WIDTH_PX, heading._replace(explanation=explanation), legend)


def similarity_sheet(
    page: EncodedPage, finest_first: Sequence[str], point: tuple[float, float], heading: Heading
) -> Image.Image:
    """How similar every cell is to the one at a point (y, x)."""
    panels = [("page", shrunk(page))]
    size = (page.image.height, page.image.width)
    for stage in finest_first:
        stride = page.stride(stage)
        cell = cell_at(point, size, page.valid_region, stride)
        values = similarity(page.stages[stage], cell, page.valid_region, stride)
        panel = heat_over_page(page.image, values, page.valid_region, stride, low=LOWEST_SIMILARITY, high=1)
        mark_cell(panel, cell, page.valid_region, stride)
        panels.append((f"{stage}, {stride} px a cell", panel))
    explanation = "Cosine similarity of every cell to the framed one, without what all cells of the page share; --at."
    bar = Legend(bar=(f"{LOWEST_SIMILARITY} (unlike)", "1 (alike)"))
    return sheet(panels, 3, PANEL_WIDTH_PX, heading._replace(explanation=explanation), bar)


def attention_sheet(
    page: EncodedPage, model: Any, block: int, point: tuple[float, float], heading: Heading
) -> Image.Image:
    """Where one block looks from the patch at a point (y, x): each head, and their mean."""
    stride = encoder_config(model).patch_size
    patch = cell_at(point, (page.image.height, page.image.width), page.valid_region, stride)
    before = page.stages[encoder_config(model).stage_names[block]]  # What the block before it put out.
    hidden = before.permute(1, 2, 0)[None].to(model.device, model.dtype)
    weights = attention_of_cell(model.encoder.blocks[block], hidden, patch).float().cpu()
    panels = [("page", shrunk(page))]
    for name, values in named_maps(weights):
        seen = values[valid_cells(page.valid_region, stride)]
        brightest = torch.quantile(seen[seen > 0], BRIGHTEST_SHARE).item() if bool((seen > 0).any()) else 1.0
        panel = heat_over_page(page.image, values.sqrt(), page.valid_region, stride, low=0, high=brightest**0.5)
        mark_cell(panel, patch, page.valid_region, stride)
        panels.append((name, panel))
    reach = "the whole page" if block in encoder_config(model).global_attn_indexes else "its window alone"
    explanation = (
        f"Attention of block {block}, over {reach}: how much of each place goes into the framed patch; --at, --block. "
        "Square-root scale, each picture up to its own highest values."
    )
    bar = Legend(bar=("none", "most"))
    return sheet(panels, HEAD_COLUMNS, HEAD_WIDTH_PX, heading._replace(explanation=explanation), bar)


def named_maps(weights: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    yield "mean of the heads", weights.mean(dim=0)
    for number, values in enumerate(weights):
        yield f"head {number}", values


def save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        picture.save(partial, format="PNG")
    print(f"Drew {path}")


if __name__ == "__main__":
    raise SystemExit(main())
