"""
Where an image lands on the canvas that the encoder sees, and back. Pure functions on integers.

A size is (height, width) in px, a region is (top, left, height, width) in px.
"""

from typing import Any, NamedTuple

Size = tuple[int, int]
Region = tuple[int, int, int, int]


class Placement(NamedTuple):
    """How an image is laid onto its canvas: resized to `resized`, put at `offset` (top, left) of `canvas`."""

    resized: Size
    canvas: Size
    offset: tuple[int, int]

    @property
    def valid_region(self) -> Region:
        """The part of the canvas that shows the image."""
        return (*self.offset, *self.resized)


class ImagePlace(NamedTuple):
    """Where an image lies on its canvas: `original_size` and `valid_region` as the image processor gives them."""

    original_size: Size
    valid_region: Region

    def cells(self, stride: int) -> tuple[slice, slice]:
        """The rows and columns of cells, `stride` px of the canvas each, that show a part of the image."""
        top, left, height, width = self.valid_region
        return slice(top // stride, -(-(top + height) // stride)), slice(left // stride, -(-(left + width) // stride))

    def cell_at(self, y: float, x: float, stride: int) -> tuple[int, int]:
        """
        The cell (row, column) that shows the point `y` px below the original image's top and `x` px right of its left.

        Raises:
            ValueError: If the point lies outside of the image.
        """
        height, width = self.original_size
        if not (0 <= y < height and 0 <= x < width):
            raise ValueError(
                f"The point x = {x:g}, y = {y:g} lies outside of the image of {width} x {height} px (width x height)."
            )
        top, left, valid_height, valid_width = self.valid_region
        return int((top + y * valid_height / height) // stride), int((left + x * valid_width / width) // stride)


def place_of(inputs: Any, index: int) -> ImagePlace:
    """The place of the image at `index` of a batch that an image processor has made, with its sizes as tensors."""
    height, width = inputs["original_sizes"][index].tolist()
    top, left, valid_height, valid_width = inputs["valid_regions"][index].tolist()
    return ImagePlace((height, width), (top, left, valid_height, valid_width))


def contain_size(image: Size, box: Size) -> Size:
    """
    The largest size of the image's aspect ratio inside `box`, rounded as `PIL.ImageOps.contain` rounds.

    A side that PIL would round to 0 (1 x 5000 px into 1024 x 1024) stays at 1 px, so that no image is lost.
    """
    (height, width), (box_height, box_width) = image, box
    # The order of the operations is PIL's: another order rounds some sizes to another px.
    if width / height > box_width / box_height:
        return max(1, round(height / width * box_width)), box_width
    if width / height < box_width / box_height:
        return box_height, max(1, round(width / height * box_height))
    return box


def longest_side_size(image: Size, box: Size) -> Size:
    """
    The largest size of the image's aspect ratio inside `box`, rounded as segment-anything's ResizeLongestSide rounds
    (commit 6fdee8f): halves up, where PIL rounds them to even. No side is less than 1 px.
    """
    scale = min(outer * 1.0 / inner for inner, outer in zip(image, box, strict=True))
    height, width = (max(1, int(inner * scale + 0.5)) for inner in image)
    return height, width


def choose_tile_grid(image: Size, tile_size: int, min_tiles: int, max_tiles: int) -> Size:
    """
    Rows and columns of square tiles of `tile_size` px that an image is cut into; (0, 0) for an image that fits into
    one tile, or whose nearest grid is a single one.

    Of the grids with `min_tiles` to `max_tiles` tiles it is that nearest in aspect ratio, by the difference of the
    ratios width / height; of several as near, the larger if the image has more than half of that grid's px: as
    DeepSeek-OCR's `dynamic_preprocess`, which has it from InternVL.
    """
    height, width = image
    if max(image) <= tile_size:
        return 0, 0
    grids = [
        (rows, columns)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if rows * columns >= min_tiles
    ]
    best, least = (1, 1), float("inf")
    for rows, columns in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        difference = abs(width / height - columns / rows)
        fills_half = height * width > 0.5 * tile_size * tile_size * rows * columns
        if difference < least or (difference == least and fills_half):
            best, least = (rows, columns), difference
    return best if best != (1, 1) else (0, 0)


def cell_edges(stride: int, offset: int, valid: int, original: int) -> tuple[int, tuple[float, ...]]:
    """
    Along one axis, the first cell of a feature map that shows a part of the image, and the borders in px of the
    original image of it and the others that do.

    The image takes `valid` px from `offset` on the canvas, and has `original` px itself; cells have `stride` px.
    """
    first, end = offset // stride, -(-(offset + valid) // stride)
    on_canvas = [min(max(cell * stride, offset), offset + valid) for cell in range(first, end + 1)]
    return first, tuple((edge - offset) * original / valid for edge in on_canvas)


def tile_cell_edges(stride: int, tile_size: int, tiles: int, original: int) -> tuple[float, ...]:
    """
    Along one axis, the borders in px of the original image of the cells of a stitched map of `tiles` tiles. The last
    cell of each tile ends with it, where the stride does not divide it.
    """
    starts = [tile * tile_size + start for tile in range(tiles) for start in range(0, tile_size, stride)]
    return tuple(edge * original / (tiles * tile_size) for edge in [*starts, tiles * tile_size])


def place_on_canvas(image: Size, canvas: Size, centered: bool = True) -> Placement:
    """
    The image, already as large as it will be, on a canvas that it fits into: in its centre, an odd px going where
    `PIL.ImageOps.pad` puts it, or in its top left corner.
    """
    top, left = 0, 0
    if centered:
        top, left = (round((outer - inner) * 0.5) for outer, inner in zip(canvas, image, strict=True))
    return Placement(resized=image, canvas=canvas, offset=(top, left))


def place_unpadded(image: Size, box: Size, patch_size: int, upscale: bool) -> Placement:
    """
    The image at its own aspect ratio inside `box`, each side rounded to a multiple of `patch_size` px.

    Unless `upscale`, no side grows beyond the image's own, except that a side shorter than one patch becomes one.
    """
    scale = min(outer / inner for inner, outer in zip(image, box, strict=True))
    if not upscale:
        scale = min(1.0, scale)
    sides = []
    for inner, outer in zip(image, box, strict=True):
        limit = outer if upscale else min(outer, inner)
        patches = min(round(inner * scale / patch_size), limit // patch_size)
        sides.append(max(1, patches) * patch_size)
    size = (sides[0], sides[1])
    return place_on_canvas(size, size)


def cell_to_pixels(
    row: int, column: int, *, stride: int, original_size: Size, valid_region: Region
) -> tuple[float, float, float, float] | None:
    """
    The box (top, left, bottom, right), in px of the original image, that one cell of a feature map stands for.

    `stride` is the side of a cell in px of the canvas: 64 for the last feature map of DeepSeek-OCR's encoder, 16 for
    the blocks and the neck. `original_size` and `valid_region` are the image processor's outputs for that image.
    Returns None for a cell that holds padding only.
    """
    edges = []
    for index, offset, valid, original in zip(
        (row, column), valid_region[:2], valid_region[2:], original_size, strict=True
    ):
        start = max(index * stride, offset) - offset
        end = min((index + 1) * stride, offset + valid) - offset
        if start >= end:
            return None
        edges.append((start * original / valid, end * original / valid))
    (top, bottom), (left, right) = edges
    return top, left, bottom, right
