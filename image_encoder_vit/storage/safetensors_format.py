"""
The safetensors file format, read defensively and written one tensor at a time.

A file is 8 bytes of header length (little endian), a JSON header, and the tensors' bytes. Headers come from strangers:
nothing is allocated from what a header claims before the claim has been checked against the size of the file.
Format after the description in the safetensors repository (v0.4), and as strict as its own parser; ours also refuses
names that could be taken for paths and has a lower bound on the header.
"""

import json
import re
import struct
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, BinaryIO, NamedTuple

LENGTH_BYTES = 8
# 16 MiB of JSON describe over 100,000 tensors and take about 100 MB as Python objects. The format allows 100 MB.
MAX_HEADER_BYTES = 16 << 20
MAX_DIMENSIONS = 16
BITS_PER_VALUE = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **dict.fromkeys(("F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
# A dtype of a later version of the format: no reason to refuse a file for tensors that nobody asks for.
DTYPE_NAME = re.compile(r"[A-Z][A-Z0-9_]{0,31}")
LFS_POINTER = b"version https://git-lfs"


class TensorSpec(NamedTuple):
    """Where a tensor lies: `start` and `end` are bytes from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.start


def check_no_pointer(start: bytes, where: str) -> None:
    """
    Checks that a file, which begins with `start`, is not the few lines that Git leaves in place of a large one.

    Raises:
        ValueError: If it is.
    """
    if len(start) >= LENGTH_BYTES and start[: len(LFS_POINTER)] == LFS_POINTER[: len(start)]:
        raise ValueError(f"{where} is a Git LFS pointer, not the file itself: run `git lfs pull` where it lies.")


def header_length(prefix: bytes, file_bytes: int, where: str) -> int:
    """
    The length of the JSON header in bytes, from the first 8 bytes or more of a file of `file_bytes` bytes.

    Raises:
        ValueError: If the file cannot hold such a header, naming `where` it was read.
    """
    check_no_pointer(prefix, where)
    if file_bytes < LENGTH_BYTES or len(prefix) < LENGTH_BYTES:
        raise ValueError(f"{where} is no safetensors file: it has {file_bytes} bytes, fewer than a header.")
    (length,) = struct.unpack("<Q", prefix[:LENGTH_BYTES])
    if length > file_bytes - LENGTH_BYTES:
        raise ValueError(
            f"{where} is no safetensors file, or is cut off: its header claims {length} bytes, "
            f"the whole file has {file_bytes}."
        )
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"The header of {where} claims {length} bytes, more than the {MAX_HEADER_BYTES} accepted.")
    return int(length)


def parse_header(header: bytes, file_bytes: int, where: str) -> dict[str, TensorSpec]:
    """
    The tensors of a file of `file_bytes` bytes from its JSON header (without the 8 bytes before it).

    Raises:
        ValueError: If the header is not valid, or does not describe exactly the bytes that follow it, naming `where`
            it was read and what is wrong.
    """
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=no_duplicates, parse_constant=_no_constants)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The header of {where} cannot be read: {str(error)[:200]}") from None
    if not isinstance(entries, dict):
        raise ValueError(f"The header of {where} is no JSON object.")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"The __metadata__ in the header of {where} does not map names to strings.")

    data_start = LENGTH_BYTES + len(header)
    specs = {name: _parse_entry(name, entry, data_start, where) for name, entry in entries.items()}
    position = data_start
    for name, spec in sorted(specs.items(), key=lambda item: (item[1].start, item[1].end)):
        if spec.start != position:
            what = "overlaps the tensor before it" if spec.start < position else "leaves a gap before it"
            raise ValueError(f"Tensor {_shown(name)} in {where} {what}: it starts at {spec.start}, not {position}.")
        position = spec.end
    if position != file_bytes:
        raise ValueError(f"The tensors in {where} end at byte {position}, the file at {file_bytes}: it is damaged.")
    return specs


def _parse_entry(name: str, entry: Any, data_start: int, where: str) -> TensorSpec:
    tensor = f"Tensor {_shown(name)} in {where}"
    if not name or not name.isprintable() or "/" in name or "\\" in name or ".." in name:
        raise ValueError(f"{tensor} has a name that could be taken for a path, or is empty or not printable.")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{tensor} must have dtype, shape and data_offsets, and nothing else.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not DTYPE_NAME.fullmatch(dtype):
        raise ValueError(f"{tensor} has the unknown dtype {_shown(dtype)}.")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{tensor} has no valid shape: {_shown(shape)}.")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{tensor} has no valid data_offsets: {_shown(offsets)}.")
    claimed_bits = prod(shape) * BITS_PER_VALUE[dtype] if dtype in BITS_PER_VALUE else None
    if claimed_bits is not None and claimed_bits != 8 * (offsets[1] - offsets[0]):
        raise ValueError(
            f"{tensor} claims {dtype} of shape {_shown(shape)}, {claimed_bits / 8:.4g} bytes, "
            f"but its data_offsets span {offsets[1] - offsets[0]:.4g}."
        )
    return TensorSpec(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _are_sizes(values: Any) -> bool:
    """Whether the value is a list of whole numbers from 0 to 2**63, as a file of any possible size has them."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _shown(value: Any) -> str:
    """A hostile value, short enough for one line of an error message."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`: an object whose names all differ. Raises a ValueError for others, naming one."""
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {_shown(twice)} occurs twice")
    return unique


def _no_constants(constant: str) -> Any:
    raise ValueError(f"{constant} is no valid JSON")


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor of one of the format's dtypes."""
    return prod(shape) * BITS_PER_VALUE[dtype] // 8


def build_header(tensors: Mapping[str, tuple[str, Iterable[int]]]) -> tuple[bytes, list[str]]:
    """
    The beginning of a file that holds `tensors`, name to (dtype, shape): its bytes, length included, and the order in
    which the tensors' bytes must follow. Both are what `safetensors.torch.save_file` writes for one dtype and the
    metadata `{"format": "pt"}`, which transformers wants.
    """
    names = sorted(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in names:
        dtype, shape = tensors[name][0], list(tensors[name][1])
        end = position + tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded, names


def read_header(file: BinaryIO, file_bytes: int, where: str) -> dict[str, TensorSpec]:
    """
    The tensors of an open local file.

    Raises:
        ValueError: As `parse_header`.
    """
    length = header_length(file.read(LENGTH_BYTES), file_bytes, where)
    return parse_header(file.read(length), file_bytes, where)
