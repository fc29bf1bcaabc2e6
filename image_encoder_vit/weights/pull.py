"""
Takes the encoder, and nothing else, out of any checkpoint of its family, and writes a folder that
`AutoModel.from_pretrained` loads.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import PIL
import torch

from ..storage.output_folder import discard, folder_lock, publish, unfinished_folder, unfinished_path
from ..storage.retries import RetryPolicy
from .hub_repository import open_repository
from .layouts import ENCODER_PART, PARTS, Choice
from .model_card import CARD_FILE, PROVENANCE_FILE, describe_model, parse_card, update_card, usage_from
from .model_folder import WEIGHTS_FILE, DamagedWeights, check_folder, write_settings, write_weights
from .model_kinds import kind_of
from .sources import OpenedCheckpoint, check_may_be_on_the_hub, open_local, open_remote

# The hidden folder beside the output is this command's own. In it lies what was fetched, and the folder that is made.
PURPOSE = "pulling"
STAGING = "staging"
FOLDER = "folder"


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


def pull(
    source: str | Path,
    output_dir: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    dtype: str | torch.dtype | None = None,
    full_download: bool = False,
    verify: bool = False,
    filename: str | None = None,
    prefix: str | None = None,
    part: str = ENCODER_PART,
    endpoint: str | None = None,
    retry: RetryPolicy | None = None,
) -> Pulled:
    """
    Writes the encoder of a checkpoint to a new folder: config.json, model.safetensors, preprocessor_config.json, the
    remote code, README.md and provenance.json. The folder appears complete and checked, or not at all. A pull from
    the Hub that was killed goes on where it was when it is started again.

    Args:
        source: A Hub repository, a local folder, or a local file (.safetensors, .pth, .pt, .bin). What exists locally
            is taken for local. The layout is recognised by the tensors, see `layouts`.
        output_dir: The folder to make.
        revision: Branch, tag or commit of a Hub repository. The commit behind it is looked up once.
        token: For private and gated repositories; by default the one that huggingface_hub finds, if any.
        dtype: "float32", "bfloat16" or "float16"; by default that of the source.
        full_download: Download whole files into huggingface_hub's cache instead of the encoder's part of them.
        verify: Compare the digests of the whole files with those that the Hub states, or for a local file with the
            one that is known of the original; a file on the Hub is downloaded whole for that.
        filename: Which file, of a source with several checkpoints.
        prefix: Which encoder, of a checkpoint with several: the beginning of its tensors' names.
        part: "encoder", SAM's alone, or "deep-encoder": SAM's with CLIP's tower, the projector and the learned tokens,
            of DeepSeek-OCR and Unlimited-OCR.
        endpoint: Address of the Hub, by default huggingface_hub's.
        retry: When to ask the Hub again.

    Raises:
        FileExistsError: If `output_dir` exists.
        ValueError: If the source is no checkpoint with one such encoder, or is damaged, naming what was found.
        OSError: If the source cannot be read or fetched, or the folder not written. What was fetched is kept in a
            hidden folder beside `output_dir` until the same command succeeds.
    """
    output = Path(output_dir).absolute()
    target_dtype = _parse_dtype(dtype)
    if part not in PARTS:
        raise ValueError(f"There is no part {part!r}. Known: {', '.join(PARTS)}.")
    choice = Choice(filename, prefix, part)
    local = Path(source)
    is_local = local.exists()
    if not is_local and isinstance(source, Path):
        raise FileNotFoundError(f"There is no file or folder {str(source)!r}.")
    if not is_local:
        check_may_be_on_the_hub(str(source))
    if is_local and revision is not None:
        raise ValueError(f"{str(source)!r} is a local path: it has no revision {revision!r}.")

    _remove_what_is_published(output)
    with unfinished_folder(output, PURPOSE) as work:
        staging, folder = work / STAGING, work / FOLDER
        discard(folder)  # Left by a pull that was killed, perhaps one of another source.
        folder.mkdir()
        try:
            if is_local:
                opened = open_local(local, choice, verify)
            else:
                repository = open_repository(
                    str(source), revision=revision, token=token, endpoint=endpoint, retry=retry or RetryPolicy()
                )
                opened = open_remote(repository, staging, choice, full_download, verify)
            pulled = _write_folder(opened, folder, target_dtype)
            publish(folder, output)
        except BaseException as error:
            # What was fetched stays for the next attempt, unless nothing can be made of it.
            if isinstance(error, DamagedWeights) or not staging.is_dir():
                discard(work)
            raise
        discard(work)
    return pulled._replace(folder=output)


def _remove_what_is_published(output: Path) -> None:
    """Removes what a pull leaves that was killed between its last two steps: its folder has become `output`."""
    work = unfinished_path(output, PURPOSE)
    if output.is_dir() and any(output.iterdir()) and work.is_dir() and not (work / FOLDER).exists():
        with suppress(BlockingIOError), folder_lock(work):
            if not (work / FOLDER).exists():
                discard(work)


def _parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    parsed = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if parsed not in (None, torch.float32, torch.bfloat16, torch.float16) or (dtype is not None and parsed is None):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}.")
    return parsed


def _write_folder(opened: OpenedCheckpoint, folder: Path, dtype: torch.dtype | None) -> Pulled:
    """Writes and checks everything but the rename."""
    layout = opened.layout
    notices = [*layout.notices, *opened.notices]
    if dtype is None:
        dtype, dtype_notices = _common_dtype(opened)
        notices += dtype_notices
    prefix = kind_of(layout.config).weight_prefix
    records = write_weights(
        folder / WEIGHTS_FILE,
        {f"{prefix}{name}": layout.shapes[name] for name in layout.sources},
        lambda name: _read_converted(opened, name.removeprefix(prefix)),
        dtype,
    )
    notices += write_settings(opened, folder, dtype)
    provenance = provenance_of(opened, records, notices)
    _write_text(folder / PROVENANCE_FILE, json.dumps(provenance, indent=2) + "\n")
    weight_bytes = (folder / WEIGHTS_FILE).stat().st_size
    _write_text(folder / CARD_FILE, card_of(opened, provenance, weight_bytes, dtype))
    check_folder(folder, {name: record["sha256"] for name, record in records.items()})
    return Pulled(
        folder=folder,
        layout=layout.family.name,
        prefix=layout.prefix,
        commit=opened.source.commit,
        tensors=len(records),
        weight_bytes=weight_bytes,
        bytes_moved=opened.traffic.body_bytes,
        requests=opened.traffic.requests,
        notices=tuple(notices),
    )


def _common_dtype(opened: OpenedCheckpoint) -> tuple[torch.dtype, tuple[str, ...]]:
    """The dtype of all weights, float32 for mixed ones, and what the user should read about it."""
    dtypes = {opened.tensors.dtype(name) for name in opened.layout.sources.values()}
    if len(dtypes) == 1 and torch.float64 not in dtypes:
        return dtypes.pop(), ()
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    return torch.float32, (f"The weights are {names}: stored as float32.",)


def provenance_of(
    opened: OpenedCheckpoint, records: Mapping[str, Mapping[str, Any]], notices: Sequence[str]
) -> dict[str, Any]:
    """The content of provenance.json: where the weights come from, and each tensor's name there and digest here."""
    layout, source = opened.layout, opened.source
    license_name, stated_by = source.license, "source"
    if license_name is None and layout.family.license is not None:
        license_name, stated_by = layout.family.license, "family"
    prefix = kind_of(layout.config).weight_prefix
    return {
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
        "notices": list(notices),
        "versions": {"pillow": PIL.__version__},  # Its resizing has versions, and the processor is equal to it.
        "tensors": {
            name: {"source_name": layout.sources[name.removeprefix(prefix)], **record}
            for name, record in records.items()
        },
    }


def card_of(opened: OpenedCheckpoint, provenance: Mapping[str, Any], weight_bytes: int, dtype: torch.dtype) -> str:
    """The content of the folder's README.md."""
    config, kind = opened.layout.config, kind_of(opened.layout.config)
    parameters = sum(torch.Size(shape).numel() for shape in opened.layout.shapes.values())
    measurements = {
        "parameters": f"{parameters:,} in {len(opened.layout.shapes)} tensors",
        "weights": f"{weight_bytes:,} bytes, {str(dtype).removeprefix('torch.')}",
    }
    if opened.source.repository is not None and not opened.notices:
        kept = f", and {opened.kept_bytes:,} kept from an interrupted pull" if opened.kept_bytes else ""
        measurements["fetched from the source"] = (
            f"{opened.traffic.body_bytes:,} bytes in {opened.traffic.requests} requests{kept}"
        )
    usage = usage_from(kind, "path/to/this/folder", None)
    generated = describe_model(config, provenance, usage=usage, measurements=measurements)
    return update_card(parse_card(""), kind, provenance, generated)


def _read_converted(opened: OpenedCheckpoint, name: str) -> torch.Tensor:
    """A weight by published name, convolutions as (O, I, H, W)."""
    tensor = opened.tensors.read(opened.layout.sources[name])
    if opened.layout.is_channels_last and tensor.ndim == 4 and not name.endswith("pos_embed"):
        tensor = tensor.permute(0, 3, 1, 2)
    return tensor


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
