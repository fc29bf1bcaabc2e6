"""
Where an image lands on the canvas that the encoder sees, and back. Pure functions on integers.

A size is (height, width) in px, a region is (top, left, height, width) in px.
"""

from typing import NamedTuple

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
