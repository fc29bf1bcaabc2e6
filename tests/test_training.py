"""Training: in several processes, with less memory, interrupted, by LoRA, by scripts/finetune.py and by Trainer."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import distributed_worker
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from builders import random_pixels, relative_error, small_model
from checkpoints import folder_files
from finetune_script import at_step, finetune, interrupt
from hub_client import client_environment, run_script
from hub_server import HubServer
from PIL import Image
from safetensors.torch import load_file
from small import SMALL
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, EvalPrediction
from transformers import pipeline as transformers_pipeline

from image_encoder_vit import (
    ImageEncoderViTConfig,
    ImageEncoderViTForImageClassification,
    ImageEncoderViTImageProcessorPil,
    ImageEncoderViTModel,
)
from image_encoder_vit.commands import loading
from image_encoder_vit.training.fine_tuning import (
    LORA_TARGETS,
    accuracy_and_macro_f1,
    freeze,
    layer_of,
    parameter_groups,
    with_lora,
)
from image_encoder_vit.training.labelled_images import load_splits

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
    arguments = [images, "--checkpoint", model_folder, "--output", output, "--epochs", 2, "--device", "cpu", *options]
    try:
        return finetune.main(list(map(str, arguments)))
    except SystemExit as refusal:  # of options that make no sense
        return int(refusal.code or 0)


def start(script: str, *arguments: object, log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Starts a script of the tests in a process group of its own, its output in `log`."""
    command = [sys.executable, "-W", "error::UserWarning", ROOT / "tests" / script, *arguments]
    with log.open("w") as file:
        return subprocess.Popen(
            list(map(str, command)), env=ENVIRONMENT | environment, stdout=file, stderr=file, start_new_session=True
        )


def end(process: subprocess.Popen[bytes], log: Path, expected: int) -> None:
    """Waits for the exit status that is expected; leaves no process of the group behind."""
    try:
        # A limit for processes that hang; what is tested has no time in it.
        assert process.wait(timeout=600) == expected, log.read_text()[-3000:]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """All weights in a folder of scripts/finetune.py."""
    return load_file(folder / "model.safetensors")


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
    """A folder with what two processes of `distributed_worker` have come to, and two that go on for them."""
    folder = tmp_path_factory.mktemp("two-processes")
    options = [images, "--checkpoint", model_folder, "--epochs", 2, "--batch-size", 2, "--device", "cpu"]
    resumed = [-1, *options, "--output", folder / "resumed", "--save-every-steps", 1, "--resume"]
    runs = [("distributed_worker.py", [folder, *options], -signal.SIGKILL), ("finetune_script.py", resumed, 0)]
    for script, arguments, expected in runs:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        place["WORLD_SIZE"] = "2"
        logs = [folder / f"{script}-{rank}.log" for rank in range(2)]
        started = [
            start(script, *arguments, log=log, RANK=str(rank), LOCAL_RANK=str(rank), **place)
            for rank, log in enumerate(logs)
        ]
        for process, log in zip(started, logs, strict=True):
            end(process, log, expected)
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


def test_the_script_in_two_processes_ends_like_one_and_goes_on_after_kill_9(
    two_processes: Path, images: Path, model_folder: str, tmp_path: Path
) -> None:
    assert run(images, model_folder, tmp_path / "one", "--batch-size", 4) == 0
    expected = weights_of(tmp_path / "one")
    actual = weights_of(two_processes / "straight")
    assert_bit_equal(weights_of(two_processes / "resumed"), actual)
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
    # Epochs of two steps of three images and one of two: the resumed ones begin within an epoch, and at its start.
    options = [*options, "--batch-size", 3, "--epochs", 2, "--save-every-steps", 2]
    if "--lora" in options:
        pytest.importorskip("peft")
    states = {}
    for name, stops in {"straight": [4, None], "interrupted": [2, 3, 4, None]}.items():
        for index, stop in enumerate(stops):
            resume = ["--resume"] if index else []
            with pytest.MonkeyPatch.context() as patch:
                if stop is None:
                    assert run(images, model_folder, tmp_path / name, *options, *resume) == 0
                    continue
                at_step(stop, interrupt, patch)
                assert run(images, model_folder, tmp_path / name, *options, *resume) == 130
                assert not (tmp_path / name).exists()
            if stop == 4:
                found = list((tmp_path / f".{name}.unfinished" / "states").glob("checkpoint-*"))
                assert [path.name for path in found] == ["checkpoint-4"]
                (weights,) = found[0].glob("*model.safetensors")
                optimizer = torch.load(found[0] / "optimizer.pt", weights_only=True)
                assert all(float(state["step"]) == 4 for state in optimizer["state"].values())
                states[name] = {"weights": load_file(weights), "optimizer": optimizer}
    assert_bit_equal(states["interrupted"], states["straight"])
    assert_bit_equal(weights_of(tmp_path / "interrupted"), weights_of(tmp_path / "straight"))
    assert not list(tmp_path.glob(".*.unfinished"))


@pytest.mark.parametrize("place", ["3", "s3"], ids=["in a step", "while a state is written"])
def test_a_killed_training_resumes_the_same(place: str, images: Path, model_folder: str, tmp_path: Path) -> None:
    options = ["--batch-size", 2, "--save-every-steps", 1, "--eval-split", 0.25]
    arguments = [
        images,
        "--checkpoint",
        model_folder,
        "--epochs",
        2,
        "--output",
        tmp_path / "killed",
        "--device",
        "cpu",
    ]
    log = tmp_path / "log"
    workers = ["--workers", 1] if place == "3" else []
    end(start("finetune_script.py", place, *arguments, *options, *workers, log=log), log, -signal.SIGKILL)
    assert not (tmp_path / "killed").exists()
    states = tmp_path / ".killed.unfinished" / "states"
    whole = [path.name for path in states.glob("checkpoint-*") if (path / "whole").exists()]
    assert whole == ["checkpoint-2" if place == "s3" else "checkpoint-3"]
    assert run(images, model_folder, tmp_path / "killed", *options, "--resume") == 0
    assert run(images, model_folder, tmp_path / "straight", *options) == 0
    for path in (tmp_path / "straight").iterdir():
        assert (tmp_path / "killed" / path.name).read_bytes() == path.read_bytes(), path.name


def test_resuming_needs_a_state_and_the_same_settings(
    images: Path, model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "tuned"
    assert run(images, model_folder, output, "--resume") == 2
    assert "--resume: no state" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        at_step(1, interrupt, patch)
        assert run(images, model_folder, output, "--save-every-steps", 1) == 130
    capsys.readouterr()
    assert run(images, model_folder, output) == 2
    assert "add --resume, or remove" in capsys.readouterr().err
    assert run(images, model_folder, output, "--resume", "--seed", 1, "--batch-size", 2) == 2
    assert "batch_size=2, seed=1 differs from the interrupted run" in capsys.readouterr().err
    more = tmp_path / "more"
    shutil.copytree(images, more)
    shutil.copy(images / "red" / "0.png", more / "red" / "4.png")
    assert run(more, model_folder, output, "--resume") == 2
    assert "images differs from the interrupted run" in capsys.readouterr().err
    assert run(images, model_folder, output, "--resume") == 0
    assert "Resuming from the state after step 1" in capsys.readouterr().out
    assert run(images, model_folder, output) == 2
    assert "exists already" in capsys.readouterr().err


@peft_s_old_name
@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ([], ("patch_embed", "pos_embed", "blocks.0", "blocks.3", "neck", "net_")),
        (
            ["--gradient-checkpointing", "--dtype", "bfloat16", "--layer-decay", 0.8],
            ("patch_embed", "pos_embed", "blocks.0", "blocks.3", "neck", "net_"),
        ),
        (["--lora", 2, "--gradient-checkpointing"], ("blocks.0", "blocks.3")),
        (["--freeze-blocks", 2, "--gradient-checkpointing"], ("blocks.3", "neck", "net_")),
        (["--freeze-encoder"], ()),
    ],
    ids=["all", "checkpointing-bf16-decay", "lora-checkpointing", "blocks-frozen", "frozen"],
)
def test_the_script_learns_and_what_it_writes_loads(
    options: list[str],
    changes: tuple[str, ...],
    images: Path,
    model_folder: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "--lora" in options:
        pytest.importorskip("peft")
    output = tmp_path / "new" / "tuned"
    epochs = 30 if "--freeze-encoder" in options else 10  # The features of random weights tell little.
    learning = ["--epochs", epochs, "--learning-rate", 0.01, "--eval-split", 0.25, "--images-at-once", 2]
    assert run(images, model_folder, output, *learning, *options) == 0
    shown = capsys.readouterr()
    assert "accuracy 1.000, macro F1 1.000 on 2 images that were not trained on" in shown.out
    assert "100%" in shown.err  # a progress bar
    results = json.loads((output / "eval_results.json").read_text())
    assert (results["accuracy"], results["macro_f1"]) == (1, 1)
    assert [path.name for path in output.parent.iterdir()] == ["tuned"]
    before = load_file(Path(model_folder) / "model.safetensors")
    after = load_file(output / "model.safetensors")
    head = {f"{layer}.{kind}" for layer in ("layernorm", "classifier") for kind in ("weight", "bias")}
    assert after.keys() - before.keys() == head
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    for part in ("patch_embed", "pos_embed", "blocks.0", "blocks.3", "neck", "net_"):
        assert any(f"encoder.{part}" in name for name in changed) == (part in changes), part
    assert type(AutoModel.from_pretrained(output)) is ImageEncoderViTModel
    assert AutoImageProcessor.from_pretrained(output, backend="pil").size == {"height": 128, "width": 128}
    classify = transformers_pipeline("image-classification", model=str(output))
    files = sorted(map(str, images.glob("*/*.png")))
    assert [found[0]["label"] for found in classify(files)] == ["blue"] * 4 + ["red"] * 4


@peft_s_old_name
def test_an_adapter_is_kept_by_itself(images: Path, model_folder: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    options = ["--learning-rate", 0.01, "--lora", 2]
    assert run(images, model_folder, tmp_path / "merged", *options) == 0
    assert run(images, model_folder, tmp_path / "adapter", *options, "--keep-adapter") == 0
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert all("lora_" in name or "classifier" in name or ".layernorm." in name for name in names)
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    assert json.loads((tmp_path / "adapter" / "id2label.json").read_text()) == {"0": "blue", "1": "red"}
    pixels = random_pixels(2, 3, 128, 128)
    with torch.no_grad():
        expected = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")(pixels).logits
        base = AutoModelForImageClassification.from_pretrained(model_folder, num_labels=2)
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert relative_error(adapted(pixel_values=pixels).logits, expected) <= 1e-4
        # transformers finds the checkpoint of the adapter by itself.
        found = AutoModelForImageClassification.from_pretrained(tmp_path / "adapter")
        assert relative_error(found(pixels).logits, expected) <= 1e-4


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the CPU is chosen where there is nothing else")
def test_bfloat16_trains_without_an_accelerator_and_without_naming_the_cpu(
    images: Path, model_folder: str, tmp_path: Path
) -> None:
    assert (
        run(images, model_folder, tmp_path / "tuned", "--epochs", 0.5, "--device", "auto", "--dtype", "bfloat16") == 0
    )
    assert {weight.dtype for weight in weights_of(tmp_path / "tuned").values()} == {torch.float32}


def test_without_a_checkpoint_random_weights_are_trained_and_said_to_be(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loading, "ImageEncoderViTConfig", lambda: ImageEncoderViTConfig(**SMALL))
    options = ["--output", tmp_path / "tuned", "--epochs", 0.5, "--image-size", 64, "--device", "cpu"]
    assert finetune.main(list(map(str, [images, *options]))) == 0
    assert "RANDOM weights" in capsys.readouterr().out
    assert ImageEncoderViTImageProcessorPil.from_pretrained(tmp_path / "tuned").size == {"height": 64, "width": 64}
    assert AutoModel.from_pretrained(tmp_path / "tuned").config.hidden_size == SMALL["hidden_size"]


def test_a_checkpoint_from_the_hub(hub: HubServer, home: Path, images: Path, model_folder: str, tmp_path: Path) -> None:
    hub.add_repository("finetune/model", folder_files(Path(model_folder)))
    options = ["--output", "tuned", "--epochs", 0.5, "--device", "cpu"]
    arguments = map(str, [images, "--checkpoint", "finetune/model", *options])
    environment = client_environment(hub.endpoint, home)
    result = run_script("finetune.py", *arguments, environment=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert run(images, model_folder, tmp_path / "local", "--epochs", 0.5) == 0
    assert_bit_equal(weights_of(tmp_path / "tuned"), weights_of(tmp_path / "local"))


@pytest.mark.parametrize("package", ["peft", "datasets"])
def test_a_missing_extra_is_one_clear_error(
    package: str,
    images: Path,
    model_folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert run(images, model_folder, tmp_path / "tuned", "--lora", 2) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {package} is not installed: it comes with the extra 'finetune'")
    assert not list(tmp_path.glob("*tuned*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", 0], "--epochs must be above 0, got 0.0."),
        (["--batch-size", -1], "--batch-size must be above 0, got -1."),
        (["--batch-size", 3, "--images-at-once", 2], "multiple of --images-at-once, got 3 and 2."),
        (["--learning-rate", "nan"], "--learning-rate must be above 0, got nan."),
        (["--workers", -1], "--workers must be 0 or more, got -1."),
        (["--lora", 2, "--freeze-encoder"], "leave out --freeze-..."),
        (["--freeze-blocks", 2, "--freeze-encoder"], "leave out --freeze-blocks."),
        (["--keep-adapter"], "--keep-adapter needs --lora RANK."),
        (["--freeze-blocks", 4], "Cannot freeze 4 of 4 blocks"),
        (["--trainer", "weight_decai=1"], "NAME=VALUE of transformers' TrainingArguments, got ['weight_decai=1']."),
        (["--eval-split", 1.5], "must be between 0 and 1, got 1.5."),
        (["--eval-split", "test"], "has no split 'test': it has 'train'."),
        (["--train-split", "all"], "has no split 'all': it has 'train'."),
        (["--image-column", "img"], "has no column 'img' of images: it has 'image', 'label'."),
        (["--label-column", "kind"], "has no column 'kind' of labels: it has 'image', 'label'."),
    ],
)
def test_senseless_options_are_refused(
    options: list[object],
    message: str,
    images: Path,
    model_folder: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(images, model_folder, tmp_path / "tuned", *options) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*tuned*"))


def test_other_arguments_reach_trainer(images: Path, model_folder: str, tmp_path: Path) -> None:
    given = finetune.parse_arguments([str(images), "--output", "tuned", "--trainer", "max_grad_norm=0.5", "seed=7"])
    arguments = finetune.training_arguments(given.options, tmp_path)
    assert (arguments.max_grad_norm, arguments.seed, arguments.num_train_epochs) == (0.5, 7, 3)


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
    elif kind == "no image":
        (target / "red" / "notes.png").write_text("no image")
    elif kind == "truncated":
        data = (target / "red" / "0.png").read_bytes()
        (target / "red" / "0.png").write_bytes(data[: len(data) // 2])
    return target


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("missing", [], r"data file at .*images"),
        ("no class", [], r"images .* any data files"),
        ("one class", [], r"has no column 'label' of labels: .* at least two subfolders"),
        ("no image", [], r"Cannot read '.*notes.png' as an image"),
        ("truncated", [], r"Cannot read '.*0.png' as an image"),
        ("truncated", ["--workers", 1], r"Cannot read '.*0.png' as an image"),
        ("good", ["--checkpoint", "nowhere"], r"nowhere"),
        ("good", ["--dtype", "float16", "--device", "cpu"], r"float16 trains on an accelerator only"),
        ("good", ["--image-size", 100], r"multiple of patch_size=16 px on each side, got 100 x 100"),
        ("good", ["--learning-rate", 1e30, "--save-every-steps", 9], r"The loss is nan at step"),
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
    shown = capsys.readouterr().err
    (error,) = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert re.search(message, error), error
    assert "Traceback" not in shown
    assert not list(tmp_path.glob("*tuned*"))  # nor an unfinished folder


def test_images_come_from_any_data_set(images: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    processor = ImageEncoderViTImageProcessorPil(size={"height": 64, "width": 64})
    folder = load_splits(str(images), processor)
    assert datasets.is_progress_bar_enabled()  # as before
    assert folder.evaluation is None
    assert folder.classes == ["blue", "red"]
    assert list(folder.train.labels) == [0] * 4 + [1] * 4

    # Subfolders for the splits, as the ecosystem names them.
    for split in ("train", "validation"):
        shutil.copytree(images, tmp_path / "splits" / split)
    shutil.rmtree(tmp_path / "splits" / "validation" / "blue")
    (tmp_path / "splits" / "validation" / "blue").mkdir()
    splits = load_splits(str(tmp_path / "splits"), processor)
    assert splits.evaluation is not None
    assert (list(splits.evaluation.labels), splits.classes) == ([1] * 4, ["blue", "red"])
    assert load_splits(str(tmp_path / "splits"), processor, eval_split="none").evaluation is None

    # Names or numbers without names as labels, other columns, images within the table; Parquet and save_to_disk.
    files = sorted(images.glob("*/*.png"))
    pages = [{"bytes": path.read_bytes(), "path": None} for path in files]
    table = {"page": pages, "kind": [path.parent.name for path in files]}
    rows = datasets.Dataset.from_dict(table).cast_column("page", datasets.Image())
    rows.to_parquet(tmp_path / "table" / "train.parquet")
    both = datasets.DatasetDict({"fit": rows.select(range(1, 7)), "check": rows.select([0, 7])})
    both.save_to_disk(tmp_path / "disk")
    columns = {"image_column": "page", "label_column": "kind"}
    parquet = load_splits(str(tmp_path / "table"), processor, **columns)
    disk = load_splits(str(tmp_path / "disk"), processor, train_split="fit", eval_split="check", **columns)
    assert parquet.classes == disk.classes == ["blue", "red"]
    assert disk.evaluation is not None
    assert list(disk.evaluation.labels) == [0, 1]
    for index in (0, 7):
        for other in (parquet.train, disk.evaluation):
            place = index if other is parquet.train else int(index > 0)
            assert torch.equal(other[place]["pixel_values"], folder.train[index]["pixel_values"])
            assert other[place]["labels"] == folder.train[index]["labels"]
    assert len({splits.digest(), folder.digest(), parquet.digest(), disk.digest()}) == 4

    # Of each class as much is held out; by the seed.
    held_out = load_splits(str(images), processor, eval_split="0.5", seed=3)
    assert held_out.evaluation is not None
    assert list(held_out.train.labels) == list(held_out.evaluation.labels) == [0, 0, 1, 1]
    again = load_splits(str(images), processor, eval_split="0.5", seed=3)
    others = [load_splits(str(images), processor, eval_split="0.5", seed=seed) for seed in range(4, 8)]
    assert again.digest() == held_out.digest()
    assert any(other.digest() != held_out.digest() for other in others)

    fit = rows.select(range(4)).map(lambda row, index: {"kind": f"blue{index % 2}"}, with_indices=True)
    datasets.DatasetDict({"train": fit, "test": rows.select([7])}).save_to_disk(tmp_path / "bad")
    with pytest.raises(ValueError, match=r"labels that the training split lacks: \['red'\]"):
        load_splits(str(tmp_path / "bad"), processor, **columns)
    rows.select(range(4)).save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match=r"has 1 class\(es\) to train on, \['blue'\]"):
        load_splits(str(tmp_path / "one"), processor, **columns)


def test_accuracy_and_macro_f1_by_hand() -> None:
    logits = np.eye(4)[[0, 0, 1, 1, 2]]
    figures = accuracy_and_macro_f1(EvalPrediction(predictions=logits, label_ids=np.array([0, 1, 1, 1, 0])))
    # F1: 0 has one hit of 2 + 2, 1 has two of 3 + 2, 2 none of 0 + 1; 3 neither occurs nor is predicted.
    assert figures == {"accuracy": pytest.approx(3 / 5), "macro_f1": pytest.approx((2 / 4 + 4 / 5 + 0) / 3)}


def test_learning_rates_fall_towards_the_first_layers() -> None:
    model = ImageEncoderViTForImageClassification(ImageEncoderViTConfig(**SMALL))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    freeze(model.encoder, blocks=1)
    options = {"num_blocks": 4, "learning_rate": 1.0, "weight_decay": 0.1, "layer_decay": 0.5}
    groups = parameter_groups(model.named_parameters(), **options)
    rates = {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}
    decays = {names[id(parameter)]: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert rates.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith(("encoder.blocks.0", "encoder.patch_embed", "encoder.pos_embed")) for name in rates)
    assert rates["encoder.blocks.1.mlp.lin1.weight"] == 1 / 8
    assert rates["encoder.blocks.3.attn.rel_pos_h"] == 1 / 2
    assert rates["encoder.neck.0.weight"] == rates["encoder.net_3.weight"] == rates["classifier.bias"] == 1
    assert decays["encoder.blocks.1.mlp.lin1.weight"] == decays["classifier.weight"] == 0.1
    for name in ("encoder.blocks.1.norm1.weight", "encoder.blocks.3.attn.rel_pos_h", "classifier.bias"):
        assert decays[name] == 0
    # Wrappers put words of their own into names.
    assert layer_of("base_model.model.encoder.patch_embed.proj.weight", 4) == 0
    assert layer_of("base_model.model.encoder.blocks.2.attn.qkv.lora_A.default.weight", 4) == 3
    assert layer_of("_fsdp_wrapped_module.encoder.blocks.3._fsdp_wrapped_module.norm1.bias", 4) == 4


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
def test_trainer_trains_and_resumes(lora: bool, images: Path, model_folder: str, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    if lora:
        pytest.importorskip("peft")
    processor = ImageEncoderViTImageProcessorPil.from_pretrained(model_folder)
    rows = load_splits(str(images), processor).train

    def trainer(max_steps: int) -> Trainer:
        torch.manual_seed(0)
        model = AutoModelForImageClassification.from_pretrained(model_folder, num_labels=2)
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
        return Trainer(model=with_lora(model, 2) if lora else model, args=arguments, train_dataset=rows)

    straight = trainer(8)
    straight.train()
    losses = [entry["loss"] for entry in straight.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    resumed = trainer(8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-4"))
    assert_bit_equal(resumed.model.state_dict(), straight.model.state_dict())
    trained = straight.model.merge_and_unload() if lora else straight.model
    trained.save_pretrained(tmp_path / "tuned")
    pixels = random_pixels(2, 3, 128, 128)
    with torch.no_grad():
        features = AutoModel.from_pretrained(tmp_path / "tuned")(pixels).last_hidden_state
        assert torch.equal(trained.eval().encoder(pixels), features)
        assert relative_error(features, small_model()(pixels).last_hidden_state) > 0.01
