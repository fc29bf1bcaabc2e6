"""Presets against PIL, the published algorithms and transformers' processors; how they are stored; threads."""

import functools
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import noise_image
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps
from transformers import AutoImageProcessor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from image_encoder_vit import ImageEncoderViTImageProcessorPil as Processor
from image_encoder_vit.image_geometry import choose_tile_grid, longest_side_size
from image_encoder_vit.image_presets import PRESETS

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CENTRED = {"tiny": 512, "small": 640, "base": 1024, "large": 1280}
TILED = {"gundam": (640, 6), "deepseek-ocr-2": (768, 6), "unlimited-ocr": (640, 32)}
SIZES = [(341, 300), (877, 620), (500, 1300), (1700, 250), (640, 640), (641, 10), (2048, 5)]


def normalised(image: Image.Image, mean_and_std: tuple[tuple[float, ...], tuple[float, ...]] = HALF) -> torch.Tensor:
    """What torchvision's ToTensor and Normalize compute."""
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32).div(255)
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in mean_and_std)
    return values.sub(mean).div(std)


def padded(image: Image.Image, side: int) -> torch.Tensor:
    return normalised(ImageOps.pad(image, (side, side), color=(127, 127, 127)))


@functools.cache
def published_candidates(min_num: int, max_num: int) -> list[tuple[int, int]]:
    """Columns and rows, in the order of a set where they have as many tiles."""
    candidates = {
        (i, j)
        for n in range(min_num, max_num + 1)
        for i in range(1, n + 1)
        for j in range(1, n + 1)
        if min_num <= i * j <= max_num
    }
    return sorted(candidates, key=lambda ratio: ratio[0] * ratio[1])


def published_grid(image: tuple[int, int], tile: int, min_num: int, max_num: int) -> tuple[int, int]:
    """The rows and columns that DeepSeek-OCR's dynamic_preprocess chooses."""
    height, width = image
    best_difference, best = float("inf"), (1, 1)
    for columns, rows in published_candidates(min_num, max_num):
        difference = abs(width / height - columns / rows)
        if difference < best_difference:
            best_difference, best = difference, (columns, rows)
        elif difference == best_difference and width * height > 0.5 * tile * tile * columns * rows:
            best = (columns, rows)
    return best[1], best[0]


def published_tiles(image: Image.Image, tile: int, max_num: int) -> list[torch.Tensor]:
    """Resized and cropped by PIL, tile by tile."""
    if image.width <= tile and image.height <= tile:
        return []
    rows, columns = published_grid((image.height, image.width), tile, 2, max_num)
    resized = image.resize((tile * columns, tile * rows))
    boxes = [
        (column * tile, row * tile, (column + 1) * tile, (row + 1) * tile)
        for row in range(rows)
        for column in range(columns)
    ]
    return [normalised(resized.crop(box)) for box in boxes]


@pytest.mark.parametrize("preset", CENTRED)
@pytest.mark.parametrize("size", SIZES[:5])
def test_deepseek_ocr_s_modes_are_pil_s(preset: str, size: tuple[int, int]) -> None:
    image, side = noise_image(*size), CENTRED[preset]
    batch = Processor.from_preset(preset)(image, return_tensors="pt")
    assert batch.keys() == {"pixel_values", "original_sizes", "valid_regions"}
    assert torch.equal(batch.pixel_values[0], padded(image, side))
    # The published code stretches in its smaller modes.
    stretched = Processor.from_preset(preset, keep_aspect_ratio=False)(image, return_tensors="pt")
    assert torch.equal(stretched.pixel_values[0], normalised(image.resize((side, side))))


@pytest.mark.parametrize("preset", TILED)
def test_tiled_presets_are_pil_s(preset: str) -> None:
    tile, most = TILED[preset]
    images = [noise_image(*size, seed=seed) for seed, size in enumerate(SIZES[:6])]
    batch = Processor.from_preset(preset)(images, return_tensors="pt")
    expected = [published_tiles(image, tile, most) for image in images]
    assert batch.tile_grids.dtype == torch.int64
    assert batch.tile_grids.prod(dim=1).tolist() == [len(tiles) for tiles in expected]
    assert batch.pixel_values_local.shape == (sum(map(len, expected)), 3, tile, tile)
    assert torch.equal(batch.pixel_values_local, torch.stack(list(itertools.chain(*expected))))
    for image, view in zip(images, batch.pixel_values, strict=True):
        assert torch.equal(view, padded(image, 1024))


def test_sam_s_preset_is_its_published_preprocessing() -> None:
    processor = Processor.from_preset("sam")
    for size in SIZES:
        image = noise_image(*size)
        scale = 1024 / max(size)
        height, width = (int(side * scale + 0.5) for side in size)
        batch = processor(image, return_tensors="pt")
        expected = torch.zeros(3, 1024, 1024)
        expected[:, :height, :width] = normalised(image.resize((width, height), Image.Resampling.BILINEAR), IMAGENET)
        assert torch.equal(batch.pixel_values[0], expected)
        assert batch.valid_regions.tolist() == [[0, 0, height, width]]


def test_got_ocr2_s_preset_is_its_published_preprocessing() -> None:
    for size in SIZES[:3]:
        image = noise_image(*size)
        pixels = Processor.from_preset("got-ocr2")(image, return_tensors="pt").pixel_values
        expected = normalised(image.resize((1024, 1024), Image.Resampling.BICUBIC), CLIP)
        assert torch.equal(pixels[0], expected)


@settings(max_examples=500, deadline=None)
@given(
    image=st.tuples(st.integers(1, 6000), st.integers(1, 6000)),
    most=st.sampled_from([6, 9, 32]),
    tile=st.sampled_from([640, 768]),
)
@example(image=(905, 905), most=6, tile=640)  # (1, 2), (2, 1) and (2, 2) are candidates
@example(image=(640, 641), most=6, tile=640)
def test_the_grid_is_the_published_one(image: tuple[int, int], most: int, tile: int) -> None:
    expected = (0, 0) if max(image) <= tile else published_grid(image, tile, 2, most)
    assert choose_tile_grid(image, tile, 2, most) == expected


@pytest.mark.parametrize("most", [6, 9, 32])
def test_ties_between_grids_are_decided_as_published(most: int) -> None:
    grids = {(rows, columns) for rows in range(1, most + 1) for columns in range(1, most // rows + 1)} - {(1, 1)}
    ties = 0
    for rows, columns in sorted(grids):
        for other_rows, other_columns in sorted(grids):
            # An image with a ratio in the middle of two grids', or exactly theirs where they are equal.
            width = columns * other_rows + other_columns * rows
            height = 2 * rows * other_rows
            ties += 1
            for scale in (641 // max(height, width) + 1, 17, 90):
                image = (height * scale, width * scale)
                if max(image) > 640:
                    assert choose_tile_grid(image, 640, 2, most) == published_grid(image, 640, 2, most), image
    assert ties == len(grids) ** 2


def test_more_tiles_only_for_images_with_the_pixels_for_them() -> None:
    # 1 : 2 is that of 1 x 2 tiles and of 2 x 4, which 32 tiles allow; half of 2 x 4 tiles of 640 px are 1,638,400 px.
    assert choose_tile_grid((640, 1280), 640, 2, 6) == (1, 2)
    assert choose_tile_grid((905, 1810), 640, 2, 9) == (1, 2)
    assert choose_tile_grid((906, 1812), 640, 2, 9) == (2, 4)
    # DeepSeek-OCR's page of 6 tiles, and one that fits into a tile.
    assert choose_tile_grid((3508, 2480), 640, 2, 6) == (3, 2)
    assert choose_tile_grid((640, 640), 640, 2, 6) == (0, 0)
    assert choose_tile_grid((700, 700), 640, 1, 1) == (0, 0)


def lands_on_the_same_px(size: tuple[int, int]) -> bool:
    """Whether transformers' DeepSeek-OCR-2 processor, which floors offsets, puts an image where PIL puts it."""
    height, width = size
    theirs = [round(side * (1024 / max(size))) for side in size]
    canvas = ImageOps.contain(Image.new("1", (width, height)), (1024, 1024), Image.Resampling.NEAREST)
    offsets = [round((1024 - side) * 0.5) for side in theirs]
    return [canvas.height, canvas.width] == theirs and offsets == [(1024 - side) // 2 for side in theirs]


def test_equal_to_transformers_deepseek_ocr_2_where_that_is_right() -> None:
    module = pytest.importorskip(
        "transformers.models.deepseek_ocr2.image_processing_pil_deepseek_ocr2", reason="needs a newer transformers"
    )
    theirs = module.DeepseekOcr2ImageProcessorPil()
    ours = Processor.from_preset("deepseek-ocr-2")
    rights = []
    for size in [(341, 300), (877, 620), (800, 700), (1000, 300), (769, 512), (300, 2000)]:
        image = noise_image(*size)
        expected, actual = theirs(image, return_tensors="pt"), ours(image, return_tensors="pt")
        assert actual.tile_grids.prod() == expected["num_local_patches"].sum()
        if "pixel_values_local" in expected:
            torch.testing.assert_close(actual.pixel_values_local, expected["pixel_values_local"], rtol=0, atol=1e-6)
        is_equal = (actual.pixel_values - expected["pixel_values"]).abs().max().item() < 1e-6
        assert is_equal == lands_on_the_same_px(size), size
        rights.append(is_equal)
    assert rights[0] is False  # 341 x 300: 901 px wide at column 61, or 62 as PIL rounds 61.5
    assert True in rights


@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 1500), width=st.integers(1, 1500))
@example(height=2048, width=5)  # 2.5 px become 3, where PIL's own rounding makes them 2
def test_equal_to_transformers_sam(height: int, width: int) -> None:
    if min(round(height * 1024 / width), round(width * 1024 / height)) < 1:
        return  # they lose the image
    image = noise_image(height, width)
    expected = SamImageProcessorPil()(image, return_tensors="pt")["pixel_values"]
    actual = Processor.from_preset("sam")(image, return_tensors="pt").pixel_values
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)


@given(image=st.tuples(st.integers(1, 6000), st.integers(1, 6000)))
def test_sam_s_sizes_are_transformers_too(image: tuple[int, int]) -> None:
    expected = SamImageProcessorPil()._get_preprocess_shape(image, 1024)
    assert longest_side_size(image, (1024, 1024)) == tuple(max(1, side) for side in expected)


def test_equal_to_transformers_got_ocr2() -> None:
    theirs = GotOcr2ImageProcessorPil(size={"height": 1024, "width": 1024})
    for size in SIZES[:4]:
        image = noise_image(*size)
        actual = Processor.from_preset("got-ocr2")(image, return_tensors="pt").pixel_values
        torch.testing.assert_close(actual, theirs(image, return_tensors="pt")["pixel_values"], rtol=0, atol=2e-6)


def test_a_batch_without_tiles_has_grids_of_none() -> None:
    batch = Processor.from_preset("gundam", size=64)([noise_image(20, 30), noise_image(40, 640)], return_tensors="pt")
    assert batch.tile_grids.tolist() == [[0, 0], [0, 0]]
    assert batch.pixel_values_local.shape == (0, 3, 640, 640)
    lists = Processor.from_preset("gundam", size=64, tile_size=16)([noise_image(20, 30), noise_image(9, 9)])
    assert [tile.shape for tile in lists.pixel_values_local] == [(3, 16, 16)] * int(lists.tile_grids.prod(1).sum())


def test_a_batch_moves_and_changes_dtype_as_one() -> None:
    batch = Processor(size=64, tile_size=32)(noise_image(50, 90), return_tensors="pt").to("cpu", torch.bfloat16)
    assert batch.pixel_values_local.dtype == torch.bfloat16
    assert batch.tile_grids.dtype == torch.int64


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_stored_by_name_and_in_full(preset: str, tmp_path: Path) -> None:
    processor = Processor.from_preset(preset)
    assert processor.preset == preset
    processor.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert stored["preset"] == preset
    assert stored["size"] == PRESETS[preset]["size"]
    assert stored.get("tile_size") == PRESETS[preset]["tile_size"]
    loaded = Processor.from_pretrained(tmp_path)
    assert loaded.preset == preset
    assert loaded.to_dict() == processor.to_dict()
    # Any preset takes the place of any other.
    for other in PRESETS:
        assert Processor.from_pretrained(tmp_path, preset=other).preset == other


def test_settings_given_override_a_preset_and_then_it_is_none(tmp_path: Path) -> None:
    Processor.from_preset("gundam", max_tiles=9).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert "preset" not in stored
    assert (stored["tile_size"], stored["max_tiles"]) == (640, 9)
    assert Processor.from_pretrained(tmp_path).max_tiles == 9
    assert Processor.from_pretrained(tmp_path, preset="large", size=256).size["height"] == 256
    # A file written by hand: the settings beside the name count.
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"preset": "gundam", "min_tiles": 3}))
    by_hand = Processor.from_pretrained(tmp_path)
    assert (by_hand.tile_size, by_hand.min_tiles, by_hand.max_tiles) == (640, 3, 6)


def test_a_preset_for_one_call_and_through_the_auto_class(model_folder: str) -> None:
    image = noise_image(700, 900)
    gundam = AutoImageProcessor.from_pretrained(model_folder, backend="pil", preset="gundam")
    assert type(gundam) is Processor
    assert gundam.preset == "gundam"
    batch = gundam(image, return_tensors="pt", preset="tiny")
    assert batch.keys() == {"pixel_values", "original_sizes", "valid_regions"}
    assert batch.pixel_values.shape == (1, 3, 512, 512)
    assert Processor()(image, return_tensors="pt", preset="gundam", max_tiles=2).tile_grids.tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "huge"}, "There is no preset 'huge'. Known: tiny, small, base, large, gundam"),
        ({"tile_size": 100}, "tile_size must be a multiple of patch_size=16 px, got 100"),
        ({"tile_size": 0}, "tile_size must be a multiple of patch_size=16 px, got 0"),
        ({"tile_size": 32, "min_tiles": 7}, "got min_tiles=7, max_tiles=6"),
        ({"tile_size": 32, "min_tiles": 0}, "got min_tiles=0, max_tiles=6"),
        ({"tile_size": 32, "do_resize": False}, "An image is resized to its tiles"),
    ],
)
def test_bad_settings_of_views_are_clear_errors(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Processor(size=64)(noise_image(20, 20), **arguments)


def test_threads_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [noise_image(100 + 30 * seed, 400 - 40 * seed, seed=seed) for seed in range(6)]
    paths = [tmp_path / f"{index}.png" for index in range(6)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    processor = Processor(size=128, tile_size=64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    expected = processor(images, return_tensors="pt")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    undecoded = [Image.open(path) for path in paths]
    assert isinstance(undecoded[0], ImageFile.ImageFile)
    for batch in (images, paths, undecoded, [Image.open(paths[0])] * 6):
        actual = processor(batch, return_tensors="pt")
        if len(set(map(id, batch))) == 1:
            assert torch.equal(actual.pixel_values, expected.pixel_values[:1].expand(6, -1, -1, -1))
            continue
        for name in expected:
            assert torch.equal(actual[name], expected[name]), name
    paths[3].write_text("no image")
    with pytest.raises(ValueError, match=r"Cannot read .*3.png"):
        processor(paths)
