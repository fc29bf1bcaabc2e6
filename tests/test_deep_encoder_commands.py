"""The commands with a folder that holds a whole DeepEncoder: maps as ever, and the decoder's sequences on request."""

from pathlib import Path

import pytest
import torch
from builders import relative_error
from deep import small_deep_encoder
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

from image_encoder_vit import ImageEncoderViTImageProcessorPil
from image_encoder_vit.commands.encode import main as encode

SAMPLES = Path(__file__).parent.parent / "samples"


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep")
    small_deep_encoder().save_pretrained(folder)
    ImageEncoderViTImageProcessorPil(size=128, tile_size=64, min_tiles=2, max_tiles=6).save_pretrained(folder)
    return folder


def outputs_of(folder: Path) -> tuple[object, object]:
    inputs = AutoImageProcessor.from_pretrained(folder, backend="pil")(SAMPLES / "page.png", return_tensors="pt")
    with torch.no_grad():
        return AutoModel.from_pretrained(folder)(**inputs), inputs


def test_encode_keeps_maps_and_tokens(deep_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = str(SAMPLES / "page.png")
    command = [page, "--checkpoint", str(deep_folder), "--device", "cpu"]
    plot = tmp_path / "page-with-features.png"
    assert encode([*command, "--tokens", "--output", str(tmp_path / "with"), "--plot", str(plot)]) == 0
    assert encode([*command, "--output", str(tmp_path / "without")]) == 0
    outputs, _ = outputs_of(deep_folder)
    expected = {
        page: outputs.last_hidden_state[0],
        f"{page}:tiles": outputs.local_feature_maps[0],
        f"{page}:tokens": outputs.vision_tokens[0],
    }
    written = load_file(tmp_path / "with")
    assert written.keys() == expected.keys()
    assert all(relative_error(written[name], value) <= 1e-6 for name, value in expected.items())
    assert load_file(tmp_path / "without").keys() == {page, f"{page}:tiles"}
    assert plot.stat().st_size > 0
    assert f", {len(outputs.vision_tokens[0])} vision tokens" in capsys.readouterr().out


def test_tokens_need_a_deep_encoder(model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(SAMPLES / "page.png"), "--checkpoint", model_folder, "--tokens", "--output", str(tmp_path / "out")]
    assert encode(command) == 2
    assert "--tokens needs the whole DeepEncoder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
