"""
Fetches some of a safetensors checkpoint's tensors from the Hub, and nothing else, into one staging file that survives
a kill.

A run is a stretch of a remote file that holds wanted tensors and small gaps between them. A chunk is a part of a run
that is fetched by one request.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from itertools import pairwise
from pathlib import Path
from threading import Event, Lock
from typing import BinaryIO, NamedTuple

from tqdm import tqdm

from .http_ranges import HubFile, TransferStopped
from .safetensors_format import LENGTH_BYTES, TensorSpec, header_length, parse_header

FIRST_READ_BYTES = 128 << 10
MAX_CHUNK_BYTES = 16 << 20
MAX_GAP_BYTES = 1 << 20
# All gaps together may add this much to the wanted bytes; the promise is 1 % for everything.
MAX_GAPS_PART = 0.005
MAX_WORKERS = 4
READ_BYTES = 1 << 20


class Chunk(NamedTuple):
    """Bytes `start` to `end` of the remote file `file`, kept from byte `offset` of the staging file."""

    file: str
    start: int
    end: int
    offset: int


def read_remote_header(file: HubFile, where: str) -> tuple[dict[str, TensorSpec], int]:
    """
    The tensors of a remote safetensors file and its size in bytes.

    Raises:
        ValueError: If the header is not valid.
        RangesUnsupported: If the server does not send ranges.
        OSError: If it cannot be fetched.
    """
    start, file_bytes = file.read_start(FIRST_READ_BYTES)
    length = header_length(start, file_bytes, where)
    header = bytearray(start[LENGTH_BYTES : LENGTH_BYTES + length])
    if len(header) < length:
        file.read_range(len(start), LENGTH_BYTES + length, file_bytes, header.extend)
    return parse_header(bytes(header), file_bytes, where), file_bytes


def plan_runs(specs: Iterable[TensorSpec]) -> list[tuple[int, int]]:
    """
    The stretches (start, end) of one file that cover the wanted tensors: joined across gaps of at most
    `MAX_GAP_BYTES`, the smallest first, while all gaps together stay below `MAX_GAPS_PART` of the wanted bytes.
    """
    wanted = sorted((spec.start, spec.end) for spec in specs if spec.size)
    allowance = int(MAX_GAPS_PART * sum(end - start for start, end in wanted))
    gaps = sorted((after[0] - before[1], before[1]) for before, after in pairwise(wanted))
    joined = set()
    for size, position in gaps:
        if size > min(allowance, MAX_GAP_BYTES):
            break
        allowance -= size
        joined.add(position)
    runs: list[tuple[int, int]] = []
    for start, end in wanted:
        if runs and runs[-1][1] in joined:
            runs[-1] = runs[-1][0], end
        else:
            runs.append((start, end))
    return runs


def plan_download(
    wanted: Mapping[str, Mapping[str, TensorSpec]], max_chunk_bytes: int = MAX_CHUNK_BYTES
) -> tuple[list[Chunk], dict[str, TensorSpec]]:
    """
    How to fetch the tensors `wanted`, name to place by remote file: the chunks, and where each tensor will lie in the
    staging file, which holds the runs one after the other.
    """
    chunks: list[Chunk] = []
    staged: dict[str, TensorSpec] = {}
    offset = 0
    for file in sorted(wanted):
        for start, end in plan_runs(wanted[file].values()):
            for name, spec in wanted[file].items():
                if start <= spec.start and spec.end <= end:
                    moved = offset - start
                    staged[name] = spec._replace(start=spec.start + moved, end=spec.end + moved)
            for position in range(start, end, max_chunk_bytes):
                chunks.append(Chunk(file, position, min(position + max_chunk_bytes, end), offset + position - start))
            offset += end - start
    return chunks, staged


class Staging:
    """
    A folder with the bytes fetched so far and a journal of the chunks that are complete, by their SHA-256: after a
    kill or a power cut only chunks whose bytes are really there count.

    `identity` names what is fetched; a folder left by a pull of anything else is emptied.
    """

    def __init__(self, folder: Path, identity: str, chunks: list[Chunk]) -> None:
        self.chunks = chunks
        self.weights = folder / "weights.part"
        self._journal = folder / "chunks.jsonl"
        self._lock = Lock()
        plan = folder / "plan.json"
        content = json.dumps({"identity": identity, "chunks": chunks})
        if not plan.exists() or plan.read_text(encoding="utf-8", errors="replace") != content:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            plan.write_text(content, encoding="utf-8")
        # A kill may have hit the removal of the folder after the weights were gone, and before the plan was.
        self.weights.touch()

    def missing(self) -> list[Chunk]:
        """The chunks that are still to be fetched."""
        digests = self._read_journal()
        missing = []
        with self.weights.open("rb") as file:
            for chunk in self.chunks:
                if chunk.offset not in digests or digests[chunk.offset] != _digest(file, chunk):
                    missing.append(chunk)
        return missing

    def _read_journal(self) -> dict[int, str]:
        digests = {}
        if self._journal.exists():
            for line in self._journal.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                    digests[int(entry["offset"])] = str(entry["sha256"])
                except (ValueError, TypeError, KeyError):
                    continue  # The line that a kill cut off.
        return digests

    def fetch(self, files: Mapping[str, HubFile], sizes: Mapping[str, int], max_workers: int = MAX_WORKERS) -> int:
        """
        Fetches what is missing, several chunks at a time, showing a progress bar. Returns how many bytes were there
        already.

        Raises:
            OSError: If a chunk cannot be fetched or written; what is complete stays for another try.
        """
        missing = self.missing()
        total_bytes = sum(chunk.end - chunk.start for chunk in self.chunks)
        left_bytes = sum(chunk.end - chunk.start for chunk in missing)
        stop = Event()
        with (
            tqdm(
                total=total_bytes, initial=total_bytes - left_bytes, unit="B", unit_scale=True, desc="Encoder weights"
            ) as progress,
            ThreadPoolExecutor(max_workers) as pool,
        ):

            def fetch_chunk(chunk: Chunk) -> None:
                digest = hashlib.sha256()
                with self.weights.open("r+b") as file:
                    file.seek(chunk.offset)

                    def write(piece: bytes) -> None:
                        file.write(piece)
                        digest.update(piece)
                        with self._lock:
                            progress.update(len(piece))

                    files[chunk.file].read_range(chunk.start, chunk.end, sizes[chunk.file], write, stop)
                # Only after the file was closed without an error are its bytes out of our hands.
                line = json.dumps({"offset": chunk.offset, "sha256": digest.hexdigest()})
                with self._lock, self._journal.open("a", encoding="utf-8") as journal:
                    journal.write(f"\n{line}\n")

            futures = [pool.submit(fetch_chunk, chunk) for chunk in missing]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                # Also when the user interrupts: no thread may go on fetching.
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
        errors = [error for future in futures if not future.cancelled() and (error := future.exception())]
        # A failure stops the others, which is not what the user wants to read about.
        errors.sort(key=lambda error: isinstance(error, TransferStopped))
        if errors:
            raise errors[0]
        return total_bytes - left_bytes


def _digest(file: BinaryIO, chunk: Chunk) -> str:
    """SHA-256 of a chunk's place in the staging file, which may be cut off."""
    digest = hashlib.sha256()
    file.seek(chunk.offset)
    left = chunk.end - chunk.start
    while left > 0 and (piece := file.read(min(READ_BYTES, left))):
        digest.update(piece)
        left -= len(piece)
    return digest.hexdigest()
