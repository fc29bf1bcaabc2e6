"""
Opens a checkpoint, wherever it lies: finds the encoder in it, and brings its weights, and as little else as possible,
onto this disk.
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from huggingface_hub import try_to_load_from_cache
from transformers.utils import logging

from ..storage.http_ranges import RangesUnsupported, Traffic
from ..storage.retries import RetryPolicy
from ..storage.safetensors_ranges import Staging, plan_download, read_remote_header
from ..support import visible
from .files import (
    FORMATS,
    MAX_INDEX_BYTES,
    CheckpointFile,
    LocalTensors,
    PickledTensors,
    parse_config,
    parse_index,
    select_checkpoint,
)
from .hub_repository import Repository, license_of, open_repository, read_capped
from .inference import Shape
from .layouts import Choice, Layout
from .model_card import CARD_FILE
from .naming import listed

logger = logging.get_logger(__name__)

MAX_SMALL_FILE_BYTES = 1 << 20
# Of the files that segment-anything publishes outside of the Hub.
KNOWN_SHA256 = {
    "sam_vit_b_01ec64.pth": "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    "sam_vit_l_0b3195.pth": "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    "sam_vit_h_4b8939.pth": "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
}


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
    """
    An encoder that was found, and its weights on this disk. `kept_bytes` of them were there before, from a pull that
    was interrupted.
    """

    source: Source
    layout: Layout
    tensors: Tensors
    traffic: Traffic
    notices: tuple[str, ...] = ()
    kept_bytes: int = 0


def check_may_be_on_the_hub(source: str) -> None:
    """
    Checks that a source that does not exist here can be a repository's name: not where it begins like a path, ends
    like a file, has more parts than a name has, or lies in a folder that does exist.

    Raises:
        FileNotFoundError: If it can only be meant as a path.
    """
    parts = source.split("/")
    if source.startswith((".", "/", "~")) or "\\" in source or source.endswith((*FORMATS, ".json")) or len(parts) > 2:
        raise FileNotFoundError(f"There is no file or folder {source!r}.")
    if len(parts) == 2 and Path(parts[0]).is_dir():
        raise FileNotFoundError(
            f"There is no file or folder {source!r}. (The folder {parts[0]!r} is here: to mean a repository of the "
            "Hub, run this in another folder.)"
        )


def check_exists(checkpoint: str, revision: str | None = None) -> None:
    """
    Checks that a checkpoint is here, in huggingface_hub's cache, or on the Hub, which is asked once: transformers would
    ask it for a long time before it says that there is no connection.

    Raises:
        OSError: If it is not, naming it.
    """
    if Path(checkpoint).exists():
        return
    check_may_be_on_the_hub(checkpoint)
    if not isinstance(try_to_load_from_cache(checkpoint, "config.json", revision=revision), str):
        open_repository(checkpoint, revision=revision, token=None, endpoint=None, retry=RetryPolicy())


def open_local(path: Path, choice: Choice, verify: bool) -> OpenedCheckpoint:
    """
    Finds the encoder in a file, or in the checkpoint of a folder.

    Raises:
        ValueError: If there is none, as `select_checkpoint` and `find_layout`.
        OSError: If a file cannot be read.
    """
    if path.is_dir():
        folder = path
        names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        selection = select_checkpoint(names, choice.filename, f"The folder {visible(path.name)!r}")
    else:
        if choice.filename is not None:
            raise ValueError(f"{path.name!r} is a file: choosing {choice.filename!r} in it makes no sense.")
        if not path.is_file():
            raise ValueError(f"{path.name!r} is neither a folder nor a regular file.")
        folder, names = path.parent, [path.name]
        selection = select_checkpoint(names, path.name, "The folder")
    if selection.is_index and not path.is_dir():
        names = sorted(file.name for file in folder.iterdir() if file.is_file())
    beside = folder if path.is_dir() else None
    files, weight_map = _files_of(selection, names, lambda name: read_capped(folder / name, MAX_INDEX_BYTES), choice)
    source = Source(
        name=path.name,
        repository=None,
        commit=None,
        files=tuple(files),
        license=license_of(folder / CARD_FILE) if beside else None,
        config=_read_json(beside, "config.json"),
        preprocessor=_read_json(beside, "preprocessor_config.json"),
    )
    paths = [folder / file for file in files]
    notices = tuple(_verify_known(file) for file in paths) if verify else ()
    return _open_whole(source, selection, weight_map, paths, Traffic(), choice, notices)


def _verify_known(path: Path) -> str:
    """
    Compares a local file with the published one of its name; a sentence that says so.

    Raises:
        ValueError: If no digest of such a file is known, or it is another.
    """
    known = KNOWN_SHA256.get(path.name)
    if known is None:
        raise ValueError(
            f"No digest of {path.name!r} is known. Known: {', '.join(KNOWN_SHA256)}; other files are verified by what "
            "the Hub states when they are pulled from there."
        )
    check_digest(path, "sha256", known, repr(path.name))
    return f"Verified: {path.name} has the SHA-256 of the published file, {known}."


def _files_of(
    selection: CheckpointFile, names: list[str], read: Callable[[str], bytes], choice: Choice
) -> tuple[list[str], dict[str, str]]:
    """The files that hold a part of the encoder, and where there is an index the file of each tensor."""
    if not selection.is_index:
        return [selection.name], {}
    weight_map = parse_index(read(selection.name), names, selection.name)
    return sorted({weight_map[name] for name in choice.weights(weight_map).values()}), weight_map


def _open_whole(
    source: Source,
    selection: CheckpointFile,
    weight_map: dict[str, str],
    paths: list[Path],
    traffic: Traffic,
    choice: Choice,
    notices: tuple[str, ...] = (),
) -> OpenedCheckpoint:
    """Finds the encoder in files that lie whole on this disk."""
    tensors = _open_files(selection, paths)
    layout = choice.layout(_all_shapes(weight_map, source.files, tensors.shapes), source.config)
    return OpenedCheckpoint(source, layout, tensors, traffic, notices)


def _open_files(file: CheckpointFile, paths: list[Path]) -> Tensors:
    return LocalTensors.open(paths) if file.is_safetensors else PickledTensors(paths)


def _read_json(folder: Path | None, name: str) -> dict[str, Any]:
    if folder is None or not (folder / name).is_file():
        return {}
    return parse_config(read_capped(folder / name, MAX_SMALL_FILE_BYTES))


def open_remote(
    repository: Repository, staging: Path, choice: Choice, full_download: bool, verify: bool
) -> OpenedCheckpoint:
    """
    Finds the encoder in a repository, and fetches its weights, by ranges where that is possible; whole, with `verify`,
    for a digest is that of a whole file.

    Raises:
        ValueError: As `open_local`, and if a file does not have the digest that the repository states.
        OSError: If a file cannot be fetched.
    """
    selection = select_checkpoint(repository.names, choice.filename, f"{repository.repo_id!r}")
    through_cache = full_download or verify

    def read(name: str, max_bytes: int = MAX_SMALL_FILE_BYTES) -> bytes:
        return repository.read_small(name, max_bytes, through_cache)

    files, weight_map = _files_of(selection, repository.names, lambda name: read(name, MAX_INDEX_BYTES), choice)
    source = Source(
        name=repository.repo_id,
        repository=repository.repo_id,
        commit=repository.commit,
        files=tuple(files),
        license=repository.license,
        config=parse_config(read("config.json")),
        preprocessor=parse_config(read("preprocessor_config.json")),
    )
    if not repository.supports_ranges:
        notice = repository.notice or "Took whole files."
    elif verify:
        notice = "Downloaded whole files into the cache, to verify them."
    elif full_download:
        notice = "Downloaded whole files into the cache, as asked for."
    elif not selection.is_safetensors:
        notice = f"Downloaded {listed(files)} whole into the cache: only safetensors can be read in parts."
    else:
        try:
            return _open_ranged(repository, source, weight_map, staging, choice)
        except RangesUnsupported as error:
            notice = f"{error} Downloaded {listed(files)} whole into the cache."
            logger.warning("%s", notice)
    paths = [repository.download(file) for file in files]
    notices = [notice]
    if verify:
        for file, path in zip(files, paths, strict=True):
            kind, stated = repository.digest(file)
            check_digest(path, kind, stated, f"{file!r} of {repository.repo_id!r}")
            notices.append(f"Verified: {visible(file)} has the {kind} {stated} that the repository states.")
    return _open_whole(source, selection, weight_map, paths, repository.traffic, choice, tuple(notices))


def check_digest(path: Path, kind: str, stated: str, where: str) -> None:
    """
    Compares a file with a digest, "sha256" of its content or "git-sha1" as Git computes it.

    Raises:
        ValueError: If it is another.
    """
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    if digest.hexdigest() != stated:
        raise ValueError(
            f"{where} has the {kind} {digest.hexdigest()} here, not {stated} as it was published: remove {str(path)!r} "
            "and fetch it again."
        )


def _open_ranged(
    repository: Repository, source: Source, weight_map: dict[str, str], staging: Path, choice: Choice
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
    kept_bytes = store.fetch(remote, sizes)
    return OpenedCheckpoint(source, layout, tensors, repository.traffic, kept_bytes=kept_bytes)


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
