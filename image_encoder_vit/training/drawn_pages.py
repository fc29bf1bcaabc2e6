"""
Pages drawn from a seed, with the class of what is where: what the sample encoder is trained and measured on.

Nothing on them is real: words are strung from syllables, photographs are overlapping shapes with the spectrum of
natural scenes. A class lies where there is ink of it and close around; blank paper inside a table or a chart is paper.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

CLASSES = ("paper", "text", "heading", "table", "figure", "photo", "formula", "outside")
PAPER, TEXT, HEADING, TABLE, FIGURE, PHOTO, FORMULA, OUTSIDE = range(len(CLASSES))
LABEL_PX = 4  # Side of the squares that have one class each.
INK_DIFFERENCE = 18  # From what lay below, in 0 to 255, to be ink.

FONT_FOLDER = Path("/usr/share/fonts")
# Of each family the regular and the bold face. Debian's packages bring them, see docs/sample.md.
LATIN_FACES = (
    ("LiberationSans-Regular", "LiberationSans-Bold"),
    ("LiberationSerif-Regular", "LiberationSerif-Bold"),
    ("LiberationSansNarrow-Regular", "LiberationSansNarrow-Bold"),
    ("Carlito-Regular", "Carlito-Bold"),
    ("Caladea-Regular", "Caladea-Bold"),
    ("Roboto-Regular", "Roboto-Bold"),
    ("Roboto-Light", "Roboto-Medium"),
    ("RobotoCondensed-Regular", "RobotoCondensed-Bold"),
    ("lmroman10-regular", "lmroman10-bold"),
    ("lmsans10-regular", "lmsans10-bold"),
    ("LinLibertine_R", "LinLibertine_RB"),
    ("LinBiolinum_R", "LinBiolinum_RB"),
    ("EBGaramond12-Regular", "EBGaramond12-Bold"),
    ("DejaVuSans", "DejaVuSans-Bold"),
    ("DejaVuSerif", "DejaVuSerif-Bold"),
    ("FreeSans", "FreeSansBold"),
)
MONOSPACED_FACES = (("LiberationMono-Regular", "LiberationMono-Bold"), ("DejaVuSansMono", "DejaVuSansMono-Bold"))
# Other scripts: face, bold face, first and last letter, whether words are set apart.
SCRIPTS = (
    ("wqy-microhei", "wqy-microhei", 0x4E00, 0x8FFF, False),
    ("wqy-microhei", "wqy-microhei", 0x4E00, 0x8FFF, False),
    ("DejaVuSans", "DejaVuSans-Bold", 0x0430, 0x044F, True),
    ("LiberationSerif-Regular", "LiberationSerif-Bold", 0x0430, 0x044F, True),
    ("LiberationSerif-Regular", "LiberationSerif-Bold", 0x03B1, 0x03C9, True),
    ("NotoSansDevanagari-Regular", "NotoSansDevanagari-Bold", 0x0915, 0x0939, True),
    ("NotoSansArabic-Regular", "NotoSansArabic-Bold", 0x0627, 0x063A, True),
    ("NotoSansHebrew-Regular", "NotoSansHebrew-Bold", 0x05D0, 0x05EA, True),
    ("NotoSansThai-Regular", "NotoSansThai-Bold", 0x0E01, 0x0E2E, True),
)
SYLLABLES_IN_A_ROW = """
    an ar as at be ca ce co da de di do en er es et fa fe fi ga ge ha he hi ho il in is it ka ke la le li lo ma me
    mi mo na ne ni no of on or pa pe po qua ra re ri ro sa se si so sta te ter th ti to tion ul un ur us va ve vi wa
    we ing ment ist ble cy dge ght ly sch str tz x y
"""
SYLLABLES = SYLLABLES_IN_A_ROW.split()

Box = tuple[int, int, int, int]  # left, top, right, bottom, px
Color = tuple[int, int, int]


class DrawnPage(NamedTuple):
    """A page, RGB, and the classes (height / 4, width / 4), uint8, of its squares of 4 px."""

    image: Image.Image
    labels: np.ndarray[Any, Any]


@functools.cache
def font_files() -> dict[str, Path]:
    """The font files installed, by name without suffix."""
    files = sorted(FONT_FOLDER.rglob("*")) if FONT_FOLDER.is_dir() else []
    return {file.stem: file for file in files if file.suffix.lower() in {".ttf", ".otf", ".ttc"}}


@functools.lru_cache(maxsize=512)
def font(face: str, size_px: int) -> Any:
    """A face, or Pillow's own where `face` is "" or not installed."""
    file = font_files().get(face)
    if file is None:
        return ImageFont.load_default(size_px)
    return ImageFont.truetype(str(file), size_px)


class Writing:
    """One script in one family of faces: makes words and finds fonts."""

    def __init__(self, rng: np.random.Generator, only_built_in: bool) -> None:
        self.rng = rng
        self.first, self.last, self.spaced = 0, 0, True
        if only_built_in or rng.random() < 0.12:
            self.regular, self.bold = "", ""
        elif rng.random() < 0.24 and (known := [s for s in SCRIPTS if s[0] in font_files()]):
            self.regular, self.bold, self.first, self.last, self.spaced = known[rng.integers(len(known))]
        else:
            families = MONOSPACED_FACES if rng.random() < 0.08 else LATIN_FACES
            self.regular, self.bold = families[rng.integers(len(families))]
        self.vocabulary = [self._new_word() for _ in range(160)]

    def _new_word(self) -> str:
        rng = self.rng
        if self.first:
            length = int(rng.integers(2, 9)) if self.spaced else int(rng.integers(1, 4))
            return "".join(map(chr, rng.integers(self.first, self.last + 1, length)))
        if rng.random() < 0.06:
            return str(rng.integers(1, 3000))
        word = "".join(SYLLABLES[i] for i in rng.integers(len(SYLLABLES), size=1 + int(rng.poisson(1.1))))
        return word.capitalize() if rng.random() < 0.12 else word

    def words(self, count: int) -> str:
        chosen = [self.vocabulary[i] for i in self.rng.integers(len(self.vocabulary), size=count)]
        chosen = [w + ",.;:"[self.rng.integers(4)] if self.rng.random() < 0.1 else w for w in chosen]
        return (" " if self.spaced else "").join(chosen)

    def number(self) -> str:
        value = float(10 ** self.rng.uniform(0, 4))
        return ["{:.0f}", "{:.1f}", "{:.2f}", "-{:.1f}", "{:.0f}%", "{:,.0f}"][self.rng.integers(6)].format(value)

    def font(self, size_px: float, bold: bool = False) -> Any:
        return font(self.bold if bold else self.regular, max(5, round(size_px)))

    def line(self, typeface: Any, width_px: float) -> str:
        """Words that fill a line of about this width and do not exceed it."""
        sample = self.words(6)
        count = max(1, int(6 * width_px / max(typeface.getlength(sample), 1) + 1))
        text = self.words(count)
        length = typeface.getlength(text)
        return text if length <= width_px else text[: max(1, int(len(text) * width_px / length))].rstrip()


class Canvas:
    """A page in the making."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int], paper: Color, writing: Writing) -> None:
        self.rng, self.writing, self.paper = rng, writing, paper
        self.image = Image.new("RGB", size, paper)
        self.draw = ImageDraw.Draw(self.image)
        self.labels = np.zeros((-(-size[1] // LABEL_PX), -(-size[0] // LABEL_PX)), np.uint8)
        dark = sum(paper) < 330
        self.ink: Color = tuple(int(v) for v in (rng.integers(200, 256, 3) if dark else rng.integers(0, 70, 3)))  # type: ignore[assignment]

    @property
    def size(self) -> tuple[int, int]:
        return self.image.size

    @contextmanager
    def marked(self, kind: int, box: Box, grow_px: float) -> Iterator[None]:
        """Gives what is drawn inside the block into `box`, and what is nearer to it than `grow_px`, a class."""
        step = LABEL_PX
        left, top = max(0, box[0]) // step, max(0, box[1]) // step
        right, bottom = -(-min(box[2], self.size[0]) // step), -(-min(box[3], self.size[1]) // step)
        if right <= left or bottom <= top:
            yield
            return
        area = (left * step, top * step, right * step, bottom * step)
        before = np.asarray(self.image.crop(area), np.int16)
        yield
        after = np.asarray(self.image.crop(area), np.int16)
        ink = (np.abs(after - before) > INK_DIFFERENCE).any(axis=2)
        ink = ink.reshape(bottom - top, step, right - left, step).any(axis=(1, 3))
        grow = round(grow_px / step)
        if grow > 0:
            wide = Image.fromarray(ink.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(2 * grow + 1))
            ink = np.asarray(wide) > 0
        self.labels[top:bottom, left:right][ink] = kind

    def fill_class(self, kind: int, box: Box) -> None:
        left, top, right, bottom = (v // LABEL_PX for v in box)
        self.labels[max(0, top) : max(0, bottom), max(0, left) : max(0, right)] = kind

    def color(self, strong: bool = True) -> Color:
        """A colour to draw with; pale for fillings."""
        rng = self.rng
        if strong and rng.random() < 0.25:
            return self.ink
        base = rng.integers(0, 256, 3)
        values = base * 0.8 if strong else 255 - (255 - base) * 0.25
        return tuple(int(v) for v in values)  # type: ignore[return-value]


def draw_page(seed: Sequence[int], only_built_in_font: bool = False) -> DrawnPage:
    """
    The page of this seed. The same seed gives the same page where the same fonts are installed; with
    `only_built_in_font`, where the same Pillow is.
    """
    rng = np.random.default_rng(list(seed))
    return compose_sheet(rng, only_built_in_font) if rng.random() < 0.09 else single_page(rng, only_built_in_font)


def single_page(rng: np.random.Generator, only_built_in_font: bool, long_px: int | None = None) -> DrawnPage:
    long_side = long_px or int(rng.integers(640, 1001))
    short_side = int(long_side * rng.choice([0.707, 0.77, 0.56, 0.9], p=[0.62, 0.18, 0.1, 0.1]))
    size = (long_side, short_side) if rng.random() < 0.24 else (short_side, long_side)
    canvas = Canvas(rng, size, paper_color(rng), Writing(rng, only_built_in_font))
    kinds: list[Callable[[Canvas], None]] = [article, report, sheet_of_drawings, slide, form, picture_page, dense_page]
    kinds[rng.choice(len(kinds), p=[0.3, 0.24, 0.15, 0.1, 0.07, 0.06, 0.08])](canvas)
    if rng.random() < 0.08:
        stamp(canvas)
    if rng.random() < 0.12:  # A frame around the page is no content.
        inset = int(rng.integers(0, 14))
        canvas.draw.rectangle((inset, inset, size[0] - 1 - inset, size[1] - 1 - inset), None, canvas.ink, 1)
    return DrawnPage(canvas.image, canvas.labels)


def paper_color(rng: np.random.Generator) -> Color:
    kind = rng.random()
    if kind < 0.6:
        return (255, 255, 255)
    if kind < 0.92:
        base = rng.integers(225, 256)
        return tuple(int(v) for v in np.clip(base + rng.integers(-12, 10, 3), 0, 255))  # type: ignore[return-value]
    if kind < 0.97:
        return tuple(int(v) for v in rng.integers(170, 245, 3))  # type: ignore[return-value]
    return tuple(int(v) for v in rng.integers(5, 60, 3))  # type: ignore[return-value]


def compose_sheet(rng: np.random.Generator, only_built_in_font: bool) -> DrawnPage:
    """Small pages on one white sheet, framed, with banners above and captions below."""
    width, height = int(rng.integers(700, 1001)), int(rng.integers(700, 1001))
    canvas = Canvas(rng, (width, height), (255, 255, 255), Writing(rng, only_built_in_font))
    columns, rows = 2, int(rng.integers(1, 3))
    for number in range(columns * rows):
        if rng.random() < 0.1:
            continue
        left, top = number % columns * width // columns + 12, number // columns * height // rows + 34
        room = (width // columns - 24, height // rows - 70)
        page = single_page(rng, only_built_in_font, int(max(room) * rng.uniform(1.0, 1.9)))
        scale = min(room[0] / page.image.width, room[1] / page.image.height, 1)
        small = page.image.resize(
            (max(8, int(page.image.width * scale)), max(8, int(page.image.height * scale))),
            Image.Resampling.BICUBIC,
            reducing_gap=2,
        )
        left, top = left // LABEL_PX * LABEL_PX, top // LABEL_PX * LABEL_PX
        canvas.image.paste(small, (left, top))
        labels = Image.fromarray(page.labels).resize(
            (-(-small.width // LABEL_PX), -(-small.height // LABEL_PX)), Image.Resampling.NEAREST
        )
        target = canvas.labels[top // LABEL_PX :, left // LABEL_PX :][: labels.height, : labels.width]
        target[:] = np.asarray(labels)[: target.shape[0], : target.shape[1]]
        if rng.random() < 0.7:
            canvas.draw.rectangle((left, top, left + small.width, top + small.height), None, (20, 20, 20), 1)
        if rng.random() < 0.4:
            banner(canvas, (left, top - 28, left + int(small.width * rng.uniform(0.5, 1)), top))
        if rng.random() < 0.5:
            size = int(rng.integers(10, 22))
            box = (left + 8, top + small.height + 4, left + small.width, top + small.height + 8 + size)
            text_line(canvas, box, size, TEXT)
    return DrawnPage(canvas.image, canvas.labels)


# Layouts of whole pages.


def article(canvas: Canvas) -> None:
    """Running text in one to three columns with a heading now and then, and few other things."""
    flow(canvas, p=[0.5, 0.16, 0.06, 0.05, 0.05, 0.05, 0.05, 0.04, 0.04], max_columns=3)


def report(canvas: Canvas) -> None:
    """Text, tables, charts and photographs alike."""
    flow(canvas, p=[0.2, 0.14, 0.07, 0.17, 0.14, 0.1, 0.08, 0.07, 0.03], max_columns=2)


def dense_page(canvas: Canvas) -> None:
    """A newspaper: narrow columns of small text, photographs."""
    flow(canvas, p=[0.55, 0.2, 0.02, 0.04, 0.03, 0.14, 0, 0.02, 0], max_columns=4, body=0.0095)


def flow(canvas: Canvas, p: list[float], max_columns: int, body: float | None = None) -> None:
    """Fills columns from top to bottom with elements, each kind with the probability in `p`."""
    rng = canvas.rng
    width, height = canvas.size
    size = max(6.5, max(width, height) * (body or float(np.exp(rng.uniform(math.log(0.0105), math.log(0.021))))))
    margin = int(width * rng.uniform(0.04, 0.12))
    top, bottom = int(height * rng.uniform(0.03, 0.09)), int(height * rng.uniform(0.88, 0.97))
    if rng.random() < 0.4:  # header and page number
        text_line(canvas, (margin, top // 3, width - margin, top), size * 0.8, TEXT, share=rng.uniform(0.2, 0.6))
    if rng.random() < 0.55:
        left = int(rng.choice([margin, width // 2, width - margin - 2 * size]))
        box = (left, bottom + 4, left + int(3 * size), bottom + 8 + int(1.4 * size))
        with canvas.marked(TEXT, box, size / 2):
            canvas.draw.text(box[:2], str(rng.integers(1, 400)), canvas.ink, canvas.writing.font(size * 0.9))
    if rng.random() < 0.6:
        top = title(canvas, (margin, top, width - margin, bottom), size)
    columns = int(rng.integers(1, max_columns + 1))
    gutter = int(size * rng.uniform(1.2, 2.5))
    column_px = (width - 2 * margin - gutter * (columns - 1)) // columns
    style = Style(size, size * rng.uniform(1.15, 1.6), rng.uniform(1.12, 1.9), rng.random() < 0.6, rng.random() < 0.75)
    kinds = [paragraph, heading, bullets, table, chart, photograph, formula, drawing, form_rows]
    for column in range(columns):
        left, y = margin + column * (column_px + gutter), top
        while y < bottom - 2 * size:
            box = (left, y, left + column_px, bottom)
            kind = kinds[rng.choice(len(kinds), p=np.array(p) / sum(p))]
            end = kind(canvas, box, style)
            y = max(end, y + int(size)) + int(size * rng.uniform(0.5, 1.6))
            if rng.random() < 0.05:
                canvas.draw.line((left, y, left + column_px, y), canvas.ink, 1)  # a rule between parts
                y += int(size)
            if rng.random() < 0.03:
                break
    if columns > 1 and rng.random() < 0.15:
        x = margin + column_px + gutter // 2
        canvas.draw.line((x, top, x, bottom), canvas.color(), 1)


def sheet_of_drawings(canvas: Canvas) -> None:
    """Mostly white: thin drawings with some lines of text, as exercises in geometry have them."""
    rng = canvas.rng
    width, height = canvas.size
    size = max(width, height) * rng.uniform(0.012, 0.02)
    style = Style(size, size * 1.5, 1.3, True, True)
    margin = int(width * rng.uniform(0.05, 0.12))
    y = int(height * rng.uniform(0.03, 0.1))
    if rng.random() < 0.5:
        y = title(canvas, (margin, y, width - margin, height), size * 0.8)
    while y < height * 0.9:
        room = int(height * rng.uniform(0.14, 0.4))
        choice = rng.random()
        if choice < 0.3:
            y = paragraph(canvas, (margin, y, width - margin, min(y + room // 2, height)), style)
        else:
            count = int(rng.integers(1, 4))
            cell = (width - 2 * margin) // count
            for number in range(count):
                if rng.random() < 0.15:
                    continue
                inset = int(cell * rng.uniform(0.03, 0.2))
                left, right = margin + number * cell + inset, margin + (number + 1) * cell - inset
                kind: Callable[[Canvas, Box, Style], int] = drawing if rng.random() < 0.8 else chart
                kind(canvas, (left, y, right, min(y + room, height - margin // 2)), style)
            y += room
        y += int(height * rng.uniform(0.02, 0.12))


def slide(canvas: Canvas) -> None:
    """Few and large words, and something beside them."""
    rng = canvas.rng
    width, height = canvas.size
    size = min(width, height) * rng.uniform(0.028, 0.055)
    style = Style(size, size * 1.4, 1.4, True, True)
    margin = int(width * 0.06)
    y = int(height * 0.05)
    if rng.random() < 0.5:
        end = y + int(size * rng.uniform(1.8, 3))
        banner(canvas, (0 if rng.random() < 0.6 else margin, y, width, end))
        y = end + int(size)
    else:
        y = title(canvas, (margin, y, width - margin, height), size)
    split = int(width * rng.uniform(0.4, 0.65))
    kinds = [bullets, paragraph, photograph, chart, drawing, table, formula]
    order = rng.permutation(len(kinds))[:2]
    boxes = [(margin, y, split - margin // 3, height - margin // 2), (split, y, width - margin, height - margin // 2)]
    for index, box in zip(order, boxes, strict=True):
        kinds[index](canvas, box, style)


def form(canvas: Canvas) -> None:
    rng = canvas.rng
    width, height = canvas.size
    size = max(width, height) * rng.uniform(0.012, 0.018)
    style = Style(size, size * 1.5, 1.25, True, True)
    margin = int(width * rng.uniform(0.05, 0.1))
    y = title(canvas, (margin, int(height * 0.04), width - margin, height), size)
    while y < height * 0.9:
        kind = [form_rows, table, paragraph, heading][rng.choice(4, p=[0.5, 0.2, 0.15, 0.15])]
        y = kind(canvas, (margin, y, width - margin, height), style) + int(size * 1.2)


def picture_page(canvas: Canvas) -> None:
    """A photograph over most of the page, with words on or below it."""
    rng = canvas.rng
    width, height = canvas.size
    edge = int(width * rng.uniform(0, 0.08))
    bottom = int(height * rng.uniform(0.55, 1.0)) - edge
    box = (edge, edge, width - edge, bottom)
    place_photo(canvas, box)
    size = height * rng.uniform(0.02, 0.05)
    if rng.random() < 0.4:
        top = int(rng.uniform(box[1], max(box[1] + 1, box[3] - 3 * size)))
        with canvas.marked(HEADING, (box[0], top, box[2], top + int(2.4 * size)), size * 0.4):
            color = [(255, 255, 255), (0, 0, 0), canvas.color()][rng.integers(3)]
            words = canvas.writing.words(int(rng.integers(1, 5)))
            canvas.draw.text((box[0] + edge + 10, top + 4), words, color, canvas.writing.font(size * 1.6, True))
    if bottom < height * 0.9:
        small = Style(size * 0.55, size * 0.8, 1.2, True, True)
        paragraph(canvas, (edge + 12, bottom + 8, width - edge - 12, height - 6), small)


# Elements: each draws into a box and returns where it ended, in px from the top.


class Style(NamedTuple):
    """What the elements of one page have in common; sizes in px."""

    body_px: float
    line_px: float
    heading_scale: float
    bold_headings: bool
    indented: bool


def text_line(canvas: Canvas, box: Box, size_px: float, kind: int, bold: bool = False, share: float = 1.0) -> None:
    typeface = canvas.writing.font(size_px, bold)
    with canvas.marked(kind, (box[0] - 4, box[1] - 4, box[2] + 8, box[3] + 8), size_px * 0.45):
        text = canvas.writing.line(typeface, (box[2] - box[0]) * share)
        canvas.draw.text((box[0], box[1]), text, canvas.ink, typeface)


def lines_of_text(canvas: Canvas, box: Box, style: Style, count: int, kind: int = TEXT) -> int:
    rng = canvas.rng
    typeface = canvas.writing.font(style.body_px, bold=bool(rng.random() < 0.07))
    count = max(0, min(count, int((box[3] - box[1]) / style.line_px)))
    end = box[1] + int(count * style.line_px)
    centred = rng.random() < 0.05
    color = canvas.color() if rng.random() < 0.08 else canvas.ink
    with canvas.marked(kind, (box[0] - 4, box[1] - 4, box[2] + 8, end + 8), style.line_px * 0.5):
        for number in range(count):
            share = rng.uniform(0.2, 1) if number == count - 1 else rng.uniform(0.93, 1)
            indent = style.body_px * 1.5 if number == 0 and style.indented and count > 2 else 0
            text = canvas.writing.line(typeface, (box[2] - box[0] - indent) * share)
            x = box[0] + indent
            if centred:
                x = (box[0] + box[2] - typeface.getlength(text)) / 2
            canvas.draw.text((x, box[1] + number * style.line_px), text, color, typeface)
    return end


def paragraph(canvas: Canvas, box: Box, style: Style) -> int:
    return lines_of_text(canvas, box, style, int(canvas.rng.integers(2, 13)))


def bullets(canvas: Canvas, box: Box, style: Style) -> int:
    rng = canvas.rng
    y = box[1]
    indent = int(style.body_px * 1.6)
    numbered = rng.random() < 0.4
    for number in range(int(rng.integers(2, 7))):
        if y + style.line_px > box[3]:
            break
        with canvas.marked(TEXT, (box[0], y, box[0] + indent, y + int(style.line_px)), style.body_px * 0.5):
            if numbered:
                canvas.draw.text((box[0], y), f"{number + 1}.", canvas.ink, canvas.writing.font(style.body_px))
            else:
                r, mid = max(1, style.body_px / 6), y + style.body_px * 0.65
                canvas.draw.ellipse((box[0] + r, mid - r, box[0] + 3 * r, mid + r), canvas.ink)
        y = lines_of_text(canvas, (box[0] + indent, y, box[2], box[3]), style, int(rng.integers(1, 4)))
        y += int(style.body_px * 0.3)
    return y


def title(canvas: Canvas, box: Box, body_px: float) -> int:
    rng = canvas.rng
    size = body_px * rng.uniform(1.6, 4.2)
    bold = rng.random() < 0.6
    y = box[1]
    for _ in range(int(rng.integers(1, 3))):
        share = rng.uniform(0.35, 0.95)
        left = box[0] if rng.random() < 0.6 else int(box[0] + (box[2] - box[0]) * (1 - share) / 2)
        text_line(canvas, (left, y, box[2], y + int(size * 1.3)), size, HEADING, bold, share)
        y += int(size * 1.25)
    if rng.random() < 0.5:
        text_line(canvas, (box[0], y, box[2], y + int(body_px * 1.5)), body_px, TEXT, share=rng.uniform(0.2, 0.7))
        y += int(body_px * 1.9)
    if rng.random() < 0.3:
        canvas.draw.line((box[0], y, box[2], y), canvas.ink, int(rng.integers(1, 3)))
    return y + int(body_px)


def heading(canvas: Canvas, box: Box, style: Style) -> int:
    rng = canvas.rng
    size = style.body_px * style.heading_scale
    if rng.random() < 0.1:
        end = box[1] + int(size * 1.7)
        banner(canvas, (box[0], box[1], box[2], end))
        return end
    count = 2 if rng.random() < 0.12 else 1
    y = box[1] + int(style.body_px * 0.4)
    color, canvas.ink = canvas.ink, (canvas.color() if rng.random() < 0.2 else canvas.ink)
    for _ in range(count):
        if y + size * 1.4 > box[3]:
            break
        text_line(
            canvas, (box[0], y, box[2], y + int(size * 1.4)), size, HEADING, style.bold_headings, rng.uniform(0.2, 0.9)
        )
        y += int(size * 1.35)
    canvas.ink = color
    return y


def banner(canvas: Canvas, box: Box) -> None:
    """A heading on a coloured bar."""
    height = box[3] - box[1]
    if height < 8 or box[2] - box[0] < 20:
        return
    pale = canvas.rng.random() < 0.3
    fill = canvas.color(strong=not pale)
    size = height * canvas.rng.uniform(0.45, 0.7)
    typeface = canvas.writing.font(size, bool(canvas.rng.random() < 0.5))
    with canvas.marked(HEADING, box, 0):
        canvas.draw.rectangle(box, fill)
        text = canvas.writing.line(typeface, (box[2] - box[0]) * canvas.rng.uniform(0.3, 0.85))
        color = (255, 255, 255) if sum(fill) < 400 else (10, 10, 20)
        canvas.draw.text((box[0] + size * 0.5, box[1] + (height - size * 1.25) / 2), text, color, typeface)


def table(canvas: Canvas, box: Box, style: Style) -> int:
    rng = canvas.rng
    width = int((box[2] - box[0]) * rng.choice([1.0, rng.uniform(0.6, 1.0)]))
    columns = int(np.clip(width / (style.body_px * rng.uniform(4, 9)), 2, 9))
    row_px = style.body_px * rng.uniform(1.3, 2.4)
    rows = min(int(rng.integers(3, 15)), int((box[3] - box[1] - style.body_px) / row_px))
    if rows < 2:
        return paragraph(canvas, box, style)
    shares = rng.uniform(0.6, 1.6, columns)
    edges = (box[0] + np.concatenate([[0], np.cumsum(shares / shares.sum())]) * width).astype(int)
    end = box[1] + int(rows * row_px)
    lines = rng.choice(["all", "rows", "three", "none", "columns"], p=[0.45, 0.2, 0.18, 0.07, 0.1])
    line_color = canvas.ink if rng.random() < 0.6 else tuple(int(v) for v in rng.integers(100, 200, 3))
    weight = 2 if rng.random() < 0.1 else 1
    regular, bold = (
        canvas.writing.font(style.body_px * rng.uniform(0.8, 1)),
        canvas.writing.font(style.body_px * 0.9, True),
    )
    numeric = rng.random() < 0.65
    with canvas.marked(TABLE, (box[0] - 4, box[1] - 4, box[0] + width + 8, end + 8), style.body_px * 0.55):
        if rng.random() < 0.4:
            canvas.draw.rectangle((box[0], box[1], box[0] + width, box[1] + int(row_px)), canvas.color(False))
        if rng.random() < 0.2:
            shade = canvas.color(False)
            for row in range(2, rows, 2):
                y = box[1] + row * row_px
                canvas.draw.rectangle((box[0], int(y), box[0] + width, int(y + row_px)), shade)
        for row in range(rows):
            y = box[1] + row * row_px + (row_px - style.body_px * 1.2) / 2
            for column in range(columns):
                if rng.random() < 0.06:
                    continue
                typeface = bold if row == 0 else regular
                room = edges[column + 1] - edges[column] - style.body_px * 0.6
                is_number = numeric and row and column
                text = (
                    canvas.writing.number() if is_number else canvas.writing.line(typeface, room * rng.uniform(0.3, 1))
                )
                x = edges[column] + style.body_px * 0.35
                if is_number and typeface.getlength(text) < room:
                    x = edges[column + 1] - style.body_px * 0.35 - typeface.getlength(text)
                canvas.draw.text((x, y), text, canvas.ink, typeface)
        for row in range(rows + 1):
            if lines in ("all", "rows") or (lines in ("three", "columns") and row in (0, 1, rows)):
                y = box[1] + int(row * row_px)
                canvas.draw.line((box[0], y, box[0] + width, y), line_color, weight)
        if lines in ("all", "columns"):
            for x in edges if rng.random() < 0.8 else edges[1:-1]:
                canvas.draw.line((int(x), box[1], int(x), end), line_color, weight)
    return caption(canvas, (box[0], end + 4, box[2], box[3]), style)


def caption(canvas: Canvas, box: Box, style: Style) -> int:
    if canvas.rng.random() < 0.5 or box[3] - box[1] < style.line_px:
        return box[1]
    small = style._replace(body_px=style.body_px * 0.85, line_px=style.line_px * 0.85, indented=False)
    return lines_of_text(canvas, (box[0], box[1] + 4, box[2], box[3]), small, int(canvas.rng.integers(1, 3)))


def form_rows(canvas: Canvas, box: Box, style: Style) -> int:
    """Labels with lines, boxes or ticks to fill in: text."""
    rng = canvas.rng
    y, step = box[1], int(style.line_px * rng.uniform(1.2, 1.8))
    for _ in range(int(rng.integers(2, 6))):
        if y + step > box[3]:
            break
        room = box[2] - box[0]
        split = box[0] + int(room * rng.uniform(0.25, 0.5))
        with canvas.marked(TEXT, (box[0], y, box[2], y + step), style.body_px * 0.5):
            typeface = canvas.writing.font(style.body_px)
            canvas.draw.text((box[0], y), canvas.writing.line(typeface, (split - box[0]) * 0.85), canvas.ink, typeface)
            kind = rng.random()
            if kind < 0.4:
                canvas.draw.line(
                    (split, y + int(style.body_px * 1.2), box[2], y + int(style.body_px * 1.2)), canvas.ink
                )
            elif kind < 0.7:
                canvas.draw.rectangle((split, y, box[2] - 1, y + int(style.body_px * 1.35)), None, canvas.ink)
            else:
                for tick in range(3):
                    x = split + tick * int(room * 0.16)
                    side = int(style.body_px)
                    canvas.draw.rectangle((x, y + 2, x + side, y + 2 + side), None, canvas.ink)
                    text = canvas.writing.line(typeface, room * 0.09)
                    canvas.draw.text((x + side * 1.4, y), text, canvas.ink, typeface)
        y += step
    return y


def formula(canvas: Canvas, box: Box, style: Style) -> int:
    """Lines of signs with fractions, sums, roots, indices and matrices."""
    rng = canvas.rng
    y = box[1] + int(style.body_px * 0.4)
    size = style.body_px * rng.uniform(0.95, 1.5)
    for _ in range(int(rng.integers(1, 4))):
        if y + size * 3 > box[3]:
            break
        end = y + int(size * 2.9)
        with canvas.marked(FORMULA, (box[0], y - 4, box[2], end), size * 0.4):
            formula_line(canvas, box[0] + (box[2] - box[0]) * rng.uniform(0.02, 0.3), y + size, box[2], size)
        y = end
    return y


FORMULA_FACES = (
    "LiberationSerif-Italic",
    "lmroman10-italic",
    "DejaVuSerif-Italic",
    "FreeSerifItalic",
    "LinLibertine_RI",
)
LETTERS, GREEK, SIGNS = (
    "abcdefghijkmnpqrstuvwxyzABCEFGHKLMNPQRSTXYZ",
    "αβγδεθλμπρσφψωΔΩΣΦ",
    ["=", "+", "-", "<", ">", "≤", "≈", "·", "∈"],
)


def formula_line(canvas: Canvas, x: float, middle: float, right: float, size: float) -> None:
    rng, draw, ink = canvas.rng, canvas.draw, canvas.ink
    plain = not canvas.writing.regular
    faces = [f for f in FORMULA_FACES if f in font_files()]
    face = "" if plain or not faces else faces[rng.integers(len(faces))]
    upright = "" if plain else "DejaVuSans"
    large, small = font(face, max(6, round(size))), font(face, max(5, round(size * 0.62)))
    sign_font = font(upright, max(6, round(size * 0.9)))
    signs = SIGNS[:5] if plain else SIGNS

    def letter() -> str:
        return (
            GREEK[rng.integers(len(GREEK))] if not plain and rng.random() < 0.3 else LETTERS[rng.integers(len(LETTERS))]
        )

    def symbol(x: float, y: float) -> float:
        text = letter()
        draw.text((x, y), text, ink, large)
        x += large.getlength(text)
        if rng.random() < 0.45:
            script = letter() if rng.random() < 0.6 else str(rng.integers(0, 10))
            draw.text((x, y + size * (0.55 if rng.random() < 0.5 else -0.2)), script, ink, small)
            x += small.getlength(script)
        return x + size * 0.08

    for _ in range(int(rng.integers(3, 12))):
        if x > right - size * 4:
            break
        kind = rng.random()
        if kind < 0.45:
            x = symbol(x, middle - size * 0.1)
        elif kind < 0.68:
            length = size * rng.uniform(0.8, 3.2)
            for y in (middle - size * 0.75, middle + size * 0.65):
                inner, stop = x + size * 0.15, x + length - size * 0.4
                while inner < stop:
                    inner = symbol(inner, y)
            y_line = int(middle + size * 0.5)
            draw.line((x, y_line, x + length, y_line), ink, max(1, round(size / 14)))
            x += length + size * 0.2
        elif kind < 0.8:
            big = font("DejaVuSans" if not plain else "", max(8, round(size * 1.7)))
            sign = "S" if plain else "∑∫∏"[rng.integers(3)]
            draw.text((x, middle - size * 0.75), sign, ink, big)
            draw.text((x + size * 0.2, middle + size * 1.15), f"{letter()}=1", ink, small)
            x += size * 1.6
        elif kind < 0.9:
            length = size * rng.uniform(0.8, 2)
            draw.line(
                [
                    (x, middle + size * 0.5),
                    (x + size * 0.25, middle + size),
                    (x + size * 0.5, middle - size * 0.25),
                    (x + size * 0.5 + length, middle - size * 0.25),
                ],
                ink,
                max(1, round(size / 14)),
            )
            symbol(x + size * 0.6, middle - size * 0.1)
            x += length + size * 0.7
        else:
            bracket = font(upright, max(8, round(size * 1.6)))
            draw.text((x, middle - size * 0.7), "([{"[rng.integers(3)], ink, bracket)
            x = symbol(x + size * 0.6, middle - size * 0.1)
            draw.text((x, middle - size * 0.7), ")]}"[rng.integers(3)], ink, bracket)
            x += size * 0.6
        if rng.random() < 0.7:
            sign = signs[rng.integers(len(signs))]
            draw.text((x + size * 0.15, middle - size * 0.1), sign, ink, sign_font)
            x += sign_font.getlength(sign) + size * 0.3
    if rng.random() < 0.3:
        draw.text((right - size * 2, middle), f"({rng.integers(1, 40)})", ink, canvas.writing.font(size * 0.9))


def element_box(canvas: Canvas, box: Box, style: Style, low: float, high: float) -> Box | None:
    """A part of the box for a picture, `low` to `high` times as high as wide; None where there is no room."""
    rng = canvas.rng
    width = int((box[2] - box[0]) * rng.choice([1.0, rng.uniform(0.45, 1.0)]))
    height = int(min(width * rng.uniform(low, high), box[3] - box[1]))
    if width < 60 or height < 50:
        return None
    left = box[0] + int((box[2] - box[0] - width) * rng.choice([0, 0.5, 1]))
    return left, box[1], left + width, box[1] + height


def chart(canvas: Canvas, box: Box, style: Style) -> int:
    """Axes with bars, lines, points or areas; pies; boxes with arrows."""
    rng = canvas.rng
    area = element_box(canvas, box, style, 0.4, 0.95)
    if area is None:
        return paragraph(canvas, box, style)
    kinds = [axes_chart, pie_chart, flow_diagram]
    with canvas.marked(FIGURE, (area[0] - 4, area[1], area[2] + 4, area[3]), style.body_px * 0.55):
        if rng.random() < 0.15:
            canvas.draw.rectangle(area, canvas.color(False))
        kinds[rng.choice(3, p=[0.68, 0.12, 0.2])](canvas, area, style)
    return caption(canvas, (box[0], area[3] + 4, box[2], box[3]), style)


def axes_chart(canvas: Canvas, box: Box, style: Style) -> None:
    rng, draw = canvas.rng, canvas.draw
    size = max(5.5, min(style.body_px * rng.uniform(0.7, 1.0), (box[3] - box[1]) / 9))
    typeface = canvas.writing.font(size)
    left, bottom = box[0] + int(size * 3), box[3] - int(size * 2)
    right, top = box[2] - int(size * 0.8), box[1] + int(size * 1.6)
    if right - left < 20 or bottom - top < 20:
        return
    if rng.random() < 0.5:
        draw.text(
            (left + size, box[1]),
            canvas.writing.line(typeface, (right - left) * rng.uniform(0.3, 0.8)),
            canvas.ink,
            typeface,
        )
    ticks = int(rng.integers(3, 8))
    grid = rng.random() < 0.4
    for tick in range(ticks):
        y = bottom - (bottom - top) * tick / ticks
        if grid:
            draw.line((left, y, right, y), (205, 205, 210))
        draw.line((left - 3, y, left, y), canvas.ink)
        text = str(tick * int(rng.choice([1, 5, 10, 100])))
        draw.text((left - 5 - typeface.getlength(text), y - size * 0.6), text, canvas.ink, typeface)
    if rng.random() < 0.5:
        draw.rectangle((left, top, right, bottom), None, canvas.ink)
    else:
        draw.line([(left, top), (left, bottom), (right, bottom)], canvas.ink, int(rng.integers(1, 3)))
    kind = rng.choice(["bars", "lines", "points", "area", "groups"], p=[0.25, 0.3, 0.17, 0.08, 0.2])
    count = int(rng.integers(3, 12))
    step = (right - left) / count
    colors = [canvas.color() for _ in range(4)]
    if kind in ("bars", "groups"):
        series = 1 if kind == "bars" else int(rng.integers(2, 5))
        for number in range(count):
            for index in range(series):
                height = (bottom - top) * rng.uniform(0.08, 0.95)
                x0 = left + step * (number + 0.12 + 0.76 * index / series)
                x1 = max(x0 + 1, x0 + step * 0.76 / series - 1)
                draw.rectangle(
                    (x0, bottom - height, x1, bottom), colors[index % 4], canvas.ink if rng.random() < 0.1 else None
                )
    else:
        for color in colors[: int(rng.integers(1, 5))]:
            points = max(2, count * int(rng.integers(1, 4)))
            walk = np.cumsum(rng.normal(0, 1, points))
            walk = (walk - walk.min()) / max(float(np.ptp(walk)), 1e-6)
            heights = bottom - (bottom - top) * (0.05 + 0.85 * walk * rng.uniform(0.4, 1))
            xs = np.linspace(left + 2, right - 2, points)
            path = [(float(x), float(y)) for x, y in zip(xs, heights, strict=True)]
            if kind == "area":
                draw.polygon([(xs[0], bottom), *path, (xs[-1], bottom)], color)
            elif kind == "lines":
                draw.line(path, color, int(rng.integers(1, 3)))
            if kind == "points" or rng.random() < 0.3:
                r = max(1.2, size * 0.2)
                scattered = path if kind == "lines" else [(x, float(rng.uniform(top, bottom))) for x, _ in path]
                for x, y in scattered:
                    draw.ellipse((x - r, y - r, x + r, y + r), color)
    for number in range(count):
        text = canvas.writing.line(typeface, step * 0.8)[:6] if rng.random() < 0.8 else ""
        draw.text((left + step * (number + 0.2), bottom + size * 0.4), text, canvas.ink, typeface)
    if rng.random() < 0.4:  # legend
        x = left + (right - left) * rng.uniform(0.1, 0.6)
        for index in range(int(rng.integers(1, 4))):
            y = top + size * (0.3 + 1.4 * index)
            draw.rectangle((x, y + size * 0.2, x + size, y + size), colors[index])
            draw.text((x + size * 1.4, y), canvas.writing.line(typeface, size * 6), canvas.ink, typeface)


def pie_chart(canvas: Canvas, box: Box, style: Style) -> None:
    rng, draw = canvas.rng, canvas.draw
    side = min(box[2] - box[0], box[3] - box[1]) - 4
    left, top = box[0] + int(rng.uniform(0, box[2] - box[0] - side)), box[1] + 2
    shares = rng.uniform(0.2, 1, int(rng.integers(2, 8)))
    angles = np.concatenate([[0], np.cumsum(shares / shares.sum())]) * 360
    for start, end in itertools.pairwise(angles):
        draw.pieslice((left, top, left + side, top + side), float(start), float(end), canvas.color(), (255, 255, 255))
    typeface = canvas.writing.font(style.body_px * 0.85)
    if left + side + 70 < box[2]:
        for index in range(len(shares)):
            y = top + style.body_px * (0.5 + 1.5 * index)
            draw.rectangle((left + side + 14, y, left + side + 22, y + 8), canvas.color())
            text = canvas.writing.line(typeface, box[2] - left - side - 30)
            draw.text((left + side + 28, y - 2), text, canvas.ink, typeface)


def flow_diagram(canvas: Canvas, box: Box, style: Style) -> None:
    rng, draw = canvas.rng, canvas.draw
    columns, rows = int(rng.integers(2, 5)), int(rng.integers(1, 4))
    step_x, step_y = (box[2] - box[0]) / columns, (box[3] - box[1]) / rows
    typeface = canvas.writing.font(max(5, min(style.body_px * 0.9, step_y * 0.3)))
    centres = []
    fill = canvas.color(False) if rng.random() < 0.5 else None
    for row in range(rows):
        for column in range(columns):
            if rng.random() < 0.15:
                continue
            x, y = box[0] + step_x * column + step_x * 0.14, box[1] + step_y * row + step_y * 0.2
            end = (x + step_x * 0.7, y + step_y * 0.55)
            shape = rng.random()
            if shape < 0.6:
                draw.rectangle((x, y, *end), fill, canvas.ink)
            elif shape < 0.85:
                draw.ellipse((x, y, *end), fill, canvas.ink)
            else:
                middle = ((x + end[0]) / 2, (y + end[1]) / 2)
                draw.polygon(
                    [(x, middle[1]), (middle[0], y), (end[0], middle[1]), (middle[0], end[1])], fill, canvas.ink
                )
            text = canvas.writing.line(typeface, step_x * 0.5)
            draw.text((x + step_x * 0.08, (y + end[1]) / 2 - style.body_px * 0.5), text, canvas.ink, typeface)
            centres.append((x, y, *end))
    for before, after in itertools.pairwise(centres):
        if after[0] > before[2]:
            arrow(draw, (before[2], (before[1] + before[3]) / 2), (after[0], (after[1] + after[3]) / 2), canvas.ink)
        else:
            arrow(draw, ((before[0] + before[2]) / 2, before[3]), ((after[0] + after[2]) / 2, after[1]), canvas.ink)


def arrow(draw: ImageDraw.ImageDraw, start: tuple[float, float], end: tuple[float, float], color: Color) -> None:
    draw.line([start, end], color)
    angle = math.atan2(end[1] - start[1], end[0] - start[0])
    sides = [(end[0] - 7 * math.cos(angle + turn), end[1] - 7 * math.sin(angle + turn)) for turn in (0.4, -0.4)]
    draw.polygon([end, *sides], color)


def drawing(canvas: Canvas, box: Box, style: Style) -> int:
    """Thin lines: geometry with lettered points, or curves as a pen draws them."""
    rng = canvas.rng
    area = element_box(canvas, box, style, 0.6, 1.1)
    if area is None:
        return paragraph(canvas, box, style)
    with canvas.marked(FIGURE, (area[0] - 8, area[1] - 8, area[2] + 8, area[3] + 8), max(8.0, style.body_px * 0.75)):
        (geometry if rng.random() < 0.6 else pen_drawing)(canvas, area, style)
    if rng.random() < 0.12:
        canvas.draw.rectangle((area[0] - 6, area[1] - 6, area[2] + 6, area[3] + 6), None, canvas.ink)
    return caption(canvas, (box[0], area[3] + 6, box[2], box[3]), style)


def geometry(canvas: Canvas, box: Box, style: Style) -> None:
    rng, draw = canvas.rng, canvas.draw
    low, span = np.array(box[:2]), np.array([box[2] - box[0], box[3] - box[1]])
    count = int(rng.integers(3, 8))
    points = low + span * rng.uniform(0.06, 0.94, (count, 2))
    if rng.random() < 0.45:  # a square or rectangle as the first four
        a, b = low + span * rng.uniform(0.05, 0.35, 2), low + span * rng.uniform(0.6, 0.95, 2)
        points[: min(4, count)] = np.array([a, (b[0], a[1]), b, (a[0], b[1])])[: min(4, count)]
    weight = int(rng.choice([1, 1, 1, 2]))
    corners = [tuple(map(float, p)) for p in points]
    first = corners[: int(rng.integers(3, 5))]
    draw.line([*first, first[0]], canvas.ink, weight)
    for _ in range(int(rng.integers(1, 6))):
        i, j = rng.integers(count, size=2)
        draw.line([corners[i], corners[j]], canvas.ink, weight)
    if rng.random() < 0.35:
        r = float(span.min()) * rng.uniform(0.15, 0.45)
        x, y = map(float, low + span / 2)
        draw.ellipse((x - r, y - r, x + r, y + r), None, canvas.ink, weight)
    typeface = canvas.writing.font(style.body_px * rng.uniform(0.8, 1.1))
    for number, (x, y) in enumerate(corners):
        dx, dy = rng.uniform(-1.2, 0.5, 2) * style.body_px
        draw.text((x + dx, y + dy), "ABCDEFGHMN"[number], canvas.ink, typeface)


def pen_drawing(canvas: Canvas, box: Box, style: Style) -> None:
    rng, draw = canvas.rng, canvas.draw
    span = np.array([box[2] - box[0], box[3] - box[1]])
    weight = int(rng.choice([1, 2, 3], p=[0.6, 0.3, 0.1]))
    for _ in range(int(rng.integers(3, 14))):
        centre = np.array(box[:2]) + span * rng.uniform(0.2, 0.8, 2)
        radius = float(span.min()) * rng.uniform(0.05, 0.35)
        angles = np.linspace(0, rng.uniform(1.5, 2 * math.pi), int(rng.integers(8, 26)))
        radii = radius * (
            1 + 0.3 * np.sin(angles * rng.integers(1, 6) + rng.uniform(0, 6)) + rng.normal(0, 0.04, len(angles))
        )
        path = centre + np.stack([np.cos(angles), np.sin(angles) * rng.uniform(0.4, 1)], 1) * radii[:, None]
        path = np.clip(path, box[:2], box[2:])
        line = [tuple(map(float, p)) for p in path]
        if rng.random() < 0.15:
            draw.polygon(line, canvas.color(False) if rng.random() < 0.6 else canvas.color(), canvas.ink)
        else:
            draw.line(line, canvas.ink, weight, joint="curve")
    if rng.random() < 0.3:
        for _ in range(int(rng.integers(4, 20))):  # hatching
            x, y = np.array(box[:2]) + span * rng.uniform(0.1, 0.8, 2)
            draw.line((float(x), float(y), float(x + span[0] * 0.06), float(y + span[1] * 0.06)), canvas.ink)


def photograph(canvas: Canvas, box: Box, style: Style) -> int:
    area = element_box(canvas, box, style, 0.45, 1.0)
    if area is None:
        return paragraph(canvas, box, style)
    if canvas.rng.random() < 0.15:
        object_on_paper(canvas, area)
    else:
        place_photo(canvas, area)
    return caption(canvas, (box[0], area[3] + 4, box[2], box[3]), style)


def place_photo(canvas: Canvas, box: Box) -> None:
    if box[2] - box[0] < 8 or box[3] - box[1] < 8:
        return
    picture = scene(canvas.rng, (box[2] - box[0], box[3] - box[1]))
    canvas.image.paste(picture, box[:2])
    canvas.fill_class(PHOTO, box)


def object_on_paper(canvas: Canvas, box: Box) -> None:
    """A thing cut out of a photograph: shaded, without background."""
    width, height = box[2] - box[0], box[3] - box[1]
    mask = Image.new("L", (width, height), 0)
    draw = ImageDraw.Draw(mask)
    for _ in range(int(canvas.rng.integers(1, 5))):
        x0, y0 = canvas.rng.uniform(0.05, 0.45, 2) * (width, height)
        x1, y1 = canvas.rng.uniform(0.55, 0.95, 2) * (width, height)
        (draw.ellipse if canvas.rng.random() < 0.6 else draw.rectangle)(
            (float(x0), float(y0), float(x1), float(y1)), 255
        )
    with canvas.marked(PHOTO, box, 6):
        canvas.image.paste(scene(canvas.rng, (width, height)), box[:2], mask.filter(ImageFilter.GaussianBlur(1.5)))


def scene(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Overlapping shaded shapes over clouds of 1/f noise, as a camera might see them."""
    width, height = size
    small = (max(8, width // 2), max(8, height // 2))
    frequencies = np.hypot(np.fft.fftfreq(small[1])[:, None], np.fft.rfftfreq(small[0])[None])
    frequencies[0, 0] = 1
    slope = rng.uniform(0.9, 1.7)
    spectrum = rng.normal(size=(2, *frequencies.shape)) + 1j * rng.normal(size=(2, *frequencies.shape))
    noise = np.fft.irfft2(spectrum / frequencies**slope, s=(small[1], small[0]))
    noise /= noise.std(axis=(1, 2), keepdims=True) + 1e-9
    base, tint = rng.uniform(40, 215, 3), rng.uniform(-1, 1, 3)
    contrast = rng.uniform(15, 55)
    clouds = base + contrast * (noise[0][..., None] + 0.4 * noise[1][..., None] * tint)
    picture = Image.fromarray(np.clip(clouds, 0, 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    shapes = Image.new("RGB", size, tuple(int(v) for v in base))
    mask = Image.new("L", size, 0)
    draw, cover = ImageDraw.Draw(shapes), ImageDraw.Draw(mask)
    palette = rng.integers(0, 256, (6, 3))
    for _ in range(int(rng.integers(4, 45))):
        radius = min(size) * 0.5 * float(rng.uniform(0.05, 1)) ** 2 + 2
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        color = tuple(int(v) for v in np.clip(palette[rng.integers(6)] + rng.integers(-30, 31, 3), 0, 255))
        opacity = int(rng.integers(110, 256))
        ratio = rng.uniform(0.4, 1.8)
        bounds = (x - radius, y - radius * ratio, x + radius, y + radius * ratio)
        if rng.random() < 0.55:
            draw.ellipse(bounds, color)
            cover.ellipse(bounds, opacity)
        else:
            corners = [
                (x + radius * math.cos(a), y + radius * ratio * math.sin(a)) for a in np.sort(rng.uniform(0, 6.3, 4))
            ]
            draw.polygon(corners, color)
            cover.polygon(corners, opacity)
    blur = ImageFilter.GaussianBlur(float(rng.choice([0.7, 1.2, 2.5])))
    picture.paste(shapes.filter(blur), (0, 0), mask.filter(blur))
    slope_x, slope_y = rng.uniform(-0.35, 0.35, 2)
    light = 1 + slope_x * np.linspace(-1, 1, width)[None, :] + slope_y * np.linspace(-1, 1, height)[:, None]
    grain = rng.normal(0, rng.uniform(1, 7), (height, width))
    values = np.asarray(picture, np.float32) * light[..., None] + grain[..., None]
    if rng.random() < 0.2:
        values = np.repeat(values.mean(axis=2, keepdims=True), 3, axis=2)
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def stamp(canvas: Canvas) -> None:
    """A round or square stamp across the page, as text."""
    rng = canvas.rng
    width, height = canvas.size
    side = int(min(width, height) * rng.uniform(0.1, 0.22))
    left, top = int(rng.uniform(0, width - side)), int(rng.uniform(0, height - side))
    color: Color = [(170, 30, 40), (40, 50, 150), (30, 110, 60)][rng.integers(3)]
    ring = canvas.draw.ellipse if rng.random() < 0.6 else canvas.draw.rectangle
    with canvas.marked(FIGURE, (left, top, left + side, top + side), 4):
        ring((left, top, left + side - 1, top + side - 1), None, color, 2)
        ring((left + 5, top + 5, left + side - 6, top + side - 6), None, color, 1)
        typeface = canvas.writing.font(side * 0.14, True)
        for row in range(3):
            text = canvas.writing.line(typeface, side * 0.62)
            canvas.draw.text((left + side * 0.2, top + side * (0.25 + 0.18 * row)), text, color, typeface)
