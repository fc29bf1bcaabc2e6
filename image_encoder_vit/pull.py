"""
Takes the encoder, and nothing else, out of any checkpoint of its family, and writes a folder that
`AutoModel.from_pretrained` loads.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from .checkpoint_files import (
    FORMAT_DTYPES,
    MAX_INDEX_BYTES,
    LocalTensors,
    PickledTensors,
    Selection,
    parse_config,
    parse_index,
    select_checkpoint,
)
from .checkpoint_layouts import (
    DEEPSEEK_OCR,
    OWN_LAYOUT,
    SAM,
    Layout,
    Shape,
    choose_prefix,
    find_layout,
    weights_below,
)
from .configuration_image_encoder_vit import ImageEncoderViTConfig
from .http_ranges import RangesUnsupported, RetryPolicy, Traffic
from .hub_repository import HubRepository
from .image_processing_image_encoder_vit import ImageEncoderViTImageProcessorPil
from .model_card import (
    CARD_FILE,
    PROVENANCE_FILE,
    build_card,
    build_metadata,
    describe_model,
    plain_license,
    read_metadata,
    usage_from,
)
from .modeling_image_encoder_vit import ImageEncoderViTModel
from .output_folder import discard, publish, unfinished_folder
from .safetensors_format import build_header
from .safetensors_ranges import Staging, plan_download, read_remote_header

logger = logging.get_logger(__name__)

WEIGHTS_FILE = "model.safetensors"
STAGING_FOLDER = "staging"
MAX_SMALL_FILE_BYTES = 1 << 20
OWN_PREFIX = f"{ImageEncoderViTModel.base_model_prefix}."


class Pulled(NamedTuple):
    """
    What `pull` made, and what it took. `bytes_moved` and `requests` count the bodies and requests of the ranged
    transfer, not of a download through the cache; `notices` are sentences that the user should read.
    """

    folder: Path
    layout: str
    prefix: str
    commit: str | None
    tensors: int
    weight_bytes: int
    bytes_moved: int
    requests: int
    notices: tuple[str, ...]


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


class Opened(NamedTuple):
    """An encoder that was found, and its weights on this disk."""

    source: Source
    layout: Layout
    tensors: Tensors
    traffic: Traffic
    notices: tuple[str, ...] = ()


def pull(
    source: str | Path,
    output_dir: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    dtype: str | torch.dtype | None = None,
    full_download: bool = False,
    filename: str | None = None,
    prefix: str | None = None,
    endpoint: str | None = None,
    retry: RetryPolicy | None = None,
) -> Pulled:
    """
    Writes the encoder of a checkpoint to a new folder: config.json, model.safetensors, preprocessor_config.json, the
    remote code, README.md and provenance.json. The folder appears complete and checked, or not at all. A pull from
    the Hub that was killed goes on where it was when it is started again.

    Args:
        source: A Hub repository, a local folder, or a local file (.safetensors, .pth, .pt, .bin). What exists locally
            is taken for local. The layout is recognised by the tensors, see `checkpoint_layouts`.
        output_dir: The folder to make.
        revision: Branch, tag or commit of a Hub repository. The commit behind it is looked up once.
        token: For private and gated repositories; by default the one that huggingface_hub finds, if any.
        dtype: "float32", "bfloat16" or "float16"; by default that of the source.
        full_download: Download whole files into huggingface_hub's cache instead of the encoder's part of them.
        filename: Which file, of a source with several checkpoints.
        prefix: Which encoder, of a checkpoint with several: the beginning of its tensors' names.
        endpoint: Address of the Hub, by default huggingface_hub's.
        retry: When to ask the Hub again.

    Raises:
        FileExistsError: If `output_dir` exists.
        ValueError: If the source is no checkpoint with one such encoder, or is damaged, naming what was found.
        OSError: If the source cannot be read or fetched, or the folder not written. What was fetched is kept in a
            hidden folder beside `output_dir`.
    """
    output = Path(output_dir).absolute()
    target_dtype = _parse_dtype(dtype)
    local = Path(source)
    is_local = local.exists()
    if not is_local and (isinstance(source, Path) or str(source).startswith((".", "/", "~"))):
        raise FileNotFoundError(f"There is no file or folder {str(source)!r}.")
    if is_local and revision is not None:
        raise ValueError(f"{str(source)!r} is a local path: it has no revision {revision!r}.")

    with unfinished_folder(output) as folder:
        staging = folder / STAGING_FOLDER
        try:
            if is_local:
                opened = _open_local(local, filename, prefix)
            else:
                repository = HubRepository(
                    str(source), revision=revision, token=token, endpoint=endpoint, retry=retry or RetryPolicy()
                )
                opened = _open_remote(repository, staging, filename, prefix, full_download)
            pulled = _write_folder(opened, folder, target_dtype)
            discard(staging)
            publish(folder, output)
        except ValueError:
            discard(folder)  # The source is not usable: nothing to go on with.
            raise
        except BaseException:
            if not staging.is_dir():
                discard(folder)
            raise
    return pulled._replace(folder=output)


def _parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    parsed = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if parsed not in (None, torch.float32, torch.bfloat16, torch.float16) or (dtype is not None and parsed is None):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}.")
    return parsed


def _open_local(path: Path, filename: str | None, prefix: str | None) -> Opened:
    """Finds the encoder in a file, or in the checkpoint of a folder."""
    if path.is_dir():
        folder = path
        names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        selection = select_checkpoint(names, filename, f"The folder {path.name!r}")
    else:
        if filename is not None:
            raise ValueError(f"{path.name!r} is a file: choosing {filename!r} in it makes no sense.")
        folder, names = path.parent, [path.name]
        selection = select_checkpoint(names, path.name, "The folder")
    files = [selection.name]
    weight_map: dict[str, str] = {}
    if selection.is_index:
        if not path.is_dir():
            names = sorted(file.name for file in folder.iterdir() if file.is_file())
        content = _read_capped(folder / selection.name, MAX_INDEX_BYTES)
        weight_map = parse_index(content, names, selection.name)
        files = _wanted_files(weight_map, prefix)
    tensors = _open_files(selection, [folder / file for file in files])
    beside = folder if path.is_dir() else None
    source = Source(
        name=path.name,
        repository=None,
        commit=None,
        files=tuple(files),
        license=plain_license(read_metadata(folder / CARD_FILE).get("license")) if beside else None,
        config=_read_json(beside, "config.json"),
        preprocessor=_read_json(beside, "preprocessor_config.json"),
    )
    shapes = _all_shapes(weight_map, files, tensors.shapes)
    layout = find_layout(shapes, prefix=prefix, source_config=source.config)
    return Opened(source, layout, tensors, Traffic())


def _open_files(selection: Selection, paths: list[Path]) -> Tensors:
    return LocalTensors.open(paths) if selection.is_safetensors else PickledTensors(paths)


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


def _wanted_files(weight_map: dict[str, str], prefix: str | None) -> list[str]:
    """The files of a sharded checkpoint that hold a part of the encoder."""
    weights = weights_below(weight_map, choose_prefix(weight_map, prefix))
    return sorted({weight_map[name] for name in weights.values()})


def _open_remote(
    repository: HubRepository, staging: Path, filename: str | None, prefix: str | None, full_download: bool
) -> Opened:
    """Finds the encoder in a repository, and fetches its weights, by ranges where that is possible."""
    selection = select_checkpoint(repository.names, filename, f"{repository.repo_id!r}")
    weight_map: dict[str, str] = {}
    files = [selection.name]
    if selection.is_index:
        content = repository.read_small(selection.name, MAX_INDEX_BYTES)
        weight_map = parse_index(content, repository.names, selection.name)
        files = _wanted_files(weight_map, prefix)
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
            return _open_ranged(repository, source, weight_map, staging, prefix)
        except RangesUnsupported as error:
            notice = f"{error} Downloaded {', '.join(files)} whole into the cache."
            logger.warning("%s", notice)
            discard(staging)
    tensors = _open_files(selection, [repository.download(file) for file in files])
    shapes = _all_shapes(weight_map, files, tensors.shapes)
    layout = find_layout(shapes, prefix=prefix, source_config=source.config)
    return Opened(source, layout, tensors, repository.traffic, (notice,))


def _open_ranged(
    repository: HubRepository, source: Source, weight_map: dict[str, str], staging: Path, prefix: str | None
) -> Opened:
    remote = {name: repository.file(name) for name in source.files}
    headers = {}
    sizes = {}
    for name, file in remote.items():
        headers[name], sizes[name] = read_remote_header(file, f"{name!r} of {repository.repo_id!r}")
    shapes = {tensor: spec.shape for specs in headers.values() for tensor, spec in specs.items()}
    shapes = _all_shapes(weight_map, source.files, shapes)
    layout = find_layout(shapes, prefix=prefix, source_config=source.config)
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
    return Opened(source, layout, tensors, repository.traffic)


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


def _write_folder(opened: Opened, folder: Path, dtype: torch.dtype | None) -> Pulled:
    """Writes and checks everything but the rename."""
    layout, source = opened.layout, opened.source
    for stale in folder.iterdir():
        if stale.name != STAGING_FOLDER:
            stale.unlink()  # Left by a pull that was killed, perhaps one of another source.
    notices = [*layout.notices, *opened.notices]
    if dtype is None:
        dtype = _common_dtype(opened, notices)
    records = write_weights(
        folder / WEIGHTS_FILE,
        {f"{OWN_PREFIX}{name}": layout.shapes[name] for name in layout.sources},
        lambda name: _read_converted(opened, name.removeprefix(OWN_PREFIX)),
        dtype,
    )
    _write_settings(opened, folder, dtype, notices)
    license_name, stated_by = source.license, "source"
    if license_name is None and layout.family.license is not None:
        license_name, stated_by = layout.family.license, "family"
    provenance = {
        "source": {
            "name": source.name,
            "repository": source.repository,
            "commit": source.commit,
            "files": list(source.files),
            "layout": layout.family.name,
            "prefix": layout.prefix,
            "license": license_name,
            "license_stated_by": stated_by if license_name else None,
        },
        "notices": notices,
        "tensors": {
            name: {"source_name": layout.sources[name.removeprefix(OWN_PREFIX)], **record}
            for name, record in records.items()
        },
    }
    _write_text(folder / PROVENANCE_FILE, json.dumps(provenance, indent=2) + "\n")
    weight_bytes = (folder / WEIGHTS_FILE).stat().st_size
    parameters = sum(torch.Size(shape).numel() for shape in layout.shapes.values())
    measurements = {
        "parameters": f"{parameters:,} in {len(records)} tensors",
        "weights": f"{weight_bytes:,} bytes, {str(dtype).removeprefix('torch.')}",
    }
    if source.repository is not None and not opened.notices:
        measurements["fetched from the source"] = (
            f"{opened.traffic.body_bytes:,} bytes in {opened.traffic.requests} requests"
        )
    generated = describe_model(
        layout.config, provenance, usage=usage_from("path/to/this/folder", None), measurements=measurements
    )
    metadata = build_metadata({}, provenance, "transformers")
    _write_text(folder / CARD_FILE, build_card("", metadata, generated))
    check_folder(folder, {name: record["sha256"] for name, record in records.items()})
    return Pulled(
        folder=folder,
        layout=layout.family.name,
        prefix=layout.prefix,
        commit=source.commit,
        tensors=len(records),
        weight_bytes=weight_bytes,
        bytes_moved=opened.traffic.body_bytes,
        requests=opened.traffic.requests,
        notices=tuple(notices),
    )


def _common_dtype(opened: Opened, notices: list[str]) -> torch.dtype:
    dtypes = {opened.tensors.dtype(name) for name in opened.layout.sources.values()}
    if len(dtypes) == 1 and torch.float64 not in dtypes:
        return dtypes.pop()
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    notices.append(f"The weights are {names}: stored as float32.")
    return torch.float32


def _read_converted(opened: Opened, name: str) -> torch.Tensor:
    """A weight by published name, convolutions as (O, I, H, W)."""
    tensor = opened.tensors.read(opened.layout.sources[name])
    if opened.layout.is_channels_last and tuple(tensor.shape) != opened.layout.shapes[name]:
        tensor = tensor.permute(0, 3, 1, 2)
    return tensor


def write_weights(
    path: Path, shapes: dict[str, Shape], read: Callable[[str], torch.Tensor], dtype: torch.dtype
) -> dict[str, dict[str, Any]]:
    """
    Writes a safetensors file tensor by tensor, so that memory holds one at a time; returns the shape, dtype and
    SHA-256 of each.

    Raises:
        ValueError: If a weight is NaN or infinite, or becomes so by the change of dtype.
        OSError: If the file cannot be written.
    """
    header, order = build_header({name: (FORMAT_DTYPES[dtype], shape) for name, shape in shapes.items()})
    records = {}
    with path.open("wb") as file:
        file.write(header)
        for name in order:
            tensor = read(name)
            data = _to_bytes(_checked(name, tensor.to(dtype), tensor))
            file.write(data)
            records[name] = {
                "shape": list(shapes[name]),
                "dtype": str(dtype).removeprefix("torch."),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
    return records


def _checked(name: str, tensor: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    if bool(torch.isfinite(tensor).all()):
        return tensor
    if bool(torch.isfinite(original).all()):
        raise ValueError(f"Weight {name!r} does not fit into {tensor.dtype}: choose another dtype.")
    raise ValueError(f"Weight {name!r} holds NaN or infinite values: the checkpoint is damaged.")


def _to_bytes(tensor: torch.Tensor) -> bytes:
    # Flattened first: a transposed tensor with sides of 1 counts as contiguous, but cannot be seen as bytes.
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _write_settings(opened: Opened, folder: Path, dtype: torch.dtype, notices: list[str]) -> None:
    """Writes config.json and preprocessor_config.json, and beside them the code that both name."""
    config = ImageEncoderViTConfig.from_dict(opened.layout.config.to_dict())
    config.dtype = str(dtype).removeprefix("torch.")
    config.architectures = [ImageEncoderViTModel.__name__]
    with torch.device("meta"):
        model = ImageEncoderViTModel(config)
    if model._auto_class is not None:
        custom_object_save(model, folder, config=config)
    config.save_pretrained(folder)
    _image_processor(opened, notices).save_pretrained(folder)


def _image_processor(opened: Opened, notices: list[str]) -> Any:
    layout, own = opened.layout, opened.source.preprocessor
    if layout.family.name == OWN_LAYOUT:
        if str(own.get("image_processor_type", "")).startswith("ImageEncoderViT"):
            return ImageEncoderViTImageProcessorPil.from_dict({k: v for k, v in own.items() if k != "auto_map"})
        closest = DEEPSEEK_OCR if layout.config.downsample_channels else SAM
        notices.append(f"The source has no preprocessor_config.json of this encoder: assuming {closest.title}'s.")
        layout = Layout(**{**layout.__dict__, "family": closest})
    return ImageEncoderViTImageProcessorPil(**layout.preprocessing)


def check_folder(folder: Path, digests: dict[str, str]) -> None:
    """
    Reads a written folder back: its weights are exactly those of its configuration's model, finite, and have the
    SHA-256 `digests`; its image processor loads. The weights are read one at a time, and the strict load is one of
    names and shapes, without memory for a model.

    Raises:
        OSError: If what lies on the disk is not what was written.
    """
    config = ImageEncoderViTConfig.from_pretrained(folder)
    ImageEncoderViTImageProcessorPil.from_pretrained(folder)
    tensors = LocalTensors.open([folder / WEIGHTS_FILE])
    with torch.device("meta"):
        model = ImageEncoderViTModel(config)
        empty = {name: torch.empty(shape) for name, shape in tensors.shapes.items()}
    try:
        model.load_state_dict(empty, strict=True, assign=True)
    except RuntimeError as error:
        raise OSError(f"The folder that was written does not load: {error}") from None
    for name, digest in digests.items():
        tensor = tensors.read(name)
        if hashlib.sha256(_to_bytes(tensor)).hexdigest() != digest:
            raise OSError(f"{WEIGHTS_FILE} cannot be read back as it was written: {name!r} differs. Is the disk bad?")
        _checked(name, tensor, tensor)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
