"""
What a pull owes to a user in a hurry: no secret shown, nothing fetched twice, refusals before the first byte, and no
checkpoint refused, or believed, for what is not the encoder's.
"""

import errno
import json
import os
import shutil
import subprocess
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from checkpoints import RECIPES, encoder_weights, folder_files, write_checkpoint
from hub_client import Worker
from hub_faults import Fault
from hub_server import WRITE_TOKEN, HubServer
from PIL import Image
from safetensors.torch import load_file, save_file

from image_encoder_vit.commands import main as command
from image_encoder_vit.storage import output_folder
from image_encoder_vit.storage.http_faults import examined
from image_encoder_vit.storage.retries import MIN_PROGRESS_BYTES, Pace, PassingFault, RetryPolicy, paced
from image_encoder_vit.storage.safetensors_ranges import FIRST_READ_BYTES
from image_encoder_vit.weights.files import load_pickle
from image_encoder_vit.weights.hub_repository import clean_token
from image_encoder_vit.weights.pull import pull

pytest_plugins = ["hub_fixtures"]

QUICK = {"first_wait_s": 0.005, "max_wait_s": 0.02, "timeout_s": 1.0, "max_failures": 3}


def only(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def source(hub_process: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded checkpoint, which is "care/sharded" on the Hub too."""
    folder = tmp_path_factory.mktemp("care") / "source"
    write_checkpoint(folder, RECIPES["deepseek-ocr-2"])
    hub_process.add_repository("care/sharded", folder_files(folder))
    return folder


# Secrets and foreign texts


@pytest.mark.parametrize("ending", ["\n", "\r", "\t", " ", "\r\n"])
def test_what_copying_adds_to_a_token_is_no_part_of_it(ending: str) -> None:
    assert clean_token(f" hf_xSecret{ending}") == "hf_xSecret"


@pytest.mark.parametrize(
    "token", ["hf_x\nSecret", "hf_x\rSecret", "hf_x Secret", "hf_x\tSecret", "hf_xSecrét", "hf_x\0"]
)
def test_a_token_that_cannot_be_one_is_refused_by_name_and_not_shown(token: str) -> None:
    with pytest.raises(ValueError, match="token holds a space, a line end") as error:
        clean_token(token)
    assert "hf_x" not in str(error.value)


def test_a_token_in_any_disguise_is_in_no_message(
    hub: HubServer, worker: Worker, source: Path, model_folder: str, tmp_path: Path
) -> None:
    for token, status in ((f"{WRITE_TOKEN}\n", 0), ("hf_xSec\nret", 2), ("hf_xSec ret", 2)):
        pulled = worker.call("command", argv=["pull", "care/sharded", str(tmp_path / "out"), "--token", token])
        pushed = worker.call("command", argv=["push", model_folder, "care/pushed", "--token", token, "--dry-run"])
        for outcome in (pulled, pushed):
            assert outcome.result == {"status": status}, outcome.output
            assert "hf_x" not in outcome.output
            assert len([line for line in outcome.output.splitlines() if line.startswith("error")]) == (status != 0)
    assert not any("hf_xSec" in json.dumps(request.headers) for request in hub.requests)


def test_texts_of_the_client_are_shown_without_secrets() -> None:
    text = "Illegal header b'Bearer hf_xS', https://user:pass@host/a?X-Signature=abc'\x1b[2J\nand more"
    shown = examined(ValueError(text), ("hf_xS",))
    assert shown == r"ValueError: Illegal header b'Bearer [hidden]', https://[hidden]@host/a'\x1b[2J"


def test_names_from_a_repository_are_made_visible(hub: HubServer, worker: Worker, tmp_path: Path) -> None:
    hub.add_repository(
        "care/escapes", {"a\x1b[2J.safetensors": b"x", "b\x1b[2J.safetensors": b"x", "\x1b]0;t\x07": b"x"}
    )
    outcome = worker.call("pull", source="care/escapes", output_dir=tmp_path / "out", retry=QUICK)
    assert outcome.error is not None
    assert r"a\x1b[2J.safetensors" in outcome.error[1]
    outcome = worker.call("pull", source="care/escapes", output_dir=tmp_path / "out", filename="c.safetensors")
    assert outcome.error is not None
    assert "\x1b" not in outcome.error[1] + outcome.error[2]


def test_markup_of_a_source_is_escaped_in_the_card(tmp_path: Path) -> None:
    folder = tmp_path / "<script>alert(1)</script>|`x`"
    folder = folder.with_name("<b>|`![x](y)")
    write_checkpoint(folder, RECIPES["sam-hf"])
    pull(folder, tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "<b>" not in card
    assert r"| source | \<b\>\|\`\!\[x\](y) |" in card


# Faults that will not pass, and servers that are too slow


@pytest.mark.parametrize(("kind", "fault"), [("TooManyRedirects", "loop"), ("UnsupportedProtocol", "scheme")])
def test_a_permanent_fault_is_told_at_once(
    kind: str, fault: str, hub: HubServer, worker: Worker, source: Path, tmp_path: Path
) -> None:
    hub.faults[:] = [Fault(fault, origin="hub", path="/resolve/", count=10_000)]
    outcome = worker.call("pull", source="care/sharded", output_dir=tmp_path / "out")
    assert outcome.error is not None
    assert outcome.error[0] == "TransferError"
    assert kind in outcome.error[1]
    # One chain of redirects, not one for each try.
    assert len([request for request in hub.requests if "/resolve/" in request.target]) <= 22
    assert only(tmp_path) == []


@pytest.mark.parametrize("path", ["/api/models/", "/resolve/"])
@pytest.mark.parametrize("kind", ["trickled headers", "trickled body", "trickled chunk", "early hints"])
def test_a_server_that_is_too_slow_is_a_fault(
    kind: str, path: str, hub: HubServer, worker: Worker, source: Path, tmp_path: Path
) -> None:
    """However it spreads its bytes, which come often enough for every timeout of a connection."""
    hub.faults[:] = [Fault(kind, origin="hub", path=path, count=1, seconds=30.0)]
    outcome = worker.call(
        "pull", source="care/sharded", output_dir=tmp_path / "survived", retry=QUICK | {"window_s": 0.5}, timeout_s=25
    )
    assert outcome.error is None, outcome.output
    hub.faults[:] = [Fault(kind, origin="hub", path=path, count=100, seconds=30.0)]
    outcome = worker.call(
        "pull",
        source="care/sharded",
        output_dir=tmp_path / "given-up",
        retry=QUICK | {"window_s": 0.3, "max_failures": 1},
        timeout_s=25,
    )
    assert outcome.error is not None
    assert outcome.error[0] == "TransferError"
    assert "too slow" in outcome.error[1]


def test_a_slow_storage_is_a_fault_too(hub: HubServer, worker: Worker, source: Path, tmp_path: Path) -> None:
    hub.faults[:] = [Fault("trickled body", after=3, count=2, seconds=30.0)]
    outcome = worker.call(
        "pull", source="care/sharded", output_dir=tmp_path / "out", retry=QUICK | {"window_s": 0.5}, timeout_s=25
    )
    assert outcome.error is None, outcome.output


def test_a_pace_asks_for_bytes_in_each_window() -> None:
    pace = Pace(0.05)
    with paced(lambda: iter([b"x" * MIN_PROGRESS_BYTES, b"y"]), pace) as pieces:
        assert list(pieces) == [b"x" * MIN_PROGRESS_BYTES, b"y"]
    time.sleep(0.06)
    pace.check()  # The first window had enough.
    time.sleep(0.06)
    with pytest.raises(PassingFault, match=r"too slow, 0 bytes in 0\.05 s"):
        pace.check()
    with pytest.raises(OSError, match="mine"), paced(raising, Pace(9)) as pieces:
        next(pieces)


def raising() -> Iterator[int]:
    raise OSError("mine")
    yield 1


def test_waits_double_and_obey_the_server() -> None:
    policy = RetryPolicy(first_wait_s=1, max_wait_s=8, max_retry_after_s=100)
    assert [policy.wait_s(failures) for failures in range(1, 6)] == [1, 2, 4, 8, 8]
    assert [policy.wait_s(1, 30), policy.wait_s(4, 3), policy.wait_s(1, 1000)] == [30, 8, 100]


# Outputs


def mounted(folder: Path) -> bool:
    done = subprocess.run(["mount", "-t", "tmpfs", "none", str(folder)], capture_output=True)
    return done.returncode == 0


def test_an_output_that_cannot_be_replaced_is_refused_before_the_first_byte(
    hub: HubServer, worker: Worker, source: Path, tmp_path: Path
) -> None:
    outputs: dict[Path, str] = {tmp_path / ("n" * 250): "File name too long"}
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    outputs |= {tmp_path / "link": "is a link", tmp_path / "dangling": "is a link"}
    (tmp_path / "file").write_text("mine")
    outputs[tmp_path / "file"] = "exists already"
    outputs[tmp_path / "file" / "below"] = "Not a directory"
    (tmp_path / "volume").mkdir()
    if mounted(tmp_path / "volume"):
        outputs[tmp_path / "volume"] = "mount point"
    before = only(tmp_path)
    try:
        for output, message in outputs.items():
            outcome = worker.call("pull", source="care/sharded", output_dir=output, retry=QUICK)
            assert outcome.error is not None
            assert message in outcome.error[1], outcome.output
            assert "\n" not in outcome.error[2]
        assert hub.requests == []
        assert only(tmp_path) == before
    finally:
        subprocess.run(["umount", str(tmp_path / "volume")], capture_output=True)
    outcome = worker.call("pull", source="care/sharded", output_dir=tmp_path / "volume", retry=QUICK)
    assert outcome.error is None, outcome.output  # An empty folder that is none is taken.


@pytest.mark.parametrize("step", ["the rename fails", "killed in the last sync"])
def test_what_was_fetched_stays_when_the_last_step_fails(
    step: str, hub: HubServer, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with monkeypatch.context() as broken:
        if step == "the rename fails":
            broken.setattr(Path, "rename", raising_busy)
        else:
            broken.setattr(output_folder, "sync", raising_interrupt)
        with pytest.raises((OSError, KeyboardInterrupt)):
            pull("care/sharded", tmp_path / "out", endpoint=hub.endpoint, token=WRITE_TOKEN)
    assert only(tmp_path) == [".out.pulling"]
    first = [request for request in hub.requests if request.origin == "storage"]
    hub.reset()
    pulled = pull("care/sharded", tmp_path / "out", endpoint=hub.endpoint, token=WRITE_TOKEN)
    assert only(tmp_path) == ["out"]
    again = [request for request in hub.requests if request.origin == "storage"]
    # The three headers alone.
    assert [request.headers["range"] for request in again] == [f"bytes=0-{FIRST_READ_BYTES - 1}"] * 3
    assert len(first) > len(again)
    assert pulled.tensors == 67


def raising_busy(path: Path, target: Path) -> None:
    raise OSError(errno.EBUSY, "Device or resource busy", str(target))


def raising_interrupt(path: Path) -> None:
    raise KeyboardInterrupt


def test_a_typing_error_keeps_what_was_fetched_and_finetune_s_states(
    hub: HubServer, worker: Worker, source: Path, tmp_path: Path
) -> None:
    states = tmp_path / ".out.unfinished" / "states"
    states.mkdir(parents=True)
    hub.faults[:] = [Fault("status", after=5, count=1000)]
    assert worker.call("pull", source="care/sharded", output_dir=tmp_path / "out", retry=QUICK).error is not None
    journal = tmp_path / ".out.pulling" / "staging" / "chunks.jsonl"
    kept = journal.read_text()
    assert kept
    hub.reset()
    for wrong in ({"prefix": "model.sam_modle"}, {"filename": "modle.safetensors"}, {"revision": "mian"}):
        outcome = worker.call("pull", source="care/sharded", output_dir=tmp_path / "out", retry=QUICK, **wrong)
        assert outcome.error is not None
        assert journal.read_text() == kept
    assert worker.call("pull", source="care/sharded", output_dir=tmp_path / "out", retry=QUICK).error is None
    assert only(tmp_path) == [".out.unfinished", "out"]
    assert states.is_dir()


def test_what_a_kill_leaves_after_the_last_step_is_cleared_away(source: Path, tmp_path: Path) -> None:
    pull(source, tmp_path / "out")
    (tmp_path / ".out.pulling" / "staging").mkdir(parents=True)
    with pytest.raises(FileExistsError):
        pull(source, tmp_path / "out")
    assert only(tmp_path) == ["out"]


# What refuses a checkpoint


def add_foreign_tensor(path: Path, dtype: str, data_bytes: int, shape: list[int]) -> None:
    """Puts a tensor of any dtype behind those of a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    header["lm_head.packed"] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + data_bytes]}
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data + bytes(data_bytes))


@pytest.mark.parametrize(
    ("dtype", "data_bytes", "shape"),
    [
        ("F4", 6, [3, 4]),
        ("F6_E2M3", 9, [3, 4]),
        ("F6_E3M2", 9, [3, 4]),
        ("F8_E4M3FNUZ", 12, [3, 4]),
        ("F8_E5M2FNUZ", 12, [3, 4]),
        ("F99_LATER", 5, [3, 4]),
    ],
)
def test_only_the_encoder_s_tensors_can_refuse_a_checkpoint(
    dtype: str, data_bytes: int, shape: list[int], tmp_path: Path
) -> None:
    _, weights = write_checkpoint(tmp_path / "source", RECIPES["got-ocr2"])
    add_foreign_tensor(tmp_path / "source" / "model.safetensors", dtype, data_bytes, shape)
    pull(tmp_path / "source", tmp_path / "model")
    written = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(written[f"encoder.{name}"], value) for name, value in weights.items())


def test_an_encoder_s_tensor_of_such_a_dtype_is_refused_by_name(tmp_path: Path) -> None:
    _, weights = encoder_weights()
    packed = {f"image_encoder.{name}": value for name, value in weights.items()}
    packed["image_encoder.pos_embed"] = packed["image_encoder.pos_embed"].to(torch.float8_e4m3fnuz)
    save_file(packed, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"image_encoder\.pos_embed' is F8_E4M3FNUZ"):
        pull(tmp_path / "model.safetensors", tmp_path / "out")


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "sam_vit_b.pth"])
def test_a_pointer_of_git_lfs_says_what_to_do(name: str, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / name).write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n"
    )
    with pytest.raises(ValueError, match="run `git lfs pull`"):
        pull(tmp_path / "source", tmp_path / "out")


def test_a_compressed_archive_is_not_unpacked(tmp_path: Path) -> None:
    torch.save({"image_encoder.pos_embed": torch.zeros(1, 64, 64, 768)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for record in plain.infolist():
            bomb.writestr(record.filename, plain.read(record))
    assert (tmp_path / "bomb.pth").stat().st_size < 100_000
    with pytest.raises(ValueError, match="unpacks from"):
        pull(tmp_path / "bomb.pth", tmp_path / "out")
    torch.save({"x": torch.zeros(1).expand(1 << 20, 1 << 20)}, tmp_path / "view.pth")
    with pytest.raises(ValueError, match="larger than the whole file"):
        load_pickle(tmp_path / "view.pth")


def test_a_source_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "endless.pth")
    with pytest.raises(ValueError, match="neither a folder nor a regular file"):
        pull(tmp_path / "endless.pth", tmp_path / "out")


@pytest.mark.parametrize("settings", [{"image_std": [0, 0, 0]}, {"size": -1}, {"size": {"height": -1, "width": 4}}])
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], model_folder: str, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "source")
    path = tmp_path / "source" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
        pull(tmp_path / "source", tmp_path / "out")
    assert only(tmp_path) == ["source"]


@pytest.mark.parametrize("card", ["---\nlicense: [mit\n---\n", "---\n- a\n---\n", "---\n1: 2\n---\n", "\xff\xfe"])
def test_a_card_that_cannot_be_read_beside_the_source_is_no_reason_to_stop(card: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", RECIPES["sam-hf"])
    (tmp_path / "source" / "README.md").write_bytes(card.encode("latin-1"))
    pull(tmp_path / "source", tmp_path / "model")
    provenance = json.loads((tmp_path / "model" / "provenance.json").read_text())
    assert provenance["source"]["license_stated_by"] == "family"


# Digests


def test_verify_compares_whole_files_with_what_the_hub_states(hub: HubServer, worker: Worker, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", RECIPES["got-ocr2"], hidden_size=64)
    hub.add_repository("care/verified", folder_files(tmp_path / "source"))
    hub.faults[:] = [Fault("flipped")]
    outcome = worker.call("pull", source="care/verified", output_dir=tmp_path / "out", verify=True)
    assert outcome.error is not None
    assert outcome.error[0] in ("ValueError", "OSError"), outcome.output
    assert "sha256" in outcome.error[1].lower()
    hub.reset()
    for path in (tmp_path / "home").glob("**/blobs/*"):
        path.unlink()
    outcome = worker.call("pull", source="care/verified", output_dir=tmp_path / "again", verify=True)
    if outcome.error is not None:  # The damaged copy is in the worker's cache: the message names it.
        damaged = Path(outcome.error[1].split("remove '")[1].split("'")[0])
        os.unlink(damaged.resolve())
        os.unlink(damaged)
        outcome = worker.call("pull", source="care/verified", output_dir=tmp_path / "again", verify=True)
    assert outcome.result is not None, outcome.output
    assert any("that the repository states" in notice for notice in outcome.result["notices"])


def test_verify_knows_the_published_sam_files_only(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, RECIPES["sam-pth"])
    with pytest.raises(ValueError, match="not ec2df62732614e57"):
        pull(tmp_path / "sam_vit_b_01ec64.pth", tmp_path / "out", verify=True)
    (tmp_path / "sam_vit_b_01ec64.pth").rename(tmp_path / "mine.pth")
    with pytest.raises(ValueError, match=r"No digest of 'mine\.pth' is known"):
        pull(tmp_path / "mine.pth", tmp_path / "out", verify=True)


# Paths that do not exist, and no network


@pytest.mark.parametrize(
    "missing", ["sam_vit_b_01ec64.pth", "weights/nothere", "a/b/c", "./x", "~/x", "model.safetensors", "w.index.json"]
)
def test_a_path_that_does_not_exist_is_told_at_once(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "weights").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "page.png")
    monkeypatch.chdir(tmp_path)
    assert command(["pull", missing, "out"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: There is no file or folder {missing!r}.")
    assert said.count("\n") == 1
    assert command(["encode", "page.png", "--checkpoint", missing, "--output", "x.safetensors"]) == 2
    assert f"There is no file or folder {missing!r}." in capsys.readouterr().err


def test_without_a_network_the_name_is_told_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(OSError, match="no file or folder 'user/name' here, and the Hub cannot be asked"):
        pull("user/name", tmp_path / "out", endpoint="http://127.0.0.1:9", retry=RetryPolicy(max_failures=100))
    assert only(tmp_path) == []


def test_offline_what_is_cached_is_used(hub: HubServer, worker: Worker, tmp_path: Path) -> None:
    _, weights = write_checkpoint(tmp_path / "source", RECIPES["deepseek-ocr"])
    (tmp_path / "source" / "README.md").write_text("---\nlicense: mit\n---\n")
    commit = hub.add_repository("care/cached", folder_files(tmp_path / "source"))
    arguments = {"source": "care/cached", "is_offline": True}
    early = worker.call("pull", output_dir=tmp_path / "early", **arguments)
    assert early.error is not None
    assert "nothing of a repository of that name in the cache" in early.error[2]
    filled = worker.call("pull", source="care/cached", output_dir=tmp_path / "whole", full_download=True)
    assert filled.error is None, filled.output
    hub.reset()
    outcome = worker.call("pull", output_dir=tmp_path / "model", **arguments)
    assert outcome.result is not None, outcome.output
    assert hub.requests == []
    assert any("taken from the cache" in notice for notice in outcome.result["notices"])
    written = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(written[f"encoder.{name}"], value) for name, value in weights.items())
    provenance = json.loads((tmp_path / "model" / "provenance.json").read_text())
    assert provenance["source"]["commit"] == commit
