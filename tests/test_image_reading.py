"""Images in every form and state: what is read, what is refused, and how it is said."""

import base64
import io
import struct
import threading
import tracemalloc
import zlib
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_image_processing import noise_image

from image_encoder_vit import ImageEncoderViTImageProcessorPil
from image_encoder_vit.image_reading import (
    decode_image,
    exif_orientation,
    open_image,
    to_8_bit,
    to_rgb,
    without_metadata,
)

PROCESSOR = ImageEncoderViTImageProcessorPil(size=64)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(image: object, **settings: object) -> torch.Tensor:
    return PROCESSOR(image, return_tensors="pt", **settings).pixel_values


# Damage that leaves the pixels whole


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def exif_with_bad_value(orientation: int) -> bytes:
    """EXIF whose YCbCrPositioning is text, where a number belongs."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0) + struct.pack("<HHI4s", 0x0213, 2, 2, b"1\0\0\0")
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + entries + bytes(4)


@pytest.mark.parametrize("place", [33, -12], ids=["before the pixels", "after them"])
@pytest.mark.parametrize(
    "bad",
    [
        chunk(b"iCCP", b""),
        chunk(b"iCCP", b"name\0\0no zlib"),
        chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(80 << 20))),
        chunk(b"tRNS", b"\0"),
        chunk(b"pHYs", b"\0"),
        chunk(b"gAMA", b"") * 2,
        chunk(b"tEXt", b"a\0b")[:-4] + b"bad!",
    ],
    ids=["empty profile", "profile", "text of 80 MB", "transparency", "resolution", "gamma", "checksum"],
)
def test_a_png_with_damaged_metadata_is_read(bad: bytes, place: int) -> None:
    image = noise_image(30, 20)
    data = saved(image, "PNG")
    data = data[:place] + bad + data[place:]
    assert np.array_equal(np.asarray(decode_image(data)), np.asarray(image))


def test_a_page_is_upright_although_its_exif_is_damaged() -> None:
    image = noise_image(16, 32)
    data = saved(image, "JPEG", exif=exif_with_bad_value(6))
    assert decode_image(data).size == (16, 32)
    upright = Image.open(io.BytesIO(saved(image, "JPEG"))).transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(decode_image(data)), np.asarray(upright))
    assert exif_orientation(exif_with_bad_value(6)) == 6
    assert exif_orientation(exif_with_bad_value(6)[:14]) == 1
    assert exif_orientation(b"Exif\0\0") == exif_orientation(b"") == 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_damage_beside_the_orientation_does_not_hide_it(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(noise_image(16, 48), kind, exif=exif, **options)
    whole = decode_image(data)
    assert whole.size == ((16, 48) if orientation > 4 else (48, 16))
    if kind == "PNG":
        data = data[:-12] + chunk(b"iCCP", b"") + data[-12:]
    elif kind == "JPEG":
        data = data[:2] + b"\xff\xe2\0\x0fICC_PROFILE\0\1" + b"\xff\xee\0\x09Adobe\0\1" + data[2:]
    elif kind == "TIFF":
        data = data.replace(struct.pack("<HHI", 305, 2, 1), struct.pack("<HHI", 305, 99, 1))
    assert np.array_equal(np.asarray(decode_image(data)), np.asarray(whole))


@pytest.mark.parametrize(
    "segment",
    [
        b"\xff\xe2\0\x0eICC_PROFILE\0",
        b"\xff\xed\0\x14Photoshop 3.0\x008BI",
        b"\xff\xee\0\x07Adobe",
        b"\xff\xe0\0\x07JFIF\0",
    ],
    ids=["profile", "Photoshop", "Adobe", "JFIF"],
)
def test_a_jpeg_with_damaged_metadata_is_read(segment: bytes) -> None:
    data = saved(noise_image(16, 32), "JPEG")
    damaged = data[:2] + segment + data[2:]
    assert np.array_equal(np.asarray(decode_image(damaged)), np.asarray(decode_image(data)))


def test_what_is_left_without_metadata_has_the_same_pixels() -> None:
    exif = Image.Exif()
    exif[0x0112] = 1
    exif[0x010E] = "a description"
    for kind, options in {
        "JPEG": {"comment": b"text", "icc_profile": b"profile" * 20},
        "PNG": {"icc_profile": b"profile"},
        "WEBP": {"lossless": True, "icc_profile": b"profile"},
        "TIFF": {"compression": "tiff_lzw", "description": "text", "icc_profile": b"profile"},
    }.items():
        data = saved(noise_image(40, 30), kind, exif=exif, **options)
        plain = without_metadata(data)
        assert plain is not None
        assert b"profile" not in plain or kind == "TIFF"
        assert np.array_equal(np.asarray(decode_image(plain)), np.asarray(decode_image(data))), kind
    assert without_metadata(b"GIF89a") is None
    assert without_metadata(b"\xff\xd8\xff") is None


# Numbers


@pytest.mark.parametrize(
    "settings", [{}, {"do_normalize": False}, {"tile_size": 32}, {"padding_position": "bottom_right"}]
)
def test_floats_from_0_to_1_need_no_rescaling(settings: dict[str, object]) -> None:
    image = torch.rand(3, 70, 50, generator=torch.Generator().manual_seed(0))
    expected = PROCESSOR(image, return_tensors="pt", **settings)
    actual = PROCESSOR(image, return_tensors="pt", do_rescale=False, **settings)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name
    # 8-bit images beside them stay as they are.
    bytes_ = noise_image(70, 50)
    both = PROCESSOR([image, bytes_], return_tensors="pt", do_rescale=False, **settings).pixel_values
    assert torch.equal(both[0], expected.pixel_values[0])
    assert torch.equal(both[1], pixels(bytes_, do_rescale=False, **settings)[0])
    assert both[1].max() > 2


def test_without_rescaling_floats_are_transformers_sam_s() -> None:
    theirs = pytest.importorskip("transformers.models.sam.image_processing_pil_sam").SamImageProcessorPil()
    image = np.random.default_rng(0).random((3, 1024, 1024), dtype=np.float32)
    image = np.rint(image * 255).astype(np.float32) / 255
    expected = theirs(image, return_tensors="pt", do_rescale=False, input_data_format="channels_first").pixel_values
    ours = ImageEncoderViTImageProcessorPil.from_preset("sam")
    torch.testing.assert_close(
        ours(image, return_tensors="pt", do_rescale=False).pixel_values, expected, rtol=0, atol=1e-5
    )


def test_values_just_above_their_range_are_not_of_another_range() -> None:
    ramp = torch.linspace(0.5, 1, 200).expand(1, 3, 300, 200)
    resized = torch.nn.functional.interpolate(ramp, (451, 301), mode="bicubic", antialias=True)[0]
    assert resized.max() > 1
    assert to_rgb(resized).getpixel((300, 0)) == (255, 255, 255)
    for above in (1.0000001, 1.05, 1.25):
        assert to_rgb(np.array([[0.5, above]], np.float32)).getpixel((0, 0))[0] == 128
    assert to_rgb(np.array([[-0.1, 0.5]], np.float32)).getpixel((0, 0))[0] == 0
    assert to_rgb(np.array([[-8.0, 100.0, 270.0]], np.float32)).getpixel((2, 0))[0] == 255
    for unclear in (1.3, 2.0, 15.0):
        with pytest.raises(ValueError, match=f"got 0.0 to {unclear} as float64"):
            to_rgb(np.array([[0.0, unclear]]))
    for unclear in (256, 300, 1023):
        with pytest.raises(ValueError, match=f"got 0 to {unclear} as int64"):
            to_rgb(np.array([[0, unclear]]))
    assert to_rgb(np.array([[0, 65535]])).getpixel((1, 0))[0] == 255
    for normalized in ([-1.0, 1.0], [-2.1, 2.6], [0.0, np.inf], [-300.0, 200.0]):
        with pytest.raises(ValueError, match="normalised already"):
            to_rgb(np.array([normalized]))


def test_16_bits_become_the_nearest_8_in_little_memory() -> None:
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert np.array_equal(to_8_bit(every)[0], np.rint(every / 257).astype(np.uint8))
    page = np.full((3000, 2000), 40000, np.uint16)
    tracemalloc.start()
    to_8_bit(page)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / page.size < 2.5  # Bytes for each px.
    dark = Image.fromarray(np.full((4, 5), 300, np.int32))
    assert dark.mode == "I"
    assert to_rgb(dark).getpixel((0, 0)) == (1, 1, 1)


def test_bfloat16_and_other_kinds_of_numbers() -> None:
    image = torch.rand(3, 20, 30)
    assert torch.equal(pixels(image.bfloat16()), pixels(image.bfloat16().float()))
    assert pixels(image.half()).shape == (1, 3, 64, 64)
    for bad, what in [
        (np.array([[1, 2], [3, None]], dtype=object), "array of object"),
        (np.ones((20, 30), complex), "array of complex128"),
        (torch.ones(20, 30, dtype=torch.complex64), "torch.complex64"),
        (torch.ones(20, 30).to_sparse(), "torch.sparse_coo"),
        (torch.ones(20, 30, device="meta"), "tensor of torch.float32"),
        (np.array([["a", "b"]]), "array of <U1"),
        (np.zeros((2, 3), "datetime64[s]"), "array of datetime64"),
    ]:
        with pytest.raises(ValueError, match=f"Image 0 of the batch: Pixel values must be .*{what}"):
            PROCESSOR(bad)


# Shapes


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 5000, 3), [1, 5000]),
        ((1, 50, 4), [1, 50]),
        ((4, 4, 3), [4, 4]),
        ((3, 40, 50), [40, 50]),
        ((40, 3, 3), [40, 3]),
        ((1, 40, 50), [40, 50]),
        ((40, 50, 1), [40, 50]),
        ((4, 40, 50), [40, 50]),
    ],
)
def test_the_axis_of_channels_is_found(shape: tuple[int, ...], size: list[int]) -> None:
    array = np.zeros(shape, np.uint8)
    for image in (array, torch.from_numpy(array)):
        assert PROCESSOR(image, return_tensors="pt").original_sizes.tolist() == [size]


@pytest.mark.parametrize("shape", [(3, 40, 3), (3, 40, 4), (4, 40, 4), (1, 40, 1), (3, 40, 1), (3, 3, 3)])
def test_arrays_that_could_be_either_ask(shape: tuple[int, ...]) -> None:
    array = np.zeros(shape, np.uint8)
    with pytest.raises(
        ValueError, match=r"Image 0 of the batch: .*may have its channels first or last.*input_data_format"
    ):
        PROCESSOR(array)
    for form, size in {"channels_first": shape[1:], "channels_last": shape[:2]}.items():
        batch = PROCESSOR(torch.from_numpy(array), input_data_format=form, return_tensors="pt")
        assert batch.original_sizes.tolist() == [list(size)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 250}, "size must be a multiple of patch_size=16 px on each side, got 250 x 250: 256 x 256 is near"),
        ({"size": {"height": 64, "width": 70}}, "got 64 x 70"),
        ({"size": 64, "patch_size": 14}, "patch_size=14 .* 70 x 70 is near"),
        ({"do_pad": False, "do_resize": False}, "Image 1 of the batch: 20 x 30 px are no multiples of patch_size=16"),
    ],
)
def test_sides_that_patches_do_not_divide_are_refused(settings: dict[str, object], message: str) -> None:
    images = [noise_image(32, 32), noise_image(20, 30)]
    with pytest.raises(ValueError, match=message):
        PROCESSOR(images, **settings)
    assert pixels(images, do_pad=False, size=250).shape[2:] == (32, 32)


# Names


def test_the_image_that_is_bad_is_named(tmp_path: Path) -> None:
    good = noise_image(20, 20)
    lazy = Image.open(io.BytesIO(saved(noise_image(99, 99), "PNG")[:-2000]))
    for bad, message in [
        (np.zeros((5, 0, 3), np.uint8), "must have pixels"),
        (lazy, "truncated"),
        ({"image": 1}, "got dict"),
        (None, "got NoneType"),
        (3, "got int"),
    ]:
        with pytest.raises(ValueError, match=f"^Image 2 of the batch: .*{message}"):
            PROCESSOR([good, [good, bad], good])
    with pytest.raises(ValueError, match=r"^Image 1 of the batch: .*does not fit"):
        PROCESSOR([good, noise_image(80, 20)], do_resize=False)
    (tmp_path / "bad.png").write_bytes(saved(good, "PNG")[:60])
    (tmp_path / "grey.png").write_bytes(saved(good.convert("L"), "PNG"))
    (tmp_path / "floats.tiff").write_bytes(saved(Image.fromarray(np.full((9, 9), np.nan, np.float32)), "TIFF"))
    for name, message in [("bad.png", "truncated"), ("floats.tiff", "got nan to nan"), ("", "no regular file")]:
        with pytest.raises(ValueError, match=rf"^Cannot read '.*{name}' as an image: .*{message}"):
            PROCESSOR([good, tmp_path / name])
    with pytest.raises(ValueError, match=r"grey.png' as an image: .*mode 'L'"):
        PROCESSOR(tmp_path / "grey.png", do_convert_rgb=False)
    for absent in (tmp_path / "absent.png", tmp_path / "bad.png" / "below.png"):
        with pytest.raises(FileNotFoundError, match=r"No image file at '.*png'"):
            PROCESSOR([str(absent)])
    with pytest.raises(ValueError, match=r"Cannot read .*null"):
        PROCESSOR("a\0b.png")


def test_base64_and_data_urls() -> None:
    image = noise_image(20, 30)
    data = saved(image, "PNG")
    text = base64.b64encode(data).decode()
    expected = pixels(image)
    for source in (text, base64.encodebytes(data).decode(), f"data:image/png;base64,{text}"):
        assert torch.equal(pixels(source), expected)
    jpeg = base64.b64encode(saved(image, "JPEG")).decode()
    assert jpeg.startswith("/9j/")
    assert pixels(jpeg).shape == expected.shape
    with pytest.raises(
        ValueError, match=r"Cannot read 'data:image/png;base64,.{150,200}\.\.\. as an image: image file is trunc"
    ):
        open_image(f"data:image/png;base64,{text[:400]}")
    with pytest.raises(FileNotFoundError, match="No image file at 'aaaa"):
        open_image("a" * 100)


@pytest.fixture
def server() -> Iterator[str]:
    """An HTTP server with one image, whose path is /page.png."""
    page = saved(noise_image(20, 30), "PNG")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/page.png" else 404)
            self.end_headers()
            self.wfile.write(page if self.path == "/page.png" else b"no such page")

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=partial(http.serve_forever, 0.01), daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def test_urls_are_fetched_and_named(server: str) -> None:
    assert torch.equal(pixels(f"{server}/page.png"), pixels(noise_image(20, 30)))
    with pytest.raises(ValueError, match=f"Cannot read '{server}/other.png' as an image: HTTP Error 404"):
        open_image(f"{server}/other.png")
    with pytest.raises(ValueError, match=r"Cannot read 'http://127.0.0.1:9/page.png' as an image: .*refused"):
        open_image("http://127.0.0.1:9/page.png")
