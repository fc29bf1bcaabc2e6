"""Encodes images and saves their features: the main job of the package, as a command."""

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import PIL
import torch
from PIL import Image

from ..corpora.page_files import describe
from ..corpora.pages import Page, PageReader, ReadOptions, find_pages, is_named_file_missing
from ..corpora.pictures import EncodedPage, Heading, overview
from ..image_geometry import ImagePlace, place_of
from ..storage.atomic_file import atomic_file, partial_path
from ..storage.safetensors_writer import SafetensorsWriter, encoded_json
from ..support import message_of, visible
from .frame import ERROR, ERROR_LINES, INTERRUPTED, progress_bar, run_command
from .loading import (
    check_tokens,
    choose_device,
    encoder_config,
    load_head,
    load_model,
    load_processor,
    print_notice,
    shown_name,
    warning_of,
)
from .options import DTYPES, add_option, check_output, command_parser, picture_format

MAX_PLOT_ROWS = 16
PANEL_WIDTH_PX = 420
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
HEADER_BYTES_PER_PAGE = 800  # Beside its name: three tensors, and where the image lies.


class Encoded(NamedTuple):
    """
    One page's features on the host by what follows its name, "" for the map (C, h, w), ":tiles" for the stitched map of
    its tiles, ":tokens" for what a decoder reads of it (n, C); and where the page lies on its canvas.
    """

    name: str
    tensors: dict[str, torch.Tensor]
    place: ImagePlace


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(encode, parse_arguments(argv), after_interrupt="nothing was encoded yet")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("encode", __doc__)
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="image files, PDFs, folders, glob patterns: what extract takes"
    )
    for name in ("--checkpoint", "--revision", "--device", "--dtype", "--preset"):
        add_option(parser, name)
    add_option(parser, "--output", metavar="FILE.safetensors", help="where features go")
    add_option(parser, "--overwrite")
    parser.add_argument("--no-pad", dest="pad", action="store_false", help="keep the aspect ratio without padding")
    add_option(parser, "--tokens")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="draw each page beside its features")
    return parser.parse_args(argv)


def encode(arguments: argparse.Namespace) -> int:
    """
    Encodes all pages; returns the exit status.

    Raises:
        OSError, ValueError, ImportError: With a message for the user, before anything was encoded.
    """
    check_outputs(arguments.output, arguments.plot)
    for path in filter(None, (arguments.output, arguments.plot)):
        check_output(path, arguments.overwrite)
    pages, missing = find_images(arguments.images, {arguments.output, arguments.plot})
    total = len(pages) + len(missing)
    for name in missing:
        print(f"{visible(name)}: skipped: No image file at {name!r}.", file=sys.stderr)
    if not pages:
        print(f"error: {total} of {total} image(s) could not be encoded, see above", file=sys.stderr)
        return 1
    device = choose_device(arguments.device)
    dtype = DTYPES[arguments.dtype] if arguments.dtype else None
    model = load_model(arguments.checkpoint, dtype, arguments.revision).to(device)
    check_tokens(model, arguments.tokens)
    settings = {} if arguments.pad else {"do_pad": False}
    processor = load_processor(arguments.checkpoint, arguments.revision, preset=arguments.preset, **settings)
    print_notice(arguments.checkpoint)
    print(f"{total} image(s), {model.dtype} on {device}".replace("torch.", ""))

    job = Job(pages, processor, model, with_tokens=arguments.tokens, with_pictures=arguments.plot is not None)
    results = job.run()
    first = next(results, None)
    if first is not None:
        with atomic_file(arguments.output) as partial:
            job.write(first, results, partial, arguments.checkpoint)
        print(f"Wrote the features of {job.encoded} image(s) to {visible(str(arguments.output))}")
        if arguments.plot:
            with atomic_file(arguments.plot) as partial:
                draw(job.pictures, arguments.checkpoint).save(partial, format=picture_format(arguments.plot))
            print(f"Drew {len(job.pictures)} of {job.encoded} image(s) to {visible(str(arguments.plot))}")
    failures = job.failures + len(missing)
    if job.stopped:
        left = len(pages) - job.encoded - job.failures
        print(f"{job.stopped}: {left} of {total} image(s) were not tried.", file=sys.stderr)
    if failures:
        print(f"error: {failures} of {total} image(s) could not be encoded, see above", file=sys.stderr)
    return job.status or (1 if failures else 0)


def check_outputs(output: Path, plot: Path | None) -> None:
    """
    Checks that both files can be written, before there is anything to write.

    Raises:
        ValueError, OSError: If not, naming the file.
    """
    if plot is not None:
        picture_format(plot)
        if plot.absolute() == output.absolute():
            raise ValueError(f"--output and --plot are the same file, {str(output)!r}.")
    for path in (output, plot):
        if path is None:
            continue
        try:
            if path.is_dir():
                raise ValueError(f"{str(path)!r} is a folder: name a file.")
            above = next(folder for folder in path.absolute().parents if folder.exists())
            if above == path.absolute().parent:
                partial_path(path).touch()
                partial_path(path).unlink()
            elif not above.is_dir() or not os.access(above, os.W_OK):
                raise PermissionError(f"{str(above)!r} cannot be written to")
        except OSError as error:
            raise OSError(f"Cannot write {str(path)!r}: {error.strerror or error}") from error


def find_images(arguments: Sequence[str], outputs: set[Path | None]) -> tuple[list[Page], list[str]]:
    """
    The pages of files, folders and patterns, each once, without those of `outputs`, and the files that are not there.

    Raises:
        ValueError: If a folder or pattern has no image, or an output is among the files named.
    """
    missing = [name for name in arguments if is_named_file_missing(name)]
    written = {os.path.abspath(path) for path in outputs if path is not None}
    for name in arguments:
        if os.path.abspath(name) in written:
            raise ValueError(f"{name!r} is an image to encode and an output: choose another output.")
        if os.path.isdir(name) and not any(True for _ in find_pages([name], ReadOptions())):
            raise ValueError(f"No image in folder {name!r}.")
    pages = find_pages([name for name in arguments if name not in missing], ReadOptions())
    return [page for page in pages if os.path.abspath(page.path) not in written], missing


class Job:
    """
    The pages of a command on their way to the output; tells about each on stdout, and on stderr of those that fail.

    `stopped` says why it ended early, with its exit `status`.
    """

    def __init__(
        self, pages: list[Page], processor: Any, model: Any, *, with_tokens: bool, with_pictures: bool
    ) -> None:
        self.pages, self.processor, self.model = pages, processor, model
        self.names = names_of(pages)
        self.with_tokens, self.with_pictures = with_tokens, with_pictures
        self.pictures: list[EncodedPage] = []
        self.encoded = self.failures = self.status = 0
        self.stopped = ""

    def run(self) -> Iterator[Encoded]:
        """The features of one page after the other."""
        reader = PageReader(ReadOptions())
        with progress_bar(len(self.pages), "image") as progress:
            for number, (page, name) in enumerate(zip(self.pages, self.names, strict=True)):
                progress.update(number - progress.n)
                try:
                    image = reader.read(page).image
                except Exception as error:  # A damaged file makes decoders raise nearly anything.
                    self.failures += 1
                    told = f"Cannot read {name!r} as an image: {visible(describe(error))}"
                    progress.write(f"{visible(name)}: skipped: {told}", file=sys.stderr)
                    continue
                try:
                    result, report = self.encode_image(name, image)
                except (OSError, ValueError, RuntimeError, MemoryError) as error:
                    self.failures += 1
                    progress.write(f"{visible(name)}: skipped: {message_of(error, ERROR_LINES)}", file=sys.stderr)
                    continue
                progress.write(report)
                yield result
            progress.update(len(self.pages) - progress.n)

    @torch.inference_mode()
    def encode_image(self, name: str, page: Image.Image) -> tuple[Encoded, str]:
        """Encodes one page; returns its features and a line to print about it."""
        start = time.perf_counter()
        inputs = self.processor(page, return_tensors="pt")
        necks: list[torch.Tensor] = []
        hook = self.model.encoder.neck.register_forward_hook(lambda module, given, output: necks.append(output))
        try:
            outputs = self.model(**inputs.to(self.model.device))
        finally:
            hook.remove()
        tensors = {"": outputs.last_hidden_state[0].cpu()}
        local = outputs.local_feature_maps[0] if outputs.local_feature_maps else None
        elapsed_s = time.perf_counter() - start
        height_px, width_px = inputs["pixel_values"].shape[2:]
        patch_px = self.model.config.patch_size
        report = (
            f"{visible(name)}: {page.height} x {page.width} px -> {height_px} x {width_px} px, "
            f"grid {height_px // patch_px} x {width_px // patch_px}, "
            f"features {tuple(tensors[''].shape)}, {outputs.patch_embeds.shape[1]} tokens, {elapsed_s:.2f} s"
        )
        if local is not None:
            rows, columns = inputs["tile_grids"][0].tolist()
            tensors[":tiles"] = local.cpu()
            report += f", {rows} x {columns} tiles, features {tuple(local.shape)}"
        if (tokens := getattr(outputs, "vision_tokens", None)) is not None:
            report += f", {len(tokens[0])} vision tokens"
            if self.with_tokens:
                tensors[":tokens"] = tokens[0].cpu()
        place = place_of(inputs, 0)
        if self.with_pictures and len(self.pictures) < MAX_PLOT_ROWS:
            # The neck's map of the whole page is made after those of its tiles.
            stages = {"neck": necks[-1][0], encoder_config(self.model).stage_names[-1]: tensors[""]}
            stages = {stage: features.float().cpu() for stage, features in stages.items()}
            _, _, height, width = place.valid_region
            # In the size that is drawn: the page itself may be large, and is let go.
            small = page.resize((width, height), Image.Resampling.LANCZOS)
            self.pictures.append(EncodedPage(Path(name).name, small, stages, place.valid_region, (height_px, width_px)))
        return Encoded(name, tensors, place), report

    def write(self, first: Encoded, others: Iterator[Encoded], path: Path, checkpoint: str) -> None:
        """
        Writes one tensor a page as they come, named by its file, more with ":tiles" and ":tokens" after the name where
        it has these, and where each image lies on its canvas as metadata. What is there when it is interrupted, or when
        the disk is full, is a whole file.
        """
        images: dict[str, Any] = {}
        metadata = {"checkpoint": checkpoint, "pillow": PIL.__version__}
        kept = len(encoded_json(metadata)) + 100
        for name in self.names:
            in_json = encoded_json(name)
            kept += 3 * len(in_json) + len(encoded_json(in_json.decode())) + HEADER_BYTES_PER_PAGE
        with SafetensorsWriter(path, kept) as writer:
            result: Encoded | None = first
            try:
                while result is not None:
                    for suffix, tensor in result.tensors.items():
                        data = tensor.contiguous().view(torch.uint8).numpy()
                        writer.add(result.name + suffix, DTYPE_NAMES[tensor.dtype], tensor.shape, data)
                    images[result.name] = result.place._asdict()
                    self.encoded += 1
                    result = next(others, None)
            except KeyboardInterrupt:
                self.stopped, self.status = "error: interrupted", INTERRUPTED
            except OSError as error:
                if not images:
                    raise
                self.stopped, self.status = f"error: {message_of(error)}", ERROR
            writer.finish({"images": json.dumps(images, ensure_ascii=False), **metadata})


def names_of(pages: list[Page]) -> list[str]:
    """A name for each page, no two alike: its source where that has one page, else with the page's number."""
    pages_of_source = Counter(page.source for page in pages)
    names: dict[str, None] = {}
    for page in pages:
        name = base = page.source if pages_of_source[page.source] == 1 else page.id
        number = 1
        while any(taken in names for taken in _related(name)):
            number += 1
            name = f"{base}@{number}"
        names[name] = None
    return list(names)


def _related(name: str) -> list[str]:
    """The name, and those whose tensors may have the same names as its own."""
    base = name.removesuffix(":tiles").removesuffix(":tokens")
    return [name, base, f"{name}:tiles", f"{name}:tokens"]


def draw(pages: list[EncodedPage], checkpoint: str) -> Image.Image:
    """A row for each page: the page and its features, the finest useful map first."""
    shown = f"{pages[0].name}: " if len(pages) == 1 else ""
    heading = Heading(f"{shown}features of {shown_name(checkpoint)}", warning=warning_of(checkpoint))
    return overview(pages, list(pages[0].stages), load_head(checkpoint), heading, PANEL_WIDTH_PX)


if __name__ == "__main__":
    raise SystemExit(main())
