"""What can go wrong with the answers of the tests' Hub: which requests it meets, and what becomes of the answer."""

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SEND_BYTES = 1 << 16


@dataclass
class Fault:
    """
    What goes wrong with `count` requests that match, after `after` that are let through.

    Of a file's body: "cut" (the connection breaks after `part` of it), "short" (it ends there, without an error),
    "stall" (nothing comes after `part` for `seconds`), "slow" (it takes `seconds` longer), "wrong_range" (Content-Range
    of other bytes), "whole" (200 instead of 206), "other_bytes" (the right headers, a body that is too long),
    "flipped" (one bit of it).

    Instead of an answer: "status" (`status`, with `retry_after_s`), "expired" (403 as for an old signature), "loop"
    (a redirect to the same address), "scheme" (one to an address that no client can follow), and, until `seconds` have
    passed, a byte every `pause_s` of: "trickled headers", "trickled body", "trickled chunk" (its length), "early hints"
    (informational answers, 103, one after the other).
    """

    kind: str
    origin: str = "storage"
    method: str = "GET"
    path: str = ""
    count: int = 1
    after: int = 0
    part: float = 0.5
    status: int = 500
    retry_after_s: int | None = None
    seconds: float = 0.0
    pause_s: float = 0.02

    def meets(self, origin: str, method: str, target: str) -> bool:
        """Whether this request is one that goes wrong; counts it."""
        if (self.origin, self.method) != (origin, method) or self.path not in target or self.count <= 0:
            return False
        if self.after > 0:
            self.after -= 1
            return False
        self.count -= 1
        return True


@dataclass
class FileReply:
    """
    An answer with bytes `start` to `end` of a file of `total` bytes, as it is going to be sent: `sent` bytes of them,
    then `stall_s` of silence, then the `extra` ones, and at the end the connection `breaks`.
    """

    status: int
    start: int
    end: int
    total: int
    sent: int
    claimed: int
    moved: int = 0
    extra: bytes = b""
    pause_s: float = 0.0
    stall_s: float = 0.0
    breaks: bool = False
    flips: bool = False


def honest(status: int, start: int, end: int, total: int) -> FileReply:
    """The answer without a fault."""
    return FileReply(status, start, end, total, sent=end - start, claimed=end - start)


def cut(fault: Fault, reply: FileReply) -> FileReply:
    reply.sent = int(reply.sent * fault.part)
    reply.breaks = True
    return reply


def short(fault: Fault, reply: FileReply) -> FileReply:
    reply.sent = reply.claimed = int(reply.sent * fault.part)
    return reply


def stall(fault: Fault, reply: FileReply) -> FileReply:
    reply.stall_s = fault.seconds
    return cut(fault, reply)


def slow(fault: Fault, reply: FileReply) -> FileReply:
    reply.pause_s = fault.seconds / (reply.sent / SEND_BYTES + 1)
    return reply


def wrong_range(fault: Fault, reply: FileReply) -> FileReply:
    reply.moved = 1000
    return reply


def whole(fault: Fault, reply: FileReply) -> FileReply:
    return honest(200, 0, reply.total, reply.total)


def other_bytes(fault: Fault, reply: FileReply) -> FileReply:
    reply.extra = b"x" * 100
    reply.claimed += len(reply.extra)
    return reply


def flipped(fault: Fault, reply: FileReply) -> FileReply:
    reply.flips = True
    return reply


CHANGED_REPLIES: dict[str, Callable[[Fault, FileReply], FileReply]] = {
    "cut": cut,
    "short": short,
    "stall": stall,
    "slow": slow,
    "wrong_range": wrong_range,
    "whole": whole,
    "other_bytes": other_bytes,
    "flipped": flipped,
}


def changed(fault: Fault | None, reply: FileReply) -> FileReply:
    """What a fault makes of an honest answer."""
    return CHANGED_REPLIES[fault.kind](fault, reply) if fault and fault.kind in CHANGED_REPLIES else reply


def refuse(fault: Fault, handler: Any) -> None:
    headers = {} if fault.retry_after_s is None else {"Retry-After": str(fault.retry_after_s)}
    handler.reply(403 if fault.kind == "expired" else fault.status, b"no", headers)


def redirect(fault: Fault, handler: Any) -> None:
    handler.reply(302, b"", {"Location": handler.path if fault.kind == "loop" else "gopher://127.0.0.1/"})


def trickle(fault: Fault, handler: Any) -> None:
    """Sends the beginning of an answer at once, and what never makes it whole byte by byte."""
    beginning, rest = {
        "trickled headers": (b"HTTP/1.1 200 OK\r\n", b"X-Long: " + b"x" * 100_000),
        "trickled body": (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b"x" * 100_000),
        "trickled chunk": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0" * 100_000),
        "early hints": (b"", b"HTTP/1.1 103 Early Hints\r\n\r\n" * 4_000),
    }[fault.kind]
    if handler.headers.get("Range") and fault.kind == "trickled body":
        start, end = handler.headers["Range"].removeprefix("bytes=").split("-")
        beginning = (
            b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes %d-%d/10000000\r\nContent-Length: %d\r\n\r\n"
            % (int(start), int(end), int(end) + 1 - int(start))
        )
    handler.wfile.write(beginning)
    deadline = time.monotonic() + fault.seconds
    for byte in rest:
        if time.monotonic() > deadline or handler.hub.is_stopping.wait(fault.pause_s):
            break
        handler.wfile.write(bytes([byte]))
        handler.wfile.flush()
    break_connection(handler)


INSTEAD_OF_REPLIES: dict[str, Callable[[Fault, Any], None]] = {
    "status": refuse,
    "expired": refuse,
    "loop": redirect,
    "scheme": redirect,
    **dict.fromkeys(("trickled headers", "trickled body", "trickled chunk", "early hints"), trickle),
}


def break_connection(handler: Any) -> None:
    handler.wfile.flush()
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)
