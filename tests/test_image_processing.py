"""The PIL image processor: bit-exact with PIL, every kind of image, batches, and clear errors."""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import noise_image, small_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from image_encoder_vit import ImageEncoderViTImageProcessor, ImageEncoderViTImageProcessorPil
from image_encoder_vit.image_reading import open_image, to_rgb

GREY = (127, 127, 127)
SAMPLE_PAGE = Path(__file__).parent.parent / "samples" / "page.png"


def reference_pixels(image: Image.Image, canvas: tuple[int, int]) -> torch.Tensor:
    """DeepSeek-OCR's pipeline: pad with PIL, then what torchvision's ToTensor and Normalize compute."""
    padded = ImageOps.pad(image, canvas[::-1], color=GREY)
    values = torch.from_numpy(np.array(padded)).permute(2, 0, 1).to(torch.float32).div(255)
    return values.sub(torch.tensor(0.5)).div(torch.tensor(0.5))


@settings(max_examples=300, deadline=None)
@given(
    height=st.integers(1, 400),
    width=st.integers(1, 400),
    canvas=st.sampled_from([(128, 128), (96, 160), (131, 127)]),
)
@example(height=341, width=300, canvas=(1024, 1024))
@example(height=3508, width=2480, canvas=(1024, 1024))
@example(height=2, width=1500, canvas=(1024, 1024))
@example(height=1024, width=1024, canvas=(1024, 1024))
@example(height=1023, width=1025, canvas=(640, 640))
def test_padding_is_bit_exact_with_pil(height: int, width: int, canvas: tuple[int, int]) -> None:
    if min(round(height / width * canvas[1]), round(width / height * canvas[0])) == 0:
        return  # PIL loses such an image; see the test of extreme ratios
    image = noise_image(height, width)
    processor = ImageEncoderViTImageProcessorPil(size={"height": canvas[0], "width": canvas[1]}, patch_size=1)
    pixels = processor(image, return_tensors="pt").pixel_values
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels[0], reference_pixels(image, canvas))


@settings(max_examples=100, deadline=None)
@given(height=st.integers(16, 400), width=st.integers(16, 400))
def test_unpadded_pixels_are_bit_exact_with_pil(height: int, width: int) -> None:
    image = noise_image(height, width)
    batch = ImageEncoderViTImageProcessorPil(size=160, do_pad=False)(image, return_tensors="pt")
    resized_height, resized_width = batch.pixel_values.shape[2:]
    expected = image.resize((resized_width, resized_height), Image.Resampling.BICUBIC)
    assert torch.equal(batch.pixel_values[0], reference_pixels(expected, (resized_height, resized_width)))
    assert batch.valid_regions.tolist() == [[0, 0, resized_height, resized_width]]
    assert batch.original_sizes.tolist() == [[height, width]]


@pytest.mark.parametrize(("height", "width", "region"), [(1, 5000, [512, 0, 1, 1024]), (5000, 1, [0, 512, 1024, 1])])
def test_extreme_ratios_keep_one_px(height: int, width: int, region: list[int]) -> None:
    batch = ImageEncoderViTImageProcessorPil()(noise_image(height, width), return_tensors="pt")
    assert batch.pixel_values.shape == (1, 3, 1024, 1024)
    assert batch.valid_regions.tolist() == [region]
    assert batch.original_sizes.tolist() == [[height, width]]


def test_sample_page_by_default() -> None:
    batch = ImageEncoderViTImageProcessorPil()(str(SAMPLE_PAGE), return_tensors="pt")
    assert torch.equal(batch.pixel_values[0], reference_pixels(Image.open(SAMPLE_PAGE), (1024, 1024)))
    assert batch.keys() == {"pixel_values", "original_sizes", "valid_regions"}
    assert batch.original_sizes.tolist() == [[1754, 1240]]
    assert batch.valid_regions.tolist() == [[0, 150, 1024, 724]]


def test_672_x_896_stays_so() -> None:
    batch = ImageEncoderViTImageProcessorPil(do_pad=False)(noise_image(672, 896), return_tensors="pt")
    assert batch.pixel_values.shape == (1, 3, 672, 896)
    outputs = small_model()(batch.pixel_values, output_hidden_states=True)
    assert outputs.hidden_states[-1].shape[1:3] == (42, 56)
    assert outputs.last_hidden_state.shape[2:] == (11, 14)


def test_small_images_are_enlarged_only_when_asked() -> None:
    image = noise_image(100, 60)
    processor = ImageEncoderViTImageProcessorPil(do_pad=False, size=256)
    assert processor(image, return_tensors="pt").pixel_values.shape == (1, 3, 96, 48)
    assert processor(image, return_tensors="pt", do_upscale=True).pixel_values.shape == (1, 3, 256, 160)


def test_a_batch_of_equal_result_sizes_needs_no_mask() -> None:
    images = [noise_image(300, 200, seed=1), noise_image(600, 400, seed=2)]
    batch = ImageEncoderViTImageProcessorPil(do_pad=False, size=160)(images, return_tensors="pt")
    assert batch.pixel_values.shape == (2, 3, 160, 112)
    assert "pixel_mask" not in batch
    assert batch.original_sizes.tolist() == [[300, 200], [600, 400]]


def test_a_mixed_batch_is_padded_with_a_mask() -> None:
    images = [noise_image(160, 96, seed=1), noise_image(64, 128, seed=2)]
    processor = ImageEncoderViTImageProcessorPil(do_pad=False)
    batch = processor(images, return_tensors="pt")
    assert batch.pixel_values.shape == (2, 3, 160, 128)
    assert batch.valid_regions.tolist() == [[0, 0, 160, 96], [0, 0, 64, 128]]
    for image, pixels, mask, (_, _, height, width) in zip(
        images, batch.pixel_values, batch.pixel_mask, batch.valid_regions.tolist(), strict=True
    ):
        assert torch.equal(pixels[:, :height, :width], reference_pixels(image, (height, width)))
        assert mask.sum() == height * width
        assert mask[:height, :width].all()
        grey = torch.tensor(127 / 255).sub(0.5).div(0.5)
        torch.testing.assert_close(pixels[:, mask == 0], grey.expand(3, int((mask == 0).sum())))
    pooled = small_model()(**batch).pooler_output
    assert torch.isfinite(pooled).all()

    unstacked = processor(images)
    assert [pixels.shape for pixels in unstacked.pixel_values] == [(3, 160, 96), (3, 64, 128)]


def test_stretching_and_sam_s_padding() -> None:
    image = noise_image(50, 100)
    stretched = ImageEncoderViTImageProcessorPil(size=64, keep_aspect_ratio=False)(image, return_tensors="pt")
    assert torch.equal(stretched.pixel_values[0], reference_pixels(image.resize((64, 64)), (64, 64)))
    assert stretched.valid_regions.tolist() == [[0, 0, 64, 64]]

    sam = ImageEncoderViTImageProcessorPil(size=64, padding_position="bottom_right", padding_color="mean")
    batch = sam(image, return_tensors="pt")
    assert batch.valid_regions.tolist() == [[0, 0, 32, 64]]
    assert torch.equal(batch.pixel_values[0, :, :32], reference_pixels(image.resize((64, 32)), (32, 64)))
    assert not batch.pixel_values[0, :, 32:].any()


def test_rescaling_and_normalising_can_be_left_out() -> None:
    image = noise_image(32, 32)
    processor = ImageEncoderViTImageProcessorPil(size=32)
    raw = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32)
    values = processor(image, return_tensors="pt", do_rescale=False, do_normalize=False).pixel_values[0]
    assert torch.equal(values, raw)
    assert torch.equal(processor(image, return_tensors="pt", do_normalize=False).pixel_values[0], raw / 255)
    imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    mean, std = (torch.tensor(imagenet[name])[:, None, None] for name in ("image_mean", "image_std"))
    assert torch.equal(processor(image, return_tensors="pt", **imagenet).pixel_values[0], (raw / 255 - mean) / std)


def test_without_resizing_the_image_is_placed_as_it_is() -> None:
    image = noise_image(30, 40)
    processor = ImageEncoderViTImageProcessorPil(size=64, do_resize=False)
    batch = processor(image, return_tensors="pt")
    assert batch.valid_regions.tolist() == [[17, 12, 30, 40]]
    assert torch.equal(batch.pixel_values[0, :, 17:47, 12:52], reference_pixels(image, (30, 40)))
    with pytest.raises(ValueError, match="80 x 40 px does not fit on the canvas of 64 x 64 px"):
        processor(noise_image(80, 40))


def test_the_same_image_in_every_form() -> None:
    image = noise_image(48, 80)
    array = np.array(image)
    processor = ImageEncoderViTImageProcessorPil(size=64)
    expected = processor(image, return_tensors="pt").pixel_values
    forms = [
        array,
        array.transpose(2, 0, 1),
        torch.from_numpy(array),
        torch.from_numpy(array).permute(2, 0, 1),
        array[None],
        [array],
        [[image]],
        array.astype(np.float32) / 255,
        torch.from_numpy(array).to(torch.bfloat16).to(torch.float32),
        array.astype(np.int64),
        array.astype(np.uint16) * 257,
        np.concatenate([array, np.full((48, 80, 1), 200, np.uint8)], axis=2),
    ]
    for form in forms:
        assert torch.equal(processor(form, return_tensors="pt").pixel_values, expected)
    chosen = processor(np.zeros((3, 40, 3), np.uint8), return_tensors="pt", input_data_format="channels_last")
    assert chosen.original_sizes.tolist() == [[3, 40]]
    assert processor(image, return_tensors="np").pixel_values.dtype == np.float32


@pytest.mark.parametrize("mode", ["L", "1", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "RGBX"])
def test_pil_modes_become_what_pil_makes_of_them(mode: str) -> None:
    image = noise_image(20, 30).convert("L").convert(mode) if mode in ("1", "LA") else noise_image(20, 30).convert(mode)
    assert to_rgb(image).mode == "RGB"
    assert np.array_equal(np.array(to_rgb(image)), np.array(image.convert("RGB")))


def test_alpha_is_dropped_not_composited() -> None:
    transparent = Image.new("RGBA", (8, 8), (200, 10, 20, 0))
    assert np.array(to_rgb(transparent))[0, 0].tolist() == [200, 10, 20]
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    palette.info["transparency"] = 1
    assert np.array(to_rgb(palette))[0, 0].tolist() == [9, 8, 7]


def test_16_bit_images_keep_their_contrast() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, axis=0)
    expected = np.rint(ramp / 257).astype(np.uint8)
    for image in (Image.fromarray(ramp), Image.fromarray(ramp.astype(np.int32)), ramp):
        assert np.array_equal(np.array(to_rgb(image))[..., 0], expected)
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, format="PNG")
    assert np.array_equal(np.array(to_rgb(Image.open(buffer)))[..., 2], expected)


def test_float_and_bool_images() -> None:
    unit = np.array([[0.0, 0.5, 1.0]], dtype=np.float32)
    assert np.array(to_rgb(unit))[0, :, 0].tolist() == [0, 128, 255]
    assert np.array(to_rgb(unit * 255))[0, :, 0].tolist() == [0, 128, 255]
    assert np.array(to_rgb(Image.fromarray(unit * 255)))[0, :, 0].tolist() == [0, 128, 255]
    assert np.array(to_rgb(np.array([[True, False]])))[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_image_upright(orientation: int) -> None:
    image = noise_image(20, 30)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", exif=exif)
    rotated = Image.open(buffer)
    assert np.array_equal(np.array(to_rgb(rotated)), np.array(ImageOps.exif_transpose(rotated)))
    size = ImageEncoderViTImageProcessorPil(size=64)(rotated, return_tensors="pt").original_sizes.tolist()
    assert size == [[30, 20] if orientation >= 5 else [20, 30]]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((0, 20, 3), np.uint8), "must have pixels, got 0 x 20 px"),
        (np.zeros((20, 0), np.uint8), "must have pixels, got 20 x 0 px"),
        (Image.new("RGB", (0, 5)), "must have pixels, got 5 x 0 px"),
        (np.zeros((20, 20, 2), np.uint8), r"channels first or last, got shape \(20, 20, 2\)"),
        (np.zeros((20,), np.uint8), r"got shape \(20,\)"),
        (np.full((4, 4, 3), -0.5, np.float32), "got -0.5 to -0.5 as float32. Are they normalised already"),
        (np.full((4, 4, 3), np.nan, np.float32), "got nan to nan"),
        (np.full((4, 4, 3), 70000, np.int64), "got 70000 to 70000 as int64"),
        ([], "list of images is empty"),
        ([[]], "list of images is empty"),
    ],
)
def test_a_bad_image_is_one_clear_error(image: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageEncoderViTImageProcessorPil(size=64)(image)


def test_something_that_is_no_image_is_named() -> None:
    with pytest.raises(TypeError, match="got dict"):
        ImageEncoderViTImageProcessorPil(size=64)({"image": 1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": {"shortest_edge": 64}}, "size must be"),
        ({"size": 0}, "size"),
        ({"padding_color": [127, 127]}, r"padding_color must be three integers.*got \[127, 127\]"),
        ({"padding_color": [127, 127, 300]}, "300"),
        ({"padding_color": "grey"}, "'grey'"),
        ({"padding_position": "left"}, "padding_position must be one of .* got 'left'"),
        ({"patch_size": 0}, "patch_size must be at least 1 px, got 0"),
        ({"do_center_crop": True, "crop_size": 32}, "nothing is cropped"),
        ({"do_convert_rgb": False}, "mode 'L'"),
    ],
)
def test_bad_arguments_are_clear_errors(arguments: dict[str, object], message: str) -> None:
    image = noise_image(20, 20).convert("L")
    with pytest.raises(ValueError, match=message):
        ImageEncoderViTImageProcessorPil(size=64)(image, **arguments)


def test_a_misspelt_argument_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no setting 'padding_colour'. Did you mean 'padding_color'\?"):
        ImageEncoderViTImageProcessorPil(padding_colour=[0, 0, 0])
    with pytest.raises(TypeError, match="do_padd"):
        ImageEncoderViTImageProcessorPil(size=64)(noise_image(20, 20), do_padd=False)


def test_longest_edge_is_a_square_canvas() -> None:
    batch = ImageEncoderViTImageProcessorPil(size={"longest_edge": 96})(noise_image(20, 40), return_tensors="pt")
    assert batch.pixel_values.shape == (1, 3, 96, 96)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No image file at .*absent.png"):
        open_image(tmp_path / "absent.png")
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"Cannot read .*text.png.* as an image"):
        open_image(tmp_path / "text.png")
    noise_image(200, 200).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "truncated.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"Cannot read .*truncated.png.* as an image"):
        open_image(tmp_path / "truncated.png")
    damaged = bytearray(content)
    damaged[60:90] = bytes(30)
    (tmp_path / "damaged.png").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"Cannot read .*damaged.png.* as an image"):
        open_image(tmp_path / "damaged.png")
    with pytest.raises(ValueError, match=r"Cannot read .* as an image"):
        open_image(tmp_path)


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise_image(50, 50).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"Cannot read .*huge.png.*exceeds limit"):
        open_image(tmp_path / "huge.png")


def test_a_large_scan_is_fine() -> None:
    # A4 at 1200 dpi, grey: 139 million px, more than PIL warns at when it opens a file.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = ImageEncoderViTImageProcessorPil()(Image.new("L", (9921, 14031), 200), return_tensors="pt")
    assert batch.valid_regions.tolist() == [[0, 150, 1024, 724]]


def test_torchvision_backend_says_what_it_needs() -> None:
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        with pytest.raises(ImportError, match="use ImageEncoderViTImageProcessorPil"):
            ImageEncoderViTImageProcessor()
    else:
        assert ImageEncoderViTImageProcessor().backend == "torchvision"
