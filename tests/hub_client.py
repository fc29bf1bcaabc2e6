"""
The package as its users run it: the scripts as processes of their own, and a forking worker that calls `pull` and
`push` in a fresh process each time without importing torch again, for tests that need many.
"""

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent


def client_environment(endpoint: str, home: Path, token: str | None = None, **extra: str) -> dict[str, str]:
    """Environment of a client that knows nothing but the server of the tests."""
    hidden = ("HF_", "HUGGING", "TRANSFORMERS_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    environment |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    return environment | ({"HF_TOKEN": token} if token else {}) | extra


def run_script(
    name: str, *arguments: str | Path, environment: Mapping[str, str], cwd: Path
) -> subprocess.CompletedProcess[str]:
    """Runs one of scripts/ to its end."""
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    return subprocess.run(command, env=dict(environment), cwd=cwd, capture_output=True, text=True, timeout=600)


class Outcome(NamedTuple):
    """How a call ended: its result, or its error as (type, message, what a script says); `killed_by` is a signal."""

    result: dict[str, Any] | None
    error: tuple[str, str, str] | None
    killed_by: int
    output: str
    peak_rss_bytes: int


class Call:
    """A call that is running in its own process."""

    def __init__(self, pid: int, folder: Path) -> None:
        self.pid = pid
        self.folder = folder

    def kill(self) -> None:
        # It may have ended by itself.
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def is_running(self) -> bool:
        return not (self.folder / "exit").exists()

    def wait(self, timeout_s: float = 60) -> Outcome:
        deadline = time.monotonic() + timeout_s
        while self.is_running():
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"the call did not end: {self._read('output')[-2000:]}")
            time.sleep(0.005)
        status, peak = json.loads(self._read("exit"))
        answer = json.loads(self._read("answer") or "{}")
        error = answer.get("error")
        return Outcome(
            result=answer.get("result"),
            error=tuple(error) if error else None,
            killed_by=os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
            output=self._read("output"),
            peak_rss_bytes=peak,
        )

    def _read(self, name: str) -> str:
        path = self.folder / name
        return path.read_text(errors="replace") if path.exists() else ""


class Worker:
    """Starts calls as forks of one process that has imported the package."""

    def __init__(self, environment: Mapping[str, str], folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=dict(environment),
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def start(self, function: str, *, max_file_bytes: int | None = None, **arguments: Any) -> Call:
        """Starts a function of `call` with these keyword arguments; `max_file_bytes` makes the disk full."""
        self._count += 1
        folder = self._folder / f"call-{self._count}"
        folder.mkdir()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job = {"function": function, "arguments": arguments, "folder": str(folder), "max_file_bytes": max_file_bytes}
        self._process.stdin.write(json.dumps(job, default=str) + "\n")
        self._process.stdin.flush()
        return Call(int(self._process.stdout.readline()), folder)

    def call(self, function: str, *, timeout_s: float = 60, **arguments: Any) -> Outcome:
        """Starts a call and waits for its end."""
        return self.start(function, **arguments).wait(timeout_s)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        assert self._process.stdout is not None
        self._process.stdout.close()


@contextmanager
def running_worker(environment: Mapping[str, str], folder: Path) -> Iterator[Worker]:
    worker = Worker(environment, folder)
    try:
        yield worker
    finally:
        worker.close()


# From here on: the worker's own side.


def serve() -> None:
    """Forks a process for each job on stdin, answers with its id, and notes how each one ended."""
    import image_encoder_vit.weights.pull
    import image_encoder_vit.weights.push  # noqa: F401

    sys.stdout.write("ready\n")
    sys.stdout.flush()
    running: dict[int, Path] = {}
    os.set_blocking(0, False)
    pending = b""
    is_open = True
    while is_open or running:
        try:
            piece = os.read(0, 1 << 16)
            is_open = bool(piece)
            pending += piece
        except BlockingIOError:
            pass
        while b"\n" in pending:
            line, pending = pending.split(b"\n", 1)
            job = json.loads(line)
            pid = os.fork()
            if pid == 0:
                run_job(job)
            running[pid] = Path(job["folder"])
            sys.stdout.write(f"{pid}\n")
            sys.stdout.flush()
        reap(running)
        time.sleep(0.003)


def reap(running: dict[int, Path]) -> None:
    for pid in list(running):
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            folder = running.pop(pid)
            (folder / "exit.new").write_text(json.dumps([status, usage.ru_maxrss * 1024]))
            (folder / "exit.new").rename(folder / "exit")


def run_job(job: dict[str, Any]) -> None:
    """The life of a forked process."""
    folder = Path(job["folder"])
    output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    answer = os.open(folder / "answer", os.O_WRONLY | os.O_CREAT)
    try:
        if job["max_file_bytes"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["max_file_bytes"], job["max_file_bytes"]))
        content: dict[str, Any] = {"result": call(job["function"], job["arguments"])}
    except Exception as error:
        traceback.print_exc()
        from image_encoder_vit.weights.hub_repository import one_line

        content = {"error": [type(error).__name__, str(error), one_line(error)]}
    os.write(answer, json.dumps(content, default=str).encode())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def call(function: str, arguments: dict[str, Any]) -> dict[str, Any]:
    from image_encoder_vit.storage import RetryPolicy
    from image_encoder_vit.weights import pull

    push_module: Any = importlib.import_module("image_encoder_vit.weights.push")

    if function == "push_checked_before":
        # The check of the folder takes seconds, and is no part of what tests of the transfer are about.
        push_module.check_remote_code = lambda folder, config: {}
    push = push_module.push
    if "retry" in arguments:
        arguments["retry"] = RetryPolicy(**arguments["retry"])
    if arguments.pop("is_offline", False):
        import huggingface_hub.constants

        huggingface_hub.constants.HF_HUB_OFFLINE = True
    functions = {
        "command": _command,
        "pull": pull,
        "push": push,
        "push_checked_before": push,
        "nothing": lambda: _Nothing(),
    }
    return functions[function](**arguments)._asdict()


class _Status(NamedTuple):
    """How a command ended."""

    status: int


def _command(argv: list[str]) -> _Status:
    from image_encoder_vit.commands import main

    return _Status(main(argv))


class _Nothing(NamedTuple):
    """The result of a call that does nothing, to measure what a process costs."""


if __name__ == "__main__":
    serve()
