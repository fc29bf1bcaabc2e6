"""
Interpreters that know nothing of this package, for code that must run without it: forks of one process that has loaded
torch and transformers and nothing else, since to import these again for each check takes seconds.
"""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

READY = "ready"


class FreshPython:
    """Runs code in interpreters of their own. To be closed."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=folder,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == f"{READY}\n"

    def __call__(self, code: str, *arguments: str, cache: Path) -> None:
        """Runs `code` with `sys.argv[1:]` in the folder `cache`, where saved code is unpacked; it must not fail."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([code, arguments, str(cache)]) + "\n")
        self._process.stdin.flush()
        status, output = json.loads(self._process.stdout.readline())
        assert status == 0, output

    def close(self) -> None:
        self._process.communicate()


def serve() -> None:
    """Answers each line of stdin by one with the exit status of its code and what that has printed."""
    import safetensors.torch  # noqa: F401
    import torch  # noqa: F401
    import transformers.image_processing_backends
    import transformers.modeling_utils
    import transformers.pipelines  # noqa: F401

    sys.stdout.write(f"{READY}\n")
    sys.stdout.flush()
    for line in sys.stdin:
        code, arguments, cache = json.loads(line)
        told = Path(cache) / "told.txt"
        child = os.fork()
        if child == 0:
            run(code, arguments, cache, told)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.stdout.write(json.dumps([status, told.read_text(errors="replace")]) + "\n")
        sys.stdout.flush()


def run(code: str, arguments: list[str], cache: str, told: Path) -> None:
    """Runs code and ends this process."""
    import transformers.dynamic_module_utils

    transformers.dynamic_module_utils.HF_MODULES_CACHE = cache
    os.environ["HF_MODULES_CACHE"] = cache
    os.chdir(cache)
    output = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["-c", *arguments]
    status = 0
    try:
        exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve()
