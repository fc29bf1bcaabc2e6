"""
A Hub repository at one commit: which files it has, and each of them by ranges, whole, or through huggingface_hub's
cache; or what that cache has of it, where HF_HUB_OFFLINE is set.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from huggingface_hub import HfApi, constants, errors, get_token, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import build_hf_headers, tqdm  # type: ignore[attr-defined]

from ..storage.http_faults import status_of, told_apart
from ..storage.http_ranges import HubFile, Traffic
from ..storage.retries import Pace, RetryPolicy, TransferError, repeat, within
from ..support import message_of, visible
from .model_card import CARD_FILE, plain_license, read_card

LIBRARY_NAME = "image-encoder-vit"
# Where there is no connection at all, the name may have been meant as a path: that is said soon.
MAX_UNREACHABLE = 1
Result = TypeVar("Result")


def clean_token(token: str | bool | None) -> str | None:
    """
    The token to use: the one given or, for None, the one that huggingface_hub finds; None for False, or where there is
    none. Spaces and line ends around it, which copying adds, are no part of it.

    Raises:
        ValueError: If it holds a character that no token has; the message does not show it.
    """
    if token is None:
        token = get_token()
    if not token or token is True:
        return None
    cleaned = token.strip()
    if not re.fullmatch(r"[!-~]+", cleaned):
        raise ValueError(
            "The token holds a space, a line end or another character that no token has: copy it again. "
            "It comes from --token, HF_TOKEN or `hf auth login`."
        )
    return cleaned


class Repository(Protocol):
    """
    The files of a model's repository at one commit. `supports_ranges` says whether `file` may be asked for, instead of
    whole ones by `download`; `notice` is a sentence about where the files come from, for the user.
    """

    repo_id: str
    commit: str
    names: list[str]
    license: str | None
    traffic: Traffic
    supports_ranges: bool
    notice: str | None

    def file(self, name: str) -> HubFile: ...

    def read_small(self, name: str, max_bytes: int, through_cache: bool = False) -> bytes: ...

    def download(self, name: str) -> Path: ...

    def digest(self, name: str) -> tuple[str, str]: ...


def open_repository(
    repo_id: str, *, revision: str | None, token: str | bool | None, endpoint: str | None, retry: RetryPolicy
) -> Repository:
    """
    The repository at the commit that `revision` names now: on the Hub, or in the cache where HF_HUB_OFFLINE is set.

    Raises:
        OSError: As the classes below.
        ValueError: As `clean_token`.
    """
    if constants.HF_HUB_OFFLINE:
        return CachedRepository(repo_id, revision=revision)
    return HubRepository(repo_id, revision=revision, token=clean_token(token), endpoint=endpoint, retry=retry)


class HubRepository:
    """
    The commit is looked up once, here, and everything is asked for at that commit, wherever the branch moves.

    Raises:
        OSError: huggingface_hub's own errors if there is no such repository or revision, or no access to it.
    """

    supports_ranges = True
    notice: str | None = None

    def __init__(
        self, repo_id: str, *, revision: str | None, token: str | None, endpoint: str | None, retry: RetryPolicy
    ) -> None:
        self.repo_id = repo_id
        self.traffic = Traffic()
        self._retry = retry
        self._token = token
        self._endpoint = endpoint
        # False: no other token than the one that was looked at.
        self._api = HfApi(endpoint=endpoint, token=token or False, library_name=LIBRARY_NAME)
        info = self._ask(
            lambda: self._api.model_info(repo_id, revision=revision, timeout=retry.timeout_s),
            f"There is no file or folder {repo_id!r} here, and the Hub cannot be asked for it",
            max_unreachable=MAX_UNREACHABLE,
        )
        if not info.sha:
            raise TransferError(f"The Hub names no commit for {repo_id!r}.")
        self.commit: str = info.sha
        self.names = [sibling.rfilename for sibling in info.siblings or []]
        self.license = plain_license(info.card_data.get("license")) if info.card_data else None

    def _ask(self, call: Callable[[], Any], what: str, max_unreachable: int | None = None) -> Any:
        """A call of the Hub's interface: its answers are short, so each has one window of time."""

        def attempt() -> Any:
            with told_apart((self._token,) if self._token else (), what):
                return within(call, Pace(self._retry.window_s))

        return repeat(attempt, self._retry, what, max_unreachable)

    def file(self, name: str) -> HubFile:
        """A file of this commit."""
        return HubFile(
            url=hf_hub_url(self.repo_id, name, revision=self.commit, endpoint=self._endpoint),
            headers=build_hf_headers(token=self._token or False, library_name=LIBRARY_NAME),
            commit=self.commit,
            traffic=self.traffic,
            retry=self._retry,
        )

    def read_small(self, name: str, max_bytes: int, through_cache: bool = False) -> bytes:
        """
        The content of a small file, empty if the repository has none of this name; it stays in the cache if asked for.

        Raises:
            ValueError: If it is larger than `max_bytes`.
            OSError: If it cannot be fetched.
        """
        if name not in self.names:
            return b""
        return read_capped(self.download(name), max_bytes) if through_cache else self.file(name).read_whole(max_bytes)

    def download(self, name: str) -> Path:
        """The whole file, through huggingface_hub's cache."""

        def attempt() -> Path:
            pace = Pace(self._retry.window_s)

            class Counting(tqdm):
                """A progress bar that tells how fast the file comes."""

                def update(self, n: float | None = 1) -> bool | None:
                    pace.add(int(n or 0))
                    return super().update(n)

            with told_apart((self._token,) if self._token else (), f"Cannot fetch {name!r} of {self.repo_id!r}"):
                return Path(
                    within(
                        lambda: hf_hub_download(
                            self.repo_id,
                            name,
                            revision=self.commit,
                            token=self._token or False,
                            endpoint=self._endpoint,
                            library_name=LIBRARY_NAME,
                            tqdm_class=Counting,
                        ),
                        pace,
                    )
                )

        return repeat(attempt, self._retry, f"Cannot fetch {name!r} of {self.repo_id!r}")

    def digest(self, name: str) -> tuple[str, str]:
        """The digest that the repository states for a file: "sha256" for large ones, "git-sha1" for small ones."""
        found = self._ask(
            lambda: self._api.get_paths_info(self.repo_id, [name], revision=self.commit),
            f"The Hub does not tell the digest of {name!r}",
        )
        if not found:
            raise TransferError(f"The Hub states no digest for {name!r} of {self.repo_id!r}.")
        return ("sha256", found[0].lfs.sha256) if found[0].lfs else ("git-sha1", found[0].blob_id)


class CachedRepository:
    """
    What huggingface_hub's cache has of a repository.

    Raises:
        FileNotFoundError: If it has nothing of that revision.
    """

    supports_ranges = False

    def __init__(self, repo_id: str, *, revision: str | None) -> None:
        self._folder = cached_snapshot(repo_id, revision)
        self.repo_id = repo_id
        self.commit = self._folder.name
        self.names = sorted(
            path.relative_to(self._folder).as_posix() for path in self._folder.rglob("*") if path.is_file()
        )
        self.traffic = Traffic()
        self.license = license_of(self._folder / CARD_FILE)
        self.notice: str | None = f"HF_HUB_OFFLINE is set: taken from the cache, at commit {self.commit}."

    def file(self, name: str) -> HubFile:
        """Not there: `supports_ranges` is False."""
        raise NotImplementedError(name)

    def read_small(self, name: str, max_bytes: int, through_cache: bool = True) -> bytes:
        """As `HubRepository.read_small`."""
        return read_capped(self._folder / name, max_bytes) if name in self.names else b""

    def download(self, name: str) -> Path:
        """Where the file lies."""
        return self._folder / name

    def digest(self, name: str) -> tuple[str, str]:
        """In the cache a file is named after its digest, by the Hub's own word when it was fetched."""
        stated = (self._folder / name).resolve().name
        if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", stated):
            raise ValueError(f"The cache does not tell the digest of {name!r}: verify without HF_HUB_OFFLINE.")
        return ("sha256" if len(stated) == 64 else "git-sha1"), stated


def cached_snapshot(repo_id: str, revision: str | None) -> Path:
    """
    The folder of huggingface_hub's cache that holds a revision; without one, that of main, or of the only commit there.

    Raises:
        FileNotFoundError: If there is none.
    """
    try:
        return Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    # What was asked for by its commit, as `pull` does, leaves no note of the branch that it was on.
    snapshots = Path(constants.HF_HUB_CACHE, f"models--{repo_id.replace('/', '--')}", "snapshots")
    commits = sorted(path.name for path in snapshots.iterdir()) if snapshots.is_dir() else []
    if revision is None and len(commits) == 1:
        return snapshots / commits[0]
    found = f"only the commits {', '.join(commits)}" if commits else "nothing of a repository of that name"
    raise FileNotFoundError(
        f"There is no file or folder {repo_id!r} here, and {found} in the cache, to which HF_HUB_OFFLINE keeps: "
        "choose a commit by --revision, unset it, or give a path."
    )


def read_capped(path: Path, max_bytes: int) -> bytes:
    """
    The content of a small file.

    Raises:
        ValueError: If it is larger than `max_bytes`.
    """
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"{path.name!r} is larger than the {max_bytes} bytes accepted.")
    return content


def license_of(card: Path) -> str | None:
    """The licence that a card names; None for a card that cannot be read, which is no reason to stop."""
    try:
        return plain_license(read_card(card).data.get("license"))
    except ValueError:
        return None


def with_retries(call: Callable[[], Result], retry: RetryPolicy, token: str | None) -> Result:
    """
    Repeats a call of huggingface_hub while it fails for reasons that may pass.

    Raises:
        OSError: huggingface_hub's own errors for what the Hub refuses, `TransferError` if it keeps failing.
    """
    what = "The Hub cannot be reached"

    def attempt() -> Result:
        with told_apart((token,) if token else (), what):
            return call()

    return repeat(attempt, retry, what)


def _repository_in(error: BaseException) -> str:
    """The name of the repository that an error of huggingface_hub's is about, quoted, as far as its address tells."""
    address = str(getattr(getattr(error, "response", None), "url", ""))
    match = re.search(r"/api/models/([\w.-]+(?:/[\w.-]+)?)", address)
    return f" {match[1].removesuffix('/revision')!r}" if match else ""


def one_line(error: BaseException) -> str:
    """The message for a user of the commands: one line that says what the Hub's own errors mean."""
    meanings: list[tuple[type[Exception], str]] = [
        (errors.GatedRepoError, "the repository is gated: accept its terms on the Hub, and log in or set HF_TOKEN"),
        (
            errors.RepositoryNotFoundError,
            f"no such repository{_repository_in(error)}, or it is private: check the name, and log in or set HF_TOKEN",
        ),
        (errors.RevisionNotFoundError, "the repository has no such revision"),
        (errors.EntryNotFoundError, "the repository has no such file"),
    ]
    for kind, meaning in meanings:
        if isinstance(error, kind):
            return meaning
    if isinstance(error, HfHubHTTPError):
        status = status_of(error)
        if status in (401, 403):
            return f"the Hub refuses the token ({status}): use one with access to the repository"
        return f"the Hub answers with status {status}"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {visible(str(error.filename))}"
    return message_of(error)
