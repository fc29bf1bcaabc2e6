"""
Images in any form, made upright 8-bit RGB: files, URLs, base64 strings, PIL images, arrays and tensors.

What is wrong with an image is a ValueError with the value seen; a file is named in it. Damage that leaves the pixels
whole, in EXIF, a colour profile or a text, is no reason to refuse a page.
"""

import base64
import binascii
import io
import os
import stat
import struct
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from transformers.image_utils import ChannelDimension

URL_PREFIXES = ("http://", "https://")
DATA_URL_PREFIX = "data:image/"
URL_TIMEOUT_S = 60
MAX_NAME_CHARACTERS = 200  # Of a source in an error's message: a base64 string may have millions.
LEAST_BASE64_CHARACTERS = 64

CHANNELS = (1, 3, 4)
PIL_16_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
# What resizing may make of pixels: bicubic interpolation overshoots at edges. Within it values are clamped.
OVERSHOOT = 0.25
# Floats between 1 + OVERSHOOT and this, or integers up to that, are in no range for sure.
DARKEST_FLOATS, DARKEST_16_BIT = 16, 1024
ROWS_AT_ONCE = 256  # Bounds the memory of conversions.

TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Tags that say where a TIFF page's pixels are and how they are coded: TIFF 6.0, and the technical notes on JPEG.
TIFF_PIXEL_TAGS = {
    *(254, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325),
    *(332, 338, 339, 347, 512, 513, 514, 515, 519, 520, 521, 529, 530, 531, 532),
}


class ImageTypeError(ValueError, TypeError):
    """Something that is no image at all, by its type."""


class RgbImage(NamedTuple):
    """An upright 8-bit RGB image, and whether its pixels were given as floats from 0 to 1."""

    image: Image.Image
    is_unit: bool


def open_image(source: str | os.PathLike[str]) -> Image.Image:
    """
    Opens an image file, a URL, a data URL or a base64 string: decoded completely and turned upright. Of a file with
    several pages it is the first.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no image, is damaged, cannot be fetched or is too large to decode, naming it and the
            reason.
    """
    name = os.fspath(source)
    try:
        if isinstance(source, str) and (data := _bytes_of_string(source)) is not None:
            return decode_image(data)
        if not stat.S_ISREG(os.stat(name).st_mode):
            raise ValueError("it is no regular file")
        with open(name, "rb") as file:
            return decode_image(file.read())
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"No image file at {_shown(name)}.") from None
    except Exception as error:  # Decoders raise nearly anything for damaged data.
        raise ValueError(f"Cannot read {_shown(name)} as an image: {_reason(error)}") from error


def _shown(name: str | bytes) -> str:
    text = repr(name)
    return text if len(text) <= MAX_NAME_CHARACTERS else f"{text[:MAX_NAME_CHARACTERS]}..."


def _reason(error: BaseException) -> str:
    return str(error).strip() or type(error).__name__


def _bytes_of_string(source: str) -> bytes | None:
    """The data of a URL, a data URL or a base64 string; None for what must be a path."""
    if source.startswith(URL_PREFIXES):
        with urllib.request.urlopen(source, timeout=URL_TIMEOUT_S) as response:
            return bytes(response.read())
    if source.startswith(DATA_URL_PREFIX):
        return base64.b64decode(source.partition(",")[2])
    if len(source) < LEAST_BASE64_CHARACTERS or os.path.exists(source):
        return None
    try:
        data = base64.b64decode("".join(source.split()), validate=True)
    except (binascii.Error, ValueError):
        return None
    return data if _format_of(data) else None


def _format_of(data: bytes) -> str | None:
    """The image format that data are in by their first bytes."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    beginnings = {
        "jpeg": (b"\xff\xd8\xff",),
        "png": (b"\x89PNG\r\n\x1a\n",),
        "tiff": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
        "gif": (b"GIF87a", b"GIF89a"),
        "bmp": (b"BM",),
        "jpeg 2000": (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"),
    }
    return next((name for name, starts in beginnings.items() if data.startswith(starts)), None)


def decode_image(data: bytes) -> Image.Image:
    """
    The image of an image file's bytes, decoded and upright; of several pages the first.

    Raises:
        ValueError: If it is no image, or its pixels cannot be decoded.
        Exception: What else PIL raises for damaged pixels.
    """
    if not data:
        raise ValueError("the file is empty")
    try:
        return upright(_decode(data))
    except UnidentifiedImageError:
        error: Exception = ValueError("it is not in an image format that is known, or its beginning is damaged")
    except Image.DecompressionBombError:
        raise
    except Exception as caught:
        error = caught
    plain = without_metadata(data)
    if plain is None:
        raise error
    try:
        image = upright(_decode(plain))
    except Exception:
        raise error from None
    return _transposed(image, orientation_in_file(data))


def _decode(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        check_image_size((image.height, image.width))
        image.load()
        return image


def upright(image: Image.Image) -> Image.Image:
    """The image turned by its EXIF orientation, as far as that can be read; itself where there is nothing to turn."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Damaged EXIF: the one value may still be there.
        orientation = exif_orientation(image.info.get("exif", b""))
    return _transposed(image, orientation)


def _transposed(image: Image.Image, orientation: Any) -> Image.Image:
    if isinstance(orientation, int) and orientation in TRANSPOSES:
        return image.transpose(TRANSPOSES[orientation])
    return image


# What is left of a file when all is taken out that its pixels do not need.


def without_metadata(data: bytes) -> bytes | None:
    """
    An image file with nothing but what its pixels need; None if it is of another format than JPEG, PNG, WebP and
    TIFF, or too damaged to tell.
    """
    strip = {"jpeg": _plain_jpeg, "png": _plain_png, "webp": _plain_webp, "tiff": _plain_tiff}.get(
        _format_of(data) or ""
    )
    try:
        return strip(data) if strip else None
    except (struct.error, IndexError):
        return None


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Marker, content and end in bytes of each segment before the pixels."""
    position = 2
    while data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # Fill bytes.
            position += 1
            continue
        (length,) = struct.unpack_from(">H", data, position + 2)
        end = position + 2 + length
        yield marker, data[position + 4 : end], end
        if marker == 0xDA:  # The pixels follow.
            return
        position = end


def _plain_jpeg(data: bytes) -> bytes:
    kept = [data[:2]]
    for marker, content, end in _jpeg_segments(data):
        # Of application data, Adobe's tells the colour space.
        is_adobe = marker == 0xEE and len(content) >= 12 and content.startswith(b"Adobe")
        if is_adobe or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content)
        if marker == 0xDA:
            kept.append(data[end:])
    return b"".join(kept)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name of each chunk, and the whole of it."""
    position = 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 12 + length
        yield data[position + 4 : position + 8], data[position:end]
        position = end


def _plain_png(data: bytes) -> bytes:
    # A name in capitals is of a chunk that pixels need.
    return data[:8] + b"".join(chunk for name, chunk in _png_chunks(data) if name[:1].isupper())


def _riff_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name and content of each chunk of a WebP file."""
    position = 12
    while position + 8 <= len(data):
        (length,) = struct.unpack_from("<I", data, position + 4)
        yield data[position : position + 4], data[position + 8 : position + 8 + length]
        position += 8 + length + length % 2


def _plain_webp(data: bytes) -> bytes:
    kept = []
    for name, content in _riff_chunks(data):
        if name in (b"ICCP", b"EXIF", b"XMP "):
            continue
        if name == b"VP8X":
            content = bytes([content[0] & ~0x2C]) + content[1:]  # It tells which of these follow.
        kept.append(name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2))
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body


class TiffForm(NamedTuple):
    """How numbers are written in a TIFF file: their order, and the form of counts and offsets."""

    order: str
    count_form: str
    offset_form: str
    first: int  # Where the offset of the first page stands.
    entry_bytes: int


def tiff_form(data: Any) -> TiffForm:
    """The form of a TIFF file, plain or BigTIFF, by its first bytes."""
    order = "<" if data[:2] == b"II" else ">"
    if struct.unpack_from(f"{order}H", data, 2)[0] == 43:
        return TiffForm(order, f"{order}Q", f"{order}Q", 8, 20)
    return TiffForm(order, f"{order}H", f"{order}I", 4, 12)


def tiff_pages(data: Any) -> tuple[list[int], bool]:
    """
    Where the pages of a TIFF file begin, in bytes, and whether their list is whole: a page beyond the file's end, and
    those after it, are not in it.
    """
    form = tiff_form(data)
    starts: dict[int, None] = {}
    try:
        (start,) = struct.unpack_from(form.offset_form, data, form.first)
        while start and start not in starts:
            (count,) = struct.unpack_from(form.count_form, data, start)
            link = start + struct.calcsize(form.count_form) + count * form.entry_bytes
            (following,) = struct.unpack_from(form.offset_form, data, link)
            starts[start] = None
            start = following
    except struct.error:
        return list(starts), False
    return list(starts), True


def with_first_page(data: bytes, start: int) -> bytes:
    """A TIFF file whose first page is that which begins at byte `start`: no page before it has to be read."""
    form = tiff_form(data)
    after = form.first + struct.calcsize(form.offset_form)
    return data[: form.first] + struct.pack(form.offset_form, start) + data[after:]


def _plain_tiff(data: bytes) -> bytes:
    """Only the tags of the first page that say how its pixels are coded; later pages are left out."""
    form = tiff_form(data)
    (start,) = struct.unpack_from(form.offset_form, data, form.first)
    (count,) = struct.unpack_from(form.count_form, data, start)
    begin = start + struct.calcsize(form.count_form)
    entries = [data[begin + n * form.entry_bytes : begin + (n + 1) * form.entry_bytes] for n in range(count)]
    kept = [entry for entry in entries if struct.unpack_from(f"{form.order}H", entry)[0] in TIFF_PIXEL_TAGS]
    directory = struct.pack(form.count_form, len(kept)) + b"".join(kept) + struct.pack(form.offset_form, 0)
    return data[:start] + directory + data[start + len(directory) :]


def orientation_in_file(data: bytes) -> int:
    """The EXIF orientation in a JPEG, PNG or WebP file, 1 where there is none or it cannot be read."""
    kind = _format_of(data)
    try:
        if kind == "jpeg":
            content = next(content for marker, content, _ in _jpeg_segments(data) if content.startswith(b"Exif\0\0"))
            return exif_orientation(content)
        if kind == "png":
            return exif_orientation(next(chunk for name, chunk in _png_chunks(data) if name == b"eXIf")[8:])
        if kind == "webp":
            return exif_orientation(next(content for name, content in _riff_chunks(data) if name == b"EXIF"))
    except (StopIteration, struct.error, IndexError):
        pass
    return 1


def exif_orientation(exif: bytes) -> int:
    """The orientation, 1 to 8, in EXIF data, whatever else of them is damaged; 1 where there is none."""
    exif = exif.removeprefix(b"Exif\0\0")
    if exif[:2] not in (b"II", b"MM"):
        return 1
    form = tiff_form(exif.ljust(4, b"\0"))
    try:
        (start,) = struct.unpack_from(form.offset_form, exif, form.first)
        (count,) = struct.unpack_from(form.count_form, exif, start)
        for number in range(count):
            entry = start + struct.calcsize(form.count_form) + number * form.entry_bytes
            tag, kind = struct.unpack_from(f"{form.order}HH", exif, entry)
            if tag == ExifTags.Base.Orientation and kind == 3:
                value = struct.unpack_from(
                    f"{form.order}H", exif, entry + form.entry_bytes - struct.calcsize(form.offset_form)
                )
                return int(value[0])
    except struct.error:
        pass
    return 1


# Everything as 8-bit RGB.


def to_rgb(
    image: Any, do_convert_rgb: bool | None = True, input_data_format: str | ChannelDimension | None = None
) -> Image.Image:
    """
    One image as an upright 8-bit RGB image.

    - A path, URL or base64 string is opened, see `open_image`.
    - A PIL image is turned upright by its EXIF orientation. Grey, palette and CMYK are converted as PIL converts
      them; an alpha channel is dropped, as in DeepSeek-OCR's own loading and in transformers' pipelines. 16-bit grey
      is scaled to 8 bits.
    - An array or tensor may be (height, width), or have 1, 3 or 4 channels first or last; where both could be meant
      `input_data_format` has to say it. Integers are 0 to 255 (uint16: 0 to 65535, wider ones if any value is 1024 or
      more), booleans black and white. Floats are 0 to 1, or 0 to 255 if any value is 16 or more; what resizing lets
      overshoot a little is clamped.

    Raises:
        FileNotFoundError: If there is no file at a path.
        ValueError: For another shape, an image without pixels, values out of range, or a file that is no image; with
            the value seen. For something that is no image at all, one that is a TypeError too.
    """
    return to_rgb_image(image, do_convert_rgb, input_data_format).image


def to_rgb_image(
    image: Any, do_convert_rgb: bool | None = True, input_data_format: str | ChannelDimension | None = None
) -> RgbImage:
    """As `to_rgb`, with the range that floats were given in."""
    is_unit = False
    if isinstance(image, (str, os.PathLike)):
        opened = open_image(image)
        try:
            return RgbImage(_rgb(opened, do_convert_rgb), False)
        except Exception as error:
            raise ValueError(f"Cannot read {_shown(os.fspath(image))} as an image: {_reason(error)}") from error
    if isinstance(image, Image.Image):
        check_image_size((image.height, image.width))
        return RgbImage(_rgb(upright(image), do_convert_rgb), False)
    if isinstance(image, (np.ndarray, torch.Tensor)):
        array = to_channels_last(_as_array(image), input_data_format)
        pixels, is_unit = to_8_bit(array)
        return RgbImage(_rgb(Image.fromarray(pixels), do_convert_rgb), is_unit)
    raise ImageTypeError(f"Expected an image (PIL, NumPy, PyTorch), a path or a URL, got {type(image).__name__}.")


def _rgb(image: Image.Image, do_convert_rgb: bool | None) -> Image.Image:
    if image.mode in PIL_16_BIT_MODES:
        image = Image.fromarray(to_8_bit(np.asarray(image).astype(np.uint16, copy=False))[0])
    elif image.mode in ("I", "F"):
        array = np.asarray(image)
        # Pixels of a file: 32 bits that hold 16, however dark the page is.
        if image.mode == "I" and array.min() >= 0 and 255 < array.max() <= 65535:
            array = array.astype(np.uint16)
        image = Image.fromarray(to_8_bit(array)[0])
    if image.mode == "RGB":
        return image
    if not do_convert_rgb:
        raise ValueError(f"The encoder needs RGB images, got mode {image.mode!r}: leave do_convert_rgb on.")
    return image.convert("RGB")


def _as_array(image: np.ndarray | torch.Tensor) -> np.ndarray:
    if not isinstance(image, torch.Tensor):
        array = image
    elif image.is_complex() or image.layout != torch.strided or image.is_meta or image.is_quantized:
        raise ValueError(f"Pixel values must be plain numbers, got a tensor of {image.dtype}, {image.layout}.")
    else:
        # NumPy knows no bfloat16 and no float8.
        array = (image.detach().cpu().float() if image.is_floating_point() else image.detach().cpu()).numpy()
    if array.dtype.kind not in "buif":
        raise ValueError(f"Pixel values must be numbers, got an array of {array.dtype}.")
    return array


def is_channels_first(shape: tuple[int, ...], input_data_format: str | ChannelDimension | None = None) -> bool:
    """
    Whether an array of three axes has its channels on the first, (C, height, width), and not on the last.

    Raises:
        ValueError: If neither has 1, 3 or 4 channels, the one that `input_data_format` names has not, or it is needed
            to tell.
    """
    if len(shape) != 3 or not (shape[0] in CHANNELS or shape[2] in CHANNELS):
        raise ValueError(
            f"An image array is (height, width), or has 1, 3 or 4 channels first or last, got shape {tuple(shape)}."
        )
    if input_data_format is not None:
        first = ChannelDimension(input_data_format) == ChannelDimension.FIRST
        channels = shape[0] if first else shape[2]
        if channels not in CHANNELS:
            raise ValueError(
                f"Expected 1, 3 or 4 channels by input_data_format={input_data_format}, got {channels} in shape "
                f"{tuple(shape)}."
            )
        return first
    first, last = shape[0] in CHANNELS, shape[2] in CHANNELS
    if not (first and last):
        return first
    # One row of colours, (1, width, 3), is a likelier image than a grey one 3 px wide; four rows than RGBA.
    if (shape[2] == 3 and shape[0] != 3) or (shape[2] == 4 and shape[0] == 1):
        return False
    raise ValueError(
        f"An array of shape {tuple(shape)} may have its channels first or last: say which by "
        'input_data_format="channels_first" or "channels_last".'
    )


def to_channels_last(array: np.ndarray, input_data_format: str | ChannelDimension | None) -> np.ndarray:
    """Brings (H, W), (C, H, W) or (H, W, C) to (H, W) or (H, W, 3 or 4)."""
    if array.ndim == 2:
        check_image_size(array.shape)
        return array
    if is_channels_first(array.shape, input_data_format):
        array = np.moveaxis(array, 0, 2)
    check_image_size(array.shape[:2])
    return array[..., 0] if array.shape[2] == 1 else array


def to_8_bit(array: np.ndarray) -> tuple[np.ndarray, bool]:
    """Pixel values of any dtype as uint8, by the rules of `to_rgb`, and whether they were floats from 0 to 1."""
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array), False
    if array.dtype == bool:
        return array.astype(np.uint8) * 255, False
    lowest, highest = array.min(), array.max()
    is_unit = False
    convert: Callable[[np.ndarray], np.ndarray] | None = None
    if np.issubdtype(array.dtype, np.floating):
        if lowest >= -OVERSHOOT and highest <= 1 + OVERSHOOT:
            convert, is_unit = _from_unit, True
        elif lowest >= -OVERSHOOT * 255 and DARKEST_FLOATS <= highest <= (1 + OVERSHOOT) * 255:
            convert = _from_8_bit_floats
    elif lowest >= 0 and (array.dtype == np.uint16 or DARKEST_16_BIT <= highest <= 65535):
        convert = _from_16_bit
    elif lowest >= 0 and highest <= 255:
        convert = _from_8_bit
    if convert is None:
        raise ValueError(
            "Pixel values must be 0 to 255 (uint16: 0 to 65535, wider integers too if any is 1024 or more; floats 0 to "
            f"1, or 0 to 255 if any is 16 or more), got {lowest} to {highest} as {array.dtype}. Are they normalised "
            "already? Else scale them, or convert them to uint8."
        )
    pixels = np.empty(array.shape, np.uint8)
    for row in range(0, len(array), ROWS_AT_ONCE):
        pixels[row : row + ROWS_AT_ONCE] = convert(array[row : row + ROWS_AT_ONCE])
    return pixels, is_unit


def _from_unit(values: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(values.astype(np.float64), 0, 1) * 255)


def _from_8_bit_floats(values: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(values, 0, 255))


def _from_16_bit(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.uint32) + 128) // 257  # To the nearest: 65535 = 255 * 257.


def _from_8_bit(values: np.ndarray) -> np.ndarray:
    return values


def check_image_size(size: tuple[int, ...]) -> None:
    """Raises a ValueError for an image of (height, width) px that has no pixels."""
    if min(size) < 1:
        raise ValueError(f"An image must have pixels, got {size[0]} x {size[1]} px (height x width).")
