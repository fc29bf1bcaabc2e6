"""
Files that hold pages, as bytes: what they are by their content, how many pages they have, and each page as an image.

Pages are reached directly, not by way of those before them; one that cannot be read hides no other.
"""

import atexit
import hashlib
import re
from functools import cached_property
from typing import Any, Literal, NamedTuple

from PIL import Image

from ..image_reading import decode_image, tiff_pages, to_rgb, with_first_page
from ..support import import_extra

Content = Literal["pdf", "tiff", "image"]

HEAD_BYTES = 1024  # A PDF's mark may stand anywhere in them.
POINTS_PER_INCH = 72
IMAGE_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM")
TIFF_BEGINNINGS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
BROKEN_LIST = "the TIFF's list of pages breaks off here: this page is damaged or cut off, and more may be"


class PageImage(NamedTuple):
    """A decoded page: upright, 8-bit RGB, and the SHA-256 of the file, member or row that it is from."""

    image: Image.Image
    sha256: str


class PageCount(NamedTuple):
    """How many pages a file has; with a `problem`, the last one cannot be read because of it."""

    pages: int
    problem: str = ""


def content_of(head: bytes, suffix: str = "") -> Content:
    """What a file is by its first bytes, `HEAD_BYTES` of them; its suffix decides where they do not tell."""
    if head.startswith(TIFF_BEGINNINGS):
        return "tiff"
    if not head.startswith(IMAGE_BEGINNINGS) and (b"%PDF-" in head[:HEAD_BYTES] or suffix == ".pdf"):
        return "pdf"
    return "image"


def count_pages(data: Any, content: Content) -> PageCount:
    """The pages of a file, given as a buffer of its bytes; 1 where they cannot be counted: reading tells why."""
    if content == "tiff":
        starts, is_whole = tiff_pages(data)
        if starts and not is_whole:
            return PageCount(len(starts) + 1, BROKEN_LIST)
        return PageCount(max(1, len(starts)))
    if content == "pdf":
        try:
            document = open_pdf(bytes(data))
        except ValueError:
            return PageCount(1)
        try:
            return PageCount(max(1, len(document)))
        finally:
            document.close()
    return PageCount(1)


def open_pdf(data: bytes) -> Any:
    """
    A document of pypdfium2.

    Raises:
        ValueError: If it is none, or needs a password.
        ImportError: If pypdfium2 is not installed.
    """
    pdfium = import_extra("pypdfium2", "corpora")
    begin = max(0, data.find(b"%PDF-"))  # Mails and editors put something before it.
    try:
        return pdfium.PdfDocument(data[begin:])
    except pdfium.PdfiumError:
        # PDFium's own code of the error may be one from before.
        why = "it is encrypted" if b"/Encrypt" in data else "it is no PDF, or too damaged"
        raise ValueError(f"PdfiumError: the document cannot be opened: {why}") from None


class PageFile:
    """One file's bytes, and what stays open while its pages are read one after the other."""

    def __init__(self, data: bytes, suffix: str = "") -> None:
        self.data = data
        self.content = content_of(data[:HEAD_BYTES], suffix)
        self.sha256 = hashlib.sha256(data).hexdigest()

    def read(self, frame: int, dpi: float) -> PageImage:
        """
        A page, counted from 0; those of a PDF are rendered at `dpi`.

        Raises:
            ValueError: If it cannot be read.
            Exception: What else PIL raises for damaged pixels.
        """
        if self.content == "pdf":
            return PageImage(self._rendered(frame, dpi), self.sha256)
        data = self.data
        if self.content == "tiff" and frame:
            data = with_first_page(data, self._starts[frame])
        return PageImage(to_rgb(decode_image(data)), self.sha256)

    def close(self) -> None:
        """Lets go of what is open."""
        if document := self.__dict__.pop("_document", None):
            atexit.unregister(self.close)
            document.close()

    @cached_property
    def _starts(self) -> list[int]:
        return tiff_pages(self.data)[0]

    @cached_property
    def _document(self) -> Any:
        document = open_pdf(self.data)
        document.init_forms()
        atexit.register(self.close)  # Before pypdfium2's own, which writes a line for each that is open.
        return document

    def _rendered(self, frame: int, dpi: float) -> Image.Image:
        pdfium = import_extra("pypdfium2", "corpora")
        if frame >= len(self._document):
            raise ValueError(f"the PDF has no page {frame}, it has {len(self._document)}")
        try:
            page = self._document[frame]
            scale = dpi / POINTS_PER_INCH
            width, height = (side * scale for side in page.get_size())
            if width * height > pixel_limit():
                raise ValueError(f"{width:.0f} x {height:.0f} px at {dpi:g} dpi are too large: lower --dpi")
            image = page.render(scale=scale).to_pil().convert("RGB")
            page.close()
        except pdfium.PdfiumError as error:
            raise ValueError(f"PdfiumError: page {frame} of the PDF is damaged: {error}") from None
        return image


def pixel_limit() -> float:
    """How many pixels an image may have: as many as PIL accepts."""
    return 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else float("inf")


def set_pixel_limit(megapixels: float) -> None:
    """Changes how many pixels images may have, in this whole process, as PIL has it: for a process of one's own."""
    Image.MAX_IMAGE_PIXELS = int(megapixels * 500_000)  # PIL warns there, and refuses twice as many.


def describe(error: BaseException) -> str:
    """The reason of a rejection in one line, without addresses, which would differ from run to run."""
    text = re.sub(r"<(\S+) object at 0x[0-9a-fA-F]+>", r"\1", " ".join(str(error).split())) or "no message"
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
