"""
The pages of a corpus: found one after the other without being decoded, and read each by itself at any time, by any
process.

A page is one image: an image file, a page of a PDF or of a TIFF file, a member of a WebDataset tar, a row of a Parquet
file or of a `datasets` dataset.
"""

import glob
import hashlib
import io
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ..image_processing_image_encoder_vit import to_rgb

IMAGE_SUFFIXES = {".bmp", ".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp"}
PAGED_SUFFIXES = {".pdf", ".tif", ".tiff"}  # One file, several pages.
CONTAINER_SUFFIXES = {".tar", ".parquet"}
SUFFIXES = IMAGE_SUFFIXES | PAGED_SUFFIXES | CONTAINER_SUFFIXES
DATASET_PREFIX = "dataset:"
DATASET_FILES = ("state.json", "dataset_dict.json")  # What `Dataset.save_to_disk` writes.
POINTS_PER_INCH = 72


class Page(NamedTuple):
    """
    Where a page lies. `source` and `page`, counted from 0, name it.

    `kind` is "file", "tar", "parquet" or "dataset" and `path` the file or dataset; of a tar's member, `offset` and
    `size` are its place in bytes. `stamp` changes when the file does. `problem` tells why no page can be read there.
    """

    source: str
    page: int
    kind: str
    path: str
    offset: int
    size: int
    stamp: str
    problem: str

    @property
    def id(self) -> str:
        return f"{self.source}#{self.page}"


class PageImage(NamedTuple):
    """A decoded page: upright, 8-bit RGB, and the SHA-256 of the file, member or row that it is from."""

    image: Image.Image
    sha256: str


class ReadOptions(NamedTuple):
    """How pages are read: PDFs at `dpi`; the `image_column` of Parquet files and datasets, the `split` of these."""

    dpi: float = 144.0
    image_column: str | None = None
    split: str = "train"


def find_pages(inputs: Iterable[str], options: ReadOptions) -> Iterator[Page]:
    """
    All pages of the inputs in an order of their own: files, folders (of all files with a suffix that is known, hidden
    ones left out), glob patterns, folders of `Dataset.save_to_disk`, and `dataset:NAME_OR_FOLDER` for
    `datasets.load_dataset`. A file named twice counts once.

    A file that cannot be read comes as a page with its `problem`.

    Raises:
        ValueError: For an input that is nothing or holds nothing, naming it.
        ImportError: If an input needs a package that is not installed.
    """
    seen: set[str] = set()
    for argument in inputs:
        for name in _expand(argument):
            if name in seen:
                continue
            seen.add(name)
            if name.startswith(DATASET_PREFIX) or _is_saved_dataset(Path(name)):
                yield from _dataset_pages(name, options)
            else:
                yield from _file_pages(Path(name), options)


def _expand(argument: str) -> list[str]:
    """The files and datasets that an argument stands for, sorted."""
    path = Path(argument)
    if argument.startswith(DATASET_PREFIX) or path.is_file() or _is_saved_dataset(path):
        return [argument if argument.startswith(DATASET_PREFIX) else path.as_posix()]
    if path.is_dir():
        found = sorted(entry.as_posix() for entry in path.rglob("*") if _is_wanted(entry, path))
        if not found:
            raise ValueError(f"No page in folder {argument!r}: looked for {', '.join(sorted(SUFFIXES))}.")
        return found
    matches = sorted(glob.glob(argument, recursive=True)) if glob.has_magic(argument) else []
    if not matches:
        raise ValueError(
            f"No file, folder or match of a pattern: {argument!r}. A dataset is given as {DATASET_PREFIX}NAME."
        )
    return [name for match in matches for name in ([match] if Path(match).is_file() else _expand(match))]


def _is_wanted(entry: Path, root: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in entry.relative_to(root).parts)
    return entry.suffix.lower() in SUFFIXES and not is_hidden and entry.is_file()


def _is_saved_dataset(path: Path) -> bool:
    return any((path / name).is_file() for name in DATASET_FILES)


def _file_pages(path: Path, options: ReadOptions) -> Iterator[Page]:
    name, suffix = path.as_posix(), path.suffix.lower()
    status = path.stat()
    whole = Page(name, 0, "file", name, 0, status.st_size, f"{status.st_size}-{status.st_mtime_ns}", "")
    if problem := _unstorable(name):
        safe = name.encode("utf-8", "backslashreplace").decode()
        yield whole._replace(source=safe, path=safe, problem=problem)
    elif suffix == ".tar":
        yield from _tar_pages(whole)
    elif suffix == ".parquet":
        yield from _parquet_pages(whole, options)
    elif suffix in PAGED_SUFFIXES:
        for page in range(_page_count(name, suffix)):
            yield whole._replace(page=page)
    else:
        yield whole


def _unstorable(name: str) -> str:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return "the name is not UTF-8: rename it"
    return ""


def _page_count(file: Any, suffix: str) -> int:
    """Pages of a PDF or TIFF file, given by its name or as bytes; 1 where they cannot be counted: reading tells why."""
    if suffix == ".pdf":
        with _open_pdf(file) as document:
            return max(1, len(document)) if document is not None else 1
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            return int(getattr(image, "n_frames", 1))
    except Exception:
        return 1


class _open_pdf:
    """A PDF for a `with` statement, None if it cannot be opened."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.document: Any = None

    def __enter__(self) -> Any:
        pdfium = import_pdfium()
        try:
            self.document = pdfium.PdfDocument(self.file)
        except (pdfium.PdfiumError, OSError):
            return None
        return self.document

    def __exit__(self, *error: object) -> None:
        if self.document is not None:
            self.document.close()


def import_pdfium() -> Any:
    """The package pypdfium2. Raises an ImportError that tells how to install it."""
    try:
        import pypdfium2
    except ImportError as error:
        raise ImportError("PDFs need pypdfium2: pip install 'image-encoder-vit[corpora]'.") from error
    return pypdfium2


def _tar_pages(whole: Page) -> Iterator[Page]:
    names: Counter[str] = Counter()
    try:
        with tarfile.open(whole.path, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # They would gather: a tar may hold millions.
                suffix = Path(member.name).suffix.lower()
                if not member.isfile() or suffix not in IMAGE_SUFFIXES | PAGED_SUFFIXES:
                    continue
                name = member.name.encode("utf-8", "backslashreplace").decode()
                names[name] += 1
                again = f"@{names[name]}" if names[name] > 1 else ""  # A tar may hold one name twice.
                page = whole._replace(source=f"{whole.source}::{name}{again}", kind="tar")
                page = page._replace(offset=member.offset_data, size=member.size)
                count = _page_count(_read_range(page), suffix) if suffix in PAGED_SUFFIXES else 1
                for index in range(count):
                    yield page._replace(page=index)
    except (tarfile.TarError, OSError, EOFError) as error:
        yield whole._replace(source=f"{whole.source}::", problem=f"the tar cannot be read to its end: {error}")


def _read_range(page: Page) -> bytes:
    with open(page.path, "rb") as file:
        file.seek(page.offset)
        data = file.read(page.size)
    if len(data) < page.size:
        raise EOFError(f"the file ends inside, after {len(data)} of {page.size} bytes")
    return data


def _parquet_pages(whole: Page, options: ReadOptions) -> Iterator[Page]:
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(whole.path) as file:
            rows, schema = file.metadata.num_rows, file.schema_arrow
    except (OSError, ValueError) as error:
        yield whole._replace(problem=f"cannot be read as Parquet: {error}")
        return
    column = image_column(schema, options.image_column, whole.path)
    for row in range(rows):
        yield whole._replace(page=row, kind="parquet", stamp=f"{whole.stamp}-{column}")


def image_column(schema: Any, wanted: str | None, where: str) -> str:
    """
    The column of images of a pyarrow schema: the one `wanted`, or the only one of bytes, or of structs with bytes.

    Raises:
        ValueError: If there is none, or several, naming the columns.
    """
    names = [field.name for field in schema if _holds_images(field.type)]
    if wanted is not None:
        if wanted not in names:
            raise ValueError(f"{where!r} has no image column {wanted!r}; columns of images: {names}.")
        return wanted
    if len(names) != 1 and "image" not in names:
        raise ValueError(
            f"{where!r} has {len(names)} columns that may hold images, {names}, of {schema.names}: choose one by "
            "--image-column."
        )
    return "image" if "image" in names else names[0]


def _holds_images(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(kind.field(index).name == "bytes" for index in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def load_dataset(name: str, split: str) -> Any:
    """
    The dataset of an input, local or from the Hub.

    Raises:
        ValueError: If it cannot be loaded, or has no such split.
        ImportError: If `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Datasets need datasets: pip install 'image-encoder-vit[corpora]'.") from error
    path = name.removeprefix(DATASET_PREFIX)
    try:
        if not _is_saved_dataset(Path(path)):
            return datasets.load_dataset(path, split=split)
        loaded = datasets.load_from_disk(path)
        return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
    except Exception as error:  # Loading scripts, builders and the Hub raise what they like.
        raise ValueError(f"Cannot load the dataset {path!r}, split {split!r}: {error}") from error


def _dataset_pages(name: str, options: ReadOptions) -> Iterator[Page]:
    dataset = load_dataset(name, options.split)
    column = image_column(dataset.data.schema, options.image_column, name)
    stamp = f"{dataset._fingerprint}-{dataset.num_rows}-{column}"
    for row in range(dataset.num_rows):
        yield Page(f"{name}:{options.split}", row, "dataset", name, 0, 0, stamp, "")


class PageReader:
    """
    Reads and decodes pages. What was read last stays open, since pages of one file come one after the other.

    Whatever goes wrong with a page is raised as it comes, by PIL, PDFium or Arrow: the caller tells it to the user.
    """

    def __init__(self, options: ReadOptions) -> None:
        self.options = options
        self._key: object = None
        self._held: Any = None

    def read(self, page: Page) -> PageImage:
        """
        The page's image.

        Raises:
            ValueError: For a page with a `problem`, or one that is no image.
            Exception: What a decoder raises for a damaged file.
        """
        if page.problem:
            raise ValueError(page.problem)
        row = page.kind in ("parquet", "dataset")
        if row:
            data = self._dataset_row(page) if page.kind == "dataset" else self._parquet_row(page)
            return PageImage(decode_image(data, 0), hashlib.sha256(data).hexdigest())
        data, digest = self._hold((page.path, page.offset), lambda: _with_digest(_read_range(page)))
        if data[:1024].lstrip().startswith(b"%PDF"):
            return PageImage(render_pdf(data, page.page, self.options.dpi), digest)
        return PageImage(decode_image(data, page.page), digest)

    def _hold(self, key: object, load: Any) -> Any:
        if self._key != key:
            self._key, self._held = None, None  # Let go first: never two at a time.
            self._held = load()
            self._key = key
        return self._held

    def _parquet_row(self, page: Page) -> bytes:
        import pyarrow.parquet as parquet

        file = parquet.ParquetFile(page.path)
        try:
            first, group = 0, 0
            while page.page >= first + file.metadata.row_group(group).num_rows:
                first += file.metadata.row_group(group).num_rows
                group += 1
            column = image_column(file.schema_arrow, self.options.image_column, page.path)
            held = self._hold((page.path, group), lambda: file.read_row_group(group, columns=[column])[column])
        finally:
            file.close()
        return _bytes_of(held[page.page - first].as_py(), Path(page.path).parent)

    def _dataset_row(self, page: Page) -> bytes:
        dataset = self._hold(page.path, lambda: load_dataset(page.path, self.options.split).with_format("arrow"))
        column = image_column(dataset.data.schema, self.options.image_column, page.path)
        return _bytes_of(dataset[page.page][column][0].as_py(), Path(page.path.removeprefix(DATASET_PREFIX)))


def _with_digest(data: bytes) -> tuple[bytes, str]:
    return data, hashlib.sha256(data).hexdigest()


def _bytes_of(value: Any, folder: Path) -> bytes:
    """The bytes of a cell of an image column: bytes, or a struct of bytes or the path of a file."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None and isinstance(value, dict) and value.get("path"):
        data = (folder / value["path"]).read_bytes()
    if data is None:
        raise ValueError("the row has no image")
    return bytes(data)


def decode_image(data: bytes, frame: int) -> Image.Image:
    """
    Frame `frame` of an image file as an upright RGB image.

    Raises:
        ValueError: If the data are empty.
        Exception: What PIL raises for data that are no image.
    """
    if not data:
        raise ValueError("the file is empty")
    with Image.open(io.BytesIO(data)) as image:
        if frame:
            image.seek(frame)
        image.load()
        return to_rgb(image)


def render_pdf(data: bytes, page: int, dpi: float) -> Image.Image:
    """
    A page of a PDF as an RGB image, its filled forms included.

    Raises:
        ValueError: If the page would have more pixels than PIL accepts of an image.
        PdfiumError: If the document or page cannot be opened.
    """
    document = import_pdfium().PdfDocument(data)
    try:
        document.init_forms()
        opened = document[page]
        scale = dpi / POINTS_PER_INCH
        width, height = (side * scale for side in opened.get_size())
        if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{width:.0f} x {height:.0f} px at {dpi:g} dpi are too large: lower --dpi")
        bitmap = opened.render(scale=scale)
        return bitmap.to_pil().convert("RGB")
    finally:
        document.close()


def describe(error: BaseException) -> str:
    """The reason of a rejection in one line, without addresses, which would differ from run to run."""
    text = " ".join(str(error).split()) or "no message"
    text = text.partition("<_io.BytesIO object at")[0].strip() or text
    known = isinstance(error, ValueError) and not type(error).__name__.startswith("Unidentified")
    return text if known else f"{type(error).__name__}: {text}"
