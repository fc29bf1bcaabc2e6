"""Where images land on their canvas: against PIL, and by their invariants."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from image_encoder_vit.image_geometry import (
    Placement,
    cell_to_pixels,
    contain_size,
    place_on_canvas,
    place_unpadded,
)

sides_px = st.integers(1, 6000)
sizes = st.tuples(sides_px, sides_px)
canvases = st.tuples(st.integers(1, 1400), st.integers(1, 1400))


@given(image=sizes, canvas=canvases)
@example(image=(341, 300), canvas=(1024, 1024))  # transformers' own processors land one px off here
@example(image=(1, 5000), canvas=(1024, 1024))
def test_contain_size_rounds_as_pil_does(image: tuple[int, int], canvas: tuple[int, int]) -> None:
    ours = contain_size(image, canvas)
    assert min(ours) >= 1
    if min(round(image[0] / image[1] * canvas[1]), round(image[1] / image[0] * canvas[0])) > 0:
        contained = ImageOps.contain(Image.new("1", image[::-1]), canvas[::-1], Image.Resampling.NEAREST)
        assert ours == contained.size[::-1]
    else:
        assert min(ours) == 1  # PIL rounds this side to 0 px, or refuses to


@given(inner=st.integers(1, 1024), canvas=st.integers(1, 1024))
def test_place_on_canvas_rounds_the_offset_as_pil_does(inner: int, canvas: int) -> None:
    inner = min(inner, canvas)
    # An image of full width, so that PIL resizes nothing and pads the height only.
    padded = ImageOps.pad(Image.new("L", (1, inner), 255), (1, canvas), Image.Resampling.NEAREST)
    placement = place_on_canvas((inner, 1), (canvas, 1))
    assert padded.getbbox() == (0, placement.offset[0], 1, placement.offset[0] + inner)
    assert placement.valid_region == (*placement.offset, inner, 1)
    assert place_on_canvas((inner, 1), (canvas, 1), centered=False).offset == (0, 0)


@given(image=sizes, box=st.tuples(st.integers(16, 1400), st.integers(16, 1400)), patch=st.sampled_from([14, 16]))
def test_unpadded_sides_are_whole_patches_within_the_box_and_never_enlarged(
    image: tuple[int, int], box: tuple[int, int], patch: int
) -> None:
    placement = place_unpadded(image, box, patch, upscale=False)
    scale = min(1.0, box[0] / image[0], box[1] / image[1])
    for inner, outer, side in zip(image, box, placement.resized, strict=True):
        assert side % patch == 0
        assert side <= max(patch, min(inner, outer))
        # As near to the exact side as whole patches allow; the caps above may cost up to one patch more.
        assert abs(side - inner * scale) <= patch
    assert placement.canvas == placement.resized


@given(image=sizes)
def test_unpadded_with_upscale_fills_the_box(image: tuple[int, int]) -> None:
    placement = place_unpadded(image, (1024, 1024), 16, upscale=True)
    assert max(placement.resized) == 1024
    assert min(placement.resized) >= 16


@pytest.mark.parametrize(
    ("image", "resized"),
    [
        ((672, 896), (672, 896)),  # grid 42 x 56, features 11 x 14
        ((3508, 2480), (1024, 720)),
        ((1024, 1024), (1024, 1024)),
        ((1000, 700), (992, 688)),  # 704 would be an enlargement
        ((10, 10), (16, 16)),  # less than a patch
        ((5000, 1), (1024, 16)),
    ],
)
def test_unpadded_examples(image: tuple[int, int], resized: tuple[int, int]) -> None:
    assert place_unpadded(image, (1024, 1024), 16, upscale=False).resized == resized


@given(
    image=st.tuples(st.integers(1, 3000), st.integers(1, 3000)), padded=st.booleans(), stride=st.sampled_from([16, 64])
)
def test_cells_cover_the_image_exactly_once(image: tuple[int, int], padded: bool, stride: int) -> None:
    if padded:
        placement = place_on_canvas(contain_size(image, (1024, 1024)), (1024, 1024))
    else:
        placement = place_unpadded(image, (1024, 1024), 16, upscale=False)
    rows, columns = (-(-side // stride) for side in placement.canvas)
    boxes = {
        (row, column): cell_to_pixels(
            row, column, stride=stride, original_size=image, valid_region=placement.valid_region
        )
        for row in range(rows)
        for column in range(columns)
    }
    covered = [box for box in boxes.values() if box is not None]
    area = sum((bottom - top) * (right - left) for top, left, bottom, right in covered)
    assert area == pytest.approx(image[0] * image[1])
    assert min(box[0] for box in covered) == 0
    assert min(box[1] for box in covered) == 0
    assert max(box[2] for box in covered) == pytest.approx(image[0])
    assert max(box[3] for box in covered) == pytest.approx(image[1])


def test_cell_to_pixels_example() -> None:
    # 2048 x 1024 px at half size, 512 px wide on a canvas of 1024: columns 4 to 11 of 16 show it.
    region = Placement(resized=(1024, 512), canvas=(1024, 1024), offset=(0, 256)).valid_region
    common = {"stride": 64, "original_size": (2048, 1024), "valid_region": region}
    assert cell_to_pixels(0, 3, **common) is None
    assert cell_to_pixels(0, 4, **common) == (0, 0, 128, 128)
    assert cell_to_pixels(15, 11, **common) == (1920, 896, 2048, 1024)
    assert cell_to_pixels(15, 12, **common) is None
