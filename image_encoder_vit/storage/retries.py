"""When to ask again, how slow is too slow, and the waiting between two attempts: one policy for every request."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any, TypeVar

# What a connection has to bring in each window of time, and what one that was cut has to have brought to be no failure:
# otherwise retrying could go on for ever.
MIN_PROGRESS_BYTES = 64 << 10
MAX_WAITING_PIECES = 4
POLL_S = 0.2

Result = TypeVar("Result")


class PassingFault(Exception):
    """
    An attempt failed in a way that another may not. `retry_after_s` is what the server asked for. `is_unreachable`
    says that there was no connection at all.
    """

    def __init__(self, reason: str, retry_after_s: float | None = None, is_unreachable: bool = False) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s
        self.is_unreachable = is_unreachable


class TransferError(OSError):
    """Bytes could not be fetched: asked for again and again, or in a way that cannot succeed."""


@dataclass(frozen=True)
class RetryPolicy:
    """
    When to ask again. The wait doubles from `first_wait_s` to `max_wait_s`, in seconds, with each failure in a row that
    brought less than `MIN_PROGRESS_BYTES`; after `max_failures` of those the transfer fails. A server's Retry-After is
    obeyed up to `max_retry_after_s`. A connection fails when it delivers nothing for `timeout_s`, and when it brings
    less than `MIN_PROGRESS_BYTES` in `window_s`, however it spreads them.
    """

    max_failures: int = 6
    first_wait_s: float = 0.5
    max_wait_s: float = 8.0
    max_retry_after_s: float = 120.0
    timeout_s: float = 10.0
    window_s: float = 60.0

    def wait_s(self, failures: int, retry_after_s: float | None = None) -> float:
        """Seconds to wait after so many failures in a row, and at least what the server asked for."""
        doubled_s = min(self.max_wait_s, self.first_wait_s * 2.0 ** max(0, failures - 1))
        return doubled_s if retry_after_s is None else min(self.max_retry_after_s, max(retry_after_s, doubled_s))


def repeat(call: Callable[[], Result], retry: RetryPolicy, what: str, max_unreachable: int | None = None) -> Result:
    """
    The result of `call`, which is called again after each `PassingFault`. `what` begins the message of a failure.
    Where no connection is made, it is called again `max_unreachable` times at most.

    Raises:
        TransferError: If it keeps failing.
    """
    failures = 0
    while True:
        try:
            return call()
        except PassingFault as fault:
            failures += 1
            allowed = max_unreachable if fault.is_unreachable and max_unreachable is not None else retry.max_failures
            if failures > min(allowed, retry.max_failures):
                times = f", {failures} times in a row" if failures > 1 else ""
                raise TransferError(f"{what}: {fault}{times}.") from None
            time.sleep(retry.wait_s(failures, fault.retry_after_s))


class Pace:
    """Whether bytes come fast enough: at least `MIN_PROGRESS_BYTES` in each window of `window_s` seconds."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._ends_at = time.monotonic() + window_s
        self._bytes = 0

    def add(self, size: int) -> None:
        """Bytes have come."""
        self._bytes += size

    def check(self) -> None:
        """
        Looks whether the window has ended, and begins the next one.

        Raises:
            PassingFault: If too little has come in it.
        """
        if time.monotonic() < self._ends_at:
            return
        if self._bytes < MIN_PROGRESS_BYTES:
            raise PassingFault(f"too slow, {self._bytes} bytes in {self._window_s:g} s")
        self._ends_at = time.monotonic() + self._window_s
        self._bytes = 0


@contextmanager
def paced(pieces: Callable[[], Iterator[Any]], pace: Pace) -> Iterator[Iterator[Any]]:
    """
    What `pieces()` yields, fetched by a thread of its own, so that nothing that a server does, or does not do, can hold
    the reader longer than `pace` allows. Pieces of bytes count for it. When the reader leaves, the thread ends at its
    next piece.

    Raises:
        PassingFault: From the iterator, if the pace is too slow.
    """
    waiting: Queue[tuple[str, Any]] = Queue(MAX_WAITING_PIECES)
    has_left = Event()

    def put(kind: str, value: Any) -> bool:
        while not has_left.is_set():
            try:
                waiting.put((kind, value), timeout=POLL_S)
                return True
            except Full:
                continue
        return False

    def run() -> None:
        try:
            for piece in pieces():
                if not put("piece", piece):
                    return
            put("end", None)
        except BaseException as error:
            put("error", error)

    def read() -> Iterator[Any]:
        while True:
            try:
                kind, value = waiting.get(timeout=POLL_S)
            except Empty:
                pace.check()
                continue
            if kind == "end":
                return
            if kind == "error":
                raise value
            pace.add(len(value) if isinstance(value, bytes) else 0)
            pace.check()
            yield value

    Thread(target=run, daemon=True).start()
    try:
        yield read()
    finally:
        has_left.set()


def within(call: Callable[[], Result], pace: Pace) -> Result:
    """The result of a call in a thread of its own, which is given up where `pace`, fed by others, is too slow."""

    def once() -> Iterator[Result]:
        yield call()

    with paced(once, pace) as results:
        return next(results)
