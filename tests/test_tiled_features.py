"""Tiles through the model, and feature maps put back onto their images."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import relative_error, small_model
from fresh_python import FreshPython
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import pipeline

from image_encoder_vit import FeatureMap, ImageEncoderViTImageProcessorPil, stitch_tiles

SIZES = [(300, 200), (60, 50), (90, 450)]


def noise_images() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]


def tiling_processor(**changes: object) -> ImageEncoderViTImageProcessorPil:
    return ImageEncoderViTImageProcessorPil(**{"size": 256, "tile_size": 128, **changes})


def mean_colours(inputs: dict[str, torch.Tensor], stride: int) -> SimpleNamespace:
    """Outputs as a model with that stride has them: the mean colour that each cell shows."""

    def means(pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(pixels, stride, ceil_mode=True)

    local_feature_maps = None
    if len(inputs["pixel_values_local"]):
        local_feature_maps = stitch_tiles(means(inputs["pixel_values_local"]), inputs["tile_grids"])
    return SimpleNamespace(last_hidden_state=means(inputs["pixel_values"]), local_feature_maps=local_feature_maps)


@pytest.mark.parametrize(("tile_batch_size", "grad"), [(None, True), (3, False)])
def test_local_maps_are_those_of_each_tile_alone(tile_batch_size: int | None, grad: bool) -> None:
    model = small_model()
    inputs = tiling_processor()(noise_images(), return_tensors="pt")
    with torch.set_grad_enabled(grad):
        outputs = model(**inputs, tile_batch_size=tile_batch_size)
        alone = [model(tile[None]).last_hidden_state[0] for tile in inputs.pixel_values_local]
        without = model(inputs.pixel_values)
    assert torch.equal(outputs.last_hidden_state, without.last_hidden_state)
    assert inputs.tile_grids.tolist() == [[3, 2], [0, 0], [1, 5]]
    first, second, third = outputs.local_feature_maps
    assert second is None
    assert first.shape == (20, 3 * 2, 2 * 2)
    assert third.shape == (20, 1 * 2, 5 * 2)
    for index in range(6):
        row, column = divmod(index, 2)
        assert relative_error(first[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2], alone[index]) <= 1e-5
    for column in range(5):
        assert relative_error(third[:, :, 2 * column : 2 * column + 2], alone[6 + column]) <= 1e-5


def test_gradients_flow_through_tiles() -> None:
    model = small_model().train()
    inputs = tiling_processor()(noise_images()[0], return_tensors="pt")
    tiles = inputs.pop("pixel_values_local").requires_grad_()
    (stitched,) = model(**inputs, pixel_values_local=tiles, tile_batch_size=4).local_feature_maps
    stitched.square().sum().backward()
    assert tiles.grad.flatten(1).norm(dim=1).min() > 0
    assert all(parameter.grad.norm() > 0 for parameter in model.parameters())


def test_recorded_outputs_are_those_of_the_whole_view() -> None:
    model = small_model()
    inputs = tiling_processor()(noise_images(), return_tensors="pt")
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    alone = model(inputs.pixel_values, output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == 5
    assert len(outputs.attentions) == 4
    assert all(torch.equal(a, b) for a, b in zip(outputs.hidden_states, alone.hidden_states, strict=True))
    as_tuple = model(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple[-1]) == 3
    assert "local_feature_maps" not in alone


def test_a_batch_without_tiles_gives_none_for_each() -> None:
    inputs = tiling_processor()(noise_images()[1], return_tensors="pt")
    assert small_model()(**inputs).local_feature_maps == (None,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tile_grids": None}, "pixel_values_local needs tile_grids"),
        ({"tile_grids": torch.tensor([[3, 2]])}, "a row for each of 3 images, got 1"),
        ({"tile_grids": torch.tensor([[3, 2], [0, 0], [1, 4]])}, "hold 10 tiles, but there are 11"),
        ({"tile_grids": torch.tensor([[3, 2], [-1, -1], [1, 4]])}, "tile_grids"),
        ({"tile_grids": torch.tensor([6, 0, 5])}, r"tile_grids must be \(images, 2\)"),
        ({"pixel_values_local": None}, "hold 11 tiles, but there are 0"),
        ({"pixel_values_local": torch.zeros(11, 3, 100, 100)}, "multiples of patch_size"),
        ({"tile_batch_size": 0}, "tile_batch_size must be at least 1, got 0"),
    ],
)
def test_tiles_that_do_not_fit_are_clear_errors(changes: dict[str, object], message: str) -> None:
    inputs = dict(tiling_processor()(noise_images(), return_tensors="pt"))
    with pytest.raises(ValueError, match=message):
        small_model()(**{**inputs, **changes})


def test_stitching_puts_each_tile_at_its_place() -> None:
    tiles = torch.arange(8.0)[:, None, None, None].expand(8, 3, 2, 1)
    first, none, last = stitch_tiles(tiles, torch.tensor([[2, 3], [0, 0], [2, 1]]))
    assert none is None
    assert first[1].tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]
    assert last[0].tolist() == [[6], [6], [7], [7]]


def test_maps_without_padding_in_px_of_the_image() -> None:
    model, processor, images = small_model(), tiling_processor(), noise_images()
    inputs = processor(images, return_tensors="pt")
    maps = processor.post_process_feature_maps(model(**inputs), inputs)
    outputs = model(**inputs)
    # 300 x 200 px became 256 x 171 at column 42 of 256: of 4 x 4 cells of 64 px all hold a part of it.
    assert inputs.valid_regions[0].tolist() == [0, 42, 256, 171]
    assert torch.equal(maps[0].global_map.features, outputs.last_hidden_state[0])
    assert maps[0].global_map.row_edges == (0, 75, 150, 225, 300)
    assert maps[0].global_map.column_edges == pytest.approx((0, 22 * 200 / 171, 86 * 200 / 171, 150 * 200 / 171, 200))
    # 90 x 450 px became 51 x 256 px at row 102: its cells are rows 1 and 2.
    assert torch.equal(maps[2].global_map.features, outputs.last_hidden_state[2, :, 1:3])
    assert torch.equal(maps[0].local_map.features, outputs.local_feature_maps[0])
    assert maps[0].local_map.cell_to_pixels(0, 0) == pytest.approx((0, 0, 50, 50))
    assert maps[0].local_map.cell_to_pixels(5, 3) == pytest.approx((250, 150, 300, 200))
    assert maps[0].local_map.pixel_to_cell(299.5, 149) == (5, 2)
    assert maps[1].local_map is None


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 700), st.integers(1, 700)),
    changes=st.sampled_from(
        [{}, {"do_pad": False}, {"padding_position": "bottom_right"}, {"keep_aspect_ratio": False}, {"tile_size": 80}]
    ),
    stride=st.sampled_from([16, 64]),
)
def test_every_pixel_has_its_cell_and_every_cell_its_box(
    size: tuple[int, int], changes: dict[str, object], stride: int
) -> None:
    processor = tiling_processor(**changes)
    inputs = processor(Image.new("RGB", size[::-1]), return_tensors="pt", max_tiles=3)
    (maps,) = processor.post_process_feature_maps(mean_colours(inputs, stride), inputs, stride=stride)
    assert (maps.local_map is not None) == (max(size) > processor.tile_size)
    for feature_map in [maps.global_map, *([maps.local_map] if maps.local_map else [])]:
        rows, columns = feature_map.features.shape[1:]
        assert (len(feature_map.row_edges), len(feature_map.column_edges)) == (rows + 1, columns + 1)
        for edges, side in zip((feature_map.row_edges, feature_map.column_edges), size, strict=True):
            assert edges[0] == 0
            assert edges[-1] == side
            assert all(start < end for start, end in itertools.pairwise(edges))
        for row in {0, rows // 2, rows - 1}:
            for column in {0, columns // 2, columns - 1}:
                top, left, bottom, right = feature_map.cell_to_pixels(row, column)
                assert feature_map.pixel_to_cell((top + bottom) / 2, (left + right) / 2) == (row, column)
                assert feature_map.pixel_to_cell(top, left) == (row, column)


def test_a_mark_on_the_page_is_found_at_its_cell() -> None:
    # With each cell's mean colour as its feature, the darkest cell is the one that shows the mark.
    processor = tiling_processor(padding_color=[255, 255, 255])
    for top, left in [(310, 520), (5, 690), (490, 3)]:
        page = Image.new("L", (700, 500), 255)
        page.paste(0, (left, top, left + 8, top + 8))
        inputs = processor(page, return_tensors="pt")
        for feature_map in processor.post_process_feature_maps(mean_colours(inputs, 16), inputs, stride=16)[0]:
            page_cells = feature_map.features[0]
            darkest = divmod(page_cells.argmin().item(), page_cells.shape[1])
            box = feature_map.cell_to_pixels(*darkest)
            assert box[0] < top + 8
            assert top < box[2]
            assert box[1] < left + 8
            assert left < box[3]
            assert feature_map.pixel_to_cell((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) == darkest


def test_maps_of_other_inputs_are_refused() -> None:
    model, processor = small_model(), tiling_processor()
    inputs = processor(noise_images(), return_tensors="pt")
    outputs = model(**inputs)
    with pytest.raises(ValueError, match=r"at a stride of 16 px: .*stride=model.encoder.stride"):
        processor.post_process_feature_maps(outputs, inputs, stride=16)
    with pytest.raises(ValueError, match="3 feature maps of 4 x 4 cells are not those of 1 images"):
        processor.post_process_feature_maps(outputs, processor(noise_images()[0], return_tensors="pt"))
    with pytest.raises(ValueError, match=r"no local_feature_maps: call model\(\*\*inputs\)"):
        processor.post_process_feature_maps(model(inputs.pixel_values), inputs)
    feature_map = FeatureMap(torch.zeros(1, 1, 2), (0, 10), (0, 5, 9))
    with pytest.raises(ValueError, match=r"has 1 x 2 cells, there is none at \(0, 2\)"):
        feature_map.cell_to_pixels(0, 2)
    with pytest.raises(ValueError, match=r"The point \(3, 9\) px is not in the image of 10 x 9 px"):
        feature_map.pixel_to_cell(3, 9)


REMOTE = """
import sys
sys.modules["image_encoder_vit"] = None
from transformers import AutoImageProcessor, AutoModel, pipeline
folder, page = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True, backend="pil")
assert processor.preset == "gundam", processor
inputs = processor(page, return_tensors="pt", size=128, tile_size=64)
outputs = model(**inputs, tile_batch_size=2)
assert outputs.local_feature_maps[0].shape == (20, 3, 2), outputs.local_feature_maps[0].shape
(maps,) = processor.post_process_feature_maps(outputs, inputs)
assert maps.local_map.pixel_to_cell(1753, 1239) == (2, 1)
"""


def test_remote_code_has_tiles_too(run_python: FreshPython, tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path / "model")
    ImageEncoderViTImageProcessorPil.from_preset("gundam").save_pretrained(tmp_path / "model")
    page = Path(__file__).parent.parent / "samples" / "page.png"
    run_python(REMOTE, str(tmp_path / "model"), str(page), cache=tmp_path)


def test_the_pipeline_takes_tiled_images() -> None:
    model, processor = small_model(), tiling_processor()
    extract = pipeline("image-feature-extraction", model=model, image_processor=processor)
    images = noise_images()
    with torch.no_grad():
        expected = model(**processor(images[0], return_tensors="pt")).pooler_output
    torch.testing.assert_close(extract(images, pool=True, return_tensors=True)[0], expected)
