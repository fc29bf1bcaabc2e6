"""
Features of a whole corpus: pages prepared by worker processes, batches of one shape, encoded unit by unit into a store.

One process, or several that Accelerate has started and that share the output folder. Whatever was killed, the same
options go on from there, and end with the same bytes.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import psutil
import torch
import transformers
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..image_geometry import Region, Size, place_of
from ..storage.output_folder import discard, folder_lock
from .page_files import describe, set_pixel_limit
from .pages import Page, PageReader, ReadOptions, find_pages
from .store import (
    MANIFEST_FILE,
    WORK,
    Plan,
    check_folder,
    check_manifest,
    forget_unit,
    is_complete,
    is_whole,
    merge,
    remove_partial_files,
    shard_name,
    write_plan,
    write_unit,
)

# Pages that wait for others of their shape, in batches: bounds the memory where every page has its own shape.
MAX_WAITING_BATCHES = 4
POLL_S = 0.2
WORKERS_ON_CPU, WORKERS_ON_ACCELERATOR = 1, 4
PAGES_AHEAD = 4  # By each worker.
LOCK_WAIT_S = 15  # What is left of a killed run ends within seconds.
LONGEST_RUN = timedelta(days=30)  # The first process to finish waits for the others.


@dataclass(frozen=True)
class ExtractionOptions:
    """
    What to extract, and how.

    Args:
        inputs: Files, folders, glob patterns and datasets, see `find_pages`.
        output: The folder of the store.
        read: How pages are read.
        feature_dtype: Of the features in the store.
        batch_size: Pages of one shape that are encoded at once, at most.
        pages_per_shard: What is lost, for each process, when one is killed.
        workers: Processes that read pages, for each that encodes; 0 for none, the encoding process reads then; None
            for one on the CPU and four on an accelerator.
        cpu: Whether to use the CPU even where there is an accelerator.
        max_megapixels: The largest image that is decoded; None for PIL's own limit.
        tokens: Whether to keep the sequences that a decoder reads too, which a DeepEncoder makes.
    """

    inputs: list[str]
    output: Path
    read: ReadOptions
    feature_dtype: torch.dtype = torch.bfloat16
    batch_size: int = 4
    pages_per_shard: int = 64
    workers: int | None = None
    cpu: bool = False
    max_megapixels: float | None = None
    tokens: bool = False


@dataclass
class Extraction:
    """
    What a run came to: pages `encoded` and `rejects` of the whole corpus, and what this process measured. Seconds are
    those of all its pages, until the first page, waiting for pages, and in the model; memory is in MB after each unit.
    """

    encoded: int = 0
    rejects: int = 0
    pages: int = 0
    seconds: float = 0.0
    first_page_s: float = 0.0
    waiting_s: float = 0.0
    model_s: float = 0.0
    memory_mb: list[float] = field(default_factory=list)


class FailedElsewhereError(RuntimeError):
    """The main process has failed, and tells why."""


class PreparedPage(NamedTuple):
    """
    A page ready for the model: its `inputs` by name, as a batch of one, and where the image lies on its canvas. Or,
    with a `reason`, one that could not be read, without inputs.
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


class PageFeatures(NamedTuple):
    """What is kept of a page: the map (C, h, w), and the tokens (n, D) where they are asked for; on the host."""

    map: Tensor
    tokens: Tensor | None

    @property
    def are_finite(self) -> bool:
        return all(bool(torch.isfinite(tensor).all()) for tensor in self if tensor is not None)


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
        tensors = {name: value for name, value in inputs.items() if name not in ("original_sizes", "valid_regions")}
        return PreparedPage(position, page, tensors, *place_of(inputs, 0), sha256, None)


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


def start_worker(max_megapixels: float | None, worker: int) -> None:
    """For a DataLoader's `worker_init_fn`."""
    if parent := multiprocessing.parent_process():
        end_with(parent.pid or 0)
    prepare_decoding(max_megapixels)


def prepare_decoding(max_megapixels: float | None) -> None:
    """Sets how large images may be in this process, and that damage is told in the rejects, not by warnings."""
    if max_megapixels is not None:
        set_pixel_limit(max_megapixels)
    warnings.filterwarnings("ignore", module=r"(PIL|pypdfium2)\b")
    warnings.filterwarnings("ignore", category=PIL.Image.DecompressionBombWarning)


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


def extract(
    options: ExtractionOptions,
    processor: Any,
    load_model: Callable[[], Any],
    checkpoint: str,
    show_finished: Callable[[int, int], None] = lambda done, total: None,
) -> Extraction:
    """
    Makes all features that are missing.

    Args:
        options: What, and how.
        processor: The image processor.
        load_model: Gives the encoder, for tokens a DeepEncoder, in eval mode; called while the workers start.
        checkpoint: What the manifest calls the model: a folder or Hub id.
        show_finished: Called in the main process with the number of finished pages and of all.

    Raises:
        OSError, ValueError, ImportError: With a message for the user.
        FailedElsewhereError: In other processes than the main one, where that has raised one of these.
    """
    accelerator = new_accelerator(options.cpu)
    output = options.output
    with ExitStack() as stack:
        plan_digest = from_main_process(accelerator, lambda: open_run(options, stack))
        plan = Plan(output, options.pages_per_shard)
        remaining = from_main_process(accelerator, lambda: remaining_units(output, plan))
        units = remaining[accelerator.process_index :: accelerator.num_processes]
        pages = start_workers(units, PreparedPages(plan, processor, options.read), options, accelerator)
        model = load_model().to(accelerator.device)
        manifest = manifest_of(options, processor, model, checkpoint, plan_digest, plan, accelerator)
        from_main_process(accelerator, lambda: check_manifest(output, manifest))
        run = Run(options, plan, model, units, show_finished if accelerator.is_main_process else None)
        run.encode(pages)
        run.result.encoded, run.result.rejects = from_main_process(accelerator, run.finish)
    accelerator.end_training()
    return run.result


def new_accelerator(cpu: bool) -> Accelerator:
    """Where models run: in a process alone, or in one of several."""
    has_accelerator = torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()
    return Accelerator(
        cpu=cpu or not has_accelerator,  # Accelerate would run several processes on CPUs as if each was alone.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_RUN)],
    )


def from_main_process(accelerator: Accelerator, compute: Callable[[], Any]) -> Any:
    """What `compute` returns in the main process, for all; an error in it is raised by all, so that none waits."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = compute()
        except (OSError, ValueError, ImportError) as error:
            outcome[1] = error
            if accelerator.num_processes == 1:
                raise
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1] if accelerator.is_main_process else FailedElsewhereError(str(outcome[1]))
    return outcome[0]


def open_run(options: ExtractionOptions, stack: ExitStack) -> str:
    """Locks the output folder, and lists all pages there; returns a digest of the list."""
    output = options.output
    check_folder(output)
    is_new = not output.exists()
    stack.enter_context(folder_lock(output, LOCK_WAIT_S))
    stack.callback(remove_unbegun, output, is_new)
    remove_partial_files(output)
    digest = write_plan(output, find_pages(options.inputs, options.read))
    if Plan(output, options.pages_per_shard).num_pages == 0:
        raise ValueError(f"No page in {', '.join(options.inputs)}.")
    return digest


def remove_unbegun(output: Path, is_new: bool) -> None:
    """Removes what a run has left that was refused before it began."""
    if not (output / MANIFEST_FILE).exists():
        discard(output / WORK)
        if is_new:
            output.rmdir()


def remaining_units(output: Path, plan: Plan) -> list[int]:
    """The units that are missing, or whose shard is missing or cut off: these count as missing from now on."""
    units = [unit for unit in range(plan.num_units) if not is_whole(output, unit)]
    for unit in units:
        forget_unit(output, unit)
    return units


def start_workers(
    units: list[int], pages: PreparedPages, options: ExtractionOptions, accelerator: Accelerator
) -> Iterator[PreparedPage]:
    """The pages of the units in their order, prepared by worker processes that start now."""
    positions = [position for unit in units for position in pages.plan.positions(unit)]
    if not positions:
        return iter(())
    if options.workers == 0:
        prepare_decoding(options.max_megapixels)
        return (pages[position] for position in positions)
    workers = WORKERS_ON_CPU if accelerator.device.type == "cpu" else WORKERS_ON_ACCELERATOR
    loader = DataLoader(
        pages,
        batch_size=None,
        sampler=positions,
        collate_fn=as_it_is,
        num_workers=options.workers or workers,
        prefetch_factor=PAGES_AHEAD,
        # A forked worker would hold the lock on the output folder for seconds after this process is killed.
        multiprocessing_context="spawn",
        worker_init_fn=partial(start_worker, options.max_megapixels),
    )
    with interrupts_ignored():
        return iter(loader)


@contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Processes that start meanwhile take no notice of Ctrl-C, for good: whoever started them ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def manifest_of(
    options: ExtractionOptions,
    processor: Any,
    model: Any,
    checkpoint: str,
    plan_digest: str,
    plan: Plan,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """What the features depend on: two runs of one manifest make the same bytes."""
    on_cpu = accelerator.device.type == "cpu"
    device = "cpu" if on_cpu or accelerator.device.type != "cuda" else torch.cuda.get_device_name(accelerator.device)
    provenance = Path(checkpoint, "provenance.json")
    source = json.loads(provenance.read_text(encoding="utf-8")) if provenance.is_file() else {}
    # Read from a module, since a version is not always where pip would find it. Pillow's resizing has versions.
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "pillow": PIL.__version__}
    return {
        "format": 2,
        "model": {
            "checkpoint": checkpoint,
            "commit": getattr(model.config, "_commit_hash", None) or source.get("commit"),
            "weights_sha256": digest_of(model),
            "dtype": name_of(model.dtype),
            "stride": model.encoder.stride,
        },
        "inputs": {"arguments": options.inputs, "pages": plan.num_pages, "sha256_of_list": plan_digest},
        "settings": {
            "processor": processor.to_dict(),
            **options.read._asdict(),
            "feature_dtype": name_of(options.feature_dtype),
            "batch_size": options.batch_size,
            "pages_per_shard": options.pages_per_shard,
            "max_megapixels": options.max_megapixels,
            "tokens": options.tokens or None,  # As it is read of manifests that do not know of tokens.
        },
        # The last bits depend on these: on the CPU also on the number of threads, which OMP_NUM_THREADS sets.
        "machine": {"device": device, "threads": torch.get_num_threads() if on_cpu else None, "versions": versions},
    }


def name_of(dtype: torch.dtype) -> str:
    """The dtype's name, as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def digest_of(model: Any) -> str:
    """SHA-256 of all weights with their names."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass
class Run:
    """One process's part of a run: its units, and what it measures while it makes them."""

    options: ExtractionOptions
    plan: Plan
    model: Any
    units: list[int]
    show: Callable[[int, int], None] | None
    result: Extraction = field(default_factory=Extraction)

    def __post_init__(self) -> None:
        self.show_finished()

    def show_finished(self) -> None:
        """Tells what all processes have finished, as the disk tells."""
        if self.show is None:
            return
        done = [unit for unit in range(self.plan.num_units) if is_complete(self.options.output, unit)]
        self.show(sum(len(self.plan.positions(unit)) for unit in done), self.plan.num_pages)

    def encode(self, pages: Iterator[PreparedPage]) -> None:
        """Makes all units of this process."""
        start = time.perf_counter()
        for unit in self.units:
            features: dict[int, PageFeatures] = {}
            positions = self.plan.positions(unit)
            prepared: list[PreparedPage] = []
            reasons: dict[int, str] = {}
            for batch in batches_by_shape(self.take(pages, len(positions), prepared), self.options.batch_size):
                for page, made in zip(batch, self.features_of(batch), strict=True):
                    if made.are_finite:
                        features[page.position - positions.start] = made
                    else:
                        dtype = name_of(self.options.feature_dtype)
                        reasons[page.position] = f"its features are not finite in {dtype}"
            rows = [self.row(unit, page, features, reasons.get(page.position, page.reason)) for page in prepared]
            maps = {row: made.map for row, made in features.items()}
            tokens = {row: made.tokens for row, made in features.items() if made.tokens is not None}
            write_unit(self.options.output, unit, maps, rows, tokens)
            self.show_finished()
            self.result.memory_mb.append(memory_mb())
        self.result.seconds = time.perf_counter() - start

    def take(self, pages: Iterator[PreparedPage], count: int, taken: list[PreparedPage]) -> Iterator[PreparedPage]:
        """The next pages, with the time counted that they are waited for; `taken` keeps them without their pixels."""
        source = islice(pages, count)
        while True:
            start = time.perf_counter()
            page = next(source, None)
            waited_s = time.perf_counter() - start
            if self.result.pages == 0:
                self.result.first_page_s = waited_s  # The workers are still starting.
            else:
                self.result.waiting_s += waited_s
            if page is None:
                return
            self.result.pages += 1
            taken.append(page._replace(inputs={}))
            yield page

    @torch.inference_mode()
    def features_of(self, batch: list[PreparedPage]) -> list[PageFeatures]:
        """What is kept of each of some pages of one shape."""
        start = time.perf_counter()
        device = next(self.model.parameters()).device
        inputs = {name: torch.cat([page.inputs[name] for page in batch]).to(device) for name in batch[0].inputs}
        outputs = self.model(**inputs)
        maps = outputs.last_hidden_state.to("cpu", self.options.feature_dtype)
        sequences = outputs.vision_tokens if self.options.tokens else [None] * len(batch)
        tokens = [None if one is None else one.to("cpu", self.options.feature_dtype) for one in sequences]
        self.result.model_s += time.perf_counter() - start
        return [PageFeatures(*made) for made in zip([tensor.clone() for tensor in maps], tokens, strict=True)]

    def row(
        self, unit: int, page: PreparedPage, features: dict[int, PageFeatures], reason: str | None
    ) -> dict[str, Any]:
        """The page's row of the index, or of the rejects with a `reason`."""
        name = {"id": page.page.id, "source": page.page.source, "page": page.page.page, "reason": reason}
        if reason is not None:
            return name
        number = page.position - self.plan.positions(unit).start
        return name | {
            "original_size": page.original_size,
            "valid_region": page.valid_region,
            "grid": tuple(features[number].map.shape[1:]),
            "shard": shard_name(unit),
            "row": number,
            "sha256": page.sha256,
        }

    def finish(self) -> tuple[int, int]:
        """Waits for the units of all processes and joins the index; returns how many pages it and the rejects have."""
        output = self.options.output
        while not all(is_complete(output, unit) for unit in range(self.plan.num_units)):
            time.sleep(POLL_S)
            self.show_finished()
        self.show_finished()
        return merge(output, self.plan.num_units)


def memory_mb() -> float:
    """Resident memory of this process and its workers, in MB."""
    process = psutil.Process()
    total = process.memory_info().rss
    for child in process.children(recursive=True):
        try:
            total += child.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return round(total / 1e6, 1)
