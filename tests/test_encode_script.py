"""The main job as a user runs it: `image-encoder-vit encode`, and scripts/encode.py against a Hub."""

import contextlib
import io
import json
import re
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from checkpoints import folder_files
from hub_client import client_environment, run_script
from hub_server import HubServer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from image_encoder_vit import ImageEncoderViTImageProcessorPil
from image_encoder_vit.commands import encode as command
from image_encoder_vit.corpora.pictures import pca_to_rgb

pytest_plugins = ["hub_fixtures"]

ROOT = Path(__file__).parent.parent
SAMPLE_PAGE = ROOT / "samples" / "page.png"


def encode(*arguments: object) -> CompletedProcess[str]:
    """As the command does it, in this process: each new one would import torch again."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            status = command.main([*map(str, arguments)])
        except SystemExit as end:
            status = int(end.code or 0)
    return CompletedProcess([], status, out.getvalue(), errors.getvalue())


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with images in four formats, below each other, and a file that is no image."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    page = Image.open(SAMPLE_PAGE).convert("RGB").resize((300, 400))
    for name in ("a.jpg", "b.png", "more/c.tiff", "more/d.webp"):
        page.save(folder / name)
    (folder / "notes.txt").write_text("left out: not an image by its name")
    return folder


def test_a_folder_of_images(images: Path, model_folder: str, tmp_path: Path) -> None:
    output, plot = tmp_path / "new" / "features.safetensors", tmp_path / "plot.png"
    result = encode(images, images / "b.png", "--checkpoint", model_folder, "--output", output, "--plot", plot)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(": 400 x 300 px -> 128 x 128 px, grid 8 x 8, features (20, 2, 2), 4 tokens, ") == 4
    assert re.search(r"4 tokens, \d+\.\d\d s\n", result.stdout)
    assert "RANDOM" not in result.stdout
    assert "4/4" in result.stderr  # the progress bar
    features = load_file(output)
    names = [str(images / name) for name in ("a.jpg", "b.png", "more/c.tiff", "more/d.webp")]
    assert sorted(features) == names

    model = AutoModel.from_pretrained(model_folder)
    processor = ImageEncoderViTImageProcessorPil.from_pretrained(model_folder)
    with torch.inference_mode():
        expected = model(**processor(names[1], return_tensors="pt")).last_hidden_state[0]
    torch.testing.assert_close(features[names[1]], expected, rtol=1e-5, atol=1e-6)
    with safe_open(output, "pt") as file:
        metadata = file.metadata()
    assert metadata["checkpoint"] == model_folder
    place = {"original_size": [400, 300], "valid_region": [0, 16, 128, 96]}
    assert json.loads(metadata["images"]) == dict.fromkeys(names, place)
    # Four rows of three pictures, 420 px wide and 560 px high, below a heading: the page, the neck, the last map.
    with Image.open(plot) as picture:
        assert picture.width == 3 * 420 + 4 * 14
        assert 4 * (560 + 26 + 14) < picture.height < 4 * (560 + 26 + 14) + 200
    assert [path.name for path in output.parent.iterdir()] == ["features.safetensors"]


def test_a_preset_with_tiles(model_folder: str, images: Path, tmp_path: Path) -> None:
    output, small = tmp_path / "features.safetensors", images / "b.png"
    arguments = ("--checkpoint", model_folder, "--output", output, "--preset", "gundam")
    result = encode(SAMPLE_PAGE, small, *arguments)
    assert result.returncode == 0, result.stderr
    assert "1754 x 1240 px -> 1024 x 1024 px, grid 64 x 64, features (20, 16, 16)" in result.stdout
    assert result.stdout.count(", 3 x 2 tiles, features (20, 30, 20)") == 1
    features = load_file(output)
    assert features.keys() == {str(SAMPLE_PAGE), f"{SAMPLE_PAGE}:tiles", str(small)}
    processor = ImageEncoderViTImageProcessorPil.from_preset("gundam")
    with torch.inference_mode():
        expected = AutoModel.from_pretrained(model_folder)(**processor(str(SAMPLE_PAGE), return_tensors="pt"))
    torch.testing.assert_close(features[f"{SAMPLE_PAGE}:tiles"], expected.local_feature_maps[0], rtol=1e-4, atol=1e-5)
    unknown = encode(small, *arguments[:-1], "huge")
    assert unknown.returncode == 2
    assert "invalid choice: 'huge'" in unknown.stderr


def test_a_checkpoint_from_the_hub(hub: HubServer, home: Path, images: Path, model_folder: str, tmp_path: Path) -> None:
    hub.add_repository("encode/model", folder_files(Path(model_folder)))
    arguments = [images / "a.jpg", "--checkpoint", "encode/model", "--output", "hub.safetensors"]
    environment = client_environment(hub.endpoint, home)
    result = run_script("encode.py", *map(str, arguments), environment=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert encode(images / "a.jpg", "--checkpoint", model_folder, "--output", tmp_path / "local").returncode == 0
    name = str(images / "a.jpg")
    from_hub, from_folder = load_file(tmp_path / "hub.safetensors")[name], load_file(tmp_path / "local")[name]
    torch.testing.assert_close(from_hub, from_folder, rtol=1e-5, atol=1e-6)

    arguments[2:] = ["encode/absent", "--output", "absent.safetensors"]
    result = run_script("encode.py", *map(str, arguments), environment=environment, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "encode/absent" in result.stderr
    assert "Traceback" not in result.stderr


def test_dtype_device_and_no_pad(images: Path, model_folder: str, tmp_path: Path) -> None:
    output = tmp_path / "features.safetensors"
    result = encode(
        images / "b.png", "--checkpoint", model_folder, "--output", output,
        "--dtype", "bfloat16", "--device", "cpu", "--no-pad",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "1 image(s), bfloat16 on cpu" in result.stdout
    assert "400 x 300 px -> 128 x 96 px, grid 8 x 6, features (20, 2, 2)" in result.stdout
    assert next(iter(load_file(output).values())).dtype == torch.bfloat16


def test_bad_files_do_not_lose_the_others(images: Path, model_folder: str, tmp_path: Path) -> None:
    (images / "bad.png").write_bytes((images / "b.png").read_bytes()[:500])
    (images / "empty.jpg").touch()
    output = tmp_path / "features.safetensors"
    result = encode(images, tmp_path / "absent.png", "--checkpoint", model_folder, "--output", output)
    assert result.returncode == 1
    assert len(load_file(output)) == 4
    assert re.search(r"bad.png: skipped: Cannot read .*bad.png", result.stderr)
    assert re.search(r"empty.jpg: skipped: Cannot read .*empty.jpg", result.stderr)
    assert re.search(r"absent.png: skipped: No image file at .*absent.png", result.stderr)
    assert "3 of 7 image(s) could not be encoded" in result.stderr
    assert "Traceback" not in result.stderr


def test_when_nothing_can_be_encoded_nothing_is_written(model_folder: str, tmp_path: Path) -> None:
    output = tmp_path / "features.safetensors"
    result = encode(tmp_path / "absent.png", "--checkpoint", model_folder, "--output", output)
    assert result.returncode == 1
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "/no/such/folder"], "/no/such/folder"),
        (["--device", "warp9"], "--device warp9"),
    ],
)
def test_bad_arguments_are_one_clear_line(images: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = encode(images, "--output", tmp_path / "f.safetensors", *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_an_empty_folder_is_named(tmp_path: Path, model_folder: str) -> None:
    (tmp_path / "empty").mkdir()
    result = encode(tmp_path / "empty", "--checkpoint", model_folder, "--output", tmp_path / "f.safetensors")
    assert result.returncode == 2
    assert re.search(r"error: No page in folder .*empty", result.stderr)


def test_a_checkpoint_of_another_model_is_refused_before_its_weights_are_fetched(images: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_vl_v2", "auto_map": {"AutoModel": "m.Model"}}')
    result = encode(images, "--checkpoint", tmp_path, "--output", tmp_path / "f.safetensors")
    assert result.returncode == 2
    assert "type 'deepseek_vl_v2', not 'image_encoder_vit'" in result.stderr
    assert f"image-encoder-vit pull {tmp_path} FOLDER" in result.stderr


def test_a_checkpoint_with_missing_weights_is_refused(images: Path, model_folder: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (broken / name).write_bytes((Path(model_folder) / name).read_bytes())
    weights = load_file(Path(model_folder) / "model.safetensors")
    del weights["encoder.net_3.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    result = encode(images, "--checkpoint", broken, "--output", tmp_path / "f.safetensors")
    assert result.returncode == 2
    assert "Missing weights (1): encoder.net_3.weight" in result.stderr


def test_without_a_checkpoint_it_uses_the_sample_and_says_so(tmp_path: Path) -> None:
    output, plot = tmp_path / "features.safetensors", tmp_path / "plot.png"
    result = encode(SAMPLE_PAGE, "--output", output, "--plot", plot)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "Using the package's small sample encoder, not DeepSeek-OCR's; --checkpoint chooses another."
    assert "1754 x 1240 px -> 768 x 768 px, grid 48 x 48, features (128, 12, 12), 144 tokens" in result.stdout
    assert load_file(output)[str(SAMPLE_PAGE)].shape == (128, 12, 12)
    with safe_open(output, "pt") as file:
        assert file.metadata()["checkpoint"] == "sample"
    with Image.open(plot) as picture:  # The page, its layout, the neck and the last map.
        assert picture.width == 4 * 420 + 5 * 14


@pytest.mark.full_size
def test_random_weights_are_there_for_the_asking_and_said_to_mean_nothing(tmp_path: Path) -> None:
    output = tmp_path / "features.safetensors"
    result = encode(SAMPLE_PAGE, "--checkpoint", "random", "--output", output)
    assert result.returncode == 0, result.stderr
    assert "RANDOM weights" in result.stdout
    assert "Its features mean nothing until real weights are used" in result.stdout
    assert "1754 x 1240 px -> 1024 x 1024 px, grid 64 x 64, features (1024, 16, 16), 256 tokens" in result.stdout
    assert load_file(output)[str(SAMPLE_PAGE)].shape == (1024, 16, 16)


def test_pca_colours_follow_the_features() -> None:
    # Four cells along one direction: the first component orders them, the others have nothing to show.
    direction = torch.randn(10, generator=torch.Generator().manual_seed(0))
    features = direction[:, None, None] * torch.tensor([[0.0, 1.0], [2.0, 4.0]])
    colors = pca_to_rgb(features)
    assert colors.shape == (3, 2, 2)
    first = colors[0].flatten().tolist()
    assert first == sorted(first) or first == sorted(first, reverse=True)
    assert {0, 255} <= set(first)
    assert torch.equal(pca_to_rgb(features), colors)
    assert pca_to_rgb(torch.ones(5, 1, 1)).shape == (3, 1, 1)
