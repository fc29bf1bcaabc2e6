"""
Damaged image files: whatever is done to one, it is read or refused in one ValueError that names it.

`IMAGE_FUZZ_CASES=30000 python -m pytest tests/test_image_fuzz.py` tries more cases than the usual; each has its own
number, from which it can be made again.
"""

import io
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from test_image_processing import noise_image

from image_encoder_vit.image_reading import _jpeg_segments, _png_chunks, _riff_chunks, decode_image, tiff_form, to_rgb

CASES = int(os.environ.get("IMAGE_FUZZ_CASES", "500"))
SIZE = (40, 56)
METADATA = {"png": (b"iCCP", b"tEXt", b"zTXt", b"eXIf", b"pHYs"), "webp": (b"ICCP", b"EXIF", b"XMP ")}
METADATA_TAGS = (270, 282, 283, 305, 34665, 34675)

# Warnings about damage are right here.
pytestmark = pytest.mark.filterwarnings("ignore")


def seeds() -> list[tuple[str, bytes]]:
    """Whole image files in all four formats, with all kinds of metadata."""
    image = noise_image(*SIZE).resize((SIZE[1], SIZE[0]))
    exif = Image.Exif()
    exif[0x0112] = 1
    exif[0x010F] = "a maker"
    exif.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    rich = {"exif": exif, "icc_profile": profile}
    text = Image.new("L", SIZE[::-1], 9)
    forms: list[tuple[str, Image.Image, dict[str, object]]] = [
        ("jpeg", image, rich | {"comment": b"hello"}),
        ("jpeg", image, {"progressive": True, "quality": 30}),
        ("jpeg", image.convert("CMYK"), {}),
        ("jpeg", text, {}),
        ("png", image, rich),
        ("png", image.quantize(16), {"transparency": 3}),
        ("png", Image.fromarray(np.arange(40 * 56, dtype=np.uint16).reshape(SIZE) * 20), {}),
        ("webp", image, rich),
        ("webp", image, rich | {"lossless": True}),
        ("webp", image, {}),
        ("tiff", image, rich | {"description": "a page"}),
        ("tiff", image, {"compression": "tiff_lzw", "dpi": (300, 300)}),
        ("tiff", image, {"compression": "jpeg"}),
        ("tiff", text.convert("1"), {"compression": "group4"}),
        (
            "tiff",
            image,
            {"save_all": True, "append_images": [text], "big_tiff": True},
        ),
    ]
    files = []
    for kind, picture, options in forms:
        file = io.BytesIO()
        picture.copy().save(file, kind, **options)  # Saving leaves settings of the coder on an image.
        files.append((kind, file.getvalue()))
    return files


SEEDS = seeds()


def some_bytes(chance: random.Random, length: int) -> bytes:
    choice = chance.randrange(3)
    return bytes(length) if choice == 0 else b"\xff" * length if choice == 1 else chance.randbytes(length)


def damaged_at_random(data: bytes, chance: random.Random) -> bytes:
    """The file with some bytes changed, left out, repeated, put in, or with its end cut off."""
    damaged = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 5, 20))):
        if not damaged:
            break
        at, length = chance.randrange(len(damaged)), chance.choice((1, 1, 2, 4, 16, 200))
        kind = chance.randrange(6)
        if kind <= 1:
            damaged[at] ^= 1 << chance.randrange(8)
        elif kind == 2:
            damaged[at : at + length] = some_bytes(chance, min(length, len(damaged) - at))
        elif kind == 3:
            del damaged[at : at + length]
        elif kind == 4:
            damaged[at:at] = damaged[at : at + length] if chance.random() < 0.5 else some_bytes(chance, length)
        else:
            del damaged[at if chance.random() < 0.5 else -length :]
    return bytes(damaged)


def parts(kind: str, data: bytes) -> list[tuple[bytes, bool, bytes]]:
    """The parts that a file consists of: name, whether it is metadata, and content."""
    if kind == "png":
        return [(name, name in METADATA[kind], chunk[8:-4]) for name, chunk in _png_chunks(data)]
    if kind == "webp":
        return [(name, name in METADATA[kind], content) for name, content in _riff_chunks(data)]
    segments = [
        (bytes([marker]), marker in (0xE1, 0xE2, 0xED, 0xFE), content) for marker, content, _ in _jpeg_segments(data)
    ]
    end = max(end for _, _, end in _jpeg_segments(data))
    return [*segments, (b"", False, data[end:])]


def joined(kind: str, data: bytes, parts: list[tuple[bytes, bool, bytes]], chance: random.Random, lies: bool) -> bytes:
    """A file of these parts, with right lengths and checksums unless it `lies`."""
    chosen = chance.randrange(len(parts)) if lies else -1
    body = b""
    for number, (name, _, content) in enumerate(parts):
        length = len(content)
        if number == chosen:
            length = max(0, length + chance.choice((-1, 1, -8, 60000, 1 << 31))) & 0xFFFFFFFF
        if kind == "png":
            body += struct.pack(">I", length) + name + content + struct.pack(">I", zlib.crc32(name + content))
        elif kind == "webp":
            body += name + struct.pack("<I", length) + content + b"\0" * (len(content) % 2)
        else:
            body += (b"\xff" + name + struct.pack(">H", (length + 2) & 0xFFFF) if name else b"") + content
    if kind == "webp":
        return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body
    return data[:8] + body if kind == "png" else data[:2] + body


def damaged_by_structure(kind: str, data: bytes, chance: random.Random) -> bytes:
    """The file with whole parts changed, left out, repeated or moved, the rest fitted to it."""
    if kind == "tiff":
        return with_changed_tags(data, chance, None)
    pieces = parts(kind, data)
    for _ in range(chance.choice((1, 1, 2))):
        at = chance.randrange(len(pieces))
        name, is_metadata, content = pieces[at]
        what = chance.randrange(5)
        if what == 0:
            pieces[at] = (name, is_metadata, damaged_at_random(content, chance))
        elif what == 1 and len(pieces) > 1:
            del pieces[at]
        elif what == 2:
            pieces.insert(chance.randrange(len(pieces)), pieces[at])
        elif what == 3:
            pieces[at] = (name, is_metadata, some_bytes(chance, chance.randrange(12)))
        else:
            pieces[at] = (chance.choice(pieces)[0], is_metadata, content)
    return joined(kind, data, pieces, chance, lies=chance.random() < 0.2)


def with_changed_tags(data: bytes, chance: random.Random, tags: tuple[int, ...] | None) -> bytes:
    """A TIFF file with the type, count or value of some tags of its first page changed, of all tags or of these."""
    form = tiff_form(data)
    damaged = bytearray(data)
    (start,) = struct.unpack_from(form.offset_form, data, form.first)
    (count,) = struct.unpack_from(form.count_form, data, start)
    begin = start + struct.calcsize(form.count_form)
    entries = [begin + number * form.entry_bytes for number in range(count)]
    wanted = [e for e in entries if tags is None or struct.unpack_from(f"{form.order}H", data, e)[0] in tags]
    for entry in chance.sample(wanted, min(len(wanted), chance.choice((1, 1, 2)))):
        what = chance.randrange(4 if tags is None else 3)
        if what == 0:
            struct.pack_into(f"{form.order}H", damaged, entry + 2, chance.choice((0, 2, 3, 5, 7, 12, 99)))
        elif what == 1:
            size = struct.calcsize(form.offset_form)
            struct.pack_into(f"{form.order}I", damaged, entry + 4, chance.choice((0, 1, 3, 1000, 1 << 31)))
            damaged[entry + 4 + size : entry + form.entry_bytes] = damaged[entry + 4 + size : entry + form.entry_bytes]
        elif what == 2:
            size = struct.calcsize(form.offset_form)
            damaged[entry + 4 + size : entry + form.entry_bytes] = some_bytes(chance, form.entry_bytes - 4 - size)
        else:
            struct.pack_into(f"{form.order}H", damaged, entry, chance.choice((256, 257, 258, 259, 262, 277, 322, 274)))
    return bytes(damaged)


def with_damaged_metadata(kind: str, data: bytes, chance: random.Random) -> bytes | None:
    """The file with damage in its metadata alone; None if it has none."""
    if kind == "tiff":
        return with_changed_tags(data, chance, METADATA_TAGS)
    pieces = parts(kind, data)
    places = [at for at, (_, is_metadata, _) in enumerate(pieces) if is_metadata]
    if not places:
        return None
    at = chance.choice(places)
    name, _, content = pieces[at]
    content = damaged_at_random(content, chance) if chance.random() < 0.7 else some_bytes(chance, chance.randrange(30))
    pieces[at] = (name, True, content[:60000])
    return joined(kind, data, pieces, chance, lies=False)


@pytest.fixture(autouse=True)
def small_bombs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged size may claim 100 million px, which are fine but slow."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)


@pytest.mark.parametrize("way", ["at random", "by structure"])
def test_damaged_files_are_read_or_refused_by_name(way: str, tmp_path: Path) -> None:
    outcomes = [0, 0]
    for case in range(CASES):
        chance = random.Random(f"{way} {case}")
        kind, data = chance.choice(SEEDS)
        damaged = damaged_at_random(data, chance) if way == "at random" else damaged_by_structure(kind, data, chance)
        path = tmp_path / f"case{case}.{kind}"
        path.write_bytes(damaged)
        try:
            image = to_rgb(path)
        except ValueError as error:
            assert str(error).startswith(f"Cannot read '{path}' as an image: "), case  # noqa: PT017
            outcomes[0] += 1
        else:
            assert image.mode == "RGB"
            assert np.asarray(image).shape == (image.height, image.width, 3)
            outcomes[1] += 1
        path.unlink()
    assert min(outcomes) > CASES / 20, outcomes  # Both happen, or nothing is tried.


def test_pages_with_damaged_metadata_are_read() -> None:
    whole = [np.asarray(to_rgb(decode_image(data))) for _, data in SEEDS]
    tried = 0
    for case in range(CASES):
        chance = random.Random(f"metadata {case}")
        number = chance.randrange(len(SEEDS))
        kind, data = SEEDS[number]
        damaged = with_damaged_metadata(kind, data, chance)
        if damaged is None or damaged == data:
            continue
        tried += 1
        image = np.asarray(to_rgb(decode_image(damaged)))
        turned = [np.rot90(way, turns) for way in (image, image[:, ::-1]) for turns in range(4)]
        assert any(np.array_equal(way, whole[number]) for way in turned), case
    assert tried > CASES / 3
