"""Training: in several processes, with less memory, interrupted, by LoRA, by scripts/finetune.py and by Trainer."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distributed_worker
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from builders import random_pixels, relative_error, small_model
from checkpoints import folder_files
from finetune_script import SCRIPT, finetune, interrupt_after
from hub_client import client_environment, run_script
from hub_server import HubServer
from PIL import Image
from safetensors.torch import load_file
from small import SMALL
from transformers import AutoImageProcessor, AutoModel

from image_encoder_vit import ImageEncoderViTConfig, ImageEncoderViTImageProcessorPil, ImageEncoderViTModel
from image_encoder_vit.training.fine_tuning import (
    LORA_TARGETS,
    ImageEncoderViTClassifier,
    ImageFolder,
    batch_indices,
    load_classifier,
    save_classifier,
    with_lora,
)

pytest_plugins = ["hub_fixtures"]

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
}
BLOCKS = [f"encoder.blocks.{index}" for index in range(SMALL["num_hidden_layers"])]

# PEFT asks for a name that transformers has renamed since.
peft_s_old_name = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the processes these tests start: runs are bit-equal with the same number of threads only."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps its settings for the life of the process; each test is its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of four images, dull red and dull blue."""
    folder = tmp_path_factory.mktemp("classes")
    generator = np.random.default_rng(0)
    for name, color in {"blue": (60, 60, 180), "red": (180, 60, 60)}.items():
        (folder / name).mkdir()
        for index in range(4):
            pixels = np.array(color) + generator.integers(-50, 50, (96, 70 + 10 * index, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index}.png")
    (folder / "red" / ".hidden").write_text("left out")
    return folder


def run(images: Path, model_folder: str, output: Path, *options: object) -> int:
    """scripts/finetune.py in this process: its exit status. Four steps unless `options` say more."""
    arguments = [images, "--checkpoint", model_folder, "--output", output, "--epochs", 2, "--cpu", *options]
    return finetune.main(list(map(str, arguments)))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """All weights in a folder of scripts/finetune.py."""
    head = {f"head.{name}": weight for name, weight in load_file(folder / "head.safetensors").items()}
    return load_file(folder / "model.safetensors") | head


def assert_bit_equal(actual: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key, value in expected.items():
            assert_bit_equal(actual[key], value)
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for mine, theirs in zip(actual, expected, strict=True):
            assert_bit_equal(mine, theirs)
    else:
        assert actual == expected


@pytest.fixture(scope="session")
def two_processes(images: Path, model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what two processes of `distributed_worker` have come to."""
    folder = tmp_path_factory.mktemp("two-processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [images, "--checkpoint", model_folder, "--epochs", 2, "--batch-size", 2]
    command = [sys.executable, "-W", "error::UserWarning", Path(distributed_worker.__file__), folder, *options, "--cpu"]
    started = []
    for rank in range(2):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        log = (folder / f"{rank}.log").open("w")
        environment = ENVIRONMENT | ranks | place
        started.append(subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=log))
        log.close()
    try:
        statuses = [process.wait(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    assert statuses == [0, 0], [(folder / f"{rank}.log").read_text()[-2000:] for rank in range(2)]
    return folder


@pytest.fixture(scope="session")
def one_process() -> dict[str, Any]:
    """The same step as the two processes make together, by one."""
    model = small_model().train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loss = distributed_worker.step(model, distributed_worker.pixels(), torch.Tensor.backward)
    named = dict(model.named_parameters())
    return {
        "loss": loss,
        "gradients": {name: parameter.grad for name, parameter in named.items()},
        "changes": {name: parameter.detach() - before[name] for name, parameter in named.items()},
        "before": before,
    }


@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2"])
def test_two_processes_make_the_same_step_as_one(kind: str, two_processes: Path, one_process: dict[str, Any]) -> None:
    if kind != "ddp" and not distributed_worker.supports_fsdp():
        pytest.skip("FSDP on the CPU needs torch 2.7, and Accelerate's FSDP 2")
    for rank in range(2):
        result = torch.load(two_processes / f"rank-{rank}.pt", weights_only=True)[kind]
        torch.testing.assert_close(result["loss"], one_process["loss"])
        assert result["weights"].keys() == one_process["before"].keys()
        for name, gradient in result.get("gradients", one_process["gradients"]).items():
            assert gradient.abs().sum() > 0, name
            assert relative_error(gradient, one_process["gradients"][name]) <= 1e-5, name
        for name, weight in result["weights"].items():
            change = weight - one_process["before"][name]
            # A change is known to the rounding of the weight that it was added to.
            rounding = 1e-6 * one_process["before"][name].abs().max()
            torch.testing.assert_close(change, one_process["changes"][name], rtol=1e-4, atol=rounding.item())
        if kind != "ddp":
            assert sorted(result["units"]) == ["", *BLOCKS]  # the root, and each block by itself


def test_the_script_in_two_processes_ends_like_one(
    two_processes: Path, images: Path, model_folder: str, tmp_path: Path
) -> None:
    assert run(images, model_folder, tmp_path / "one", "--batch-size", 4) == 0
    expected = weights_of(tmp_path / "one")
    actual = weights_of(two_processes / "straight")
    assert_bit_equal(weights_of(two_processes / "resumed"), actual)  # after an interruption
    start = load_file(Path(model_folder) / "model.safetensors")
    for name, weight in expected.items():
        # Adam divides by the size of a gradient, so where that is near zero rounding shows.
        assert relative_error(actual[name], weight) <= 1e-4, name
        assert name not in start or not torch.equal(weight, start[name]), name


def test_gradient_checkpointing_lowers_the_peak_of_memory() -> None:
    command = [sys.executable, ROOT / "tests" / "training_memory.py"]
    output = subprocess.run(list(map(str, command)), env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout
    with_checkpointing, without = map(int, output.split())
    figures = f"{with_checkpointing / 1e6:.0f} MB with gradient checkpointing, {without / 1e6:.0f} MB without"
    sys.stdout.write(figures + "\n")  # for pytest -rP
    assert with_checkpointing <= 0.7 * without, figures


@peft_s_old_name
@pytest.mark.parametrize("options", [[], ["--lora", 2]], ids=["full", "lora"])
def test_a_resumed_training_is_the_same_bit_for_bit(
    options: list[object], images: Path, model_folder: str, tmp_path: Path
) -> None:
    # Six steps of three images, shuffles of eight: a batch reaches over the end of a shuffle.
    options = [*options, "--batch-size", 3, "--epochs", 2.25, "--save-every-steps", 2]
    if "--lora" in options:
        pytest.importorskip("peft")
    for name, stops in {"straight": [4, None], "interrupted": [2, 4, None]}.items():
        for index, stop in enumerate(stops):
            resume = ["--resume"] if index else []
            with pytest.MonkeyPatch.context() as patch:
                if stop is None:
                    assert run(images, model_folder, tmp_path / name, *options, *resume) == 0
                    continue
                interrupt_after(stop, patch)
                assert run(images, model_folder, tmp_path / name, *options, *resume) == 130
                assert not (tmp_path / name).exists()
            if stop == 4:
                states = tmp_path / f".{name}.unfinished" / "states"
                assert [path.name for path in states.iterdir()] == ["step-00000004"]
                shutil.copytree(states / "step-00000004", tmp_path / f"{name}-state")
    optimizers = [
        torch.load(tmp_path / f"{name}-state" / "optimizer.bin", weights_only=True)
        for name in ("interrupted", "straight")
    ]
    assert all(float(state["step"]) == 4 for state in optimizers[1]["state"].values())
    assert_bit_equal(*optimizers)
    models = [load_file(tmp_path / f"{name}-state" / "model.safetensors") for name in ("interrupted", "straight")]
    assert_bit_equal(*models)
    assert_bit_equal(weights_of(tmp_path / "interrupted"), weights_of(tmp_path / "straight"))
    assert not list(tmp_path.glob(".*.unfinished"))


def test_a_killed_training_resumes_the_same(images: Path, model_folder: str, tmp_path: Path) -> None:
    options = ["--batch-size", 2, "--epochs", 5, "--save-every-steps", 1]  # 20 steps
    arguments = [images, "--checkpoint", model_folder, "--output", tmp_path / "killed", "--cpu", *options]
    arguments += ["--workers", 1]
    command = [sys.executable, SCRIPT, *arguments]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(list(map(str, command)), env=ENVIRONMENT, stdout=log, stderr=log)
    states = tmp_path / ".killed.unfinished" / "states"
    deadline = time.monotonic() + 60
    while not list(states.glob("step-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=30) == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert not (tmp_path / "killed").exists()
    assert run(images, model_folder, tmp_path / "killed", *options, "--resume") == 0
    assert run(images, model_folder, tmp_path / "straight", *options) == 0
    assert_bit_equal(weights_of(tmp_path / "killed"), weights_of(tmp_path / "straight"))


def test_resuming_needs_a_state_and_the_same_settings(
    images: Path, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "tuned"
    assert run(images, model_folder, output, "--resume") == 2
    assert "--resume: no state" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(1, patch)
        assert run(images, model_folder, output, "--save-every-steps", 1) == 130
    assert run(images, model_folder, output) == 2
    assert "add --resume, or remove" in capsys.readouterr().err
    assert run(images, model_folder, output, "--resume", "--seed", 1, "--batch-size", 2) == 2
    assert "batch_size=2, seed=1 differs from the interrupted run" in capsys.readouterr().err
    assert run(images, model_folder, output, "--resume") == 0
    assert "Resumed after step 1 of 4" in capsys.readouterr().out
    assert run(images, model_folder, output) == 2
    assert "exists already" in capsys.readouterr().err


@peft_s_old_name
@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ([], ("patch_embed", "pos_embed", "blocks", "neck", "net_")),
        (["--gradient-checkpointing", "--mixed-precision", "bf16"], ("patch_embed", "blocks", "neck", "net_")),
        (["--lora", 2, "--gradient-checkpointing"], ("blocks",)),
        (["--freeze-encoder"], ()),
    ],
    ids=["all", "checkpointing-bf16", "lora-checkpointing", "frozen"],
)
def test_the_script_learns_and_what_it_writes_loads(
    options: list[str], changes: tuple[str, ...], images: Path, model_folder: str, tmp_path: Path
) -> None:
    if "--lora" in options:
        pytest.importorskip("peft")
    output = tmp_path / "new" / "tuned"
    epochs = 50 if "--freeze-encoder" in options else 10  # The features of random weights tell little.
    assert run(images, model_folder, output, "--epochs", epochs, "--learning-rate", 0.01, *options) == 0
    assert [path.name for path in output.parent.iterdir()] == ["tuned"]
    before = load_file(Path(model_folder) / "model.safetensors")
    changed = {
        name for name, weight in load_file(output / "model.safetensors").items() if (weight != before[name]).any()
    }
    for part in ("patch_embed", "blocks", "neck", "net_"):
        assert any(part in name for name in changed) == (part in changes), part
    encoder = AutoModel.from_pretrained(output)
    assert type(encoder) is ImageEncoderViTModel
    assert AutoImageProcessor.from_pretrained(output, backend="pil").size == {"height": 128, "width": 128}
    classifier, classes, processor = load_classifier(output)
    assert classes == ["blue", "red"]
    dataset = ImageFolder(images, processor)
    with torch.no_grad():
        pixels = torch.stack([dataset[index]["pixel_values"] for index in range(8)])
        assert torch.equal(classifier.encoder(pixels).last_hidden_state, encoder(pixels).last_hidden_state)
        found = classifier(pixels)["logits"].argmax(-1).tolist()
    assert found == [0] * 4 + [1] * 4


def test_without_a_checkpoint_random_weights_are_trained_and_said_to_be(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(finetune, "ImageEncoderViTConfig", lambda: ImageEncoderViTConfig(**SMALL))
    options = ["--output", tmp_path / "tuned", "--epochs", 0.5, "--image-size", 64, "--cpu"]
    assert finetune.main(list(map(str, [images, *options]))) == 0
    assert "RANDOM weights" in capsys.readouterr().out
    assert ImageEncoderViTImageProcessorPil.from_pretrained(tmp_path / "tuned").size == {"height": 64, "width": 64}
    assert AutoModel.from_pretrained(tmp_path / "tuned").config.hidden_size == SMALL["hidden_size"]


def test_a_checkpoint_from_the_hub(hub: HubServer, home: Path, images: Path, model_folder: str, tmp_path: Path) -> None:
    hub.add_repository("finetune/model", folder_files(Path(model_folder)))
    options = ["--output", "tuned", "--epochs", 0.5, "--cpu"]
    arguments = map(str, [images, "--checkpoint", "finetune/model", *options])
    environment = client_environment(hub.endpoint, home)
    result = run_script("finetune.py", *arguments, environment=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert run(images, model_folder, tmp_path / "local", "--epochs", 0.5) == 0
    assert_bit_equal(weights_of(tmp_path / "tuned"), weights_of(tmp_path / "local"))


def test_lora_without_peft_is_one_clear_error(
    images: Path,
    model_folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert run(images, model_folder, tmp_path / "tuned", "--lora", 2) == 2
    assert capsys.readouterr().err == "error: LoRA needs PEFT: pip install 'image-encoder-vit[finetune]'.\n"
    assert not list(tmp_path.glob("*tuned*"))


@pytest.mark.parametrize(
    "options",
    [
        ["--epochs", 0],
        ["--batch-size", -1],
        ["--learning-rate", "nan"],
        ["--workers", -1],
        ["--lora", 2, "--freeze-encoder"],
    ],
)
def test_senseless_options_are_refused(
    options: list[object], images: Path, model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(images, model_folder, tmp_path / "tuned", *options)
    assert str(options[0]) in capsys.readouterr().err


def broken(kind: str, images: Path, folder: Path) -> Path:
    """A folder of images with something wrong."""
    target = folder / "images"
    if kind == "missing":
        return target
    if kind == "no class":
        target.mkdir()
        return target
    shutil.copytree(images, target)
    if kind == "one class":
        shutil.rmtree(target / "red")
    elif kind == "empty class":
        (target / "green").mkdir()
    elif kind == "no image":
        (target / "red" / "notes.txt").write_text("no image")
    elif kind == "truncated":
        data = (target / "red" / "0.png").read_bytes()
        (target / "red" / "0.png").write_bytes(data[: len(data) // 2])
    return target


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("missing", [], r"No folder of images at '.*images'\."),
        ("no class", [], r"has 0 class\(es\): \[\]. It needs at least two subfolders"),
        ("one class", [], r"has 1 class\(es\): \['blue'\]. It needs at least two subfolders"),
        ("empty class", [], r"No image in '.*green'"),
        ("no image", [], r"Cannot read '.*notes.txt' as an image"),
        ("truncated", [], r"Cannot read '.*0.png' as an image"),
        ("truncated", ["--workers", 1], r"Cannot read '.*0.png' as an image"),
        ("good", ["--checkpoint", "nowhere"], r"nowhere"),
        ("good", ["--image-size", 100], r"multiples of patch_size=16 px, got 100 x 100 px"),
        ("good", ["--learning-rate", 1e30], r"The loss is nan at step"),
    ],
)
def test_bad_input_is_one_clear_error(
    kind: str,
    options: list[object],
    message: str,
    images: Path,
    model_folder: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "tuned"
    assert run(broken(kind, images, tmp_path), model_folder, output, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) <= 4
    assert re.search(message, error)
    assert "Traceback" not in error
    assert not list(tmp_path.glob("*tuned*"))  # nor an unfinished folder


def test_batches_go_through_every_shuffle_once() -> None:
    count, size = 10, 4
    stream = [index for step in range(15) for index in batch_indices(step, size, count, seed=3)]
    shuffles = [tuple(stream[start : start + count]) for start in range(0, len(stream), count)]
    assert all(sorted(shuffle) == list(range(count)) for shuffle in shuffles)
    assert len(set(shuffles)) == len(shuffles)
    assert batch_indices(0, 25, count, seed=3) == stream[:25]  # larger than the folder
    assert batch_indices(0, count, count, seed=4) != stream[:count]


def test_the_learning_rate_rises_and_falls() -> None:
    shares = [finetune.learning_rate_share(step, 100) for step in range(100)]
    assert shares[4] == 1 == max(shares)
    assert shares == [*sorted(shares[:5]), *sorted(shares[5:], reverse=True)]
    assert 0 < shares[-1] < 0.001 < shares[0]
    assert finetune.learning_rate_share(0, 1) == 1


@peft_s_old_name
@pytest.mark.parametrize("targets", [LORA_TARGETS, ["qkv", "proj", "lin1", "lin2"]], ids=["pattern", "names"])
def test_lora_adapts_and_merges_back(targets: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    plain = small_model()
    model = peft.get_peft_model(small_model(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    adapted = {
        name.removesuffix(".lora_A.default") for name, _ in model.named_modules() if name.endswith("lora_A.default")
    }
    expected = {
        f"base_model.model.encoder.blocks.{index}.{name}"
        for index in range(4)
        for name in ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2")
    }
    if targets is not LORA_TARGETS:
        expected.add("base_model.model.encoder.patch_embed.proj")
    assert adapted == expected
    pixels = random_pixels(2, 3, 128, 144)
    with torch.no_grad():
        before = plain(pixels).last_hidden_state
        # An adapter starts as zero.
        assert relative_error(model.eval()(pixels).last_hidden_state, before) <= 1e-6
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        inference = model(pixels).last_hidden_state
    training = model(pixels).last_hidden_state
    training.square().mean().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }
    assert relative_error(inference, before) > 0.01
    assert relative_error(inference, training.detach()) <= 1e-6
    merged = model.merge_and_unload()
    assert type(merged) is ImageEncoderViTModel
    merged.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert relative_error(merged(pixels).last_hidden_state, inference) <= 1e-5
        loaded = AutoModel.from_pretrained(tmp_path / "merged")
        assert torch.equal(loaded(pixels).last_hidden_state, merged(pixels).last_hidden_state)
    plain.save_pretrained(tmp_path / "plain")  # PEFT leaves nothing of its own behind.
    assert (tmp_path / "merged" / "config.json").read_text() == (tmp_path / "plain" / "config.json").read_text()


@peft_s_old_name
@pytest.mark.parametrize("lora", [False, True])
def test_trainer_trains_and_resumes(
    lora: bool, images: Path, model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import Trainer, TrainingArguments

    if lora:
        pytest.importorskip("peft")
    processor = ImageEncoderViTImageProcessorPil.from_pretrained(model_folder)

    def trainer(max_steps: int) -> Trainer:
        torch.manual_seed(0)
        encoder = ImageEncoderViTModel.from_pretrained(model_folder)
        arguments = TrainingArguments(
            tmp_path / "trainer",
            max_steps=max_steps,
            per_device_train_batch_size=4,
            learning_rate=0.01,
            lr_scheduler_type="constant",
            save_steps=4,
            logging_steps=4,
            report_to="none",
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
        )
        classifier = ImageEncoderViTClassifier(with_lora(encoder, 2) if lora else encoder, num_classes=2)
        return Trainer(model=classifier, args=arguments, train_dataset=ImageFolder(images, processor))

    straight = trainer(8)
    straight.train()
    losses = [entry["loss"] for entry in straight.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    resumed = trainer(8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-4"))
    assert_bit_equal(resumed.model.state_dict(), straight.model.state_dict())
    save_classifier(straight.model, ["blue", "red"], processor, tmp_path / "tuned")
    classifier, classes, _ = load_classifier(tmp_path / "tuned")
    assert classes == json.loads((tmp_path / "tuned" / "classes.json").read_text())
    pixels = random_pixels(2, 3, 128, 128)
    with torch.no_grad():
        features = AutoModel.from_pretrained(tmp_path / "tuned")(pixels).last_hidden_state
        assert torch.equal(classifier.encoder(pixels).last_hidden_state, features)
        assert relative_error(features, small_model()(pixels).last_hidden_state) > 0.01
