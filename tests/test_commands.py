"""The command line: one name for all commands, one frame for their errors, the same options everywhere."""

import importlib
import inspect
import subprocess
import sys
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from safetensors.torch import load_file
from transformers.utils import logging

import image_encoder_vit
from image_encoder_vit.commands import COMMANDS, main
from image_encoder_vit.commands.frame import progress_bar, run_command
from image_encoder_vit.commands.loading import choose_device, load_model, load_processor
from image_encoder_vit.commands.options import OPTIONS
from image_encoder_vit.support import import_extra

ROOT = Path(__file__).parent.parent
SCRIPTS = {"pull": "pull_from_hub", "push": "push_to_hub", "extract": "extract_features", "plot": "plot_features"}
SCRIPTS |= {"encode": "encode", "export": "export_onnx", "finetune": "finetune", "benchmark": "benchmark"}
LINES_OF_A_SCRIPT = 4


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_it_lists_its_commands(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 0
    listed = capsys.readouterr().out
    assert listed.startswith("usage: image-encoder-vit ")
    for name, does in COMMANDS.items():
        assert f" {name} " in listed
        assert does in " ".join(listed.split())


def test_an_unknown_command_is_one_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fetch"])
    assert stopped.value.code == 2
    assert "invalid choice: 'fetch'" in capsys.readouterr().err


def test_a_command_without_its_extra_names_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ImportError) as missing:
        import_extra("package_of_an_extra", "corpora")

    def import_module(name: str, package: str) -> object:
        raise missing.value

    monkeypatch.setattr(importlib, "import_module", import_module)
    assert main(["search", "features", "page"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: package_of_an_extra is not installed: it comes with the extra 'corpora'")


def test_help_needs_no_extra() -> None:
    extras = ["pyarrow", "datasets", "peft", "matplotlib", "onnx", "onnxruntime", "openvino", "pypdfium2", "faiss"]
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({extras}))\n"
        "from image_encoder_vit.commands import COMMANDS, main\n"
        "for name in COMMANDS:\n"
        "    try:\n"
        "        status = main([name, '--help'])\n"
        "    except SystemExit as stopped:\n"
        "        status = stopped.code\n"
        "    assert status == 0, name\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("usage: image-encoder-vit ") == len(COMMANDS)


def test_it_tells_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"image-encoder-vit {image_encoder_vit.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_helps_by_its_own_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"image_encoder_vit.commands.{name}")
    assert list(inspect.signature(module.main).parameters) == ["argv"]
    shown = help_of(name, capsys)
    assert shown.startswith(f"usage: image-encoder-vit {name} ")
    assert "scripts/" not in shown


def test_options_of_one_name_mean_one_thing(capsys: pytest.CaptureFixture[str]) -> None:
    """What all commands that load a checkpoint take, and no second name for it."""
    for name in ("encode", "extract", "plot"):
        shown = help_of(name, capsys)
        for option in ("--checkpoint FOLDER_OR_HUB_ID", "--revision NAME", "--device", "--dtype", "--output"):
            assert option in shown, (name, option)
    for name in COMMANDS:
        shown = help_of(name, capsys).split()
        assert not {"--cpu", "--force", "--model", "--out"} & set(shown), name
    assert {"--checkpoint", "--revision", "--device", "--dtype", "--preset", "--output", "--overwrite"} <= set(OPTIONS)


@pytest.mark.parametrize(("name", "script"), SCRIPTS.items())
def test_scripts_are_four_lines_around_the_command(name: str, script: str) -> None:
    assert COMMANDS.keys() - SCRIPTS.keys() == {"search"}  # younger than the scripts
    lines = (ROOT / "scripts" / f"{script}.py").read_text().splitlines()
    code = [line for line in lines if line and not line.startswith("#!")]
    assert len(code) == LINES_OF_A_SCRIPT
    assert f"from image_encoder_vit.commands.{name} import main" in code


def test_every_way_to_start_it_reaches_the_same_command(tmp_path: Path) -> None:
    """The installed program and `-m`, from a folder where no checkout lies."""
    program = Path(sys.executable).with_name("image-encoder-vit")
    module = [sys.executable, "-m"]
    ways = [
        [str(program), "encode"],
        [*module, "image_encoder_vit", "encode"],
        [*module, "image_encoder_vit.commands.encode"],
    ]
    Image.new("RGB", (8, 8)).save(tmp_path / "page.png")
    command = ["page.png", "--output", "features", "--device", "warp9"]
    running = [
        subprocess.Popen([*way, *command], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for way in ways
    ]
    ended = [(process.communicate(), process.returncode) for process in running]
    assert [status for _, status in ended] == [2, 2, 2]
    assert {errors for (_, errors), _ in ended} == {ended[0][0][1]}
    assert ended[0][0][1].startswith("error: Cannot use --device warp9: ")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("no such\x1b[2J file"), "no such\\x1b[2J file"),
        (ValueError("one\n\n  two\nthree\nfour\nfive"), "one\ntwo\nthree\nfour"),
        (ImportError("it comes with the extra 'export'"), "it comes with the extra 'export'"),
        (ZeroDivisionError(), "ZeroDivisionError"),
        (torch.OutOfMemoryError("tried to allocate 9 GiB"), "tried to allocate 9 GiB"),
        (ValueError("Caught ValueError in DataLoader worker.\nTraceback:\nValueError: cut.png"), "cut.png"),
    ],
)
def test_an_error_is_told_and_makes_the_status_2(
    error: Exception, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: Namespace) -> int:
        raise error

    assert run_command(fail, Namespace(), after_interrupt="nothing was written") == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_faults_of_the_package_keep_their_traceback() -> None:
    with pytest.raises(KeyError):
        run_command(lambda arguments: {}["absent"], Namespace(), after_interrupt="nothing was written")


def test_the_process_is_as_it_was_before() -> None:
    before = logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.get_num_threads(), torch.initial_seed()

    def work(arguments: Namespace) -> int:
        assert logging.get_verbosity() == logging.ERROR
        assert not logging.is_progress_bar_enabled()
        torch.set_num_threads(before[2] + 1)
        torch.manual_seed(before[3] + 1)
        raise arguments.error

    for error in (ValueError("told"), KeyboardInterrupt(), KeyError("not told")):
        with suppress(KeyError):
            run_command(work, Namespace(error=error), after_interrupt="nothing was written")
        after = logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.get_num_threads()
        assert (*after, torch.initial_seed()) == before


def test_an_answer_of_the_hub_is_told_without_its_address(capsys: pytest.CaptureFixture[str]) -> None:
    httpx = importlib.import_module(HfHubHTTPError.__bases__[0].__module__.split(".")[0])
    request = httpx.Request("GET", "https://hub.example/x?signature=secret")

    def fail(arguments: Namespace) -> int:
        raise HfHubHTTPError(
            "for url https://hub.example/x?signature=secret", response=httpx.Response(503, request=request)
        )

    assert run_command(fail, Namespace(), after_interrupt="nothing was written") == 2
    assert capsys.readouterr().err == "error: the Hub answers with status 503\n"


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_ctrl_c_is_one_line_that_says_what_goes_on(
    rank: str, lines: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)

    def interrupt(arguments: Namespace) -> int:
        raise KeyboardInterrupt

    assert run_command(interrupt, Namespace(), after_interrupt="the same command goes on") == 130
    assert capsys.readouterr().err == "error: interrupted; the same command goes on\n" * lines


def test_the_bar_writes_above_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(2, "page") as progress:
        progress.write("page 1")
        progress.update(2)
    shown = capsys.readouterr()
    assert shown.out == "page 1\n"
    assert "2/2" in shown.err
    with progress_bar(2, "page", is_shown=False) as progress:
        progress.update(2)
    assert not capsys.readouterr().err


def test_an_output_is_replaced_when_asked(
    tmp_path: Path, model_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    page, output = ROOT / "samples" / "page.png", tmp_path / "features.safetensors"
    output.write_text("precious")
    command = ["encode", str(page), "--checkpoint", model_folder, "--output", str(output), "--device", "cpu"]
    assert main(command) == 2
    assert "exists already: add --overwrite to replace it" in capsys.readouterr().err
    assert output.read_text() == "precious"
    assert main([*command, "--overwrite"]) == 0
    assert load_file(output)[str(page)].shape == (20, 2, 2)


def test_a_revision_belongs_to_a_repository(model_folder: str) -> None:
    for checkpoint, reason in (
        ("sample", "'sample' is none"),
        ("random", "'random' is none"),
        (model_folder, "is on this disk"),
    ):
        for load in (load_model, load_processor):
            with pytest.raises(ValueError, match=f"--revision v1: .*{reason}"):
                load(checkpoint, revision="v1")


def test_devices_by_name() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert isinstance(choose_device("auto"), torch.device)
    for name in ("warp9", "cuda:77"):
        with pytest.raises(ValueError, match=f"Cannot use --device {name}: "):
            choose_device(name)
