"""
Reads parts of a Hub file over HTTP, and gives either exactly the bytes asked for or an error.

Every attempt starts at the Hub's own address, so that it gets a fresh signature for the storage behind it; the HTTP
client drops the token when it follows the redirect there. What a broken connection has already delivered is kept, and
the next attempt asks for the rest.

Exactly the bytes asked for means: as many, from that place, of that file at that commit, as the server says it sends
them. There is no checksum for a part of a file: bits that are flipped on the way behind TLS' back are not seen here.
"""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from threading import Event, Lock
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import get_session, hf_raise_for_status

from ..support import visible
from .http_faults import TRANSIENT_STATUS, retry_after_s, told_apart
from .retries import MIN_PROGRESS_BYTES, Pace, PassingFault, RetryPolicy, TransferError, paced, repeat

# Whole bodies sent in place of a range before ranges count as unsupported: one may be a proxy's hiccup.
MAX_WHOLE_BODIES = 3
# Of the storage behind the Hub these may mean a signature that has expired.
STORAGE_REFUSALS = (400, 401, 403, 404, 410)


class RangesUnsupported(OSError):
    """The server sends whole files instead of the ranges asked for."""


class TransferStopped(OSError):
    """The transfer was stopped because another one failed."""


class WholeBody(PassingFault):
    """Status 200 where 206 was asked for."""


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
    retry: RetryPolicy = field(default_factory=RetryPolicy)

    def read_whole(self, max_bytes: int) -> bytes:
        """
        The whole file, for small ones.

        Raises:
            ValueError: If it is larger than `max_bytes`.
            OSError: If the Hub refuses, or the transfer keeps failing.
        """

        def attempt() -> bytes:
            body = bytearray()
            with paced(lambda: self.exchange({}), Pace(self.retry.window_s)) as pieces:
                response = next(pieces)
                if response.status_code != 200:
                    raise PassingFault(f"unexpected status {response.status_code}")
                for piece in pieces:
                    body += piece
                    if len(body) > max_bytes:
                        raise ValueError(f"{self.shown} is larger than the {max_bytes} bytes accepted.")
            return bytes(body)

        return repeat(attempt, self.retry, f"Cannot fetch {self.shown}")

    def read_start(self, wanted_bytes: int) -> tuple[bytes, int]:
        """
        The first bytes of the file, up to `wanted_bytes`, and the size of the whole file in bytes.

        Raises:
            ValueError: If the file is empty.
            RangesUnsupported: If the server does not send ranges.
            OSError: As `read_whole`.
        """
        download = Download(self, 0, wanted_bytes)
        start = b"".join(download.pieces())
        assert download.total is not None
        return start, download.total

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
        for piece in Download(self, start, end, total, stop).pieces():
            write(piece)

    @property
    def shown(self) -> str:
        """The address without anything that could be a secret."""
        address = urlsplit(self.url)
        return address._replace(query="", fragment="", netloc=address.netloc.rpartition("@")[2]).geturl()

    def exchange(self, headers: dict[str, str]) -> Iterator[Any]:
        """
        One GET: yields the response once its headers are there and right, and then its body in pieces.

        Raises:
            PassingFault: For faults and statuses that may pass.
            OSError: huggingface_hub's own errors for statuses that will not, and `TransferError` for such faults.
            ValueError: If the file has no such bytes.
        """
        self.traffic.add(requests=1)
        secrets = tuple(filter(None, [self.headers.get("authorization", "").removeprefix("Bearer ")]))
        with (
            told_apart(secrets, f"Cannot fetch {self.shown}"),
            get_session().stream(
                "GET",
                self.url,
                headers={**self.headers, "Accept-Encoding": "identity", **headers},
                timeout=self.retry.timeout_s,
                follow_redirects=True,
            ) as response,
        ):
            self._check_response(response)
            yield response
            for piece in response.iter_raw():
                self.traffic.add(body_bytes=len(piece))
                yield piece

    def _check_response(self, response: Any) -> None:
        status = response.status_code
        if status in TRANSIENT_STATUS:
            raise PassingFault(f"status {status}", retry_after_s(response.headers.get("Retry-After")))
        if status == 416:
            raise ValueError(f"{self.shown} is empty, or shorter than it says: it has no bytes where some must be.")
        if status >= 400:
            is_storage = urlsplit(str(response.url)).netloc != urlsplit(self.url).netloc
            if is_storage and status in STORAGE_REFUSALS:
                raise PassingFault(f"status {status} from the storage behind the Hub: has the signature expired?")
            response.read()
            hf_raise_for_status(response)
        for answer in (*response.history, response):
            served = answer.headers.get("X-Repo-Commit")
            if served is not None and served != self.commit:
                raise TransferError(
                    f"{self.shown} was asked for at commit {self.commit}, but {visible(served)} is served."
                )
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            raise PassingFault(f"the body is compressed: {visible(encoding)}")


class Download:
    """
    The bytes `position` to `end` of a file, over as many requests as it takes. `total` is the size of the whole file,
    None until an answer has told it; `end` may lie behind it then.
    """

    def __init__(
        self, file: HubFile, position: int, end: int, total: int | None = None, stop: Event | None = None
    ) -> None:
        self._file = file
        self._position = position
        self._end = end
        self._stop = stop
        self.total = total

    def pieces(self) -> Iterator[bytes]:
        """
        The bytes in order and each once.

        Raises:
            OSError: As `HubFile.read_range`.
        """
        failures = whole_bodies = 0
        while self.total is None or self._position < min(self._end, self.total):
            start = self._position
            fault = PassingFault("the connection was cut")
            try:
                yield from self._attempt()
            except PassingFault as seen:
                fault = seen
            whole_bodies += isinstance(fault, WholeBody)
            if whole_bodies >= MAX_WHOLE_BODIES:
                raise RangesUnsupported(f"The server sends {self._file.shown} whole instead of in ranges.")
            if self.total is not None and self._position == min(self._end, self.total):
                return
            failures = 0 if self._position - start >= MIN_PROGRESS_BYTES else failures + 1
            if failures > self._file.retry.max_failures:
                raise TransferError(f"Cannot fetch {self._file.shown}: {fault}, {failures} times in a row.")
            self._wait(self._file.retry.wait_s(failures, fault.retry_after_s))

    def _attempt(self) -> Iterator[bytes]:
        asked = f"{self._position}-{self._end - 1}"
        with paced(lambda: self._file.exchange({"Range": f"bytes={asked}"}), Pace(self._file.retry.window_s)) as pieces:
            first, last, total = parse_content_range(next(pieces))
            if first != self._position or last != min(self._end, total) - 1 or self.total not in (None, total):
                raise PassingFault(f"asked for bytes {asked}, got {first}-{last} of {total}")
            self.total = total
            for piece in pieces:
                if self._stop is not None and self._stop.is_set():
                    raise TransferStopped("Another part of the transfer failed.")
                if len(piece) > last + 1 - self._position:
                    raise PassingFault("the body is longer than its range")
                self._position += len(piece)
                yield piece

    def _wait(self, seconds: float) -> None:
        if self._stop is None:
            time.sleep(seconds)
        elif self._stop.wait(seconds):
            raise TransferStopped("Another part of the transfer failed.")


def parse_content_range(response: Any) -> tuple[int, int, int]:
    """
    The first and last byte of a 206 response, and the size of the whole file.

    Raises:
        PassingFault: If it says none.
    """
    if response.status_code == 200:
        raise WholeBody("whole body instead of a range")
    seen = response.headers.get("Content-Range", "")
    match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", seen)
    if response.status_code != 206 or match is None:
        raise PassingFault(f"status {response.status_code} with Content-Range {seen!r} instead of a range")
    first, last, total = map(int, match.groups())
    return first, last, total
