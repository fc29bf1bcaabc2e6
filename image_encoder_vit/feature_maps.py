"""
Feature maps put back onto their images: tiles stitched, padding cropped away, cells traced to pixels and back.

Letters in shapes: B images, N tiles of all of them, C channels, h and w cells.
"""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .image_geometry import ImagePlace, Size, cell_edges, place_of, tile_cell_edges


@dataclass(frozen=True)
class FeatureMap:
    """
    A feature map (C, h, w) whose cells all show a part of the image.

    `row_edges` (h + 1) and `column_edges` (w + 1) are the borders of its cells in px of the original image, ascending.
    """

    features: Tensor
    row_edges: tuple[float, ...]
    column_edges: tuple[float, ...]

    def cell_to_pixels(self, row: int, column: int) -> tuple[float, float, float, float]:
        """
        The box (top, left, bottom, right) of a cell, in px of the original image.

        Raises:
            ValueError: If the map has no such cell.
        """
        rows, columns = len(self.row_edges) - 1, len(self.column_edges) - 1
        if not (0 <= row < rows and 0 <= column < columns):
            raise ValueError(f"The feature map has {rows} x {columns} cells, there is none at ({row}, {column}).")
        return self.row_edges[row], self.column_edges[column], self.row_edges[row + 1], self.column_edges[column + 1]

    def pixel_to_cell(self, y: float, x: float) -> tuple[int, int]:
        """
        The cell (row, column) that shows the point `y` px below the original image's top and `x` px right of its left.

        Raises:
            ValueError: If the point lies outside of the image.
        """
        height, width = self.row_edges[-1], self.column_edges[-1]
        if not (0 <= y < height and 0 <= x < width):
            raise ValueError(f"The point ({y}, {x}) px is not in the image of {height:g} x {width:g} px.")
        return bisect_right(self.row_edges, y) - 1, bisect_right(self.column_edges, x) - 1


class ImageFeatureMaps(NamedTuple):
    """The feature maps of one image: of the whole view, and of its tiles stitched to one, None where it has none."""

    global_map: FeatureMap
    local_map: FeatureMap | None


def stitch_tiles(features: Tensor, tile_grids: Tensor) -> tuple[Tensor | None, ...]:
    """
    The feature maps of all tiles, (N, C, h, w), put together to one for each image: (C, rows * h, columns * w), or
    None for an image without tiles.

    `tile_grids` (B, 2) holds each image's rows and columns of tiles, 0 and 0 for none; the tiles lie image by image and
    row by row, as the image processor gives them.

    Raises:
        ValueError: If the grids do not hold as many tiles as there are.
    """
    grids = checked_tile_grids(tile_grids, features.shape[0])
    stitched: list[Tensor | None] = []
    start = 0
    for rows, columns in grids:
        count = rows * columns
        tiles = features[start : start + count]
        start += count
        if not count:
            stitched.append(None)
            continue
        channels, height, width = tiles.shape[1:]
        by_place = tiles.reshape(rows, columns, channels, height, width).permute(2, 0, 3, 1, 4)
        stitched.append(by_place.reshape(channels, rows * height, columns * width))
    return tuple(stitched)


def checked_tile_grids(tile_grids: Tensor, num_tiles: int) -> list[Size]:
    """
    The grids (rows, columns) of a batch as numbers.

    Raises:
        ValueError: If `tile_grids` has another shape than (images, 2), or its grids do not hold `num_tiles` tiles.
    """
    if tile_grids.ndim != 2 or tile_grids.shape[1] != 2:
        raise ValueError(f"tile_grids must be (images, 2), rows and columns of each, got {tuple(tile_grids.shape)}.")
    grids = [(int(rows), int(columns)) for rows, columns in tile_grids.tolist()]
    count = sum(prod(grid) for grid in grids)
    if count != num_tiles or any(min(grid) < 0 for grid in grids):
        raise ValueError(f"tile_grids {grids} hold {count} tiles, but there are {num_tiles} in pixel_values_local.")
    return grids


def image_feature_maps(
    features: Tensor,
    local_features: Tensor | None,
    *,
    stride: int,
    place: ImagePlace,
    tile_grid: Size,
    tile_size: int,
) -> ImageFeatureMaps:
    """
    The maps of one image from what the encoder gave for it: `features` (C, h, w) of the whole view, of which the
    cells that hold padding only are left out, and `local_features`, stitched, of its tiles.

    `stride` is the side of a cell in px that the encoder sees, `place` and `tile_grid` are the image processor's.
    """
    top, left, height, width = place.valid_region
    rows, columns = place.cells(stride)
    row_edges = cell_edges(stride, top, height, place.original_size[0])[1]
    column_edges = cell_edges(stride, left, width, place.original_size[1])[1]
    local_map = None
    if local_features is not None:
        local_map = FeatureMap(
            local_features,
            tile_cell_edges(stride, tile_size, tile_grid[0], place.original_size[0]),
            tile_cell_edges(stride, tile_size, tile_grid[1], place.original_size[1]),
        )
    return ImageFeatureMaps(FeatureMap(features[:, rows, columns], row_edges, column_edges), local_map)


def batch_feature_maps(outputs: Any, inputs: Any, stride: int) -> list[ImageFeatureMaps]:
    """
    The maps of every image of a batch; see the image processor's `post_process_feature_maps`.

    Raises:
        ValueError: If outputs and inputs are not of the same images, or of another stride.
    """
    features, pixels = outputs.last_hidden_state, inputs["pixel_values"]
    canvas, cells = tuple(pixels.shape[2:]), tuple(features.shape[2:])
    expected = tuple(-(-side // stride) for side in canvas)
    if len(features) != len(pixels) or cells != expected:
        raise ValueError(
            f"{len(features)} feature maps of {cells[0]} x {cells[1]} cells are not those of {len(pixels)} images of "
            f"{canvas[0]} x {canvas[1]} px at a stride of {stride} px: give the inputs that the outputs came from, and "
            "stride=model.encoder.stride."
        )
    local_maps = getattr(outputs, "local_feature_maps", None)
    if local_maps is None:
        local_maps = [None] * len(features)
    has_tiles = "tile_grids" in inputs and len(inputs["pixel_values_local"]) > 0
    tile_size = int(inputs["pixel_values_local"].shape[-1]) if has_tiles else 0
    grids = inputs["tile_grids"].tolist() if has_tiles else [(0, 0)] * len(features)
    if has_tiles and all(local is None for local in local_maps):
        raise ValueError("The inputs hold tiles, but the outputs have no local_feature_maps: call model(**inputs).")
    return [
        image_feature_maps(
            image_features,
            local_features,
            stride=stride,
            place=place_of(inputs, index),
            tile_grid=tuple(grid),
            tile_size=tile_size,
        )
        for index, (image_features, local_features, grid) in enumerate(zip(features, local_maps, grids, strict=True))
    ]


def cell_vectors(maps: Iterable[ImageFeatureMaps]) -> list[Tensor]:
    """
    The cells of each image as unit vectors (n, C): those of its tiles, then those of the whole view, row by row, none
    of padding. The form that late interaction takes: the score of a page is the mean, over the vectors of a query, of
    the largest product with a vector of the page.
    """
    return [
        normalize(torch.cat([cells.features.flatten(1).T for cells in (local, whole) if cells is not None]), dim=1)
        for whole, local in maps
    ]
