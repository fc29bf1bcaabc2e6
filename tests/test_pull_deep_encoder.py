"""The whole DeepEncoder out of whole checkpoints, by ranges, and back: right bytes, few of them, clear refusals."""

import json
import re
from pathlib import Path

import pytest
import torch
from builders import DEEP_ENCODER_CODE, random_pixels, relative_error
from checkpoints import RECIPES, folder_files, write_checkpoint, write_tensors
from deep import small_deep_encoder, unlimited_ocr
from hub_client import Worker, client_environment, run_script
from hub_faults import Fault
from hub_server import HubServer
from safetensors.torch import load_file
from test_pull_faults import QUICK, leftovers
from torch import nn
from transformers import AutoModel

from image_encoder_vit import DeepEncoderModel, ImageEncoderViTImageProcessorPil, ImageEncoderViTModel
from image_encoder_vit.commands.pull import main as pull_main
from image_encoder_vit.commands.push import main as push_main
from image_encoder_vit.weights.export import export_weights
from image_encoder_vit.weights.native_folder import export_native_folder
from image_encoder_vit.weights.pull import pull

pytest_plugins = ["hub_fixtures"]

COMPLETE = DEEP_ENCODER_CODE | {
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "README.md",
    "provenance.json",
}
# The heads of CLIP's tower, which no tensor tells, as DeepSeek-OCR's config.json has them.
DEEPSEEK_CONFIG = {"model_type": "deepseek_vl_v2", "vision_config": {"width": {"clip-l-14-224": {"heads": 4}}}}


def model_in_bfloat16() -> DeepEncoderModel:
    return small_deep_encoder().to(torch.bfloat16)


def write_source(folder: Path, kind: str, model: DeepEncoderModel, decoder_values: int = 60) -> None:
    """A checkpoint with the weights of `model` inside, as DeepSeek-OCR or MLX lays them out."""
    weights = model.state_dict()
    decoder = torch.randn(4, decoder_values // 4).to(torch.bfloat16)
    if kind == "mlx":
        tensors = {
            name: value.permute(0, 2, 3, 1).contiguous() if value.ndim == 4 and "pos_embed" not in name else value
            for name, value in weights.items()
        }
        tensors["view_separator"] = tensors.pop("view_seperator")
        tensors["vision_model.embeddings.patch_embedding.weight"] = torch.zeros(20, 14, 14, 3, dtype=torch.bfloat16)
        tensors["language_model.lm_head.weight"] = decoder
    else:
        tensors = {f"model.{name}": value for name, value in weights.items()}
        tensors["model.vision_model.embeddings.patch_embedding.weight"] = torch.zeros(20, 3, 14, 14).bfloat16()
        tensors |= {"model.layers.0.mlp.up_proj.weight": decoder, "model.embed_tokens.weight": decoder.clone()}
        tensors["lm_head.weight"] = decoder.clone()
    write_tensors(folder, tensors, "odd" if kind == "deepseek-ocr" else "sharded" if kind == "sharded" else "single")
    (folder / "config.json").write_text(json.dumps(DEEPSEEK_CONFIG))


def assert_holds(folder: Path, model: nn.Module) -> None:
    assert {path.name for path in folder.iterdir()} == COMPLETE
    written = load_file(folder / "model.safetensors")
    expected = model.state_dict()
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], value) for name, value in expected.items())


@pytest.mark.parametrize("kind", ["deepseek-ocr", "sharded", "mlx"])
def test_every_layout_becomes_a_model(kind: str, tmp_path: Path) -> None:
    model = model_in_bfloat16()
    write_source(tmp_path / "source", kind, model)
    pulled = pull(tmp_path / "source", tmp_path / "model", part="deep-encoder")
    assert_holds(tmp_path / "model", model)
    assert pulled.layout == "deepseek-ocr"
    assert pulled.prefix == ("" if kind == "mlx" else "model.")
    assert any("Left out, as nothing reads it: " in notice for notice in pulled.notices)
    loaded = AutoModel.from_pretrained(tmp_path / "model")
    assert type(loaded) is DeepEncoderModel
    assert loaded.config.to_dict()["sam_config"]["window_size"] == 3
    pixels = random_pixels(1, 3, 128, 192)
    with torch.no_grad():
        assert torch.equal(loaded(pixels).vision_tokens[0], model(pixels).vision_tokens[0])
    processor = ImageEncoderViTImageProcessorPil.from_pretrained(tmp_path / "model")
    assert dict(processor.size) == {"height": 128, "width": 128}
    card = (tmp_path / "model" / "README.md").read_text()
    assert "# DeepEncoder" in card
    assert "7 vision tokens of 24 channels" in card
    assert "license: mit" in card


def test_a_pulled_folder_is_a_source_of_both_parts(tmp_path: Path) -> None:
    model = model_in_bfloat16()
    write_source(tmp_path / "source", "deepseek-ocr", model)
    pull(tmp_path / "source", tmp_path / "model", part="deep-encoder")
    processor = json.loads((tmp_path / "model" / "preprocessor_config.json").read_text())
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(processor | {"image_mean": [0.1] * 3}))
    again = pull(tmp_path / "model", tmp_path / "again", part="deep-encoder")
    assert again.layout == "image-encoder-vit"
    assert_holds(tmp_path / "again", model)
    assert json.loads((tmp_path / "again" / "preprocessor_config.json").read_text())["image_mean"] == [0.1] * 3

    pull(tmp_path / "model", tmp_path / "encoder")
    encoder = ImageEncoderViTModel.from_pretrained(tmp_path / "encoder")
    pixels = random_pixels(1, 3, 128, 128)
    with torch.no_grad():
        assert torch.equal(encoder(pixels).last_hidden_state, model(pixels).sam_feature_map)


def test_what_transformers_saves_of_unlimited_ocr(tmp_path: Path) -> None:
    model = small_deep_encoder()
    unlimited_ocr(model).save_pretrained(tmp_path / "source")
    pull(tmp_path / "source", tmp_path / "model", part="deep-encoder")
    assert_holds(tmp_path / "model", model)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("deepseek-ocr-2", "It is DeepSeek-OCR-2's: what reads SAM's features there is a Qwen2, not CLIP"),
        ("got-ocr2", "GOT-OCR2 and Vary hand SAM's features to one linear layer; no CLIP reads them."),
        ("got-ocr2-hf", "GOT-OCR2 and Vary hand SAM's features to one linear layer"),
        ("vary", "GOT-OCR2 and Vary hand SAM's features"),
        ("sam-pth", "Segment Anything has a mask decoder after its encoder; there is no CLIP in it."),
        ("sam-hf", "Segment Anything has a mask decoder after its encoder"),
        ("deepseek-vl", "without CLIP's tower beside it, which is looked for below vision_model"),
    ],
)
def test_models_without_one_are_refused_with_what_is_there(
    kind: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "source", RECIPES[kind])
    with pytest.raises(ValueError, match=re.escape(message)):
        pull(tmp_path / "source", tmp_path / "model", part="deep-encoder")
    assert pull_main([str(tmp_path / "source"), str(tmp_path / "model"), "--part", "deep-encoder"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: There is no DeepEncoder in this checkpoint.")
    assert "Without --part, pull takes its SAM encoder." in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_queries_keys_and_values_apart_are_refused_with_what_to_do(tmp_path: Path) -> None:
    native = unlimited_ocr(small_deep_encoder())
    native.save_pretrained(tmp_path / "source", save_original_format=False)
    with pytest.raises(ValueError, match="queries, keys and values apart: save the model by save_pretrained"):
        pull(tmp_path / "source", tmp_path / "model", part="deep-encoder")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.view_seperator": None}, "not complete. Weights missing (1): view_seperator"),
        (
            {"model.vision_model.post_layernorm.weight": torch.zeros(20)},
            "of another architecture: it also has model.vis",
        ),
        ({"model.projector.layers.weight": torch.zeros(24, 20)}, "of another shape (1): projector.layers.weight"),
        ({"model.vision_model.embeddings.position_embedding.weight": torch.zeros(6, 20)}, "1 + n x n, got 6"),
        ({"model.vision_model.transformer.layers.999999.mlp.fc1.bias": torch.zeros(48)}, "names block 999999, but"),
    ],
)
def test_damaged_and_foreign_checkpoints_are_refused(
    changes: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    tensors = {f"model.{name}": value for name, value in small_deep_encoder().state_dict().items()} | changes
    write_tensors(tmp_path / "source", {name: value for name, value in tensors.items() if value is not None}, "single")
    (tmp_path / "source" / "config.json").write_text(json.dumps(DEEPSEEK_CONFIG))
    with pytest.raises(ValueError, match=re.escape(message)):
        pull(tmp_path / "source", tmp_path / "model", part="deep-encoder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no part 'clip'\. Known: encoder, deep-encoder"):
        pull(tmp_path, tmp_path / "model", part="clip")


@pytest.mark.parametrize("kind", ["deepseek-ocr", "mlx"])
def test_from_the_hub_by_few_ranges(kind: str, hub: HubServer, worker: Worker, tmp_path: Path) -> None:
    model = model_in_bfloat16()
    write_source(tmp_path / "source", kind, model, decoder_values=4_000_000)
    hub.add_repository(f"deep/{kind}", folder_files(tmp_path / "source"))
    outcome = worker.call("pull", source=f"deep/{kind}", output_dir=tmp_path / "model", part="deep-encoder")
    assert outcome.result is not None, outcome.output
    assert_holds(tmp_path / "model", model)
    wanted = sum(value.nbytes for value in model.state_dict().values())
    assert outcome.result["bytes_moved"] <= 1.01 * wanted + 1_000_000
    whole = sum(path.stat().st_size for path in (tmp_path / "source").glob("*.safetensors"))
    assert outcome.result["bytes_moved"] < whole / 10


def test_after_a_fault_without_end_only_what_is_missing_is_fetched(
    hub: HubServer, worker: Worker, tmp_path: Path
) -> None:
    """The storage gives the header of the last file, and nothing else of it."""
    model = model_in_bfloat16()
    write_source(tmp_path / "source", "sharded", model)
    commit = hub.add_repository("deep/faulty", folder_files(tmp_path / "source"))
    blobs = hub.repositories["deep/faulty"].commits[commit]
    last = blobs[max(name for name in blobs if name.endswith(".safetensors"))]
    (tmp_path / "pulls").mkdir()
    output = tmp_path / "pulls" / "model"
    options = {"source": "deep/faulty", "output_dir": output, "part": "deep-encoder", "retry": QUICK}
    hub.faults[:] = [Fault("cut", path=last.oid, after=1, count=10_000, part=0.0)]
    outcome = worker.call("pull", **options)
    assert outcome.error is not None
    assert outcome.error[0] == "TransferError"
    assert not output.exists()
    hub.reset()
    assert worker.call("pull", **options).error is None
    assert_holds(output, model)
    assert leftovers(tmp_path / "pulls") == ["model"]
    assert " kept from an interrupted pull" in (output / "README.md").read_text()


def test_a_dry_run_of_a_push_checks_and_shows_the_folder(home: Path, tmp_path: Path) -> None:
    write_source(tmp_path / "source", "single", model_in_bfloat16())
    pull(tmp_path / "source", tmp_path / "model", part="deep-encoder")
    before = folder_files(tmp_path / "model")
    environment = client_environment("http://127.0.0.1:9", home)  # Nothing listens there.
    done = run_script("push_to_hub.py", "model", "push/deep", "--dry-run", environment=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in COMPLETE - {"README.md"}:
        assert f"{(tmp_path / 'model' / name).stat().st_size:,} bytes  {name}\n" in done.stdout
    for part in ("# DeepEncoder", "7 vision tokens of 24 channels", 'source = "push/deep"', "nothing was sent"):
        assert part in done.stdout
    assert folder_files(tmp_path / "model") == before


# And back.


def test_export_to_deepseek_ocr_goes_back_bit_by_bit(tmp_path: Path) -> None:
    model = model_in_bfloat16()
    write_source(tmp_path / "source", "single", model)
    pull(tmp_path / "source", tmp_path / "model", part="deep-encoder")
    command = [str(tmp_path / "model"), "--layout", "deepseek-ocr", "--export-to", str(tmp_path / "out.safetensors")]
    assert push_main(command) == 0
    exported = load_file(tmp_path / "out.safetensors")
    original = load_file(tmp_path / "source" / "model.safetensors")
    assert len(exported) == len(model.state_dict())
    assert all(torch.equal(original[name], value) for name, value in exported.items())
    with pytest.raises(ValueError, match="no place for a whole DeepEncoder"):
        export_weights(tmp_path / "model", tmp_path / "other.safetensors", "transformers")


def test_a_folder_without_a_decoder_loads_in_transformers_alone(tmp_path: Path) -> None:
    model = small_deep_encoder()
    unlimited_ocr(model)  # Skips where transformers has no such class.
    model.save_pretrained(tmp_path / "model")
    ImageEncoderViTImageProcessorPil(size=128).save_pretrained(tmp_path / "model")
    command = [str(tmp_path / "model"), "--layout", "transformers-folder", "--export-to", str(tmp_path / "native")]
    assert push_main(command) == 0
    native, info = AutoModel.from_pretrained(tmp_path / "native", output_loading_info=True)
    assert type(native).__name__ == "UnlimitedOcrModel"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    pixels, tiles = random_pixels(1, 3, 128, 128), random_pixels(2, 3, 64, 64, seed=1)
    with torch.no_grad():
        theirs = native.get_image_features(pixels, tiles, [2], [[1, 2]]).pooler_output[0]
        ours = model(pixels, pixel_values_local=tiles, tile_grids=torch.tensor([[2, 1]])).vision_tokens[0]
    assert relative_error(ours, theirs) <= 1e-5
    with pytest.raises(FileExistsError):
        export_native_folder(tmp_path / "model", tmp_path / "native")


def test_a_plain_encoder_makes_no_such_folder(model_folder: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no DeepEncoder, but a model of type 'image_encoder_vit'"):
        export_native_folder(model_folder, tmp_path / "native")
    assert not list(tmp_path.iterdir())
