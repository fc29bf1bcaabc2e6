"""What `search` does with a feature store: reads the query, finds, and shows what was found."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from ..corpora.extraction import digest_of
from ..corpora.pages import Page, PageReader, ReadOptions, find_pages
from ..corpora.pictures import sheet
from ..corpora.search import Hit, Query, query_of_map, query_of_page, search
from ..corpora.search_modes import Box
from ..corpora.store import PLAN_FILE, WORK, FeatureStore, Plan
from ..image_processing_image_encoder_vit import ImageEncoderViTImageProcessorPil
from ..storage.atomic_file import atomic_file
from .loading import choose_device, load_model
from .options import DTYPES, picture_format

FRAME_COLOR, MISSING_COLOR = (230, 30, 90), (225, 225, 228)
SHEET_COLUMNS, PANEL_PX = 6, 320


def find_and_show(arguments: argparse.Namespace, mode: str) -> str:
    """
    Searches, draws the sheet of --plot, and gives what is printed.

    Raises:
        OSError, ValueError, ImportError: With a message for the user.
    """
    store = FeatureStore(arguments.features)
    query, page = read_query(store, arguments)
    hits = search(store, query, mode=mode, top=arguments.top, shortlist=arguments.shortlist, track=with_progress)
    if arguments.plot:
        with atomic_file(arguments.plot) as partial:
            draw(store, arguments, page, hits).save(partial, picture_format(arguments.plot))
    return as_json(store, arguments.query, mode, hits) if arguments.json else as_table(hits)


def with_progress(page_ids: Iterable[str]) -> Iterator[str]:
    yield from tqdm(page_ids, unit="page", file=sys.stderr, leave=False)


def read_query(store: FeatureStore, arguments: argparse.Namespace) -> tuple[Query, Image.Image | None]:
    """
    The query of the command, and its image if it is no page of the store.

    Raises:
        OSError, ValueError, ImportError: With a message for the user.
    """
    if arguments.query in store:
        return query_of_page(store, arguments.query, arguments.region), None
    image = read_image(store, arguments.query, arguments.page)
    model, processor = load_encoder(store, arguments.checkpoint, arguments.revision)
    model = model.to(choose_device(arguments.device))
    return query_of_map(encode(image, model, processor, feature_dtype(store)), arguments.region), image


def read_image(store: FeatureStore, name: str, page: int) -> Image.Image:
    """A page of a file as an RGB image, PDFs at the resolution of the store's."""
    options = ReadOptions(dpi=settings_of(store).get("dpi", ReadOptions().dpi))
    try:
        pages = list(find_pages([name], options))
    except ValueError as error:
        raise ValueError(f"{error} Nor is it the id of a page of {str(store.folder)!r}.") from None
    if not 0 <= page < len(pages):
        raise ValueError(f"--page {page}: {name!r} has {len(pages)} page(s), counted from 0.")
    try:
        return PageReader(options).read(pages[page]).image
    except Exception as error:  # A damaged file makes decoders raise nearly anything.
        raise ValueError(f"Cannot read {pages[page].id!r}: {error}") from error


def settings_of(store: FeatureStore) -> dict[str, Any]:
    """What the store's manifest says about how its features were made."""
    settings: dict[str, Any] = store.manifest.get("settings", {})
    return settings


def feature_dtype(store: FeatureStore) -> torch.dtype:
    return DTYPES[settings_of(store).get("feature_dtype", "float32")]


def load_encoder(store: FeatureStore, checkpoint: str | None, revision: str | None = None) -> tuple[Any, Any]:
    """
    The model that made the store, from where its manifest says or from `checkpoint`, and the processor.

    Raises:
        OSError, ValueError: If it cannot be loaded, or has other weights.
    """
    made_by = store.manifest.get("model", {})
    named, dtype = made_by.get("checkpoint"), made_by.get("dtype")
    if named is None or dtype not in DTYPES or "processor" not in settings_of(store):
        raise ValueError(f"The manifest of {str(store.folder)!r} does not say which model made it: extract it again.")
    wanted = checkpoint or named
    try:
        model = load_model(wanted, DTYPES[dtype], revision)
    except (OSError, ValueError) as error:
        if checkpoint is not None:
            raise
        raise ValueError(
            f"The model that made {str(store.folder)!r}, {named!r}, cannot be loaded: give its place with "
            f"--checkpoint. {error}"
        ) from error
    if digest_of(model) != made_by.get("weights_sha256"):
        raise ValueError(
            f"The features in {str(store.folder)!r} were made by {named!r}. {wanted!r} holds other weights, whose "
            "features cannot be compared with them. Give the same model with --checkpoint, or extract again."
        )
    return model, ImageEncoderViTImageProcessorPil.from_dict(settings_of(store)["processor"])


@torch.inference_mode()
def encode(image: Image.Image, model: Any, processor: Any, dtype: torch.dtype) -> Any:
    """The feature map of an image as the store would hold it, rounded to `dtype` as there."""
    inputs = processor(image, return_tensors="pt").to(model.device)
    outputs = model(**inputs)
    outputs.last_hidden_state = outputs.last_hidden_state.to("cpu", dtype)
    return processor.post_process_feature_maps(outputs, inputs, stride=model.encoder.stride)[0].global_map


def as_table(hits: list[Hit]) -> str:
    if not hits:
        return "No other page in the store."
    lines = ["rank   score  top left bottom right (px)  page"]
    for rank, hit in enumerate(hits, 1):
        box = " ".join(f"{side:.0f}" for side in hit.box)
        lines.append(f"{rank:>4}  {hit.score:>6.3f}  {box:<26}  {hit.page_id}")
    return "\n".join(lines)


def as_json(store: FeatureStore, query: str, mode: str, hits: list[Hit]) -> str:
    """One object: the query, the mode, and the hits with their boxes as [top, left, bottom, right] in px."""
    found = [
        {
            "id": hit.page_id,
            "score": round(hit.score, 6),
            "box": [round(side, 1) for side in hit.box],
            "original_size": store.row(hit.page_id)["original_size"],
        }
        for hit in hits
    ]
    return json.dumps({"query": query, "by": mode, "hits": found}, indent=2)


def draw(store: FeatureStore, arguments: argparse.Namespace, page: Image.Image | None, hits: list[Hit]) -> Image.Image:
    """A sheet of the query and the hits, each framed. Pages whose file is not there any more are grey."""
    pages = StoredPages(store)
    page = page or pages.image(arguments.query)
    panels = [("query", panel(page, arguments.region))]
    for rank, hit in enumerate(hits, 1):
        panels.append((f"{rank}: {hit.score:.3f}  {shortened(hit.page_id)}", panel(pages.image(hit.page_id), hit.box)))
    return sheet(panels, SHEET_COLUMNS, PANEL_PX)


def shortened(page_id: str, characters: int = 28) -> str:
    return page_id if len(page_id) <= characters else "..." + page_id[3 - characters :]


def panel(page: Image.Image | None, box: Box | None) -> Image.Image:
    """A page on a white square of PANEL_PX px, with a frame around the box, if given."""
    side = PANEL_PX
    if page is None:
        return Image.new("RGB", (side, side), MISSING_COLOR)
    picture = Image.new("RGB", (side, side), "white")
    scale = side / max(page.size)
    small = page.resize((max(1, round(page.width * scale)), max(1, round(page.height * scale))))
    if box is not None:
        top, left, bottom, right = (edge * scale for edge in box)
        corners = (left, top, min(right, small.width - 1), min(bottom, small.height - 1))
        ImageDraw.Draw(small).rectangle(corners, outline=FRAME_COLOR, width=3)
    picture.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
    return picture


class StoredPages:
    """The images of a store's pages, as far as their files still lie where they were."""

    def __init__(self, store: FeatureStore) -> None:
        self.store = store
        settings = settings_of(store)
        known = {name: settings[name] for name in ReadOptions._fields if settings.get(name) is not None}
        self.reader = PageReader(ReadOptions(**known))
        has_plan = (store.folder / WORK / PLAN_FILE).is_file()
        self.plan = Plan(store.folder, settings.get("pages_per_shard", 1)) if has_plan else None

    def image(self, page_id: str) -> Image.Image | None:
        """The page as an RGB image, None if it cannot be read."""
        place = self.place(page_id)
        try:
            return self.reader.read(place).image if place else None
        except Exception:  # The file may have gone or changed: a picture less, no reason to stop.
            return None

    def place(self, page_id: str) -> Page | None:
        if self.plan is None:
            return None
        row = self.store.row(page_id)
        return self.plan.find(row["source"], row["page"])
