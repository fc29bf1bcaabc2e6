"""The torchvision image processor: the sizes, offsets and masks of the PIL one, pixels within a small bound."""

from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from image_encoder_vit import ImageEncoderViTImageProcessor, ImageEncoderViTImageProcessorPil
from image_encoder_vit.image_presets import PRESETS

try:
    import torchvision  # noqa: F401
except (ImportError, RuntimeError):  # RuntimeError: a torchvision built for another torch
    pytest.skip("torchvision is not installed: `make test-torchvision` runs this", allow_module_level=True)

SAMPLE_PAGE = Path(__file__).parent.parent / "samples" / "page.png"
MEAN_BOUND_LEVELS = 0.01  # mean difference from PIL in levels of 0..255
MAX_BOUND_LEVELS = 3
# Pillow 13 resizes the height first where it shrinks much more than the width, as by stretching an upright page to a
# square; torchvision, and Pillow before, the width. 0.06 % of the values differ by more than 2 levels, 11.6 at most.
MAX_BOUND_LEVELS_BY_PRESET = {"got-ocr2": 12} if int(PIL.__version__.split(".")[0]) >= 13 else {}
SETTINGS = [
    {},
    {"do_pad": False},
    {"padding_position": "bottom_right", "padding_color": "mean"},
    {"do_pad": False, "do_upscale": True},
    {"size": {"height": 640, "width": 512}},
]


def both(images: object, **settings: object) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What the two backends make of the same images."""
    torchvision_backend = ImageEncoderViTImageProcessor()(images, return_tensors="pt", **settings)
    return torchvision_backend, ImageEncoderViTImageProcessorPil()(images, return_tensors="pt", **settings)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_sample_page_is_nearly_pil_s(settings: dict[str, object]) -> None:
    actual, expected = both(str(SAMPLE_PAGE), **settings)
    assert actual.keys() == expected.keys()
    for name in ("original_sizes", "valid_regions"):
        assert torch.equal(actual[name], expected[name])
    assert actual["pixel_values"].dtype == torch.float32
    levels = (actual["pixel_values"] - expected["pixel_values"]).abs() * 127.5
    assert levels.mean() <= MEAN_BOUND_LEVELS
    assert levels.max() <= MAX_BOUND_LEVELS


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_pil_s_sizes_paddings_and_tiles(preset: str) -> None:
    page = Image.open(SAMPLE_PAGE)
    images = [page, page.crop((0, 0, 300, 341)), page.crop((0, 200, 1240, 700))]
    actual, expected = both(images, preset=preset)
    assert actual.keys() == expected.keys()
    for name in expected.keys() - {"pixel_values", "pixel_values_local"}:
        assert torch.equal(torch.as_tensor(actual[name]), torch.as_tensor(expected[name])), name
    levels_per_unit = 255 * max(PRESETS[preset]["image_std"])
    for name in expected.keys() & {"pixel_values", "pixel_values_local"}:
        assert actual[name].shape == expected[name].shape
        levels = (actual[name] - expected[name]).abs() * levels_per_unit
        assert levels.mean() <= MEAN_BOUND_LEVELS
        assert levels.max() <= MAX_BOUND_LEVELS_BY_PRESET.get(preset, MAX_BOUND_LEVELS)


def test_tiles_of_a_batch_lie_where_pil_s_do() -> None:
    # Each tile of one colour, so that a tile in another's place shows.
    image = Image.new("RGB", (192, 128))
    for index in range(6):
        column, row = index % 3, index // 3
        image.paste((40 * index, 0, 255 - 40 * index), (64 * column, 64 * row, 64 * column + 64, 64 * row + 64))
    actual, expected = both([image, Image.new("RGB", (30, 30))], size=64, tile_size=64)
    assert actual["tile_grids"].tolist() == expected["tile_grids"].tolist() == [[2, 3], [0, 0]]
    assert actual["pixel_values_local"].shape == (6, 3, 64, 64)
    torch.testing.assert_close(actual["pixel_values_local"], expected["pixel_values_local"], rtol=0, atol=1e-6)
    nothing, _ = both(Image.new("RGB", (30, 30)), size=64, tile_size=64)
    assert nothing["pixel_values_local"].shape == (0, 3, 64, 64)


def test_tiles_are_those_of_transformers_unlimited_ocr() -> None:
    module = pytest.importorskip(
        "transformers.models.unlimited_ocr.image_processing_unlimited_ocr", reason="needs a newer transformers"
    )
    theirs = module.UnlimitedOcrImageProcessor()
    ours = ImageEncoderViTImageProcessor.from_preset("unlimited-ocr")
    page = Image.open(SAMPLE_PAGE).convert("RGB")
    for image, is_right in [
        (page, True),
        (page.resize((2000, 700)), True),
        (page.crop((0, 0, 600, 640)), True),
        (page.crop((0, 0, 300, 341)), False),  # They floor the offset of 61.5 px, PIL rounds it to 62.
    ]:
        expected, actual = theirs(image, return_tensors="pt"), ours(image, return_tensors="pt")
        tiles = int(actual.tile_grids.prod())
        assert tiles == sum(expected["num_local_patches"])
        if tiles:
            assert actual.tile_grids[0].flip(0).tolist() == list(expected["patches_grid"][0])
            torch.testing.assert_close(actual.pixel_values_local, expected["pixel_values_local"], rtol=0, atol=1e-5)
        is_equal = (actual.pixel_values - expected["pixel_values"]).abs().max().item() < 1e-5
        assert is_equal is is_right


def test_without_resizing_the_pixels_are_pil_s() -> None:
    image = Image.open(SAMPLE_PAGE).crop((100, 100, 400, 300))
    actual, expected = both(image, do_resize=False)
    torch.testing.assert_close(actual["pixel_values"], expected["pixel_values"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", SETTINGS[:2], ids=str)
def test_sizes_and_regions_of_many_images(settings: dict[str, object]) -> None:
    random = np.random.default_rng(0)
    for height, width in random.integers(1, 300, (60, 2)):
        image = Image.new("RGB", (int(width), int(height)), (10, 200, 90))
        actual, expected = both(image, size=128, **settings)
        assert torch.equal(actual["valid_regions"], expected["valid_regions"])
        torch.testing.assert_close(actual["pixel_values"], expected["pixel_values"], rtol=0, atol=1e-6)


def test_a_mixed_batch_is_padded_with_a_mask() -> None:
    images = [Image.new("RGB", (96, 160), (1, 2, 3)), Image.new("L", (128, 64), 77)]
    actual, expected = both(images, do_pad=False)
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=1e-6)


def test_tensors_arrays_and_paths() -> None:
    array = np.array(Image.open(SAMPLE_PAGE).convert("RGB"))
    processor = ImageEncoderViTImageProcessor(size=256)
    expected = processor(str(SAMPLE_PAGE), return_tensors="pt").pixel_values
    for image in (array, torch.from_numpy(array).permute(2, 0, 1), Image.fromarray(array), [array]):
        assert torch.equal(processor(image, return_tensors="pt").pixel_values, expected)
    with pytest.raises(ValueError, match="must have pixels"):
        processor(torch.zeros(3, 0, 5, dtype=torch.uint8))


def test_auto_class_prefers_torchvision_and_takes_pil_on_request(model_folder: str) -> None:
    assert type(AutoImageProcessor.from_pretrained(model_folder)) is ImageEncoderViTImageProcessor
    assert type(AutoImageProcessor.from_pretrained(model_folder, backend="pil")) is ImageEncoderViTImageProcessorPil


def test_both_backends_save_the_same_settings(tmp_path: Path) -> None:
    for backend in (ImageEncoderViTImageProcessor, ImageEncoderViTImageProcessorPil):
        backend(size=256, do_pad=False).save_pretrained(tmp_path / backend.__name__)
    files = [path.read_text() for path in sorted(tmp_path.glob("*/preprocessor_config.json"))]
    assert len(files) == 2
    assert files[0] == files[1]
