"""Pulls from files, folders and the loopback Hub: the right bytes, few of them, in a complete folder."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import REMOTE_CODE, small_model
from checkpoints import RECIPES, SMALL, Recipe, encoder_weights, folder_files, laid_out, write_checkpoint, write_tensors
from hub_client import Worker, client_environment, run_script
from hub_server import READ_TOKEN, HubServer
from safetensors.torch import load_file, save_file

from image_encoder_vit import ImageEncoderViTImageProcessorPil, ImageEncoderViTModel
from image_encoder_vit.weights.pull import pull

pytest_plugins = ["hub_fixtures"]

COMPLETE = REMOTE_CODE | {
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "README.md",
    "provenance.json",
}


def assert_holds(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """The folder is complete and has exactly these weights, bit by bit."""
    assert {path.name for path in folder.iterdir()} >= COMPLETE
    written = load_file(folder / "model.safetensors")
    assert written.keys() == {f"encoder.{name}" for name in weights}
    for name, value in weights.items():
        assert torch.equal(written[f"encoder.{name}"], value), name


def only(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", RECIPES)
def test_every_layout_becomes_a_model(kind: str, tmp_path: Path) -> None:
    config, weights = write_checkpoint(tmp_path / "source", RECIPES[kind])
    pulled = pull(tmp_path / "source", tmp_path / "model")
    assert_holds(tmp_path / "model", weights)
    assert pulled.layout == RECIPES[kind].layout
    assert only(tmp_path) == ["model", "source"]
    model = ImageEncoderViTModel.from_pretrained(tmp_path / "model").eval()
    assert model.dtype == RECIPES[kind].dtype
    assert model.config.downsample_channels == config.downsample_channels
    expected = ImageEncoderViTModel(config).to(model.dtype).eval()
    expected.load_state_dict(weights)
    pixels = torch.rand(1, 3, 128, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        assert torch.equal(model(pixels).last_hidden_state, expected(pixels).last_hidden_state)
    processor = ImageEncoderViTImageProcessorPil.from_pretrained(tmp_path / "model")
    assert processor(torch.zeros(3, 40, 60), return_tensors="pt")["pixel_values"].shape == (1, 3, 128, 128)


def test_the_written_weights_are_what_safetensors_itself_writes(tmp_path: Path) -> None:
    _, weights = write_checkpoint(tmp_path / "source", RECIPES["sam-pth"])
    pull(tmp_path / "source" / "sam_vit_b_01ec64.pth", tmp_path / "model")
    save_file({f"encoder.{n}": v for n, v in weights.items()}, tmp_path / "expected", metadata={"format": "pt"})
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()


@pytest.mark.parametrize("kind", ["sam-pth", "deepseek-ocr", "deepseek-ocr-2"])
def test_a_single_file_or_index_is_a_source(kind: str, tmp_path: Path) -> None:
    _, weights = write_checkpoint(tmp_path / "source", RECIPES[kind])
    file = "sam_vit_b_01ec64.pth" if kind == "sam-pth" else "model.safetensors.index.json"
    pull(tmp_path / "source" / file, tmp_path / "model")
    assert_holds(tmp_path / "model", weights)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", torch.float32])
def test_the_dtype_can_be_chosen(dtype: str | torch.dtype, tmp_path: Path) -> None:
    _, weights = write_checkpoint(tmp_path / "source", RECIPES["deepseek-ocr"])
    pull(tmp_path / "source", tmp_path / "model", dtype=dtype)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert_holds(tmp_path / "model", {name: value.to(wanted) for name, value in weights.items()})
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["dtype"] == str(wanted).removeprefix("torch.")


def test_mixed_dtypes_become_float32_with_a_notice(tmp_path: Path) -> None:
    _, weights = encoder_weights(dtype=torch.bfloat16)
    weights["pos_embed"] = weights["pos_embed"].double()
    write_tensors(tmp_path / "source", laid_out(RECIPES["got-ocr2"], weights), "single")
    pulled = pull(tmp_path / "source", tmp_path / "model")
    assert_holds(tmp_path / "model", {name: value.float() for name, value in weights.items()})
    assert any("bfloat16, float64: stored as float32" in notice for notice in pulled.notices)


def test_provenance_and_card_name_the_source(tmp_path: Path) -> None:
    _, weights = write_checkpoint(tmp_path / "source", RECIPES["sam-hf"])
    (tmp_path / "source" / "README.md").write_text("---\nlicense: bsd-3-clause\n---\n# Mine\n")
    pull(tmp_path / "source", tmp_path / "model")
    provenance = json.loads((tmp_path / "model" / "provenance.json").read_text())
    assert provenance["source"]["layout"] == "sam-transformers"
    assert provenance["source"]["prefix"] == "vision_encoder."
    assert provenance["source"]["license"] == "bsd-3-clause"
    assert provenance["tensors"].keys() == {f"encoder.{name}" for name in weights}
    record = provenance["tensors"]["encoder.blocks.1.norm1.weight"]
    assert record["source_name"] == "vision_encoder.layers.1.layer_norm1.weight"
    assert record["shape"] == [32]
    card = (tmp_path / "model" / "README.md").read_text()
    for record in provenance["tensors"].values():
        assert record["sha256"] in card
    assert "license: bsd-3-clause" in card
    # Nothing of the machine that it was made on.
    assert str(tmp_path) not in card
    assert str(tmp_path) not in json.dumps(provenance)


@pytest.mark.parametrize(("kind", "license_name"), [("sam-pth", "apache-2.0"), ("deepseek-ocr", "mit"), ("vary", None)])
def test_the_family_states_the_licence_where_the_source_does_not(
    kind: str, license_name: str | None, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "source", RECIPES[kind])
    pull(tmp_path / "source", tmp_path / "model")
    source = json.loads((tmp_path / "model" / "provenance.json").read_text())["source"]
    assert source["license"] == license_name
    assert source["license_stated_by"] == ("family" if license_name else None)


def test_user_errors(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", RECIPES["deepseek-ocr"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "none").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"x": torch.zeros(1)}, tmp_path / "two" / name)
    cases = [
        (tmp_path / "source", tmp_path / "full", {}, FileExistsError, "exists already"),
        (tmp_path / "missing", tmp_path / "out", {}, FileNotFoundError, "no file or folder"),
        ("./missing", tmp_path / "out", {}, FileNotFoundError, "no file or folder"),
        (tmp_path / "source", tmp_path / "out", {"dtype": "int8"}, ValueError, "float32, bfloat16 or float16"),
        (tmp_path / "source", tmp_path / "out", {"revision": "main"}, ValueError, "local path"),
        (tmp_path / "source", tmp_path / "out", {"filename": "x.bin"}, ValueError, "has no file 'x.bin'"),
        (tmp_path / "source", tmp_path / "out", {"filename": "model.safetensors.index.json", "prefix": "a"}, ValueError,
         "No encoder under the prefix"),
        (tmp_path / "none", tmp_path / "out", {}, ValueError, "no checkpoint"),
        (tmp_path / "two", tmp_path / "out", {}, ValueError, "several checkpoints: a.safetensors, b.safetensors"),
        (tmp_path / "two" / "a.safetensors", tmp_path / "out", {}, ValueError, "No encoder found"),
        ("no spaces allowed/here", tmp_path / "out", {}, ValueError, "Repo id"),
    ]  # fmt: skip
    for source, output, options, kind, message in cases:
        with pytest.raises(kind, match=message):
            pull(source, output, **options)
    assert only(tmp_path) == ["full", "none", "source", "two"]
    assert only(tmp_path / "full") == ["file"]


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_a_training_checkpoint_holds_the_weights_in_a_dictionary(key: str, tmp_path: Path) -> None:
    weights = {f"encoder.{name}": value for name, value in small_model().encoder.state_dict().items()}
    torch.save({"epoch": 3, "optimizer": {"state": {}}, key: weights}, tmp_path / "training.pth")
    pull(tmp_path / "training.pth", tmp_path / "model")
    assert load_file(tmp_path / "model" / "model.safetensors").keys() == weights.keys()


def test_pickles_run_no_code(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "executed",)

    torch.save({"image_encoder.pos_embed": Attack()}, tmp_path / "evil.pth")
    (tmp_path / "noise.bin").write_bytes(b"\x80\x02 no pickle")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    for name in ("evil.pth", "noise.bin", "empty.pt", "list.pth"):
        with pytest.raises(ValueError, match=name):
            pull(tmp_path / name, tmp_path / "out")
    assert only(tmp_path) == ["empty.pt", "evil.pth", "list.pth", "noise.bin"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("files", ["single", "pytorch_model.bin"])
def test_weights_that_are_not_finite_are_refused(bad: float, files: str, tmp_path: Path) -> None:
    _, weights = encoder_weights()
    weights["blocks.2.mlp.lin1.weight"][3, 4] = bad
    write_tensors(tmp_path / "source", laid_out(RECIPES["got-ocr2"], weights), files)
    with pytest.raises(ValueError, match=r"blocks\.2\.mlp\.lin1\.weight.*NaN or infinite"):
        pull(tmp_path / "source", tmp_path / "out")
    assert only(tmp_path) == ["source"]


def test_a_dtype_that_the_weights_do_not_fit_into_is_refused(tmp_path: Path) -> None:
    _, weights = encoder_weights()
    weights["pos_embed"][0, 0, 0, 0] = 1e6
    write_tensors(tmp_path / "source", laid_out(RECIPES["got-ocr2"], weights), "single")
    with pytest.raises(ValueError, match=r"pos_embed.*choose another dtype"):
        pull(tmp_path / "source", tmp_path / "out", dtype="float16")


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    _, weights = encoder_weights()
    weights["pos_embed"] = weights["pos_embed"].to(torch.int8)
    write_tensors(tmp_path / "source", laid_out(RECIPES["got-ocr2"], weights), "single")
    with pytest.raises(ValueError, match=r"pos_embed.* is I8"):
        pull(tmp_path / "source", tmp_path / "out")


# From here on, from the Hub.


def add_checkpoint(
    hub: HubServer, name: str, recipe: Recipe, folder: Path, **changes: object
) -> dict[str, torch.Tensor]:
    _, weights = write_checkpoint(folder, recipe, **changes)
    hub.add_repository(name, folder_files(folder))
    return weights


@pytest.mark.parametrize("kind", ["deepseek-ocr", "deepseek-ocr-2", "sam-hf", "got-ocr2-hf", "mlx"])
def test_from_the_hub_by_ranges(kind: str, hub: HubServer, worker: Worker, tmp_path: Path) -> None:
    weights = add_checkpoint(hub, f"pull/{kind}", RECIPES[kind], tmp_path / "source")
    outcome = worker.call("pull", source=f"pull/{kind}", output_dir=tmp_path / "model")
    assert outcome.error is None, outcome.output
    assert_holds(tmp_path / "model", weights)
    assert only(tmp_path) == ["model", "source"]
    commit = hub.repositories[f"pull/{kind}"].refs["main"]
    provenance = json.loads((tmp_path / "model" / "provenance.json").read_text())
    assert provenance["source"]["commit"] == commit
    assert provenance["source"]["repository"] == f"pull/{kind}"
    assert commit in (tmp_path / "model" / "README.md").read_text()
    assert f"base_model: pull/{kind}" in (tmp_path / "model" / "README.md").read_text()
    # Once the commit is known, nothing is asked for by a name that can move.
    resolved = [request.target for request in hub.requests if "/resolve/" in request.target]
    assert resolved
    assert all(f"/resolve/{commit}/" in target for target in resolved)


@pytest.mark.parametrize("kind", ["sam-pth", "vary"])
def test_formats_without_ranges_are_downloaded_whole_and_say_so(
    kind: str, hub: HubServer, worker: Worker, tmp_path: Path
) -> None:
    weights = add_checkpoint(hub, f"pull/{kind}", RECIPES[kind], tmp_path / "source")
    outcome = worker.call("pull", source=f"pull/{kind}", output_dir=tmp_path / "model")
    assert outcome.result is not None, outcome.output
    assert_holds(tmp_path / "model", weights)
    assert any("only safetensors can be read in parts" in notice for notice in outcome.result["notices"])


def test_servers_without_ranges_fall_back_and_say_so(hub: HubServer, worker: Worker, tmp_path: Path) -> None:
    weights = add_checkpoint(hub, "pull/no-ranges", RECIPES["deepseek-ocr-2"], tmp_path / "source")
    hub.supports_ranges = False
    outcome = worker.call("pull", source="pull/no-ranges", output_dir=tmp_path / "model", retry={"first_wait_s": 0.01})
    assert outcome.result is not None, outcome.output
    assert_holds(tmp_path / "model", weights)
    assert any("whole instead of in ranges" in notice for notice in outcome.result["notices"])


def test_full_download_uses_the_cache(hub: HubServer, worker: Worker, tmp_path: Path) -> None:
    weights = add_checkpoint(hub, "pull/whole", RECIPES["deepseek-ocr"], tmp_path / "source")
    for attempt in range(2):
        hub.reset()
        outcome = worker.call("pull", source="pull/whole", output_dir=tmp_path / f"model-{attempt}", full_download=True)
        assert outcome.error is None, outcome.output
        assert_holds(tmp_path / f"model-{attempt}", weights)
        stored = [request for request in hub.requests if request.origin == "storage"]
        assert len(stored) == (1 if attempt == 0 else 0)


def test_a_revision_is_followed_to_its_commit(hub: HubServer, worker: Worker, tmp_path: Path) -> None:
    first = add_checkpoint(hub, "pull/revisions", RECIPES["sam-hf"], tmp_path / "a", seed=1)
    commit = hub.repositories["pull/revisions"].refs["main"]
    hub.repositories["pull/revisions"].refs["v1"] = commit
    second = add_checkpoint(hub, "pull/revisions", RECIPES["sam-hf"], tmp_path / "b", seed=2)
    for revision, weights in (("v1", first), (commit, first), ("main", second), (None, second)):
        output = tmp_path / f"model-{revision}"
        outcome = worker.call("pull", source="pull/revisions", output_dir=output, revision=revision)
        assert outcome.error is None, outcome.output
        assert_holds(output, weights)


def test_the_script_needs_no_token_for_public_repositories(hub: HubServer, home: Path, tmp_path: Path) -> None:
    weights = add_checkpoint(hub, "pull/public", RECIPES["deepseek-ocr"], tmp_path / "source")
    done = run_script(
        "pull_from_hub.py", "pull/public", "out", environment=client_environment(hub.endpoint, home), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert_holds(tmp_path / "out", weights)
    commit = hub.repositories["pull/public"].refs["main"]
    assert f"pull/public at commit {commit}: layout deepseek-ocr" in done.stdout
    assert re.search(r"Fetched [\d,]+ bytes in \d+ requests", done.stdout)
    assert "Encoder weights: 100%" in done.stderr
    assert not any("authorization" in request.headers for request in hub.requests)


def test_the_scripts_errors_are_one_line_and_name_no_token(hub: HubServer, home: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", RECIPES["deepseek-ocr"])
    hub.add_repository("pull/gated", folder_files(tmp_path / "source"), is_gated=True)
    done = run_script(
        "pull_from_hub.py",
        *("pull/gated", "out", "--token", "hf_xWrong"),
        environment=client_environment(hub.endpoint, home),
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr == "error: the Hub refuses the token (401): use one with access to the repository\n"
    assert done.stdout == ""
    assert "out" not in only(tmp_path)


def test_errors_of_the_hub_have_their_own_types(hub: HubServer, worker: Worker, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", RECIPES["deepseek-ocr"])
    hub.add_repository("pull/closed", folder_files(tmp_path / "source"), is_private=True)
    hub.add_repository("pull/terms", folder_files(tmp_path / "source"), is_gated=True)
    cases = [
        ({"source": "pull/absent"}, "RepositoryNotFoundError", "no such repository 'pull/absent', or it is private"),
        ({"source": "pull/closed", "revision": "nope"}, "RevisionNotFoundError", "no such revision"),
        ({"source": "pull/terms", "token": False}, "GatedRepoError", "gated: accept its terms"),
        ({"source": "pull/terms", "token": "hf_xWrong"}, "HfHubHTTPError", "refuses the token (401)"),
        ({"source": "pull/closed", "filename": "none.safetensors"}, "ValueError", "has no file"),
    ]
    for arguments, kind, line in cases:
        outcome = worker.call("pull", output_dir=tmp_path / "out", **arguments)
        assert outcome.error is not None
        assert outcome.error[0] == kind
        assert line in outcome.error[2]
        assert "\n" not in outcome.error[2]
        assert "hf_x" not in outcome.output
    assert only(tmp_path) == ["source"]
    outcome = worker.call("pull", source="pull/closed", output_dir=tmp_path / "out", token=READ_TOKEN)
    assert outcome.error is None


def test_what_is_pulled_loads_by_auto_classes_without_this_package(tmp_path: Path) -> None:
    """The code in the folder is enough, in a process that never imports this package."""
    config, weights = write_checkpoint(tmp_path / "source", RECIPES["got-ocr2-hf"])
    pull(tmp_path / "source", tmp_path / "model", dtype="float32")
    expected = ImageEncoderViTModel(config).eval()
    expected.load_state_dict({name: value.float() for name, value in weights.items()})
    pixels = torch.rand(1, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = expected(pixels).last_hidden_state.contiguous()
    save_file({"pixels": pixels, "features": features}, tmp_path / "expected")
    code = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel
model = AutoModel.from_pretrained("model", trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained("model", trust_remote_code=True, backend="pil")
probe = load_file("expected")
with torch.no_grad():
    torch.testing.assert_close(model(probe["pixels"]).last_hidden_state, probe["features"])
assert processor.keep_aspect_ratio is False
assert "image_encoder_vit.modeling_image_encoder_vit" not in sys.modules
"""
    environment = client_environment("http://127.0.0.1:9", tmp_path / "home", HF_HUB_OFFLINE="1", PYTHONPATH="")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr


def test_an_own_model_keeps_its_settings(tmp_path: Path) -> None:
    config, weights = encoder_weights(**{**SMALL, "window_size": 8})
    model = ImageEncoderViTModel(config).eval()
    model.load_state_dict(weights)
    model.save_pretrained(tmp_path / "source")
    settings = {"size": {"height": 64, "width": 96}, "padding_color": [1, 2, 3], "tile_size": 640}
    ImageEncoderViTImageProcessorPil(**settings).save_pretrained(tmp_path / "source")
    pull(tmp_path / "source", tmp_path / "model")
    for name in ("model.safetensors", "preprocessor_config.json", *REMOTE_CODE):
        assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "source" / name).read_bytes(), name
