"""
Takes the encoder, and nothing else, out of any checkpoint of its family, and writes a folder that
`AutoModel.from_pretrained` loads.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch

from ..storage.http_ranges import RetryPolicy
from ..storage.output_folder import discard, publish, unfinished_folder
from .hub_repository import HubRepository
from .model_card import CARD_FILE, PROVENANCE_FILE, build_card, build_metadata, describe_model, usage_from
from .model_folder import OWN_PREFIX, WEIGHTS_FILE, check_folder, write_settings, write_weights
from .sources import Opened, open_local, open_remote

STAGING_FOLDER = "staging"


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
                opened = open_local(local, filename, prefix)
            else:
                repository = HubRepository(
                    str(source), revision=revision, token=token, endpoint=endpoint, retry=retry or RetryPolicy()
                )
                opened = open_remote(repository, staging, filename, prefix, full_download)
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
    write_settings(opened, folder, dtype, notices)
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
    if opened.layout.is_channels_last and tensor.ndim == 4 and name != "pos_embed":
        tensor = tensor.permute(0, 3, 1, 2)
    return tensor


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
