"""
Opens a checkpoint, wherever it lies: finds the encoder in it, and brings its weights, and as little else as possible,
onto this disk.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from transformers.utils import logging

from ..storage.http_ranges import RangesUnsupported, Traffic
from ..storage.output_folder import discard
from ..storage.safetensors_ranges import Staging, plan_download, read_remote_header
from .files import (
    MAX_INDEX_BYTES,
    CheckpointFile,
    LocalTensors,
    PickledTensors,
    parse_config,
    parse_index,
    select_checkpoint,
)
from .hub_repository import HubRepository
from .inference import Shape
from .layouts import Choice, Layout
from .model_card import CARD_FILE, plain_license, read_card

logger = logging.get_logger(__name__)

MAX_SMALL_FILE_BYTES = 1 << 20


class Tensors(Protocol):
    """A checkpoint whose tensors can be read one by one."""

    shapes: dict[str, Shape]

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str) -> torch.Tensor: ...


class Source(NamedTuple):
    """Where a checkpoint comes from, and what lies beside it: `config` and `preprocessor` are its JSON files."""

    name: str
    repository: str | None
    commit: str | None
    files: tuple[str, ...]
    license: str | None
    config: dict[str, Any]
    preprocessor: dict[str, Any]


class OpenedCheckpoint(NamedTuple):
    """An encoder that was found, and its weights on this disk."""

    source: Source
    layout: Layout
    tensors: Tensors
    traffic: Traffic
    notices: tuple[str, ...] = ()


def open_local(path: Path, choice: Choice) -> OpenedCheckpoint:
    """Finds the encoder in a file, or in the checkpoint of a folder."""
    if path.is_dir():
        folder = path
        names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        selection = select_checkpoint(names, choice.filename, f"The folder {path.name!r}")
    else:
        if choice.filename is not None:
            raise ValueError(f"{path.name!r} is a file: choosing {choice.filename!r} in it makes no sense.")
        folder, names = path.parent, [path.name]
        selection = select_checkpoint(names, path.name, "The folder")
    files = [selection.name]
    weight_map: dict[str, str] = {}
    if selection.is_index:
        if not path.is_dir():
            names = sorted(file.name for file in folder.iterdir() if file.is_file())
        content = _read_capped(folder / selection.name, MAX_INDEX_BYTES)
        weight_map = parse_index(content, names, selection.name)
        files = _wanted_files(weight_map, choice)
    tensors = _open_files(selection, [folder / file for file in files])
    beside = folder if path.is_dir() else None
    source = Source(
        name=path.name,
        repository=None,
        commit=None,
        files=tuple(files),
        license=_read_license(folder / CARD_FILE) if beside else None,
        config=_read_json(beside, "config.json"),
        preprocessor=_read_json(beside, "preprocessor_config.json"),
    )
    shapes = _all_shapes(weight_map, files, tensors.shapes)
    layout = choice.layout(shapes, source.config)
    return OpenedCheckpoint(source, layout, tensors, Traffic())


def _open_files(file: CheckpointFile, paths: list[Path]) -> Tensors:
    return LocalTensors.open(paths) if file.is_safetensors else PickledTensors(paths)


def _read_license(card: Path) -> str | None:
    """The licence that a card names; None for a card that cannot be read, which is no reason to stop."""
    try:
        return plain_license(read_card(card).data.get("license"))
    except ValueError:
        return None


def _read_json(folder: Path | None, name: str) -> dict[str, Any]:
    if folder is None or not (folder / name).is_file():
        return {}
    return parse_config(_read_capped(folder / name, MAX_SMALL_FILE_BYTES))


def _read_capped(path: Path, max_bytes: int) -> bytes:
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"{path.name!r} is larger than the {max_bytes} bytes accepted.")
    return content


def _wanted_files(weight_map: dict[str, str], choice: Choice) -> list[str]:
    """The files of a sharded checkpoint that hold a part of the encoder."""
    return sorted({weight_map[name] for name in choice.weights(weight_map).values()})


def open_remote(repository: HubRepository, staging: Path, choice: Choice, full_download: bool) -> OpenedCheckpoint:
    """Finds the encoder in a repository, and fetches its weights, by ranges where that is possible."""
    selection = select_checkpoint(repository.names, choice.filename, f"{repository.repo_id!r}")
    weight_map: dict[str, str] = {}
    files = [selection.name]
    if selection.is_index:
        content = repository.read_small(selection.name, MAX_INDEX_BYTES)
        weight_map = parse_index(content, repository.names, selection.name)
        files = _wanted_files(weight_map, choice)
    source = Source(
        name=repository.repo_id,
        repository=repository.repo_id,
        commit=repository.commit,
        files=tuple(files),
        license=repository.license,
        config=parse_config(repository.read_small("config.json", MAX_SMALL_FILE_BYTES)),
        preprocessor=parse_config(repository.read_small("preprocessor_config.json", MAX_SMALL_FILE_BYTES)),
    )
    notice = "Downloaded whole files into the cache, as asked for."
    if not selection.is_safetensors:
        notice = f"Downloaded {', '.join(files)} whole into the cache: only safetensors can be read in parts."
    elif not full_download:
        try:
            return _open_ranged(repository, source, weight_map, staging, choice)
        except RangesUnsupported as error:
            notice = f"{error} Downloaded {', '.join(files)} whole into the cache."
            logger.warning("%s", notice)
            discard(staging)
    tensors = _open_files(selection, [repository.download(file) for file in files])
    shapes = _all_shapes(weight_map, files, tensors.shapes)
    layout = choice.layout(shapes, source.config)
    return OpenedCheckpoint(source, layout, tensors, repository.traffic, (notice,))


def _open_ranged(
    repository: HubRepository, source: Source, weight_map: dict[str, str], staging: Path, choice: Choice
) -> OpenedCheckpoint:
    remote = {name: repository.file(name) for name in source.files}
    headers = {}
    sizes = {}
    for name, file in remote.items():
        headers[name], sizes[name] = read_remote_header(file, f"{name!r} of {repository.repo_id!r}")
    shapes = {tensor: spec.shape for specs in headers.values() for tensor, spec in specs.items()}
    shapes = _all_shapes(weight_map, source.files, shapes)
    layout = choice.layout(shapes, source.config)
    wanted = set(layout.sources.values())
    per_file = {
        name: {tensor: spec for tensor, spec in specs.items() if tensor in wanted} for name, specs in headers.items()
    }
    chunks, staged = plan_download(per_file)
    # The dtypes are known before anything is fetched, so a quantised checkpoint is refused here.
    tensors = LocalTensors({name: (staging / "weights.part", spec) for name, spec in staged.items()})
    for tensor in wanted:
        tensors.dtype(tensor)
    store = Staging(staging, f"{repository.repo_id}@{repository.commit}", chunks)
    store.fetch(remote, sizes)
    return OpenedCheckpoint(source, layout, tensors, repository.traffic)


def _all_shapes(weight_map: dict[str, str], files: Iterable[str], opened: dict[str, Shape]) -> dict[str, Shape]:
    """
    The shapes of the tensors in the files that were opened, and empty ones for those that an index names elsewhere:
    their names tell families apart.

    Raises:
        ValueError: If an opened file lacks a tensor that the index names in it.
    """
    lacking = sorted(name for name, file in weight_map.items() if file in files and name not in opened)
    if lacking:
        raise ValueError(f"The index names {lacking[0]!r} in {weight_map[lacking[0]]!r}, which does not hold it.")
    return {**dict.fromkeys(weight_map, ()), **opened}
