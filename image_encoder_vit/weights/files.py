"""Which files of a folder or repository make up its checkpoint, and reading tensors from such files on this disk."""

import json
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch

from ..storage.safetensors_format import TensorSpec, check_no_pointer, no_duplicates, read_header
from ..support import message_of, visible
from .inference import Shape
from .naming import listed

MAX_INDEX_BYTES = 16 << 20
PICKLE_SUFFIXES = (".pth", ".pt", ".bin")
# In this order, as transformers looks for them; a repository that has several holds the same weights in each.
INDEX_SUFFIX = ".index.json"
USUAL_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
FORMATS = (".safetensors" + INDEX_SUFFIX, ".safetensors", ".bin" + INDEX_SUFFIX, *PICKLE_SUFFIXES)

TORCH_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
FORMAT_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class LocalTensors:
    """
    Floating-point tensors in safetensors files on this disk, read one by one so that memory holds no more than one.

    `entries` maps each name to its file and place. The files are not mapped into memory: mapped pages would count as
    ours.
    """

    def __init__(self, entries: Mapping[str, tuple[Path, TensorSpec]]) -> None:
        self._entries = entries
        self.shapes: dict[str, Shape] = {name: spec.shape for name, (_, spec) in entries.items()}

    @classmethod
    def open(cls, paths: Iterable[Path]) -> "LocalTensors":
        """
        All tensors of some files.

        Raises:
            ValueError: If a header is not valid, or two files hold a tensor of one name.
        """
        entries: dict[str, tuple[Path, TensorSpec]] = {}
        for path in paths:
            with path.open("rb") as file:
                specs = read_header(file, path.stat().st_size, repr(path.name))
            twice = sorted(specs.keys() & entries.keys())
            if twice:
                raise ValueError(f"Two files hold a tensor {twice[0]!r}: {entries[twice[0]][0].name}, {path.name}.")
            entries.update({name: (path, spec) for name, spec in specs.items()})
        return cls(entries)

    def dtype(self, name: str) -> torch.dtype:
        """
        The dtype of a tensor.

        Raises:
            ValueError: If it is no floating-point tensor, as in quantised checkpoints.
        """
        return floating_dtype(name, self._entries[name][1].dtype)

    def read(self, name: str) -> torch.Tensor:
        """The tensor, in its own dtype and shape."""
        path, spec = self._entries[name]
        dtype = self.dtype(name)
        data = bytearray(spec.size)
        with path.open("rb") as file:
            file.seek(spec.start)
            if file.readinto(data) != spec.size:
                raise OSError(f"{path.name!r} was cut off while it was read: tensor {name!r} is not whole.")
        return torch.frombuffer(data, dtype=dtype).reshape(spec.shape)


class PickledTensors:
    """
    Tensors from files of torch.save, unpickled by torch's restricted loader, which runs no code from the file.

    Raises:
        ValueError: If a file holds anything but tensors by name.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        for path in paths:
            self._tensors.update(load_pickle(path))
        self.shapes: dict[str, Shape] = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        """As `LocalTensors.dtype`."""
        dtype = self._tensors[name].dtype
        return floating_dtype(name, FORMAT_DTYPES.get(dtype, str(dtype).removeprefix("torch.")))

    def read(self, name: str) -> torch.Tensor:
        """The tensor, in its own dtype and shape."""
        return self._tensors[name]


def floating_dtype(name: str, dtype: str) -> torch.dtype:
    """
    The torch dtype of one of the format's names.

    Raises:
        ValueError: If encoder weights cannot have it.
    """
    if dtype not in TORCH_DTYPES:
        raise ValueError(
            f"Tensor {name!r} is {dtype}; encoder weights must be one of {', '.join(TORCH_DTYPES)}. "
            "Quantised checkpoints cannot be converted: pull the original."
        )
    return TORCH_DTYPES[dtype]


def load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """
    The tensors of one file of torch.save, mapped into memory where its format allows.

    Raises:
        ValueError: If the restricted loader refuses the file, or it holds anything but tensors by name.
    """
    with path.open("rb") as file:
        check_no_pointer(file.read(64), repr(path.name))
    check_archive(path)
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, ValueError):
            # Files older than torch 1.6 are no zip archives, and cannot be mapped.
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, ImportError, TypeError,
        IndexError, OverflowError, MemoryError, RecursionError,
    ) as error:  # fmt: skip
        raise ValueError(
            f"{path.name!r} is no file of plain tensors, or is damaged; it was not unpickled: {message_of(error)[:200]}"
        ) from None
    content = without_training_state(content)
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in content.items()
    ):
        raise ValueError(f"{path.name!r} does not hold tensors by name, but {type(content).__name__}.")
    for name, tensor in content.items():
        # A view may repeat one value any number of times, and is copied in full when it is written.
        if tensor.numel() * tensor.element_size() > path.stat().st_size:
            raise ValueError(
                f"{path.name!r} claims a tensor {visible(name)[:100]!r} of shape {tuple(tensor.shape)}, which is "
                "larger than the whole file."
            )
    return dict(content)


def without_training_state(content: Any) -> Any:
    """The weights of a training checkpoint, which holds the optimizer and counters beside them."""
    if isinstance(content, Mapping):
        for key in ("model", "state_dict"):
            if isinstance(content.get(key), Mapping):
                return content[key]
    return content


def check_archive(path: Path) -> None:
    """
    Checks that a file of torch.save, where it is a zip archive, unpacks to no more than its own size: torch stores its
    records uncompressed, so that they can be mapped into memory.

    Raises:
        ValueError: If it unpacks to more.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked_bytes = sum(record.file_size for record in archive.infolist())
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, EOFError) as error:
        raise ValueError(f"{path.name!r} is a damaged zip archive: {message_of(error)[:200]}") from None
    if unpacked_bytes > path.stat().st_size:
        raise ValueError(
            f"{path.name!r} is a compressed archive that unpacks from {path.stat().st_size:,} to {unpacked_bytes:,} "
            "bytes; torch.save does not compress. Load it where you trust it, and save it again."
        )


class CheckpointFile(NamedTuple):
    """The file that stands for the whole checkpoint: an index, or the checkpoint itself."""

    name: str

    @property
    def is_index(self) -> bool:
        """Whether it maps tensors to files instead of holding them."""
        return self.name.endswith(INDEX_SUFFIX)

    @property
    def is_safetensors(self) -> bool:
        """Whether the tensors are in safetensors files, not in pickles."""
        return self.name.removesuffix(INDEX_SUFFIX).endswith(".safetensors")


def select_checkpoint(names: Iterable[str], filename: str | None, where: str) -> CheckpointFile:
    """
    Chooses among the files of a folder or repository (paths with "/"), or takes `filename`.

    Safetensors come before pickles, the usual names before others; only the top folder is looked into.

    Raises:
        ValueError: If there is no checkpoint, or several and none was asked for, with what was found.
    """
    names = sorted(names)
    if filename is not None:
        if filename not in names:
            raise ValueError(f"{where} has no file {filename!r}. It has: {listed(names)}.")
        if not filename.endswith(FORMATS):
            raise ValueError(f"{filename!r} is no checkpoint: those end in {', '.join(FORMATS)}.")
        return CheckpointFile(filename)
    top = [name for name in names if "/" not in name]
    usual = [name for name in USUAL_NAMES if name in top]
    if usual:
        return CheckpointFile(usual[0])
    for suffix in FORMATS:
        found = [name for name in top if name.endswith(suffix)]
        if len(found) > 1:
            raise ValueError(f"{where} has several checkpoints: {listed(found)}. Choose one by --filename.")
        if found:
            return CheckpointFile(found[0])
    nested = [name for name in names if name.endswith(FORMATS)]
    hint = f" Below its folders: {listed(nested)}; choose one by --filename." if nested else ""
    raise ValueError(f"{where} has no checkpoint: looked for names that end in {', '.join(FORMATS)}.{hint}")


def parse_index(content: bytes, names: Iterable[str], index: str) -> dict[str, str]:
    """
    Tensor to file from the content of an index, checked against the files that exist (`names`).

    Raises:
        ValueError: If the index is damaged, or names a file that does not exist.
    """
    check_no_pointer(content, f"The index {index!r}")
    try:
        weight_map: Any = json.loads(content.decode("utf-8"), object_pairs_hook=no_duplicates)["weight_map"]
        files = set(weight_map.values())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"The index {index!r} cannot be read: {type(error).__name__}: {message_of(error)[:200]}"
        ) from None
    # Files are named relative to the index.
    folder = PurePosixPath(index).parent
    located = {file: (folder / file).as_posix() if isinstance(file, str) else "" for file in files}
    missing = sorted(repr(file) for file in files if located[file] not in set(names))
    if missing:
        raise ValueError(f"The index {index!r} names files that do not exist: {', '.join(missing[:5])}.")
    return {tensor: located[file] for tensor, file in weight_map.items()}


def parse_config(content: bytes) -> dict[str, Any]:
    """The content of a config.json, empty where it is none: it is a hint only."""
    try:
        config = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}
