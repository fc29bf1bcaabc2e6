"""
What can go wrong in a request, told apart by whether another attempt may help. The one place that knows the exceptions
of the HTTP client under huggingface_hub, and what of their texts may be shown.
"""

import re
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from ..support import message_of
from .retries import PassingFault, TransferError

# The client library has changed its name (httpx, httpx2); the base of its exceptions is found by huggingface_hub's.
HubClientError: type[Exception] = HfHubHTTPError.__bases__[0]
assert issubclass(HubClientError, Exception), HubClientError
# An address that cannot be parsed is no error of a request there, and has another base.
InvalidAddress: type[Exception] = sys.modules[HubClientError.__module__.partition(".")[0]].InvalidURL
# No header, address or chain of redirects becomes legal by asking again.
PERMANENT_FAULTS = ("LocalProtocolError", "UnsupportedProtocol", "TooManyRedirects", "InvalidURL")
UNREACHABLE_FAULTS = ("ConnectError", "ConnectTimeout")
TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
HIDDEN = "[hidden]"


@contextmanager
def told_apart(secrets: tuple[str, ...], what: str) -> Iterator[None]:
    """
    Turns what the client raises into `PassingFault` where asking again may help. huggingface_hub's own errors, which
    say what the Hub answers, pass through. `secrets` are not shown; `what` begins the message of a permanent fault.

    Raises:
        PassingFault: For a fault that may pass.
        TransferError: For one that will not.
    """
    try:
        yield
    except LocalEntryNotFoundError:
        # What is meant is that the Hub did not answer, and the cache has no copy either.
        raise PassingFault("no answer, and no copy in the cache") from None
    except HfHubHTTPError as error:
        status = status_of(error)
        if status not in TRANSIENT_STATUS:
            raise
        raise PassingFault(f"status {status}", retry_after_s(error.response.headers.get("Retry-After"))) from None
    except (HubClientError, InvalidAddress) as error:
        reason = examined(error, secrets)
        if is_permanent(error):
            raise TransferError(f"{what}: {reason}.") from None
        raise PassingFault(reason, is_unreachable=type(error).__name__ in UNREACHABLE_FAULTS) from None


def status_of(error: HfHubHTTPError) -> int | None:
    """The status that the Hub answered with."""
    return getattr(error.response, "status_code", None)


def is_permanent(error: BaseException) -> bool:
    """Whether the same request must fail again."""
    if type(error).__name__ in PERMANENT_FAULTS:
        return True
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ssl.SSLCertVerificationError):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def examined(error: BaseException, secrets: tuple[str, ...]) -> str:
    """
    An error of the client in a few words, of which some carry no message of their own: without the secrets that it was
    given, and without what addresses in it may carry, signatures and passwords.
    """
    name, text = type(error).__name__, message_of(error)
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    text = re.sub(r"//[^/@\s]+@", f"//{HIDDEN}@", re.sub(r"(\w+://[^\s?'\"]*)\?[^\s'\"]*", r"\1", text))
    return name if text == name else f"{name}: {text}"


def retry_after_s(header: str | None) -> float | None:
    """Seconds of a Retry-After header, None if there is none or it is a date."""
    return float(header) if header is not None and re.fullmatch(r"\d{1,6}(\.\d{1,3})?", header) else None
