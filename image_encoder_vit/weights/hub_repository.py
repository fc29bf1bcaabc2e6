"""A Hub repository at one commit: which files it has, and each of them by ranges, whole, or through the cache."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, errors, get_token, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]
from transformers.utils import logging

from ..storage.http_ranges import (
    TRANSIENT_STATUS,
    HttpError,
    HubFile,
    RetryPolicy,
    Traffic,
    TransferError,
    describe,
    retry_after_s,
)
from .model_card import plain_license

logger = logging.get_logger(__name__)

LIBRARY_NAME = "image-encoder-vit"
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


class HubRepository:
    """
    The commit is looked up once, here, and everything is asked for at that commit, wherever the branch moves.

    Raises:
        OSError: huggingface_hub's own errors if there is no such repository or revision, or no access to it.
    """

    def __init__(
        self, repo_id: str, *, revision: str | None, token: str | None, endpoint: str | None, retry: RetryPolicy
    ) -> None:
        self.repo_id = repo_id
        self.traffic = Traffic()
        self._retry = retry
        self._token = token
        self._endpoint = endpoint
        api = HfApi(endpoint=endpoint, token=token, library_name=LIBRARY_NAME)
        info = with_retries(lambda: api.model_info(repo_id, revision=revision, timeout=retry.timeout_s), retry)
        if not info.sha:
            raise TransferError(f"The Hub names no commit for {repo_id!r}.")
        self.commit: str = info.sha
        self.names = [sibling.rfilename for sibling in info.siblings or []]
        self.license = plain_license(info.card_data.get("license")) if info.card_data else None

    def file(self, name: str) -> HubFile:
        """A file of this commit."""
        return HubFile(
            url=hf_hub_url(self.repo_id, name, revision=self.commit, endpoint=self._endpoint),
            headers=build_hf_headers(token=self._token, library_name=LIBRARY_NAME),
            commit=self.commit,
            traffic=self.traffic,
            retry=self._retry,
        )

    def read_small(self, name: str, max_bytes: int) -> bytes:
        """
        The content of a small file, empty if the repository has none of this name.

        Raises:
            ValueError: If it is larger than `max_bytes`.
            OSError: If it cannot be fetched.
        """
        return self.file(name).read_whole(max_bytes) if name in self.names else b""

    def download(self, name: str) -> Path:
        """The whole file, through huggingface_hub's cache."""

        def fetch() -> str:
            return str(
                hf_hub_download(
                    self.repo_id,
                    name,
                    revision=self.commit,
                    token=self._token,
                    endpoint=self._endpoint,
                    library_name=LIBRARY_NAME,
                )
            )

        return Path(with_retries(fetch, self._retry))


def with_retries(call: Callable[[], Result], retry: RetryPolicy) -> Result:
    """
    Repeats a call of huggingface_hub while it fails for reasons that may pass.

    Raises:
        OSError: The last error, if it keeps failing; the connection's own errors as `TransferError`.
    """
    for failures in range(1, retry.max_failures + 2):
        wish_s = None
        try:
            return call()
        except HfHubHTTPError as error:
            status = getattr(error.response, "status_code", None)
            if status not in TRANSIENT_STATUS or failures > retry.max_failures:
                raise
            wish_s = retry_after_s(error.response.headers.get("Retry-After"))
            logger.info("Asking the Hub again after status %s.", status)
        except HttpError as error:
            if failures > retry.max_failures:
                raise TransferError(f"The Hub cannot be reached: {describe(error)}, {failures} times.") from None
            logger.info("Asking the Hub again after %s.", describe(error))
        wait_s = min(retry.max_wait_s, retry.first_wait_s * 2.0 ** (failures - 1))
        time.sleep(wait_s if wish_s is None else min(retry.max_retry_after_s, max(wish_s, wait_s)))
    raise AssertionError("unreachable: the last failure is raised")


def one_line(error: BaseException) -> str:
    """The message for a user of the scripts: the first line with what the Hub's own errors mean, no signed address."""
    meanings: list[tuple[type[Exception], str]] = [
        (errors.GatedRepoError, "the repository is gated: accept its terms on the Hub, and log in or set HF_TOKEN"),
        (
            errors.RepositoryNotFoundError,
            "no such repository, or it is private: check the name, and log in or set HF_TOKEN",
        ),
        (errors.RevisionNotFoundError, "the repository has no such revision"),
        (errors.EntryNotFoundError, "the repository has no such file"),
    ]
    for kind, meaning in meanings:
        if isinstance(error, kind):
            return meaning
    if isinstance(error, HfHubHTTPError):
        status: Any = getattr(error.response, "status_code", None)
        if status in (401, 403):
            return f"the Hub refuses the token ({status}): use one with access to the repository"
        return f"the Hub answers with status {status}"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
