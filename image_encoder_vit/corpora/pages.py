"""
The pages of a corpus: found one after the other without being decoded, and read each by itself at any time, by any
process.

A page is one image: an image file, a page of a PDF or of a TIFF file, of a member of a tar, or of a row of a Parquet
file or of a `datasets` dataset. Nothing that may hold a page is passed over in silence: what cannot be read is a page
with a problem.
"""

import bz2
import glob
import gzip
import lzma
import mmap
import os
import stat
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from ..support import import_extra, message_of
from .page_files import HEAD_BYTES, PageCount, PageFile, PageImage, content_of, count_pages

IMAGE_SUFFIXES = {
    *(".avif", ".bmp", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jpx", ".pbm", ".pgm", ".png"),
    *(".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
}
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
SUFFIXES = {*IMAGE_SUFFIXES, *TAR_SUFFIXES, ".pdf", ".parquet"}
DATASET_PREFIX = "dataset:"
DATASET_FILES = ("state.json", "dataset_dict.json")  # What `Dataset.save_to_disk` writes.
COMPRESSIONS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
# What headers inside of files may claim; beyond it they are damaged, or meant to fill the memory.
MAX_TAR_HEADER_BYTES = 1 << 20
MAX_FILE_BYTES = 4 << 30
BYTES_AT_ONCE = 16 << 20
ROWS_AT_ONCE = 16

Kind = Literal["file", "tar", "parquet", "dataset"]


class Page(NamedTuple):
    """
    Where a page lies. `source`, UTF-8 with other bytes as escapes, and `page`, counted from 0, name it.

    `path` is the file or dataset; `offset` and `size` are a tar's member in bytes, and `offset` the number of a row.
    Of a cell that lists several files, `item` is the file's number, else -1. `frame` is the page's number inside its
    file. `stamp` changes when the file does. `problem` tells why no page can be read there.
    """

    source: str
    page: int = 0
    kind: Kind = "file"
    path: str = ""
    offset: int = 0
    size: int = 0
    stamp: str = ""
    problem: str = ""
    item: int = -1
    frame: int = 0

    @property
    def id(self) -> str:
        return f"{self.source}#{self.page}"

    def storable(self) -> "Page":
        """The page, with a problem if its file's name is no UTF-8 and cannot be kept in a list of pages."""
        safe = storable(self.path)
        return self if safe == self.path else self._replace(path=safe, problem="the name is not UTF-8: rename it")


class ReadOptions(NamedTuple):
    """
    How pages are read: PDFs at `dpi`; the `image_column` of Parquet files and datasets, the `split` of these. With
    `any_path` the cells of image columns may name any file, not only those below the dataset's folder.
    """

    dpi: float = 144.0
    image_column: str | None = None
    split: str = "train"
    any_path: bool = False


class Found(NamedTuple):
    """
    A file or dataset that an input stands for, whether the input is its very name, and whether it may hold pages.
    """

    name: str
    is_named: bool = False
    problem: str = ""
    has_pages: bool = True


def find_pages(inputs: Iterable[str], options: ReadOptions) -> Iterator[Page]:
    """
    All pages of the inputs in an order of their own: files, folders (of all files with a suffix that is known, hidden
    ones left out, and the outputs of `extract`), glob patterns, folders of `Dataset.save_to_disk`, and
    `dataset:NAME_OR_FOLDER` for `datasets.load_dataset`. A file named twice counts once.

    A file that cannot be read comes as a page with its `problem`.

    Raises:
        ValueError: For an input that is nothing, holds nothing, or is a file or dataset without images, naming it.
        ImportError: If an input needs a package that is not installed.
    """
    seen: set[str] = set()
    for argument in inputs:
        for found in expand(argument):
            if found.name in seen:
                continue
            seen.add(found.name)
            try:
                yield from _pages_of(found, options)
            except ValueError as error:
                if found.is_named:
                    raise
                yield _problem(found.name, str(error))


def expand(argument: str) -> list[Found]:
    """
    The files and datasets that an argument stands for, sorted.

    Raises:
        ValueError: If there are none.
    """
    path = Path(argument)
    if argument.startswith(DATASET_PREFIX):
        return [Found(argument, is_named=True)]
    if is_saved_dataset(path) or (path.exists() and not path.is_dir()):
        return [Found(path.as_posix(), is_named=True)]
    if path.is_dir():
        if _is_feature_store(path):
            raise ValueError(f"{argument!r} holds features, not pages.")
        found = sorted(entry for entry in _walk(path) if entry.has_pages)
        if not found:
            raise ValueError(f"No page in folder {argument!r}: looked for {', '.join(sorted(SUFFIXES))}.")
        return found
    matches = sorted(glob.glob(argument, recursive=True)) if glob.has_magic(argument) else []
    if not matches:
        raise ValueError(
            f"No file, folder or match of a pattern: {argument!r}. A dataset is given as {DATASET_PREFIX}NAME."
        )
    files = [found for match in matches for found in ([Found(match)] if os.path.isfile(match) else _expanded(match))]
    return files


def is_named_file_missing(argument: str) -> bool:
    """Whether the argument names a file, not a pattern or dataset, and there is none."""
    is_pattern = argument.startswith(DATASET_PREFIX) or glob.has_magic(argument)
    return not is_pattern and not os.path.exists(argument)


def _expanded(match: str) -> list[Found]:
    """What a pattern's match stands for; an empty folder is no error there."""
    try:
        return [found._replace(is_named=False) for found in expand(match)]
    except ValueError:
        return []


def passed_over(inputs: Iterable[str]) -> Counter[str]:
    """How many files in the folders among the inputs have another suffix than pages, by their suffix."""
    folders = [
        Path(argument) for argument in inputs if os.path.isdir(argument) and not is_saved_dataset(Path(argument))
    ]
    return Counter(suffix_of(found.name) for folder in folders for found in _walk(folder) if not found.has_pages)


def suffix_of(name: str) -> str:
    """The suffix of a file's name in small letters, both of a compressed tar."""
    lower = name.lower()
    return next((suffix for suffix in TAR_SUFFIXES if lower.endswith(suffix)), PurePosixPath(lower).suffix)


def _walk(folder: Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Found]:
    """Every file and saved dataset below a folder, through links too, but for what is hidden."""
    try:
        status = folder.stat()
        entries = list(os.scandir(folder))
    except OSError as error:
        yield Found(folder.as_posix(), problem=f"the folder cannot be read: {error.strerror}")
        return
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return  # A link to a folder that it lies in.
    for entry in entries:
        path = folder / entry.name
        name = path.as_posix()
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if is_saved_dataset(path):
                yield Found(name)
            elif not _is_feature_store(path):
                yield from _walk(path, (*above, identity))
        elif suffix_of(name) not in SUFFIXES:
            yield Found(name, has_pages=False)
        elif entry.is_file():
            yield Found(name)
        else:
            yield Found(name, problem="a link to nothing" if entry.is_symlink() else "no regular file")


def is_saved_dataset(path: Path) -> bool:
    """Whether `Dataset.save_to_disk` has written the folder."""
    return any((path / name).is_file() for name in DATASET_FILES)


def _is_feature_store(path: Path) -> bool:
    """Whether `extract` has written the folder, or begun to."""
    return (path / "manifest.json").is_file() and ((path / ".work").is_dir() or (path / "index.parquet").is_file())


def _problem(name: str, problem: str) -> Page:
    safe = storable(name)
    return Page(safe, path=safe, problem=problem)


def storable(name: str) -> str:
    """The name with every byte that is no UTF-8 as an escape."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _pages_of(found: Found, options: ReadOptions) -> Iterator[Page]:
    if found.problem:
        yield _problem(found.name, found.problem)
    elif found.name.startswith(DATASET_PREFIX) or is_saved_dataset(Path(found.name)):
        yield from _dataset_pages(found.name, options)
    else:
        yield from _file_pages(found.name, options)


def _file_pages(name: str, options: ReadOptions) -> Iterator[Page]:
    suffix = suffix_of(name)
    try:
        status = os.stat(name)
        whole = Page(storable(name), path=name, size=status.st_size, stamp=f"{status.st_size}-{status.st_mtime_ns}")
        if not stat.S_ISREG(status.st_mode):
            yield whole._replace(problem="no regular file")
            return
        with open(name, "rb") as file:
            head = file.read(HEAD_BYTES)
            if suffix == ".parquet" or head.startswith(b"PAR1"):
                inside = None
            elif suffix in TAR_SUFFIXES or head[257:262] == b"ustar":
                inside = None
                suffix = ".tar"
            else:
                inside = _count_in_file(file, head, suffix)
    except OSError as error:
        yield _problem(name, f"cannot be read: {error.strerror}")
        return
    if inside is not None:
        yield from _frames(whole, inside)
    elif suffix == ".tar":
        yield from _tar_pages(whole)
    else:
        yield from _parquet_pages(whole, options)


def _count_in_file(file: Any, head: bytes, suffix: str) -> PageCount:
    content = content_of(head, suffix)
    if content == "image" or not head:
        return PageCount(1)
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return count_pages(data, content)


def _frames(whole: Page, count: PageCount) -> Iterator[Page]:
    """The pages of a file."""
    for frame in range(count.pages):
        problem = count.problem if frame == count.pages - 1 else ""
        yield whole._replace(page=frame, frame=frame, problem=problem)


# Tars


class _Headers:
    """A file for `tarfile`, which reads as many bytes as a header claims: never past `end`, and never very many."""

    def __init__(self, file: Any, end: int | None) -> None:
        self.file, self.end = file, end
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if self.end is not None:
            size = min(size, max(0, self.end - self.tell()))
        if not 0 <= size <= MAX_TAR_HEADER_BYTES:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        return bytes(self.file.read(size))


def open_container(path: str, is_tar: bool = True) -> tuple[Any, int | None]:
    """A file opened for reading, a compressed tar decompressed, and its size in bytes if that is known."""
    with open(path, "rb") as file:
        head = file.read(8)
    for beginning, opener in COMPRESSIONS.items():
        if is_tar and head.startswith(beginning):
            return opener(path, "rb"), None
    return open(path, "rb"), os.path.getsize(path)


def _tar_pages(whole: Page) -> Iterator[Page]:
    try:
        file, size = open_container(whole.path)
        with file:
            yield from _tar_members(whole, file, 0, size)
    except OSError as error:
        yield whole._replace(source=f"{whole.source}::", problem=f"the tar cannot be read: {message_of(error)}")


def _tar_members(whole: Page, file: Any, start: int, end: int | None) -> Iterator[Page]:
    """The pages of a tar that lies in `file` from `start` to `end`; of one within a tar too."""
    names: Counter[str] = Counter()
    try:
        file.seek(start)
        with tarfile.open(fileobj=_Headers(file, end), mode="r:") as tar:  # type: ignore[call-overload]
            for member in tar:
                tar.members = []  # They would gather: a tar may hold millions.
                name, suffix = storable(member.name), suffix_of(member.name)
                is_hidden = any(part.startswith(".") and part != ".." for part in PurePosixPath(name).parts)
                if member.isdir() or is_hidden or suffix not in SUFFIXES:
                    continue
                names[name] += 1
                again = f"@{names[name]}" if names[name] > 1 else ""  # A tar may hold one name twice.
                page = whole._replace(source=f"{whole.source}::{name}{again}", kind="tar")
                page = page._replace(offset=member.offset_data, size=member.size)
                if not member.isreg() or member.issparse():
                    yield page._replace(problem="a link, or no regular file, inside of a tar")
                else:
                    yield from _member_pages(page, suffix, file, end)
    # Compression libraries and tarfile raise nearly anything for damaged data.
    except Exception as error:
        yield whole._replace(
            source=f"{whole.source}::", kind="tar", problem=f"the tar cannot be read to its end: {message_of(error)}"
        )


def _member_pages(page: Page, suffix: str, file: Any, end: int | None) -> Iterator[Page]:
    if suffix == ".parquet":
        yield page._replace(problem="a Parquet file inside of a tar: take it out")
        return
    file.seek(page.offset)
    head = file.read(min(page.size, HEAD_BYTES))
    if suffix in TAR_SUFFIXES:
        if head.startswith(tuple(COMPRESSIONS)):
            yield page._replace(problem="a compressed tar inside of a tar: take it out")
        else:
            yield from _tar_members(page, file, page.offset, page.offset + page.size)
        return
    content = content_of(head, suffix)
    if content == "image":
        yield page
        return
    try:
        if end is not None and page.offset + page.size > end:
            raise EOFError(f"the file ends inside, before its {page.size} bytes")
        count = count_pages(_read_range(file, page.offset, page.size), content)
    except (EOFError, ValueError) as error:
        yield page._replace(problem=str(error))
        return
    yield from _frames(page, count)


def _read_range(file: Any, offset: int, size: int) -> bytes:
    """
    So many bytes of a file from `offset` on; memory is taken only for what there is.

    Raises:
        EOFError: If the file ends before.
        ValueError: If they are too many.
    """
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{size} bytes are more than the {MAX_FILE_BYTES} that a page's file may have")
    file.seek(offset)
    data = bytearray()
    while len(data) < size:
        more = file.read(min(BYTES_AT_ONCE, size - len(data)))
        if not more:
            raise EOFError(f"the file ends inside, after {len(data)} of {size} bytes")
        data += more
    return bytes(data)


# Parquet files and datasets


def _parquet_pages(whole: Page, options: ReadOptions) -> Iterator[Page]:
    parquet = import_extra("pyarrow.parquet", "corpora")
    try:
        file = parquet.ParquetFile(whole.path)
    except (OSError, ValueError) as error:
        yield whole._replace(problem=f"cannot be read as Parquet: {message_of(error)}")
        return
    with file:
        column = image_column(file.schema_arrow, options.image_column, whole.path)
        whole = whole._replace(kind="parquet", stamp=f"{whole.stamp}-{column}")
        is_list = is_list_column(file.schema_arrow, column)
        next_row = 0
        try:
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=[column]):
                for cell in batch.column(0):
                    yield from _row_pages(whole, next_row, cell.as_py(), is_list, options)
                    next_row += 1
        except (OSError, ValueError):  # A damaged part of the file: each row tells when it is read.
            for row in range(next_row, file.metadata.num_rows):
                yield whole._replace(page=row, offset=row)


def _row_pages(whole: Page, row: int, cell: Any, is_list: bool, options: ReadOptions) -> Iterator[Page]:
    """
    The pages of a row: named by the row's number where it is one image, else by their numbers within the row.

    `cell` is the value of its image column.
    """
    pages: list[Page] = []
    files = (cell or [None]) if is_list else [cell]
    for item, value in enumerate(files):
        page = whole._replace(offset=row, item=item if is_list else -1)
        try:
            data = bytes_of(value, allowed_folders(page), options.any_path)
            pages += _frames(page, count_pages(data, content_of(data[:HEAD_BYTES])))
        except (OSError, ValueError):  # Reading tells why.
            pages.append(page)
    if is_list or len(pages) > 1:
        for number, page in enumerate(pages):
            yield page._replace(source=f"{whole.source}::{row}", page=number)
    else:
        yield pages[0]._replace(page=row)


def image_column(schema: Any, wanted: str | None, where: str) -> str:
    """
    The column of images of a pyarrow schema: the one `wanted`, or the only one of bytes, of structs with bytes, or of
    lists of these.

    Raises:
        ValueError: If there is none, or several, naming the columns.
    """
    names = [field.name for field in schema if _holds_images(field.type)]
    if wanted is not None:
        if wanted not in names:
            raise ValueError(f"{where!r} has no image column {wanted!r}; columns of images: {names}.")
        return wanted
    usual = [name for name in ("image", "images") if name in names]
    if len(names) != 1 and len(usual) != 1:
        raise ValueError(
            f"{where!r} has {len(names)} columns that may hold images, {names}, of {schema.names}"
            + (": choose one by --image-column." if names else ".")
        )
    return usual[0] if usual else names[0]


def is_list_column(schema: Any, column: str) -> bool:
    """Whether each cell of the column holds several images."""
    return _element(schema.field(column).type) is not None


def _element(kind: Any) -> Any:
    """The type of a list's elements, None for what is no list."""
    types = import_extra("pyarrow.types", "corpora")
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return kind.value_type if is_list else None


def _holds_images(kind: Any) -> bool:
    types = import_extra("pyarrow.types", "corpora")
    kind = _element(kind) or kind
    if types.is_struct(kind):
        return any(kind.field(index).name == "bytes" for index in range(kind.num_fields))
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def load_dataset(name: str, split: str) -> Any:
    """
    The dataset of an input, local or from the Hub.

    Raises:
        ValueError: If it cannot be loaded, or has no such split.
        ImportError: If `datasets` is not installed.
    """
    datasets = import_extra("datasets", "corpora")
    path = name.removeprefix(DATASET_PREFIX)
    try:
        if not is_saved_dataset(Path(path)):
            return datasets.load_dataset(path, split=split)
        loaded = datasets.load_from_disk(path)
        return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
    except Exception as error:  # Loading scripts, builders and the Hub raise what they like.
        raise ValueError(f"Cannot load the dataset {path!r}, split {split!r}: {error}") from error


def _dataset_pages(name: str, options: ReadOptions) -> Iterator[Page]:
    dataset = load_dataset(name, options.split)
    schema = dataset.data.schema
    column = image_column(schema, options.image_column, name)
    is_list = is_list_column(schema, column)
    stamp = f"{dataset._fingerprint}-{dataset.num_rows}-{column}"
    whole = Page(f"{name}:{options.split}", kind="dataset", path=name, stamp=stamp)
    rows = dataset.with_format("arrow")
    for first in range(0, dataset.num_rows, ROWS_AT_ONCE):
        for number, cell in enumerate(rows[first : first + ROWS_AT_ONCE][column].to_pylist()):
            yield from _row_pages(whole, first + number, cell, is_list, options)


def allowed_folders(page: Page) -> list[Path]:
    """The folders whose files the cells of a page's table may name."""
    if page.kind == "parquet":
        return [Path(page.path).parent]
    folders = [Path(page.path.removeprefix(DATASET_PREFIX))]
    if page.path.startswith(DATASET_PREFIX):  # Downloaded and extracted there.
        datasets, hub = import_extra("datasets.config", "corpora"), import_extra("huggingface_hub.constants", "corpora")
        folders += [Path(datasets.HF_DATASETS_CACHE), Path(datasets.DOWNLOADED_DATASETS_PATH), Path(hub.HF_HUB_CACHE)]
    return folders


def bytes_of(value: Any, folders: list[Path], any_path: bool) -> bytes:
    """
    The bytes of a cell of an image column: bytes, or a struct of bytes or of the path of a file, relative to the first
    of the folders and below one of them, unless it may be `any_path`.

    Raises:
        ValueError: If the cell holds neither, or a path that is not allowed.
        OSError: If the file cannot be read.
    """
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None and isinstance(value, dict) and value.get("path"):
        named = Path(os.path.realpath(folders[0] / value["path"]))
        if not any_path and not any(named.is_relative_to(os.path.realpath(folder)) for folder in folders):
            raise ValueError(f"the row names a file outside of its dataset's folder: {value['path']!r}")
        if not named.is_file():
            raise ValueError(f"the row names a file that is not there, or is no regular one: {value['path']!r}")
        data = named.read_bytes()
    if data is None:
        raise ValueError("the row has no image")
    return bytes(data)


class PageReader:
    """
    Reads and decodes pages. What was read last stays open, since pages of one file come one after the other.

    Whatever goes wrong with a page is raised as it comes, by PIL, PDFium or Arrow: the caller tells it to the user.
    """

    def __init__(self, options: ReadOptions) -> None:
        self.options = options
        self._file = _Held()
        self._container = _Held()
        self._rows = _Held()

    def __del__(self) -> None:
        for held in (self._file, self._container, self._rows):
            held.close()

    def read(self, page: Page) -> PageImage:
        """
        The page's image.

        Raises:
            ValueError: For a page with a `problem`, or one that is no image.
            Exception: What a decoder raises for a damaged file.
        """
        if page.problem:
            raise ValueError(page.problem)
        key = (page.kind, page.path, page.offset, page.item)
        file = self._file.get(key, lambda: PageFile(self._bytes(page), suffix_of(page.source)))
        image: PageImage = file.read(page.frame, self.options.dpi)
        return image

    def _bytes(self, page: Page) -> bytes:
        if page.kind == "parquet":
            cell = self._parquet_cell(page)
        elif page.kind == "dataset":
            cell = self._dataset_cell(page)
        else:
            opened = self._container.get(page.path, lambda: open_container(page.path, page.kind == "tar")[0])
            return _read_range(opened, page.offset, page.size)
        value = (cell or [None])[page.item] if page.item >= 0 else cell
        return bytes_of(value, allowed_folders(page), self.options.any_path)

    def _parquet_cell(self, page: Page) -> Any:
        parquet = import_extra("pyarrow.parquet", "corpora")
        with parquet.ParquetFile(page.path) as file:
            first, group = 0, 0
            while page.offset >= first + file.metadata.row_group(group).num_rows:
                first += file.metadata.row_group(group).num_rows
                group += 1
            column = image_column(file.schema_arrow, self.options.image_column, page.path)
            key = (page.path, group)
            rows = self._rows.get(key, lambda: file.read_row_group(group, columns=[column])[column])
        return rows[page.offset - first].as_py()

    def _dataset_cell(self, page: Page) -> Any:
        rows = self._rows.get(page.path, lambda: load_dataset(page.path, self.options.split).with_format("arrow"))
        column = image_column(rows.data.schema, self.options.image_column, page.path)
        return rows[page.offset][column][0].as_py()


class _Held:
    """What was opened last, by what it is."""

    def __init__(self) -> None:
        self.key: Any = None
        self.value: Any = None

    def get(self, key: Any, load: Any) -> Any:
        if self.key != key:
            self.close()  # First: never two at a time.
            self.value = load()
            self.key = key
        return self.value

    def close(self) -> None:
        if hasattr(self.value, "close"):
            self.value.close()
        self.key, self.value = None, None
