"""torch.compile, torch.export, ONNX files and OpenVINO give what the model gives."""

import importlib
import json
import os
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from builders import random_pixels, relative_error, small_model

from image_encoder_vit import ImageEncoderViTConfig, ImageEncoderViTModel
from image_encoder_vit.commands import export as export_command
from image_encoder_vit.runtimes import onnx_export
from image_encoder_vit.runtimes.fixed_size import OUTPUT_NAMES
from image_encoder_vit.runtimes.onnx_export import export_onnx
from image_encoder_vit.runtimes.openvino import cpu_settings, openvino_encoder

SIZE = (144, 208)
LONG = pytest.mark.skipif("LONG_TESTS" not in os.environ, reason="LONG_TESTS=1 runs it")
BOUND = 1e-4


def needs(*names: str) -> None:
    for name in names:
        pytest.importorskip(name, reason=f"{name} comes with the extra export, which this environment lacks")


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs("onnx", "onnxscript", "onnxruntime")
    path = tmp_path_factory.mktemp("onnx") / "encoder.onnx"
    assert export_onnx(small_model(), path, SIZE, {"commit": "abc"}) <= BOUND
    return path


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_one_compiled_graph_serves_a_repeated_size(attn_implementation: str) -> None:
    model = small_model()
    model.set_attn_implementation(attn_implementation)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=False)
    with torch.no_grad():
        for seed in range(3):
            pixels = random_pixels(1, 3, *SIZE, seed=seed)
            assert relative_error(compiled(pixels).last_hidden_state, model(pixels).last_hidden_state) <= 1e-5
    assert counter.frame_count == 1


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_an_exported_model_takes_any_batch(attn_implementation: str) -> None:
    model = small_model()
    model.set_attn_implementation(attn_implementation)
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        program = torch.export.export(
            model.encoder,
            (random_pixels(2, 3, *SIZE),),
            {"attn_implementation": attn_implementation},
            dynamic_shapes={"x": {0: batch}, "attn_implementation": None},
            strict=False,
        )
        for images in (1, 3):
            pixels = random_pixels(images, 3, *SIZE)
            actual = program.module()(pixels, attn_implementation=attn_implementation)
            assert relative_error(actual, model(pixels).last_hidden_state) <= 1e-5


@pytest.mark.parametrize("batch", [1, 3])
def test_an_onnx_file_runs_in_both_runtimes(onnx_file: Path, batch: int) -> None:
    needs("openvino")
    onnxruntime, openvino = importlib.import_module("onnxruntime"), importlib.import_module("openvino")
    model, pixels = small_model(), random_pixels(batch, 3, *SIZE)
    with torch.inference_mode():
        expected = model(pixels)
        bf16_error = relative_error(small_model().bfloat16()(pixels).last_hidden_state, expected.last_hidden_state)
    session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    for name, values in zip(OUTPUT_NAMES, session.run(None, {"pixel_values": pixels.numpy()}), strict=True):
        assert relative_error(torch.from_numpy(values), expected[name]) <= BOUND
    for precision, bound in (("fp32", BOUND), ("bf16", 2 * bf16_error)):
        run = openvino.Core().compile_model(str(onnx_file), "CPU", cpu_settings(precision, 2))
        values = torch.from_numpy(run([pixels.numpy()])["last_hidden_state"])
        assert relative_error(values, expected.last_hidden_state) <= bound


def test_an_onnx_file_says_what_it_holds(onnx_file: Path) -> None:
    proto = importlib.import_module("onnx").load(str(onnx_file))
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(metadata["config"])["model_type"] == "image_encoder_vit"
    assert json.loads(metadata["image_size_px"]) == list(SIZE)
    assert json.loads(metadata["source"]) == {"commit": "abc"}
    assert [file.name for file in onnx_file.parent.iterdir()] == ["encoder.onnx"]


def test_a_mismatch_leaves_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    needs("onnx", "onnxscript", "onnxruntime")
    monkeypatch.setattr(
        onnx_export, "expected_outputs", lambda model, encoder, pixels: [x * 1.01 for x in encoder(pixels)]
    )
    with pytest.raises(ArithmeticError, match="was not written"):
        export_onnx(small_model(), tmp_path / "encoder.onnx", (64, 64))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def two_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks have 0.3 MB of weights: these count as too many for one file."""
    needs("onnx", "onnxscript", "onnxruntime")
    monkeypatch.setattr(onnx_export, "MAX_WEIGHT_BYTES", 100_000)


def test_weights_too_large_for_one_file_lie_beside_it(
    two_files: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = small_model(num_hidden_layers=2, global_attn_indexes=[1])
    path, data = tmp_path / "made" / "encoder.onnx", tmp_path / "made" / "encoder.onnx.data"
    assert export_onnx(model, path, SIZE) <= BOUND
    assert sorted(path.parent.iterdir()) == [path, data]
    weight_bytes = sum(4 * parameter.numel() for parameter in model.parameters())
    assert data.stat().st_size > 0.5 * weight_bytes

    # Both work wherever they lie together.
    moved = path.parent.rename(tmp_path / "moved") / path.name
    onnxruntime = importlib.import_module("onnxruntime")
    pixels = random_pixels(1, 3, *SIZE)
    session = onnxruntime.InferenceSession(str(moved), providers=["CPUExecutionProvider"])
    actual = torch.from_numpy(session.run(["last_hidden_state"], {"pixel_values": pixels.numpy()})[0])
    with torch.inference_mode():
        assert relative_error(actual, model(pixels).last_hidden_state) <= BOUND
    moved.unlink()
    with pytest.raises(FileExistsError, match=r"encoder.onnx.data' exists already"):
        export_onnx(model, moved, SIZE)


@pytest.mark.parametrize("failing", ["the check", "the last rename"])
def test_of_two_files_none_stays_after_a_failure(
    failing: str, two_files: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def largest_error(*arguments: object) -> float:
        if failing == "the last rename":
            (tmp_path / "encoder.onnx").mkdir()  # Nothing can be renamed to its name.
            return 0.0
        return float("nan")

    monkeypatch.setattr(onnx_export, "largest_error", largest_error)
    with pytest.raises((ArithmeticError, OSError)):
        export_onnx(small_model(num_hidden_layers=2, global_attn_indexes=[1]), tmp_path / "encoder.onnx", SIZE)
    left = [path.name for path in tmp_path.iterdir()]
    assert left == ([] if failing == "the check" else ["encoder.onnx"])


def test_the_command_refuses_in_one_line(model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([model_folder, str(tmp_path / "a.onnx"), "--size", "100x64"], "multiples of patch_size=16"),
        ([model_folder, str(Path(__file__))], "exists already"),
    ):
        assert export_command.main(arguments) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ")
        assert told.count("\n") == 1
        assert message in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["openvino", "onnxruntime"])
def test_a_missing_runtime_names_its_extra(missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if missing == "onnxruntime":
        needs("onnx", "onnxscript")

    def import_module(name: str) -> object:
        if name == missing:
            raise ModuleNotFoundError(name, name=name)
        return object()

    monkeypatch.setattr(importlib, "import_module", import_module)
    model = small_model()
    run = {
        "openvino": lambda: openvino_encoder(model),
        "onnxruntime": lambda: export_onnx(model, tmp_path / "a.onnx", SIZE),
    }[missing]
    with pytest.raises(ImportError, match=rf"{missing} is not installed.*image-encoder-vit\[export\]"):
        run()


def test_openvino_gives_what_the_model_gives() -> None:
    needs("openvino")
    model, pixels = small_model(), random_pixels(2, 3, *SIZE)
    mask = torch.ones(2, *SIZE)
    mask[:, 64:] = 0
    with torch.inference_mode():
        expected = model(pixels, pixel_mask=mask)
        bf16_error = relative_error(small_model().bfloat16()(pixels).last_hidden_state, expected.last_hidden_state)
    for precision, bound in (("fp32", BOUND), ("bf16", 2 * bf16_error)):
        actual = openvino_encoder(model, precision)(pixels, pixel_mask=mask)
        assert type(actual) is type(expected)
        for name in expected:
            assert relative_error(actual[name], expected[name]) <= bound


def test_openvino_refuses_what_it_cannot_do() -> None:
    needs("openvino")
    with pytest.raises(ValueError, match="precision must be one of 'fp32', 'bf16', got 'int8'"):
        openvino_encoder(small_model(), "int8")
    encoder = openvino_encoder(small_model())
    with pytest.raises(ValueError, match="multiples of patch_size"):
        encoder(random_pixels(1, 3, 100, 64))
    with pytest.raises(ValueError, match="output_attentions=True needs the PyTorch model"):
        encoder(random_pixels(1, 3, 64, 64), output_attentions=True)


@pytest.mark.full_size
@pytest.mark.parametrize("side_px", [pytest.param(640, marks=LONG), 1024])
def test_an_onnx_file_of_full_width(side_px: int, tmp_path: Path) -> None:
    """All widths and sizes of the full encoder; two of its twelve blocks, one of each kind."""
    needs("onnx", "onnxscript", "onnxruntime")
    torch.manual_seed(0)
    model = ImageEncoderViTModel(ImageEncoderViTConfig(num_hidden_layers=2, global_attn_indexes=[1])).eval()
    assert export_onnx(model, tmp_path / "encoder.onnx", (side_px, side_px)) <= BOUND


@pytest.mark.skipif("LARGEST_ENCODER" not in os.environ, reason="needs 12 GB and minutes: LARGEST_ENCODER=1 runs it")
def test_the_largest_encoder_takes_two_files(tmp_path: Path) -> None:
    """SAM's ViT-H, 637 million parameters: by hand, `LARGEST_ENCODER=1 pytest tests/export_checks.py -k largest`."""
    needs("onnx", "onnxscript", "onnxruntime")
    config = ImageEncoderViTConfig(
        hidden_size=1280,
        num_hidden_layers=32,
        num_attention_heads=16,
        global_attn_indexes=[7, 15, 23, 31],
        downsample_channels=[],
    )
    model = ImageEncoderViTModel(config).eval()
    assert export_onnx(model, tmp_path / "encoder.onnx", (256, 256)) <= BOUND
    assert (tmp_path / "encoder.onnx.data").stat().st_size > 2**31
    assert (tmp_path / "encoder.onnx").stat().st_size < 2**26
