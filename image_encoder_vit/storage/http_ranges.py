"""
Reads parts of a Hub file over HTTP, and gives either exactly the bytes asked for or an error.

Every attempt starts at the Hub's own address, so that it gets a fresh signature for the storage behind it; the HTTP
client drops the token when it follows the redirect there. What a broken connection has already delivered is kept, and
the next attempt asks for the rest.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Lock
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import get_session, hf_raise_for_status
from huggingface_hub.errors import HfHubHTTPError

# The client library under huggingface_hub has changed its name (httpx, httpx2), its base exception is found by this.
HttpError: Any = HfHubHTTPError.__bases__[0]

TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
# Whole bodies sent in place of a range before ranges count as unsupported: one may be a proxy's hiccup.
MAX_WHOLE_BODIES = 3
# A connection that was cut counts as a failure unless it brought this much, or retrying could go on for ever.
MIN_PROGRESS_BYTES = 64 << 10


class TransferError(OSError):
    """Bytes could not be fetched although they were asked for again and again."""


class RangesUnsupported(OSError):
    """The server sends whole files instead of the ranges asked for."""


class TransferStopped(OSError):
    """The transfer was stopped because another one failed."""


@dataclass(frozen=True)
class RetryPolicy:
    """
    When to ask again. The wait doubles from `first_wait_s` to `max_wait_s`, in seconds, with each failure that brought
    no byte; after `max_failures` of those in a row the transfer fails. A server's Retry-After is obeyed up to
    `max_retry_after_s`. `timeout_s` is how long a connection may deliver nothing.
    """

    max_failures: int = 6
    first_wait_s: float = 0.5
    max_wait_s: float = 8.0
    max_retry_after_s: float = 120.0
    timeout_s: float = 10.0


class Traffic:
    """Counts what was asked for and what came, from several threads."""

    def __init__(self) -> None:
        self.requests = 0
        self.body_bytes = 0
        self._lock = Lock()

    def add(self, *, requests: int = 0, body_bytes: int = 0) -> None:
        with self._lock:
            self.requests += requests
            self.body_bytes += body_bytes


class _Failure(Exception):
    """One attempt failed in a way that another may not. `wait_s` is the server's own wish."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


@dataclass(frozen=True)
class HubFile:
    """
    A file of a repository at a commit. `url` is its address on the Hub, `headers` authorise, `commit` is checked
    against what the Hub says it serves.
    """

    url: str
    headers: dict[str, str]
    commit: str
    traffic: Traffic
    retry: RetryPolicy = RetryPolicy()

    def read_whole(self, max_bytes: int) -> bytes:
        """
        The whole file, for small ones.

        Raises:
            ValueError: If it is larger than `max_bytes`.
            OSError: If the Hub refuses, or the transfer keeps failing.
        """
        body = bytearray()

        def attempt() -> bool:
            body.clear()
            with self._request({}) as response:
                if response.status_code != 200:
                    raise _Failure(f"unexpected status {response.status_code}")
                for chunk in response.iter_raw():
                    self.traffic.add(body_bytes=len(chunk))
                    body.extend(chunk)
                    if len(body) > max_bytes:
                        raise ValueError(f"{self._shown} is larger than the {max_bytes} bytes accepted.")
            return False

        self._retry(attempt, lambda: True)
        return bytes(body)

    def read_start(self, wanted_bytes: int) -> tuple[bytes, int]:
        """
        The first bytes of the file, up to `wanted_bytes`, and the size of the whole file in bytes.

        Raises:
            ValueError: If the file is empty.
            RangesUnsupported: If the server does not send ranges.
            OSError: As `read_whole`.
        """
        body = bytearray()
        known_total: int | None = None

        def is_finished() -> bool:
            return known_total is not None and len(body) == min(wanted_bytes, known_total)

        def attempt() -> bool:
            nonlocal known_total
            start = len(body)
            with self._request({"Range": f"bytes={start}-{wanted_bytes - 1}"}) as response:
                first, last, total = parse_content_range(response)
                if first != start or last != min(wanted_bytes, total) - 1 or known_total not in (None, total):
                    raise _Failure(f"asked for bytes {start}-{wanted_bytes - 1}, got {first}-{last} of {total}")
                known_total = total
                for chunk in response.iter_raw():
                    self.traffic.add(body_bytes=len(chunk))
                    if len(body) + len(chunk) > last + 1:
                        raise _Failure("the body is longer than its range")
                    body.extend(chunk)
            return is_finished() or len(body) - start >= MIN_PROGRESS_BYTES

        self._retry(attempt, is_finished)
        assert known_total is not None
        return bytes(body), known_total

    def read_range(
        self, start: int, end: int, total: int, write: Callable[[bytes], None], stop: Event | None = None
    ) -> None:
        """
        Calls `write` with the bytes from `start` to `end` (exclusive) of the file of `total` bytes, in order and each
        once. What `write` raises is passed on. Gives up when `stop` is set.

        Raises:
            RangesUnsupported: If the server does not send ranges.
            TransferStopped: If `stop` was set.
            OSError: As `read_whole`.
        """
        position = start

        def attempt() -> bool:
            nonlocal position
            attempt_start = position
            with self._request({"Range": f"bytes={position}-{end - 1}"}) as response:
                if parse_content_range(response) != (position, end - 1, total):
                    seen = response.headers.get("Content-Range")
                    raise _Failure(f"asked for bytes {position}-{end - 1} of {total}, got {seen!r}")
                try:
                    for chunk in response.iter_raw():
                        if stop is not None and stop.is_set():
                            raise TransferStopped("Another part of the transfer failed.")
                        self.traffic.add(body_bytes=len(chunk))
                        if len(chunk) > end - position:
                            raise _Failure("the body is longer than its range")
                        write(chunk)
                        position += len(chunk)
                except HttpError as error:
                    if position - attempt_start >= MIN_PROGRESS_BYTES:
                        return True
                    raise _Failure(describe(error)) from None
            return position == end or position - attempt_start >= MIN_PROGRESS_BYTES

        self._retry(attempt, lambda: position == end, stop=stop)

    @property
    def _shown(self) -> str:
        """The address without anything that could be a secret."""
        return urlsplit(self.url)._replace(query="", fragment="").geturl()

    @contextmanager
    def _request(self, headers: dict[str, str]) -> Iterator[Any]:
        """One GET. Raises `_Failure` for statuses that may pass, and the Hub's own errors for those that will not."""
        self.traffic.add(requests=1)
        with get_session().stream(
            "GET",
            self.url,
            headers={**self.headers, "Accept-Encoding": "identity", **headers},
            timeout=self.retry.timeout_s,
            follow_redirects=True,
        ) as response:
            status = response.status_code
            if status in TRANSIENT_STATUS:
                raise _Failure(f"status {status}", retry_after_s(response.headers.get("Retry-After")))
            if status == 416:
                raise ValueError(
                    f"{self._shown} is empty, or shorter than it says: it has no bytes where some must be."
                )
            if status >= 400:
                is_storage = urlsplit(str(response.url)).netloc != urlsplit(self.url).netloc
                if is_storage and status in (400, 401, 403, 404, 410):
                    raise _Failure(f"status {status} from the storage behind the Hub: has the signature expired?")
                response.read()
                hf_raise_for_status(response)
            self._check_commit([*response.history, response])
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise _Failure(f"the body is compressed: {response.headers['Content-Encoding']}")
            yield response

    def _check_commit(self, responses: list[Any]) -> None:
        for response in responses:
            served = response.headers.get("X-Repo-Commit")
            if served is not None and served != self.commit:
                raise TransferError(f"{self._shown} was asked for at commit {self.commit}, but {served} is served.")

    def _retry(self, attempt: Callable[[], bool], is_finished: Callable[[], bool], stop: Event | None = None) -> None:
        """Repeats `attempt`, which returns whether it brought enough bytes that are kept, until `is_finished`."""
        failures = whole_bodies = 0
        while True:
            wish_s = None
            try:
                made_progress = attempt()
                if is_finished():
                    return
                failures = 0 if made_progress else failures + 1
                reason = "the connection was cut"
            except _WholeBody:
                whole_bodies += 1
                if whole_bodies >= MAX_WHOLE_BODIES:
                    raise RangesUnsupported(f"The server sends {self._shown} whole instead of in ranges.") from None
                failures, reason = failures + 1, "whole body instead of a range"
            except _Failure as failure:
                failures, reason, wish_s = failures + 1, str(failure), failure.wait_s
            except HfHubHTTPError:
                raise
            except HttpError as error:
                failures, reason = failures + 1, describe(error)
            if failures > self.retry.max_failures:
                raise TransferError(f"Cannot fetch {self._shown}: {reason}, {failures} times in a row.")
            self._wait(failures, wish_s, stop)

    def _wait(self, failures: int, wish_s: float | None, stop: Event | None) -> None:
        wait_s = min(self.retry.max_wait_s, self.retry.first_wait_s * 2.0 ** max(0, failures - 1))
        if wish_s is not None:
            wait_s = min(self.retry.max_retry_after_s, max(wish_s, wait_s))
        if stop is None:
            time.sleep(wait_s)
        elif stop.wait(wait_s):
            raise TransferStopped("Another part of the transfer failed.")


class _WholeBody(Exception):
    """Status 200 where 206 was asked for."""


def parse_content_range(response: Any) -> tuple[int, int, int]:
    """The first and last byte of a 206 response, and the size of the whole file."""
    if response.status_code == 200:
        raise _WholeBody
    match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", response.headers.get("Content-Range", ""))
    if response.status_code != 206 or match is None:
        seen = response.headers.get("Content-Range")
        raise _Failure(f"status {response.status_code} with Content-Range {seen!r} instead of a range")
    first, last, total = map(int, match.groups())
    return first, last, total


def retry_after_s(header: str | None) -> float | None:
    """Seconds of a Retry-After header, None if there is none or it is a date."""
    return float(header) if header is not None and re.fullmatch(r"\d{1,6}(\.\d{1,3})?", header) else None


def describe(error: Exception) -> str:
    """A connection's error in a few words; some carry no message of their own."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
