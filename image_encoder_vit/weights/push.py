"""
Publishes a model folder on the Hub in one commit, after a fresh process has loaded it as strangers will and has come
to the same outputs.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

from ..storage.http_faults import status_of
from ..storage.retries import RetryPolicy
from ..support import visible
from .export import export_weights
from .files import parse_config
from .folder_check import check_remote_code, foreign_code
from .hub_repository import LIBRARY_NAME, clean_token, with_retries
from .layouts import EXPORT_LAYOUTS
from .model_card import (
    CARD_FILE,
    PROVENANCE_FILE,
    describe_model,
    parse_card,
    read_card,
    read_provenance,
    update_card,
    usage_from,
)
from .model_folder import WEIGHTS_FILE
from .model_kinds import kind_of, read_config

logger = logging.get_logger(__name__)

REQUIRED_FILES = ("config.json", WEIGHTS_FILE, "preprocessor_config.json")
OPTIONAL_FILES = (PROVENANCE_FILE, "LICENSE", "NOTICE")
MAIN = "main"


class Pushed(NamedTuple):
    """
    What `push` published, or would have: `files` are names and sizes in bytes, `left_out` the files of the folder that
    stay here, `revision` the tag that the card's usage is pinned to, `repository` the full id on the Hub. `url` and
    `commit` are None after a dry run.
    """

    repository: str
    files: dict[str, int]
    left_out: tuple[str, ...]
    card: str
    revision: str
    url: str | None
    commit: str | None
    notices: tuple[str, ...]


class Destination(NamedTuple):
    """Where on the Hub a publication goes, see `push`."""

    repo_id: str
    private: bool | None
    branch: str
    create_pr: bool


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
        repo_id: Repository to publish to, made where it does not exist. A bare name is one of the token's owner.
        private: Whether a new repository is private.
        revision: Branch to commit to, made where it does not exist; by default main.
        create_pr: Open a pull request instead of committing.
        dry_run: Check everything and build the card, without any network.
        layout: Publish the weights alone under another family's names, see `export_weights`.
        token: By default the one that huggingface_hub finds.
        endpoint: Address of the Hub, by default huggingface_hub's.
        retry: When to ask the Hub again.

    Raises:
        ValueError: If the folder is incomplete, leads out of itself by a link, or does not give the same outputs when
            it is loaded as strangers load it. Nothing has left then.
        OSError: If there is no token, the Hub refuses it, or the Hub cannot be reached. What was committed before,
            stays; the same call can be made again.
    """
    validate_repo_id(repo_id)
    destination = Destination(repo_id, private, revision or MAIN, create_pr)
    token = clean_token(token)
    if token is None and not dry_run:
        raise LocalTokenNotFoundError("Publishing needs a token with write permission: `hf auth login`, or HF_TOKEN.")
    if create_pr and destination.branch != MAIN:
        raise ValueError(f"A pull request goes to {MAIN}: choose it or the revision {revision!r}, not both.")
    if layout is not None and layout not in EXPORT_LAYOUTS:
        raise ValueError(f"Unknown layout {layout!r}. Known: {', '.join(EXPORT_LAYOUTS)}.")
    with TemporaryDirectory(prefix="image-encoder-vit-") as scratch:
        publication = prepare(Path(model_dir), layout, Path(scratch))
        if dry_run:
            return publication.result(repo_id)
        api = HfApi(endpoint=endpoint, token=token, library_name=LIBRARY_NAME)
        return send(publication, destination, api, retry or RetryPolicy())


@dataclass(frozen=True)
class Publication:
    """
    What is published, but for the card, which names the repository: each file by its name, the SHA-256 of what was
    checked, and a tag named after them. `layout` as in `push`.
    """

    folder: Path
    files: Mapping[str, Path]
    digests: Mapping[str, str]
    config: PreTrainedConfig
    measurements: Mapping[str, str]
    layout: str | None

    @property
    def tag(self) -> str:
        """The name of the tag: the same content has the same."""
        return "content-" + hashlib.sha256(json.dumps(self.digests, sort_keys=True).encode()).hexdigest()[:12]

    def card(self, repo_id: str) -> str:
        """The README.md of the repository."""
        provenance, kind = read_provenance(self.folder), kind_of(self.config)
        usage = (
            usage_from(kind, repo_id, self.tag)
            if self.layout is None
            else _export_usage(repo_id, self.tag, self.layout)
        )
        generated = describe_model(self.config, provenance, usage=usage, measurements=self.measurements)
        return update_card(read_card(self.folder / CARD_FILE), kind, provenance, generated)

    def result(
        self, repo_id: str, *, url: str | None = None, commit: str | None = None, notices: tuple[str, ...] = ()
    ) -> Pushed:
        """What the caller of `push` is told."""
        card = self.card(repo_id)
        sizes = {name: path.stat().st_size for name, path in self.files.items()} | {CARD_FILE: len(card.encode())}
        here = {path.name for path in self.folder.iterdir()}
        return Pushed(
            repository=repo_id,
            files=sizes,
            left_out=tuple(sorted(here - sizes.keys() - {*REQUIRED_FILES})),
            card=card,
            revision=self.tag,
            url=url,
            commit=commit,
            notices=(*self._notices(card), *notices),
        )

    def _notices(self, card: str) -> list[str]:
        notices = []
        if parse_card(card).data.get("license") is None:
            notices.append("The card names no license: the source states none. Add one to README.md's front matter.")
        if not read_provenance(self.folder):
            notices.append(f"There is no {PROVENANCE_FILE}: the card cannot say where the weights come from.")
        return notices


def prepare(folder: Path, layout: str | None, scratch: Path) -> Publication:
    """
    Collects and checks what is published of a folder; an export is written to `scratch`.

    Raises:
        ValueError, OSError: As `push`.
    """
    files = collect_files(folder)
    config = read_config(folder)
    read_card(folder / CARD_FILE)  # A card that cannot be read is refused before the check, which takes a while.
    digests = {name: _sha256(path) for name, path in files.items()}
    foreign = foreign_code(files.values())
    if foreign:
        logger.warning(
            "The code in %r is not this package's (%s): it runs now, to be checked, without your home folder, tokens "
            "and environment.",
            str(folder),
            ", ".join(foreign),
        )
    measurements = measure(folder, config) | check_remote_code(folder, config)
    if layout is not None:
        export_weights(folder, scratch / WEIGHTS_FILE, layout)
        files = {name: path for name, path in files.items() if name in OPTIONAL_FILES}
        files[WEIGHTS_FILE] = scratch / WEIGHTS_FILE
        digests = {name: _sha256(path) for name, path in files.items()}
    return Publication(folder, files, digests, config, measurements, layout)


def collect_files(folder: Path) -> dict[str, Path]:
    """
    The files of a model folder that are published, by name: weights, settings, provenance and the code that both
    settings name.

    Raises:
        ValueError: If one is missing, or is a link that leads out of the folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder.")
    missing = [name for name in REQUIRED_FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{str(folder)!r} is no complete model: {', '.join(missing)} missing. Write it by save_pretrained of the "
            "model and of its image processor, or by image-encoder-vit pull."
        )
    code: set[str] = set()
    for name in ("config.json", "preprocessor_config.json"):
        check_link(folder / name)
        auto_map = parse_config((folder / name).read_bytes()).get("auto_map", {})
        for entry in auto_map.values() if isinstance(auto_map, dict) else ():
            for reference in entry if isinstance(entry, list) else [entry]:
                module = folder / f"{str(reference).split('.')[0]}.py"
                if not module.is_file() or module.parent != folder:
                    raise ValueError(f"{name} names the code {visible(module.name)}, which is not in {str(folder)!r}.")
                check_link(module)
                code |= {module.name, *(Path(path).name for path in get_relative_import_files(module))}
    if not code:
        raise ValueError(f"{str(folder)!r} holds no code, so only this package could load it: save it again.")
    names = [*REQUIRED_FILES, *(name for name in OPTIONAL_FILES if (folder / name).is_file()), *sorted(code)]
    for name in (*names, CARD_FILE):
        check_link(folder / name)
    return {name: folder / name for name in names}


def check_link(path: Path) -> None:
    """
    Checks that a file lies in its folder, also where it is a link. In huggingface_hub's cache the files are links to
    the `blobs` of their repository, which counts as the folder.

    Raises:
        ValueError: If it leads elsewhere, where its content may be private.
    """
    folder = path.parent.resolve()
    allowed = [folder]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent / "blobs")
    target = path.resolve()
    if not any(target.is_relative_to(place) for place in allowed):
        raise ValueError(f"{str(path)!r} is a link that leads out of its folder, to {str(target)!r}: put a copy there.")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def measure(folder: Path, config: PreTrainedConfig) -> dict[str, str]:
    """Figures of the model for its card."""
    with torch.device("meta"):
        model = kind_of(config).model(config)
    weight_bytes = (folder / WEIGHTS_FILE).stat().st_size
    return {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,} in {len(model.state_dict())} tensors",
        "weights": f"{weight_bytes:,} bytes, {str(config.dtype).removeprefix('torch.')}",
    }


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


def send(publication: Publication, destination: Destination, api: HfApi, retry: RetryPolicy) -> Pushed:
    """
    Makes the repository and branch where they do not exist, one commit, and a tag on it.

    Raises:
        ValueError: If a file has changed since it was checked.
        OSError: As `push`.
    """
    repo_id, token = destination.repo_id, api.token if isinstance(api.token, str) else None
    if not destination.create_pr:
        # The Hub completes a bare name by its owner.
        repo_id = with_retries(
            lambda: api.create_repo(repo_id, private=destination.private, exist_ok=True).repo_id, retry, token
        )
        if destination.branch != MAIN:
            with_retries(lambda: api.create_branch(repo_id, branch=destination.branch, exist_ok=True), retry, token)
    contents: dict[str, Path | bytes] = {**publication.files, CARD_FILE: publication.card(repo_id).encode()}

    def commit() -> Any:
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in contents.items()]
        for operation in operations:
            # What was checked is what leaves, even if something has written to the folder meanwhile.
            sha256 = operation.upload_info.sha256.hex()
            if publication.digests.get(operation.path_in_repo, sha256) != sha256:
                raise ValueError(f"{operation.path_in_repo} has changed since it was checked: nothing was published.")
        return api.create_commit(
            repo_id,
            operations,
            commit_message=f"Upload the image encoder ({publication.tag})",
            revision=destination.branch,
            create_pr=destination.create_pr or None,
        )

    made = with_retries(commit, retry, token)
    notices: tuple[str, ...] = ()
    try:
        with_retries(
            lambda: api.create_tag(repo_id, tag=publication.tag, revision=made.oid, exist_ok=True), retry, token
        )
    except HfHubHTTPError as error:
        if not destination.create_pr:
            raise
        notices = (
            f"The tag {publication.tag} could not be made ({status_of(error)}): make it when the request is merged.",
        )
    url = getattr(made, "pr_url", None) or f"{api.endpoint}/{repo_id}"
    return publication.result(repo_id, url=url, commit=made.oid, notices=notices)
