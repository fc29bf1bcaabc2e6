"""Between the pages of a corpus and the model: pages prepared in worker processes, and batches of one shape."""

import multiprocessing
import os
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import Dataset

from ..image_geometry import Region, Size
from .pages import Page, PageReader, ReadOptions, describe
from .store import Plan

# Pages that wait for others of their shape, in batches: bounds the memory where every page has its own shape.
MAX_WAITING_BATCHES = 4
POLL_S = 0.2


class PreparedPage(NamedTuple):
    """
    A page ready for the model: its `inputs` by name, without a batch dimension, and where the image lies on its canvas.
    Or, with a `reason`, one that could not be read, without inputs.
    """

    position: int
    page: Page
    inputs: dict[str, Tensor]
    original_size: Size
    valid_region: Region
    sha256: str
    reason: str | None

    @property
    def shapes(self) -> tuple[Any, ...]:
        return tuple((name, tuple(tensor.shape)) for name, tensor in self.inputs.items())


class PreparedPages(Dataset[PreparedPage]):
    """The pages of a plan, decoded and preprocessed when asked for: what worker processes of a DataLoader run."""

    def __init__(self, plan: Plan, processor: Any, options: ReadOptions) -> None:
        self.plan, self.processor = plan, processor
        self.reader = PageReader(options)

    def __getitem__(self, position: int) -> PreparedPage:
        page = self.plan.page(position)
        try:
            image, sha256 = self.reader.read(page)
            inputs = dict(self.processor(image, return_tensors="pt"))
        except Exception as error:  # A damaged file makes decoders raise nearly anything.
            return PreparedPage(position, page, {}, (0, 0), (0, 0, 0, 0), "", describe(error))
        height, width = inputs.pop("original_sizes")[0].tolist()
        top, left, valid_height, valid_width = inputs.pop("valid_regions")[0].tolist()
        tensors = {name: value[0] for name, value in inputs.items()}
        region = (top, left, valid_height, valid_width)
        return PreparedPage(position, page, tensors, (height, width), region, sha256, None)


def as_it_is(page: Any) -> Any:
    """For a DataLoader's `collate_fn`."""
    return page


def end_with(process_id: int) -> None:
    """
    Lets this process end within a second of its parent, whose id this is: a parent that is killed cannot end it, and
    it would wait for ever for someone to take its pages.
    """

    def watch() -> None:
        while os.getppid() == process_id:
            time.sleep(POLL_S)
        os._exit(2)

    threading.Thread(target=watch, daemon=True).start()


def end_worker_with_parent(worker: int) -> None:
    """For a DataLoader's `worker_init_fn`."""
    if parent := multiprocessing.parent_process():
        end_with(parent.pid or 0)


def batches_by_shape(pages: Iterable[PreparedPage], batch_size: int) -> Iterator[list[PreparedPage]]:
    """
    Batches of pages of one shape, as they fill up, the incomplete ones last. Which pages make a batch depends on
    nothing but the pages and their order. Pages without inputs are left out.
    """
    waiting: dict[Any, list[PreparedPage]] = {}
    for page in pages:
        if page.reason is not None:
            continue
        batch = waiting.setdefault(page.shapes, [])
        batch.append(page)
        fullest = max(waiting, key=lambda shapes: len(waiting[shapes]))
        if len(batch) == batch_size:
            yield waiting.pop(page.shapes)
        elif sum(map(len, waiting.values())) >= MAX_WAITING_BATCHES * batch_size:
            yield waiting.pop(fullest)
    yield from waiting.values()
