"""A DeepEncoder's whole view in ONNX Runtime and OpenVINO, its cells for late interaction, and its documentation."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import random_pixels, relative_error
from deep import small_deep_encoder

from image_encoder_vit import ImageEncoderViTImageProcessorPil, cell_vectors
from image_encoder_vit.commands import benchmark
from image_encoder_vit.commands.export import main as export

ROOT = Path(__file__).parent.parent
BOUND = 1e-5


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep")
    small_deep_encoder().save_pretrained(folder)
    ImageEncoderViTImageProcessorPil(size=128).save_pretrained(folder)
    return folder


def test_onnx_of_the_whole_view(deep_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    file = tmp_path / "deep.onnx"
    assert export([str(deep_folder), str(file), "--size", "192x128"]) == 0  # CLIP's positions are resized.
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == [
        "last_hidden_state",
        "pooler_output",
        "patch_embeds",
        "vision_tokens",
    ]
    pixels = random_pixels(3, 3, 192, 128)
    cells, pooled, sam_tokens, tokens = map(torch.from_numpy, session.run(None, {"pixel_values": pixels.numpy()}))
    with torch.no_grad():
        expected = small_deep_encoder()(pixels)
    assert relative_error(tokens, torch.stack(expected.vision_tokens)) <= BOUND
    assert relative_error(cells, expected.last_hidden_state) <= BOUND
    assert relative_error(pooled, expected.pooler_output) <= BOUND
    assert relative_error(sam_tokens, expected.patch_embeds) <= BOUND


def test_openvino_of_the_whole_view() -> None:
    pytest.importorskip("openvino")
    from image_encoder_vit.runtimes.openvino import openvino_encoder

    model, pixels = small_deep_encoder(), random_pixels(2, 3, 192, 128)
    mask = torch.zeros(2, 192, 128)
    mask[:, :64] = 1
    encoder = openvino_encoder(model)
    actual = encoder(pixels, pixel_mask=mask)
    with torch.no_grad():
        expected = model(pixels, pixel_mask=mask)
    for name in ("last_hidden_state", "pooler_output", "patch_embeds", "sam_feature_map"):
        assert relative_error(actual[name], expected[name]) <= BOUND, name
    assert relative_error(torch.stack(actual.vision_tokens), torch.stack(expected.vision_tokens)) <= BOUND
    with pytest.raises(ValueError, match="Tiles need the PyTorch model"):
        encoder(pixels, pixel_values_local=random_pixels(2, 3, 64, 64))


def test_cells_for_late_interaction_are_unit_vectors_without_padding_and_newlines() -> None:
    processor = ImageEncoderViTImageProcessorPil(size=256, tile_size=128, min_tiles=2, max_tiles=6)
    wide, small = torch.zeros(3, 40, 160, dtype=torch.uint8), torch.zeros(3, 60, 60, dtype=torch.uint8)
    inputs = processor([wide, small], return_tensors="pt")
    model = small_deep_encoder()
    with torch.no_grad():
        outputs = model(**inputs)
    maps = processor.post_process_feature_maps(outputs, inputs, stride=model.encoder.stride)
    vectors = cell_vectors(maps)
    assert len(vectors) == 2
    assert maps[0].local_map is not None
    tiles, view = maps[0].local_map.features, maps[0].global_map.features
    # The canvas has 4 x 4 cells; the wide image lies on the two rows in its middle.
    assert view.shape == (24, 2, 4)
    assert vectors[0].shape == (tiles[0].numel() + 8, 24)
    assert vectors[1].shape == (maps[1].global_map.features[0].numel(), 24)
    for own in vectors:
        torch.testing.assert_close(own.norm(dim=1), torch.ones(len(own)))
    torch.testing.assert_close(vectors[0][0], torch.nn.functional.normalize(tiles[:, 0, 0], dim=0))
    torch.testing.assert_close(vectors[0][-1], torch.nn.functional.normalize(view[:, -1, -1], dim=0))
    # Every image is its own best match.
    scores = [[float((query @ page.T).amax(1).mean()) for page in vectors] for query in vectors]
    assert scores[0][0] == pytest.approx(1, abs=1e-5)
    assert scores[1][1] == pytest.approx(1, abs=1e-5)


def test_the_documentation_s_python_runs(deep_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("pypdfium2")
    page = (ROOT / "docs" / "deep-encoder.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 3
    shutil.copytree(deep_folder, tmp_path / "deep-encoder")
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    code = "\n".join(block for block in blocks if "unlimited_ocr" not in block)
    # What a query finds depends on trained weights; a whole page finds itself with any.
    code += """
assert len(scores) == len(pages) == 3 and scores[best] == max(scores)
whole = vectors_of([pages[1]])[0]
scores = [float((whole @ page.T).amax(dim=1).mean()) for page in vectors_of(pages)]
assert max(range(3), key=scores.__getitem__) == 1 and scores[1] > 0.9999, scores
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.full_size
def test_the_benchmark_times_the_whole_deep_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers.models.unlimited_ocr")
    arguments = ["--part", "deep-encoder", "--sizes", "128x128", "--dtypes", "float32", "--rounds", "1", "--no-memory"]
    arguments += ["--contenders", benchmark.OURS, benchmark.DROP_IN, "--json", str(tmp_path / "report.json")]
    assert benchmark.main(arguments) == 0
    results = json.loads((tmp_path / "report.json").read_text())["cases"][0]["results"]
    assert [result["contender"] for result in results] == [benchmark.BASELINE, benchmark.OURS, benchmark.DROP_IN]
    assert max(result["error"] for result in results) <= 1e-5
    assert "deep-encoder, 128 x 128 px" in capsys.readouterr().out


def test_the_benchmark_counts_both_towers() -> None:
    case = benchmark.Case(1024, 1024, 1, "float32")
    clip_gflop = 161.7 + 2 * 256 * 2048 * 1280 / 1e9
    whole = benchmark.count_gflop(case._replace(model=benchmark.DEEP_ENCODER))
    assert whole - benchmark.count_gflop(case) == pytest.approx(clip_gflop, rel=0.01)
