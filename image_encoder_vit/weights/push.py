"""
Publishes a model folder on the Hub in one commit, after a fresh process has loaded it as strangers will and has come
to the same outputs.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

from ..configuration_image_encoder_vit import ImageEncoderViTConfig
from ..image_processing_image_encoder_vit import ImageEncoderViTImageProcessorPil
from ..modeling_image_encoder_vit import ImageEncoderViTForImageClassification, ImageEncoderViTModel
from ..storage.http_ranges import RetryPolicy
from .export import export_weights
from .files import parse_config
from .hub_repository import LIBRARY_NAME, with_retries
from .layouts import EXPORT_LAYOUTS, read_config
from .model_card import (
    CARD_FILE,
    PROVENANCE_FILE,
    build_card,
    build_metadata,
    describe_model,
    is_classifier,
    read_metadata,
    read_provenance,
    usage_from,
)
from .model_folder import WEIGHTS_FILE

logger = logging.get_logger(__name__)

REQUIRED_FILES = ("config.json", WEIGHTS_FILE, "preprocessor_config.json")
OPTIONAL_FILES = (PROVENANCE_FILE, "LICENSE", "NOTICE")
CHECK_SECONDS = 900
# Rounding may differ between two runs of the same code on other numbers of threads, in the dtype of the weights.
MAX_RELATIVE_DIFFERENCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
PROBE_IMAGE_PX = (93, 131)


class File(NamedTuple):
    """A file to publish: where it lies, or its content."""

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    def sha256(self) -> str:
        """Digest of the content, read in pieces."""
        if isinstance(self.content, bytes):
            return hashlib.sha256(self.content).hexdigest()
        digest = hashlib.sha256()
        with self.content.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
        return digest.hexdigest()


class Pushed(NamedTuple):
    """
    What `push` published, or would have: `files` are names and sizes in bytes, `left_out` the files of the folder that
    stay here, `revision` the tag that the card's usage is pinned to. `url` and `commit` are None after a dry run.
    """

    files: dict[str, int]
    left_out: tuple[str, ...]
    card: str
    revision: str
    url: str | None
    commit: str | None
    notices: tuple[str, ...]


def push(
    model_dir: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    layout: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    retry: RetryPolicy | None = None,
) -> Pushed:
    """
    Publishes a folder that `pull` or `save_pretrained` wrote: weights, settings, code and card in one commit, and a
    tag, named after their content, that the card's usage is pinned to. Only files that belong to the model leave.

    Args:
        model_dir: The folder.
        repo_id: Repository to publish to, made where it does not exist.
        private: Whether a new repository is private.
        revision: Branch to commit to, made where it does not exist; by default main.
        create_pr: Open a pull request instead of committing.
        dry_run: Check everything and build the card, without any network.
        layout: Publish the weights alone under another family's names, see `export_weights`.
        token: By default the one that huggingface_hub finds.
        endpoint: Address of the Hub, by default huggingface_hub's.
        retry: When to ask the Hub again.

    Raises:
        ValueError: If the folder is incomplete, or does not give the same outputs when it is loaded as strangers load
            it. Nothing has left then.
        OSError: If there is no token, the Hub refuses it, or the Hub cannot be reached. What was committed before,
            stays; the same call can be made again.
    """
    folder = Path(model_dir)
    token = token or get_token()
    if token is None and not dry_run:
        raise LocalTokenNotFoundError("Publishing needs a token with write permission: `hf auth login`, or HF_TOKEN.")
    if create_pr and revision not in (None, "main"):
        raise ValueError(f"A pull request goes to main: choose it or the revision {revision!r}, not both.")
    if layout is not None and layout not in EXPORT_LAYOUTS:
        raise ValueError(f"Unknown layout {layout!r}. Known: {', '.join(EXPORT_LAYOUTS)}.")
    files = collect_files(folder)
    digests = {file.name: file.sha256() for file in files}
    measurements = measure(folder)
    measurements |= check_remote_code(folder)

    with TemporaryDirectory(prefix="image-encoder-vit-") as scratch:
        if layout is not None:
            exported = Path(scratch) / WEIGHTS_FILE
            export_weights(folder, exported, layout)
            kept = [file for file in files if file.name in OPTIONAL_FILES]
            files = [File(WEIGHTS_FILE, exported), *kept]
            digests = {file.name: file.sha256() for file in files}
        tag = "content-" + hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:12]
        card = _card(folder, repo_id, tag, layout, measurements)
        files.append(File(CARD_FILE, card.encode()))
        here = {path.name for path in folder.iterdir()}
        pushed = Pushed(
            files={file.name: file.size for file in files},
            left_out=tuple(sorted(here - {file.name for file in files} - set(REQUIRED_FILES))),
            card=card,
            revision=tag,
            url=None,
            commit=None,
            notices=_notices(card, folder),
        )
        if dry_run:
            return pushed
        api = HfApi(endpoint=endpoint, token=token, library_name=LIBRARY_NAME)
        return _publish(api, repo_id, files, digests, pushed, private, revision, create_pr, retry or RetryPolicy())


def collect_files(folder: Path) -> list[File]:
    """
    The files of a model folder that are published: weights, settings, provenance and the code that both settings name.

    Raises:
        ValueError: If one is missing.
    """
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder.")
    missing = [name for name in REQUIRED_FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{str(folder)!r} is no complete model: {', '.join(missing)} missing. Write it by save_pretrained of the "
            "model and of its image processor, or by scripts/pull_from_hub.py."
        )
    code: set[str] = set()
    for name in ("config.json", "preprocessor_config.json"):
        auto_map = parse_config((folder / name).read_bytes()).get("auto_map", {})
        for entry in auto_map.values() if isinstance(auto_map, dict) else ():
            for reference in entry if isinstance(entry, list) else [entry]:
                module = folder / f"{str(reference).split('.')[0]}.py"
                if not module.is_file() or module.parent != folder:
                    raise ValueError(f"{name} names the code {module.name}, which is not in {str(folder)!r}.")
                code |= {module.name, *(Path(path).name for path in get_relative_import_files(module))}
    if not code:
        raise ValueError(f"{str(folder)!r} holds no code, so only this package could load it: save it again.")
    names = [*REQUIRED_FILES, *(name for name in OPTIONAL_FILES if (folder / name).is_file()), *sorted(code)]
    return [File(name, folder / name) for name in names]


def measure(folder: Path) -> dict[str, str]:
    """Figures of the model for its card."""
    config = read_config(folder)
    with torch.device("meta"):
        model = _class_of(config)(config)
    weight_bytes = (folder / WEIGHTS_FILE).stat().st_size
    return {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,} in {len(model.state_dict())} tensors",
        "weights": f"{weight_bytes:,} bytes, {str(config.dtype).removeprefix('torch.')}",
    }


def _class_of(config: ImageEncoderViTConfig) -> Any:
    return ImageEncoderViTForImageClassification if is_classifier(config) else ImageEncoderViTModel


def check_remote_code(folder: Path) -> dict[str, str]:
    """
    Loads a folder in a fresh process, by transformers and the folder's own code, and compares its outputs with those
    of this package: features of a small random image, and logits where there is a head, and the image processor's
    pixels of another one. Needs no network and gives the process no token. Returns what was measured.

    Raises:
        ValueError: If the folder cannot be loaded so, or the outputs differ.
    """
    try:
        model = _class_of(read_config(folder)).from_pretrained(folder).eval()
        processor = ImageEncoderViTImageProcessorPil.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{str(folder)!r} cannot be loaded: {' '.join(str(error).splitlines())}") from None
    generator = torch.Generator().manual_seed(0)
    # A window and a bit on each side, and not square: padding, windows and resized positions all take part.
    patch, window = model.config.patch_size, model.config.window_size
    sides_px = patch * (window + 1), patch * (window + 3)
    pixel_values = torch.rand(1, model.config.num_channels, *sides_px, generator=generator) * 2 - 1
    image = torch.randint(0, 256, (*PROBE_IMAGE_PX, 3), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        features = model.encoder(pixel_values)
        logits = model(pixel_values).logits if is_classifier(model.config) else None
    processed = processor(Image.fromarray(image.numpy()), return_tensors="pt")["pixel_values"]
    if not torch.isfinite(features).all():
        raise ValueError(f"{str(folder)!r} gives features that are not finite: its weights are damaged.")
    strangers = _run_check(folder, {"image": image, "pixel_values": pixel_values})

    if strangers["features"].shape != features.shape:
        shapes = f"{tuple(strangers['features'].shape)} instead of {tuple(features.shape)}"
        raise ValueError(f"{str(folder)!r} gives features of shape {shapes} when it is loaded with its own code.")
    reference = features.double()
    difference = float((strangers["features"].double() - reference).norm() / reference.norm().clamp(min=1e-30))
    allowed = MAX_RELATIVE_DIFFERENCE.get(features.dtype, 0.0)
    if difference > allowed:
        raise ValueError(
            f"{str(folder)!r} gives other features when it is loaded with its own code: relative difference "
            f"{difference:.3g}. Its code or weights are not those of this package; save it again."
        )
    if logits is not None and not torch.allclose(
        strangers["logits"].double(), logits.double(), rtol=0, atol=allowed * float(logits.abs().max())
    ):
        raise ValueError(
            f"{str(folder)!r} gives other logits when it is loaded with its own code: {strangers['logits'].tolist()} "
            f"instead of {logits.tolist()}. Its code or weights are not those of this package; save it again."
        )
    if not torch.equal(strangers["processed"], processed):
        raise ValueError(f"{str(folder)!r} prepares images in another way when it is loaded with its own code.")
    sides = f"{pixel_values.shape[2]} x {pixel_values.shape[3]} px"
    return {
        "loaded afresh with the published code": f"relative difference of the features {difference:.3g}, image {sides}",
        "shape of those features": " x ".join(map(str, features.shape)),
    }


def _run_check(folder: Path, probe: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Runs `remote_code_check` on a folder in a process of its own, and returns its results."""
    code = (Path(__file__).with_name("remote_code_check.py")).read_text(encoding="utf-8")
    with TemporaryDirectory(prefix="image-encoder-vit-") as scratch:
        probe_file, result_file = Path(scratch) / "probe.safetensors", Path(scratch) / "result.safetensors"
        save_file(probe, probe_file)
        environment = {name: value for name, value in os.environ.items() if "TOKEN" not in name}
        # Code cached from another folder must not be taken for this one's.
        environment |= {"HF_MODULES_CACHE": str(Path(scratch) / "modules"), "HF_HUB_OFFLINE": "1"}
        environment |= {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        command = [sys.executable, "-c", code, str(folder.absolute()), str(probe_file), str(result_file)]
        try:
            done = subprocess.run(
                command, env=environment, cwd=scratch, capture_output=True, text=True, timeout=CHECK_SECONDS
            )
        except subprocess.TimeoutExpired:
            raise ValueError(f"{str(folder)!r} did not load and run within {CHECK_SECONDS} s.") from None
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"{str(folder)!r} does not work when it is loaded with its own code: {reason[:300]}")
        return dict(load_file(result_file))


def _card(folder: Path, repo_id: str, tag: str, layout: str | None, measurements: dict[str, str]) -> str:
    provenance = read_provenance(folder)
    path = folder / CARD_FILE
    existing = path.read_text(encoding="utf-8") if path.is_file() else ""
    config = read_config(folder)
    classifies = layout is None and is_classifier(config)
    usage = _export_usage(repo_id, tag, layout) if layout else usage_from(repo_id, tag, classifies)
    generated = describe_model(config, provenance, usage=usage, measurements=measurements)
    metadata = build_metadata(read_metadata(path), provenance, "transformers", classifies)
    return build_card(existing, metadata, generated)


def _export_usage(repo_id: str, tag: str, layout: str) -> str:
    return (
        f"The weights of the encoder alone, under the names of the layout `{layout}`. They go into a model of that "
        "family, and replace its encoder:\n\n"
        "```python\n"
        "from huggingface_hub import hf_hub_download\n"
        "from safetensors.torch import load_file\n\n"
        f'weights = load_file(hf_hub_download("{repo_id}", "{WEIGHTS_FILE}", revision="{tag}"))\n'
        "unexpected = model.load_state_dict(weights, strict=False).unexpected_keys\n"
        "assert not unexpected\n"
        "```\n"
    )


def _notices(card: str, folder: Path) -> tuple[str, ...]:
    notices = []
    front_matter = card.split("\n---\n", 1)[0]
    if "\nlicense:" not in front_matter:
        notices.append("The card names no license: the source states none. Add one to README.md's front matter.")
    if not read_provenance(folder):
        notices.append(f"There is no {PROVENANCE_FILE}: the card cannot say where the weights come from.")
    return tuple(notices)


def _publish(
    api: HfApi,
    repo_id: str,
    files: list[File],
    digests: dict[str, str],
    pushed: Pushed,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    retry: RetryPolicy,
) -> Pushed:
    def ask(call: Callable[[], Any]) -> Any:
        return with_retries(call, retry)

    if not create_pr:
        ask(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
        if revision not in (None, "main"):
            ask(lambda: api.create_branch(repo_id, branch=str(revision), exist_ok=True))
    what = "pull request" if create_pr else "commit"
    logger.info("Publishing %d files to %s as one %s.", len(files), repo_id, what)

    def commit() -> Any:
        operations = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file.content) for file in files]
        for operation in operations:
            # What was checked is what leaves, even if something has written to the folder meanwhile.
            sha256 = operation.upload_info.sha256.hex()
            if digests.get(operation.path_in_repo, sha256) != sha256:
                raise ValueError(f"{operation.path_in_repo} has changed since it was checked: nothing was published.")
        message = f"Upload the image encoder ({pushed.revision})"
        return api.create_commit(
            repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr or None
        )

    info = ask(commit)
    notices = list(pushed.notices)
    try:
        ask(lambda: api.create_tag(repo_id, tag=pushed.revision, revision=info.oid, exist_ok=True))
    except HfHubHTTPError as error:
        if not create_pr:
            raise
        status = getattr(error.response, "status_code", None)
        notices.append(f"The tag {pushed.revision} could not be made ({status}): make it when the request is merged.")
    url = getattr(info, "pr_url", None) or f"{api.endpoint}/{repo_id}"
    return pushed._replace(url=url, commit=info.oid, notices=tuple(notices))
