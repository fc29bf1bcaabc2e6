"""A safetensors file written while its tensors are still being made, one at a time: none stays in memory."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from .safetensors_format import LENGTH_BYTES


class SafetensorsWriter:
    """
    Writes tensors to `path` as they come, for a `with` statement; `finish` completes the file.

    The header, which names every tensor, stands before all of them: `header_bytes` are kept free for it, and what it
    does not need is filled with spaces, as the format allows.
    """

    def __init__(self, path: Path, header_bytes: int) -> None:
        self.path = path
        self.header_bytes = header_bytes + -header_bytes % 8
        self.entries: dict[str, Any] = {}
        self.end = 0  # Of the tensors that are there as a whole, from the first on.
        self._file: BinaryIO | None = None

    def __enter__(self) -> "SafetensorsWriter":
        self._file = self.path.open("wb")
        self._file.seek(LENGTH_BYTES + self.header_bytes)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._file.close()

    def add(self, name: str, dtype: str, shape: Sequence[int], data: Any) -> None:
        """
        Appends a tensor: its name, dtype as the format names it, shape, and bytes.

        Raises:
            OSError: If it cannot be written; the tensors before it stay.
        """
        assert self._file is not None
        assert name not in self.entries
        end = self.end + memoryview(data).nbytes
        self._file.write(data)
        self.entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [self.end, end]}
        self.end = end

    def finish(self, metadata: Mapping[str, str]) -> None:
        """
        Writes the header for what was added as a whole.

        Raises:
            ValueError: If it needs more bytes than were kept for it.
            OSError: If it cannot be written.
        """
        assert self._file is not None
        header = encoded_json({"__metadata__": dict(metadata), **self.entries})
        if len(header) > self.header_bytes:
            raise ValueError(f"The header needs {len(header)} bytes, {self.header_bytes} were kept for it.")
        self._file.truncate(LENGTH_BYTES + self.header_bytes + self.end)
        self._file.seek(0)
        self._file.write(self.header_bytes.to_bytes(LENGTH_BYTES, "little") + header.ljust(self.header_bytes))
        self._file.flush()


def encoded_json(value: Any) -> bytes:
    """A value as JSON without spaces, in UTF-8."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
