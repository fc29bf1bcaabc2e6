"""The commands with a folder that holds a whole DeepEncoder: maps as ever, and the decoder's sequences on request."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from builders import relative_error
from deep import small_deep_encoder
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

from image_encoder_vit import ImageEncoderViTImageProcessorPil
from image_encoder_vit.commands.encode import main as encode
from image_encoder_vit.commands.extract import main as extract
from image_encoder_vit.corpora.pages import PageReader, ReadOptions, find_pages
from image_encoder_vit.corpora.store import FeatureStore

SAMPLES = Path(__file__).parent.parent / "samples"


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep")
    small_deep_encoder().save_pretrained(folder)
    ImageEncoderViTImageProcessorPil(size=128, tile_size=64, min_tiles=2, max_tiles=6).save_pretrained(folder)
    return folder


@pytest.fixture
def new_accelerator() -> Iterator[None]:
    """Accelerate as it is in a process that has not used it."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


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


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    """A folder of pages with tiles in several grids, and one too small for tiles."""
    (tmp_path / "pages").mkdir()
    page = Image.open(SAMPLES / "page.png")
    for name, size in {"tall": (200, 500), "tall too": (190, 500), "wide": (700, 200), "small": (50, 60)}.items():
        page.resize(size).save(tmp_path / "pages" / f"{name}.png")
    return tmp_path / "pages"


@pytest.mark.usefixtures("new_accelerator")
def test_extract_keeps_tokens_beside_the_maps(
    deep_folder: Path, pages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "store"
    command = [str(pages), "--checkpoint", str(deep_folder), "--device", "cpu", "--output", str(output)]
    command += ["--workers", "0", "--pages-per-shard", "3", "--feature-dtype", "float32"]
    assert extract([*command, "--tokens"]) == 0
    store = FeatureStore(output)
    assert store.manifest["settings"]["tokens"] is True
    processor = AutoImageProcessor.from_pretrained(deep_folder, backend="pil")
    model = AutoModel.from_pretrained(deep_folder)
    lengths = {}
    for page in find_pages([str(pages)], ReadOptions()):
        with torch.no_grad():
            outputs = model(**processor(PageReader(ReadOptions()).read(page).image, return_tensors="pt"))
        assert relative_error(store[page.id], outputs.last_hidden_state[0]) <= 1e-5
        assert relative_error(store.tokens(page.id), outputs.vision_tokens[0]) <= 1e-5
        lengths[Path(page.source).stem] = len(store.tokens(page.id))
    assert len(store) == 4
    assert lengths["small"] == 2 * 3 + 1
    assert lengths["tall"] == lengths["tall too"] > lengths["small"]

    # A shard that has gone is made again, tokens included; other settings are refused.
    before = contents(output)
    (output / store.row(page.id)["shard"]).unlink()
    assert extract([*command, "--tokens"]) == 0
    assert contents(output) == before
    assert extract(["--verify", "--output", str(output)]) == 0
    capsys.readouterr()
    assert extract(command) == 2
    assert "settings.tokens was True, is None" in capsys.readouterr().err
    assert contents(output) == before


@pytest.mark.usefixtures("new_accelerator")
def test_extract_without_tokens_keeps_the_same_maps(
    deep_folder: Path, model_folder: str, pages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [str(pages), "--device", "cpu", "--workers", "0", "--feature-dtype", "float32", "--output"]
    assert extract([*options, str(tmp_path / "with"), "--checkpoint", str(deep_folder), "--tokens"]) == 0
    assert extract([*options, str(tmp_path / "without"), "--checkpoint", str(deep_folder)]) == 0
    with_tokens, without = FeatureStore(tmp_path / "with"), FeatureStore(tmp_path / "without")
    assert list(with_tokens) == list(without)
    assert all(relative_error(without[page_id], with_tokens[page_id]) <= 1e-6 for page_id in without)
    assert "tile_size" not in without.manifest["settings"]["processor"]
    with pytest.raises(ValueError, match="holds maps only: extract with --tokens"):
        without.tokens(next(iter(without)))
    with pytest.raises(KeyError, match="No features of 'nothing#0'"):
        with_tokens.tokens("nothing#0")

    capsys.readouterr()
    assert extract([*options, str(tmp_path / "plain"), "--checkpoint", model_folder, "--tokens"]) == 2
    assert "--tokens needs the whole DeepEncoder" in capsys.readouterr().err
    assert not (tmp_path / "plain").exists()
