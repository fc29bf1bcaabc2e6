"""
Makes a folder that appears complete or not at all: it is filled under a hidden name beside its place, locked against a
second process, brought to the disk and renamed.
"""

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .atomic_file import sync

try:
    import fcntl
except ImportError:  # Windows. The final rename still refuses to replace a folder, so nothing can be overwritten.
    fcntl = None  # type: ignore[assignment]


def check_free(output: Path) -> None:
    """
    Checks that the folder can be made.

    Raises:
        FileExistsError: If something is there already; an empty folder is accepted, a link to one is not.
    """
    if output.is_symlink():
        raise FileExistsError(f"{str(output)!r} is a link, which cannot become a folder: give the place it leads to.")
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists():
        raise FileExistsError(f"{str(output)!r} exists already: remove it, or choose another folder.")


def unfinished_path(output: Path, purpose: str = "unfinished") -> Path:
    """Where the folder is filled. Commands with another `purpose` use another place, and leave this one alone."""
    return output.parent / f".{output.name}.{purpose}"


@contextmanager
def unfinished_folder(output: Path, purpose: str = "unfinished") -> Iterator[Path]:
    """
    The hidden folder beside `output` to work in, which may hold what an interrupted process has left. For as long as
    it is open no other process gets it.

    Raises:
        FileExistsError: If `output` exists.
        BlockingIOError: If another process is making the same folder.
        OSError: If a folder cannot be made or replaced there, for whatever reason `publish` would meet.
    """
    folder = unfinished_path(output, purpose)
    while True:
        check_free(output)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_be_made(output, error) from None
        lock = _try_lock(folder)
        if lock is not None:
            break
    try:
        _check_replaceable(output, folder)
        yield folder
    finally:
        if lock >= 0:
            os.close(lock)


def _check_replaceable(output: Path, folder: Path) -> None:
    """
    Does to an empty `output` what `publish` does at the end, with an empty folder: a mount point cannot be replaced.
    One that does not exist needs no trial, as `folder`, of a longer name, could be made beside it.
    """
    if not output.is_dir():
        return
    trial = folder / "trial"
    trial.mkdir(exist_ok=True)
    try:
        trial.rename(output)
    except OSError as error:
        trial.rmdir()
        if not any(folder.iterdir()):
            folder.rmdir()
        raise _cannot_be_made(output, error) from None


def _cannot_be_made(output: Path, error: OSError) -> OSError:
    hint = " (is it a mount point? choose a folder in it)" if error.errno == errno.EBUSY else ""
    return OSError(error.errno, f"The folder cannot be made: {error.strerror}{hint}", str(output))


@contextmanager
def folder_lock(folder: Path, wait_s: float = 0) -> Iterator[None]:
    """
    Makes the folder and holds the lock on it: for as long as it is open no other process gets it.

    Raises:
        BlockingIOError: If another process has it, and after `wait_s` still.
    """
    deadline = time.monotonic() + wait_s
    lock = None
    while lock is None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = _try_lock(folder)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
    try:
        yield
    finally:
        if lock >= 0:
            os.close(lock)


def _try_lock(folder: Path) -> int | None:
    """
    A descriptor that holds the lock on the folder until it is closed, -1 where folders cannot be locked. None if the
    folder was renamed or removed meanwhile: it has to be made again.
    """
    if fcntl is None:
        return -1
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
            raise BlockingIOError(
                f"Another process is working on {str(folder)!r}: wait for it, or choose another folder."
            ) from None
        return -1  # A file system without locks.
    # The lock belongs to the folder itself, which its last owner may have renamed or removed.
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(descriptor), folder.stat()):
            return descriptor
    os.close(descriptor)
    return None


def publish(folder: Path, output: Path) -> None:
    """
    Brings all files of `folder` to the disk and renames it to `output`.

    Raises:
        FileExistsError: If `output` was made meanwhile.
    """
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)
    try:
        # On POSIX this replaces an empty folder, and nothing else.
        folder.rename(output)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise FileExistsError(f"{str(output)!r} was made by another process meanwhile.") from None
        raise _cannot_be_made(output, error) from None
    sync(output.parent)


def discard(folder: Path) -> None:
    """Removes an unfinished folder, by this process or an earlier one."""
    shutil.rmtree(folder, ignore_errors=True)
