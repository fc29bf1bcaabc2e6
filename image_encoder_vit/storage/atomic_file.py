"""Files that appear complete or not at all, and stay after a power failure."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """
    Gives a hidden path beside `path` to write to. When the body ends, that file is brought to the disk and renamed to
    `path`, replacing what was there; when it raises, the file is removed and `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def partial_path(path: Path) -> Path:
    """Where this process writes the file that becomes `path`; a killed process leaves it behind."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def sync(path: Path) -> None:
    """Brings a file, or a folder's list of names, to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Folders cannot be opened there.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
