"""What all commands do alike: one line for an error, one for Ctrl-C, a bar for progress, and what the status means."""

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError
from tqdm import tqdm
from transformers.utils import logging

from ..support import message_of
from ..weights.hub_repository import one_line

ERROR, INTERRUPTED = 2, 130
ERROR_LINES = 4  # What is missing from a checkpoint is listed below the sentence that says so.
# What a user can mend, or his machine lacks. Anything else is a fault of this package, and keeps its traceback.
REPORTED = (OSError, ValueError, ImportError, ArithmeticError, MemoryError, torch.OutOfMemoryError)


def run_command(work: Callable[[Namespace], int], arguments: Namespace, *, after_interrupt: str) -> int:
    """
    The exit status of `work(arguments)`, which says what it did on stdout. An error is told on stderr and makes it
    `ERROR`, Ctrl-C `INTERRUPTED`; `after_interrupt` completes the sentence that tells the user what he has then.
    """
    try:
        with settings_put_back():
            return work(arguments)
    except REPORTED as error:
        message = one_line(error) if isinstance(error, HfHubHTTPError) else message_of(error, ERROR_LINES)
        print(f"error: {message}", file=sys.stderr)
        return ERROR
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":  # Ctrl-C reaches every process that a launcher started.
            print(f"error: interrupted; {after_interrupt}", file=sys.stderr)
        return INTERRUPTED


@contextmanager
def settings_put_back() -> Iterator[None]:
    """
    Quiet from transformers; and what the command sets for the whole process (that, PyTorch's threads and its random
    numbers) is afterwards as it was, since a command may be called from Python.
    """
    verbosity, had_bars, threads = logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.get_num_threads()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def progress_bar(total: int, unit: str, *, is_shown: bool = True) -> Any:
    """A bar on stderr that counts to `total`: `update(n)` moves it, `write(line)` prints above it; closes itself."""
    return tqdm(total=total, unit=unit, file=sys.stderr, disable=not is_shown)
