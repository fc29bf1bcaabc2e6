"""
A page, or several, with their features as one HTML file that needs nothing else: colours of every stage, and what is
similar to a region that the reader chooses.

The browser computes the cosines from features of 8 bits a value. `region_similarities` computes the same from the
features themselves.
"""

import base64
import html
import io
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..weights.layout_head import LayoutHead
from .pictures import HEAT_COLORS, EncodedPage, class_colors, common_basis, valid_cells

PAGE_JPEG_QUALITY = 80
MAX_PAGE_PX = 1000  # Of the longer side of a page as it is shown.
LAYOUT_OPACITY = 150  # Of 255.


def explorer_html(
    pages: Sequence[EncodedPage],
    *,
    title: str,
    checkpoint: str,
    warning: str,
    searchable: Sequence[str],
    head: LayoutHead | None,
) -> str:
    """
    The file's content. `searchable` are the stages in which regions can be compared, the first one first; `warning` is
    written large.
    """
    stages = list(pages[0].stages)
    ordered = [*searchable, *(name for name in stages if name not in searchable)]
    layers = [pca_layer(pages, stage) for stage in ordered]
    if head is not None:
        layers.insert(0, layout_layer(pages, head))
    data = {
        "pages": [shown_page(page) for page in pages],
        "layers": layers,
        "grids": [feature_grid(pages, stage) for stage in searchable],
        "heat": HEAT_COLORS,
    }
    # "</script>" within a name must not end the script.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    values = {
        "title": html.escape(title),
        "warning": html.escape(warning),
        "checkpoint": html.escape(checkpoint),
        "data": text,
    }
    content = files(__package__).joinpath("explorer.html").read_text(encoding="utf-8")
    for name, value in values.items():
        content = content.replace("{{" + name + "}}", value)
    return content


def shown_page(page: EncodedPage) -> dict[str, Any]:
    picture = page.image.copy()
    picture.thumbnail((MAX_PAGE_PX, MAX_PAGE_PX), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=PAGE_JPEG_QUALITY)
    return {
        "name": page.name,
        "image": data_uri("image/jpeg", file.getvalue()),
        "width": picture.width,
        "height": picture.height,
    }


def data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def place_of(page: EncodedPage, stage: str) -> dict[str, float]:
    """Where the valid cells of a stage lie on the page, in shares of its sides; they may stick out."""
    stride = page.stride(stage)
    top, left, height, width = page.valid_region
    rows, columns = valid_cells(page.valid_region, stride)
    return {
        "rows": rows.stop - rows.start,
        "columns": columns.stop - columns.start,
        "top": (rows.start * stride - top) / height,
        "left": (columns.start * stride - left) / width,
        "height": (rows.stop - rows.start) * stride / height,
        "width": (columns.stop - columns.start) * stride / width,
    }


def pca_layer(pages: Sequence[EncodedPage], stage: str) -> dict[str, Any]:
    """The PCA colours of a stage; one basis for all pages, so that a colour means the same on each."""
    basis = common_basis(pages, stage)
    maps = []
    for page in pages:
        colors = basis.colors(page.valid(stage)).permute(1, 2, 0).numpy()
        maps.append(place_of(page, stage) | {"image": png(Image.fromarray(colors))})
    _, height, width = pages[0].stages[stage].shape
    return {
        "name": f"{stage} ({height} x {width} cells)",
        "explanation": "Alike features have alike colours: the three main components as red, green and blue.",
        "maps": maps,
    }


def layout_layer(pages: Sequence[EncodedPage], head: LayoutHead) -> dict[str, Any]:
    """The layout class of each cell in its colour, see-through."""
    colors = class_colors(head.classes)
    palette = np.array([(*color, LAYOUT_OPACITY) if color else (0, 0, 0, 0) for color in colors], np.uint8)
    maps = [
        place_of(page, head.stage)
        | {"image": png(Image.fromarray(palette[head.classify(page.valid(head.stage)).numpy()]))}
        for page in pages
    ]
    named = [[name, color] for name, color in zip(head.classes, colors, strict=True) if color]
    return {"name": "layout classes", "explanation": "", "classes": named, "maps": maps}


def png(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return data_uri("image/png", file.getvalue())


def common_mean(pages: Sequence[EncodedPage], stage: str) -> Tensor:
    """The mean (C,) over the valid cells of all pages: what all cells have in common would make all alike."""
    return torch.cat([page.valid(stage).flatten(1) for page in pages], dim=1).mean(dim=1)


def feature_grid(pages: Sequence[EncodedPage], stage: str) -> dict[str, Any]:
    """The features of a stage without their mean, rounded to 8 bits with one scale for each channel."""
    mean = common_mean(pages, stage)
    centred = [page.valid(stage) - mean[:, None, None] for page in pages]
    largest = torch.stack([features.abs().amax(dim=(1, 2)) for features in centred]).amax(dim=0)
    scales = (largest / 127).clamp(min=torch.finfo(torch.float32).tiny)
    maps = []
    for page, features in zip(pages, centred, strict=True):
        codes = (features / scales[:, None, None]).round().to(torch.int8).permute(1, 2, 0).contiguous()
        place = place_of(page, stage)
        maps.append(place | {"codes": base64.b64encode(codes.numpy().tobytes()).decode("ascii")})
    return {
        "name": stage,
        "stride": pages[0].stride(stage),
        "scales": [float(f"{scale:.6g}") for scale in scales.tolist()],
        "maps": maps,
    }


def region_similarities(
    pages: Sequence[EncodedPage], stage: str, page: int, cells: tuple[slice, slice]
) -> list[Tensor]:
    """
    Of each page, the cosines (h, w) of its valid cells to the mean of some valid cells, `cells`, of one `page`, the
    common mean of all pages taken off: what the browser shows, from the features themselves.
    """
    mean = common_mean(pages, stage)[:, None, None]
    query = (pages[page].valid(stage) - mean)[:, cells[0], cells[1]].mean(dim=(1, 2))
    return [F.cosine_similarity(other.valid(stage) - mean, query[:, None, None], dim=0) for other in pages]
