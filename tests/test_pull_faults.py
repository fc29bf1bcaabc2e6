"""
Pulls through a network and a disk that fail in every way that they do: either the right folder, or none and a clear
error; never a wrong byte, never the token anywhere.
"""

import json
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import RECIPES, encoder_weights, folder_files, laid_out, write_checkpoint, write_tensors
from hub_client import Outcome, Worker, client_environment, run_script
from hub_faults import Fault
from hub_server import WRITE_TOKEN, HubServer
from safetensors.torch import load_file

from image_encoder_vit.storage.safetensors_format import build_header, tensor_bytes
from image_encoder_vit.storage.safetensors_ranges import FIRST_READ_BYTES

pytest_plugins = ["hub_fixtures"]

QUICK = {"first_wait_s": 0.005, "max_wait_s": 0.02, "timeout_s": 0.3, "max_retry_after_s": 1.0}
# Wide enough for several chunks of each file, quick enough for hundreds of pulls.
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "output_channels": 16}


class Target:
    """A sharded checkpoint on the Hub, and what must come out of it."""

    def __init__(self, hub: HubServer, folder: Path) -> None:
        self.repository = "faults/sharded"
        _, self.weights = write_checkpoint(folder, RECIPES["deepseek-ocr-2"], **SIZES)
        self.commit = hub.add_repository(self.repository, folder_files(folder))
        self.expected = {f"encoder.{name}": value for name, value in self.weights.items()}

    def assert_right(self, folder: Path) -> None:
        written = load_file(folder / "model.safetensors")
        assert written.keys() == self.expected.keys()
        assert all(torch.equal(written[name], value) for name, value in self.expected.items())


@pytest.fixture(scope="module")
def target(hub_process: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Target:
    return Target(hub_process, tmp_path_factory.mktemp("faults") / "source")


def pull_with(worker: Worker, target: Target, output: Path, **options: Any) -> Outcome:
    return worker.call("pull", source=target.repository, output_dir=output, retry=QUICK, **options)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


STORAGE_FAULTS = {
    "connection cut": {"kind": "cut"},
    "short body": {"kind": "short"},
    "stalled": {"kind": "stall", "seconds": 1.0},
    "slow": {"kind": "slow", "seconds": 0.2},
    "500": {"kind": "status", "status": 500},
    "502": {"kind": "status", "status": 502},
    "503": {"kind": "status", "status": 503, "retry_after_s": 0},
    "429 with Retry-After": {"kind": "status", "status": 429, "retry_after_s": 1},
    "wrong Content-Range": {"kind": "wrong_range"},
    "200 instead of 206": {"kind": "whole"},
    "expired signature": {"kind": "expired"},
    "body longer than its range": {"kind": "other_bytes"},
}


@pytest.mark.parametrize("kind", STORAGE_FAULTS)
def test_faults_of_the_storage_are_survived(
    kind: str, hub: HubServer, worker: Worker, target: Target, tmp_path: Path
) -> None:
    """Eight pulls for each fault, each with faults at seeded random places of its transfers."""
    dice = random.Random(kind)
    injected = 0
    pulls = 3 if kind in ("stalled", "slow", "429 with Retry-After") else 8
    for number in range(pulls):
        count = dice.randint(1, 2)
        fault = Fault(part=dice.random(), count=count, **STORAGE_FAULTS[kind])
        hub.faults[:] = [fault]
        outcome = pull_with(worker, target, tmp_path / f"model-{number}")
        assert outcome.error is None, outcome.output
        target.assert_right(tmp_path / f"model-{number}")
        injected += count - fault.count
    assert injected >= pulls
    assert leftovers(tmp_path) == sorted(f"model-{number}" for number in range(pulls))


@pytest.mark.parametrize("path", ["/api/models/", "index.json", "config.json", "/resolve/"])
@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "status", "status": 500},
        {"kind": "status", "status": 503, "retry_after_s": 0},
        {"kind": "status", "status": 429, "retry_after_s": 0},
        {"kind": "cut"},
        {"kind": "stall", "seconds": 1.0},
    ],
)
def test_faults_of_the_hub_itself_are_survived(
    path: str, fault: dict[str, Any], hub: HubServer, worker: Worker, target: Target, tmp_path: Path
) -> None:
    hub.faults[:] = [Fault(origin="hub", path=path, count=2, part=0.3, **fault)]
    outcome = pull_with(worker, target, tmp_path / "model")
    assert outcome.error is None, outcome.output
    target.assert_right(tmp_path / "model")


def test_many_faults_at_once(hub: HubServer, worker: Worker, target: Target, tmp_path: Path) -> None:
    """Fourteen pulls of which each meets three to six faults of all kinds, in random order."""
    dice = random.Random(0)
    kinds = [STORAGE_FAULTS[name] for name in STORAGE_FAULTS if name not in ("429 with Retry-After", "stalled")]
    for number in range(14):
        hub.faults[:] = [Fault(part=dice.random(), **dice.choice(kinds)) for _ in range(dice.randint(3, 6))]
        outcome = pull_with(worker, target, tmp_path / "model" / str(number))
        assert outcome.error is None, outcome.output
        target.assert_right(tmp_path / "model" / str(number))


def test_retry_after_is_obeyed(hub: HubServer, worker: Worker, target: Target, tmp_path: Path) -> None:
    hub.faults[:] = [Fault("status", status=429, retry_after_s=1)]
    start = time.monotonic()
    assert pull_with(worker, target, tmp_path / "model").error is None
    assert time.monotonic() - start >= 1


@pytest.mark.parametrize("kind", ["connection cut", "500", "expired signature", "wrong Content-Range"])
def test_faults_without_end_give_one_clear_error_and_can_be_resumed(
    kind: str, hub: HubServer, worker: Worker, target: Target, tmp_path: Path
) -> None:
    hub.faults[:] = [Fault(count=10_000, part=0.0, **STORAGE_FAULTS[kind])]
    outcome = pull_with(worker, target, tmp_path / "model")
    assert outcome.error is not None
    assert outcome.error[0] == "TransferError"
    assert "in a row" in outcome.error[1]
    assert "signature=" not in outcome.output
    assert not (tmp_path / "model").exists()
    hub.reset()
    assert pull_with(worker, target, tmp_path / "model").error is None
    target.assert_right(tmp_path / "model")
    assert leftovers(tmp_path) == ["model"]


def test_the_branch_may_move_between_any_two_requests(hub: HubServer, worker: Worker, tmp_path: Path) -> None:
    """Whatever commit was pinned, every byte is of that one: the branch moves to other weights before request N."""
    versions = {}
    for seed in range(2):
        _, weights = write_checkpoint(tmp_path / f"source-{seed}", RECIPES["deepseek-ocr-2"], seed=seed)
        commit = hub.add_repository("faults/moving", folder_files(tmp_path / f"source-{seed}"))
        versions[commit] = weights
    first, second = versions
    repository = hub.repositories["faults/moving"]
    for request_number in range(12):
        repository.refs["main"] = first
        seen = 0

        def move(origin: str, method: str, target: str, number: int = request_number) -> None:
            nonlocal seen
            if seen == number:
                repository.refs["main"] = second
            seen += 1

        hub.before_request = move
        output = tmp_path / f"model-{request_number}"
        outcome = worker.call("pull", source="faults/moving", output_dir=output, retry=QUICK)
        assert outcome.result is not None, outcome.output
        pinned = outcome.result["commit"]
        assert pinned == (second if request_number == 0 else first)
        written = load_file(output / "model.safetensors")
        for name, value in versions[pinned].items():
            assert torch.equal(written[f"encoder.{name}"], value)


def test_a_hub_that_serves_another_commit_is_refused(
    hub: HubServer, worker: Worker, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = hub.add_repository("faults/other", {"config.json": b"{}"})
    repository = hub.repositories[target.repository]
    honest = repository.resolve

    def resolve(revision: str) -> str | None:
        return honest(revision) if revision == "main" else other

    repository.commits[other] = repository.commits[target.commit]
    monkeypatch.setattr(repository, "resolve", resolve)
    outcome = pull_with(worker, target, tmp_path / "model")
    assert outcome.error is not None
    assert f"{other} is served" in outcome.error[1]
    assert leftovers(tmp_path) == []


@pytest.fixture
def large(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Target:
    """A checkpoint of some megabytes, so that there is time to kill."""
    folder = tmp_path_factory.mktemp("large") / "source"
    target = Target.__new__(Target)
    target.repository = "faults/large"
    _, target.weights = encoder_weights(hidden_size=256, num_attention_heads=8, dtype=torch.float32)
    write_tensors(folder, laid_out(RECIPES["got-ocr2"], target.weights), "single")
    target.commit = hub.add_repository(target.repository, folder_files(folder))
    target.expected = {f"encoder.{name}": value for name, value in target.weights.items()}
    return target


def test_kill_9_at_any_moment_leaves_nothing_or_what_can_be_resumed(
    hub: HubServer, worker: Worker, large: Target, tmp_path: Path
) -> None:
    """Twenty-four pulls killed at random moments of their life, each then finished by a second one."""
    start = time.monotonic()
    assert pull_with(worker, large, tmp_path / "whole").error is None
    life_s = time.monotonic() - start
    dice = random.Random(9)
    killed = resumed = 0
    for number in range(24):
        output = tmp_path / str(number) / "model"
        call = worker.start("pull", source=large.repository, output_dir=output, retry=QUICK)
        time.sleep(life_s * dice.random())
        call.kill()
        ended = call.wait()
        killed += ended.killed_by == 9
        parent = leftovers(output.parent) if output.parent.exists() else []
        assert parent in ([], ["model"], [".model.pulling"], [".model.pulling", "model"])
        if "model" in parent:
            large.assert_right(output)
            continue
        resumed += parent != []
        outcome = pull_with(worker, large, output)
        assert outcome.error is None, outcome.output
        large.assert_right(output)
        assert leftovers(output.parent) == ["model"]
    assert killed >= 12
    assert resumed >= 5


def test_a_killed_pull_fetches_only_what_is_missing(
    hub: HubServer, worker: Worker, target: Target, tmp_path: Path
) -> None:
    """Killed while the last file stalls: the second pull asks for exactly the chunks that the journal lacks."""
    blobs = hub.repositories[target.repository].commits[target.commit]
    last = blobs["model-00003-of-00003.safetensors"]
    # Its header comes, its chunks do not.
    hub.faults[:] = [Fault("stall", path=last.oid, after=1, count=100, part=0.0, seconds=20.0)]
    call = worker.start(
        "pull", source=target.repository, output_dir=tmp_path / "model", retry=QUICK | {"timeout_s": 15.0}
    )
    staging = tmp_path / ".model.pulling" / "staging"
    journal = staging / "chunks.jsonl"
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and (not journal.exists() or journal.read_text().count("}") < 2):
        time.sleep(0.01)
    call.kill()
    assert call.wait().killed_by == 9
    done = {json.loads(line)["offset"] for line in journal.read_text().splitlines() if line}
    plan = json.loads((staging / "plan.json").read_text())["chunks"]
    lacking = [(blobs[file].oid, f"bytes={start}-{end - 1}") for file, start, end, offset in plan if offset not in done]
    assert len(done) >= 2
    assert lacking

    hub.reset()
    outcome = pull_with(worker, target, tmp_path / "model")
    assert outcome.error is None, outcome.output
    target.assert_right(tmp_path / "model")
    stored = [request for request in hub.requests if request.origin == "storage"]
    fetched = [(re.search("blobs/([0-9a-f]+)", r.target)[1], r.headers["range"]) for r in stored]
    headers = [(oid, f"bytes=0-{FIRST_READ_BYTES - 1}") for oid in {blobs[file].oid for file, *_ in plan}]
    assert sorted(fetched) == sorted(lacking + headers)
    kept_bytes = sum(end - start for _, start, end, offset in plan if offset in done)
    assert f"{kept_bytes:,} kept from an interrupted pull" in (tmp_path / "model" / "README.md").read_text()


def test_a_damaged_staging_file_is_fetched_again(hub: HubServer, worker: Worker, large: Target, tmp_path: Path) -> None:
    hub.faults[:] = [Fault("status", status=500, count=10_000)]
    assert pull_with(worker, large, tmp_path / "model").error is not None
    # As a power cut may leave it: the journal says done, the bytes are not there.
    folder = tmp_path / ".model.pulling" / "staging"
    folder.mkdir(parents=True, exist_ok=True)
    hub.reset()
    call = worker.start(
        "pull", source=large.repository, output_dir=tmp_path / "model", retry=QUICK, max_file_bytes=1 << 20
    )
    assert call.wait().error is not None
    size = (folder / "weights.part").stat().st_size
    (folder / "weights.part").write_bytes(bytes(size))
    assert pull_with(worker, large, tmp_path / "model").error is None
    large.assert_right(tmp_path / "model")


def test_a_full_disk_gives_a_clear_error_and_no_folder(
    hub: HubServer, worker: Worker, large: Target, tmp_path: Path
) -> None:
    """The limit hits the staging file, the weights, or a small file, by its size."""
    weight_bytes = sum(value.nbytes for value in large.expected.values())
    dice = random.Random(3)
    limits = [0, 1, 100, 5000, weight_bytes // 2, weight_bytes - 1, weight_bytes + 100]
    limits += [dice.randrange(weight_bytes) for _ in range(5)]
    for number, limit in enumerate(limits):
        output = tmp_path / str(number) / "model"
        # The worker's own answer is small; its limit is the same, so the call's end is what counts.
        outcome = worker.call("pull", source=large.repository, output_dir=output, retry=QUICK, max_file_bytes=limit)
        assert outcome.result is None
        if limit >= 5000:
            assert outcome.error is not None
            assert outcome.error[0] == "OSError"
            assert "File too large" in outcome.error[1]
        assert not output.exists()
        if number % 4 == 0:
            outcome = pull_with(worker, large, output)
            assert outcome.error is None, outcome.output
            large.assert_right(output)
            assert leftovers(output.parent) == ["model"]


def test_two_pulls_into_one_folder_at_once(hub: HubServer, worker: Worker, large: Target, tmp_path: Path) -> None:
    """One of them makes the folder; the other says who is at work, or that the folder is there."""
    for number in range(6):
        output = tmp_path / str(number) / "model"
        calls = [worker.start("pull", source=large.repository, output_dir=output, retry=QUICK) for _ in range(3)]
        outcomes = [call.wait() for call in calls]
        assert sum(outcome.error is None for outcome in outcomes) == 1, [outcome.error for outcome in outcomes]
        for outcome in outcomes:
            if outcome.error is not None:
                assert outcome.error[0] in ("BlockingIOError", "FileExistsError")
        large.assert_right(output)
        assert leftovers(output.parent) == ["model"]


def test_another_source_does_not_resume_from_a_killed_pull(
    hub: HubServer, worker: Worker, large: Target, target: Target, tmp_path: Path
) -> None:
    hub.faults[:] = [Fault("status", status=500, count=10_000)]
    call = worker.start(
        "pull", source=large.repository, output_dir=tmp_path / "model", retry=QUICK, max_file_bytes=1 << 20
    )
    call.wait()
    hub.reset()
    assert pull_with(worker, target, tmp_path / "model").error is None
    target.assert_right(tmp_path / "model")
    assert leftovers(tmp_path) == ["model"]


# The byte count and the memory of a checkpoint of 2 GB.

WANTED_BYTES_FLOOR = 50 << 20


def write_sparse(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], real: dict[str, torch.Tensor]) -> None:
    """A safetensors file that is as large as its tensors say, of which only `real` takes room on the disk."""
    header, order = build_header(tensors)
    position = len(header)
    with path.open("wb") as file:
        file.write(header)
        for name in order:
            dtype, shape = tensors[name]
            if name in real:
                file.seek(position)
                file.write(real[name].contiguous().view(torch.uint8).numpy().tobytes())
            position += tensor_bytes(dtype, shape)
        file.truncate(position)


@pytest.fixture(scope="module", params=["single file", "sharded"])
def two_gigabytes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[dict[str, bytes | Path], dict[str, Any]]]:
    """
    A checkpoint of 1,950 MB in names: an encoder of some 60 MB among language model weights, in one file of an unusual
    name with an index, as DeepSeek-OCR has it, or in four files of which two hold a part of the encoder each.
    """
    folder = tmp_path_factory.mktemp("sparse")
    _, weights = encoder_weights(
        hidden_size=768, num_hidden_layers=4, num_attention_heads=12, image_size=512, output_channels=256,
        window_size=14, downsample_channels=[512, 1024], dtype=torch.bfloat16,
    )  # fmt: skip
    real = {f"model.sam_model.{name}": value for name, value in weights.items()}
    files: dict[str, bytes | Path] = {}
    weight_map = {}
    shards = 1 if request.param == "single file" else 4
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:06d}.safetensors"
        held = dict(list(real.items())[shard % 2 :: 2]) if shards > 1 else real
        held = {} if shard >= 2 else held
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {n: ("BF16", tuple(v.shape)) for n, v in held.items()}
        for layer in range(shard, 900, shards):
            tensors[f"model.layers.{layer}.mlp.experts.0.down_proj.weight"] = ("BF16", (1024, 1024))
        write_sparse(folder / name, tensors, held)
        files[name] = folder / name
        weight_map.update(dict.fromkeys(tensors, name))
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    yield files, weights
    for file in folder.iterdir():
        file.unlink()


def test_bytes_moved_and_memory_of_two_gigabytes(
    hub: HubServer,
    worker: Worker,
    two_gigabytes: tuple[dict[str, bytes | Path], dict[str, torch.Tensor]],
    tmp_path: Path,
) -> None:
    files, weights = two_gigabytes
    hub.repositories.pop("faults/two-gigabytes", None)
    hub.add_repository("faults/two-gigabytes", files)
    assert sum(file.stat().st_size for file in files.values() if isinstance(file, Path)) > 1_900_000_000
    wanted_bytes = sum(value.nbytes for value in weights.values())
    assert wanted_bytes > WANTED_BYTES_FLOOR
    baseline = worker.call("nothing")
    outcome = worker.call("pull", source="faults/two-gigabytes", output_dir=tmp_path / "model")
    assert outcome.result is not None, outcome.output
    written = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(written[f"encoder.{name}"], value) for name, value in weights.items())
    moved_bytes = hub.sent_bytes()
    memory_bytes = outcome.peak_rss_bytes - baseline.peak_rss_bytes
    assert moved_bytes <= 1.01 * wanted_bytes + 1_000_000
    assert outcome.result["bytes_moved"] <= moved_bytes
    assert memory_bytes <= 256_000_000


def test_the_token_is_nowhere(hub: HubServer, worker: Worker, home: Path, target: Target, tmp_path: Path) -> None:
    """In no output of the most talkative run, no file of it, and no request to the storage; on the Hub it is used."""
    hub.faults[:] = [Fault("status", status=503, retry_after_s=0), Fault("cut"), Fault("expired")]
    environment = client_environment(hub.endpoint, home, WRITE_TOKEN, HF_DEBUG="1", HF_HUB_VERBOSITY="debug")
    done = run_script("pull_from_hub.py", target.repository, "out", environment=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    hub.faults[:] = [Fault("status", status=500, count=10_000)]
    outcome = worker.call("pull", source=target.repository, output_dir=tmp_path / "failed", retry=QUICK)
    assert outcome.error is not None
    hub.faults.clear()
    secret = WRITE_TOKEN.encode()
    assert WRITE_TOKEN not in done.stdout + done.stderr + outcome.output
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or secret not in path.read_bytes(), path
    storage = [request for request in hub.requests if request.origin == "storage"]
    assert storage
    for request in storage:
        assert "authorization" not in request.headers
        assert WRITE_TOKEN not in json.dumps(request.headers) + request.target
    resolved = [request for request in hub.requests if request.origin == "hub" and "/resolve/" in request.target]
    assert all(request.headers["authorization"] == f"Bearer {WRITE_TOKEN}" for request in resolved)
    target.assert_right(tmp_path / "out")
