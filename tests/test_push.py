"""Pushes to the loopback Hub: checked before anything leaves, in one commit, and pulled back byte by byte."""

import json
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import REMOTE_CODE
from checkpoints import RECIPES, encoder_weights, folder_files, write_checkpoint
from hub_client import Call, Worker, client_environment, run_script
from hub_faults import Fault
from hub_server import READ_TOKEN, WRITE_TOKEN, HubServer
from huggingface_hub import metadata_load
from PIL import Image
from safetensors.torch import load_file, save_file

from image_encoder_vit import ImageEncoderViTImageProcessorPil, ImageEncoderViTModel
from image_encoder_vit.weights.export import export_weights
from image_encoder_vit.weights.folder_check import KEPT_VARIABLES, clean_environment, foreign_code
from image_encoder_vit.weights.model_card import END_MARK, START_MARK, describe_model, parse_card, update_card
from image_encoder_vit.weights.model_kinds import ENCODER
from image_encoder_vit.weights.pull import pull
from image_encoder_vit.weights.push import collect_files, push

pytest_plugins = ["hub_fixtures"]

QUICK = {"first_wait_s": 0.01, "max_wait_s": 0.05, "timeout_s": 2.0}
PUBLISHED = REMOTE_CODE | {
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "README.md",
    "provenance.json",
}


@pytest.fixture(scope="module")
def pulled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `pull` made of a SAM checkpoint."""
    folder = tmp_path_factory.mktemp("pulled")
    write_checkpoint(folder / "source", RECIPES["sam-hf"])
    pull(folder / "source", folder / "model")
    return folder / "model"


@pytest.fixture
def model_folder(pulled: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    shutil.copytree(pulled, tmp_path / "model")
    return tmp_path / "model"


def commits(hub: HubServer, repository: str) -> list[str]:
    """Summaries of the commits after the empty first one."""
    return hub.repositories[repository].messages


def test_pull_push_pull_is_byte_equal_and_the_card_works(
    hub: HubServer, worker: Worker, home: Path, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "source", RECIPES["deepseek-ocr"])
    hub.add_repository("push/origin", folder_files(tmp_path / "source") | {"README.md": b"---\nlicense: mit\n---\n"})
    origin_commit = hub.repositories["push/origin"].refs["main"]
    assert worker.call("pull", source="push/origin", output_dir=tmp_path / "model").error is None
    (tmp_path / "model" / "optimizer.pt").write_bytes(b"private")
    environment = client_environment(hub.endpoint, home, WRITE_TOKEN)
    done = run_script("push_to_hub.py", "model", "push/encoder", environment=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    repository = hub.repositories["push/encoder"]
    head = repository.refs["main"]
    tag = next(ref for ref in repository.refs if ref.startswith("content-"))
    assert repository.refs[tag] == head
    assert f"{hub.endpoint}/push/encoder at commit {head}, tag {tag}" in done.stdout
    assert "Left out: optimizer.pt" in done.stdout
    assert set(hub.files("push/encoder")) == PUBLISHED
    assert len(commits(hub, "push/encoder")) == 1
    assert not repository.is_private

    (tmp_path / "card.md").write_bytes(hub.content("push/encoder", "README.md"))
    metadata = metadata_load(tmp_path / "card.md")
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "image-feature-extraction"
    assert metadata["license"] == "mit"
    assert metadata["base_model"] == "push/origin"
    assert {"sam", "ocr"} <= set(metadata["tags"])
    card = (tmp_path / "card.md").read_text()
    for part in (origin_commit, f'revision="{tag}"', "relative difference", "82,640 in 67 tensors", "deepseek-ocr"):
        assert part in card

    outcome = worker.call("pull", source="push/encoder", output_dir=tmp_path / "again")
    assert outcome.result is not None, outcome.output
    for name in PUBLISHED - {"README.md", "provenance.json"}:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes(), name

    # The usage of the card, run as a reader runs it: without this package, without a token.
    usage = card.split("```python\n")[1].split("```")[0].replace("page.png", str(tmp_path / "page.png"))
    page = torch.randint(0, 256, (90, 60, 3), dtype=torch.uint8)
    Image.fromarray(page.numpy()).save(tmp_path / "page.png")
    stranger = client_environment(hub.endpoint, tmp_path / "stranger", PYTHONPATH="")
    code = usage + "\nassert features.shape == (1, 20, 2, 2)\nassert 'image_encoder_vit' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", "import sys\n" + code], env=stranger, cwd=tmp_path, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_dry_run_shows_everything_and_touches_no_network(model_folder: Path, home: Path, tmp_path: Path) -> None:
    # Nothing listens there, and a login would be needed.
    environment = client_environment("http://127.0.0.1:9", home)
    before = folder_files(model_folder)
    done = run_script("push_to_hub.py", "model", "push/dry", "--dry-run", environment=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in PUBLISHED - {"README.md"}:
        assert f"{(model_folder / name).stat().st_size:,} bytes  {name}\n" in done.stdout
    for part in ("library_name: transformers", "license: apache-2.0", 'source = "push/dry"', "nothing was sent"):
        assert part in done.stdout
    assert folder_files(model_folder) == before


def test_missing_and_read_only_tokens_give_one_clear_line(
    hub: HubServer, worker: Worker, model_folder: Path, home: Path, tmp_path: Path
) -> None:
    done = run_script(
        "push_to_hub.py", "model", "push/denied", environment=client_environment(hub.endpoint, home), cwd=tmp_path
    )
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: Publishing needs a token with write permission")
    outcome = worker.call("push_checked_before", model_dir=model_folder, repo_id="push/denied", token=READ_TOKEN)
    assert outcome.error is not None
    assert outcome.error[2] == "the Hub refuses the token (403): use one with access to the repository"
    assert "hf_x" not in done.stdout + done.stderr + outcome.output
    assert "push/denied" not in hub.repositories


def append(path: Path, code: str) -> None:
    path.write_text(path.read_text() + code)


def change_code(folder: Path) -> None:
    append(
        folder / "modeling_image_encoder_vit.py",
        "\nhonest = ImageEncoderViT.forward"
        "\nImageEncoderViT.forward = lambda self, *args, **kwargs: 1.01 * honest(self, *args, **kwargs)\n",
    )


def change_preprocessing_code(folder: Path) -> None:
    append(
        folder / "image_processing_image_encoder_vit.py",
        "\nhonest = to_rgb_image\n"
        "def to_rgb_image(*args, **kwargs):\n"
        "    found = honest(*args, **kwargs)\n"
        "    return found._replace(image=found.image.rotate(180))\n",
    )


def break_code(folder: Path) -> None:
    append(folder / "attention.py", "\nimport a_module_that_nobody_has\n")


def break_settings(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"window_size": -1}))


def remove_code(folder: Path) -> None:
    (folder / "image_processing_image_encoder_vit.py").unlink()


def remove_settings(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


def remove_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.neck.0.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def poison_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["encoder.neck.0.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_code, "gives other last_hidden_state"),
        (change_preprocessing_code, "prepares images in another way"),
        (break_code, "a_module_that_nobody_has"),
        (break_settings, "window_size must be at least 1, got -1"),
        (remove_code, "names the code image_processing_image_encoder_vit.py, which is not in"),
        (remove_settings, "preprocessor_config.json missing"),
        (remove_a_weight, "cannot be loaded"),
        (poison_a_weight, "not finite"),
    ],
)
def test_what_does_not_work_for_strangers_is_refused(
    damage: object, message: str, hub: HubServer, worker: Worker, model_folder: Path
) -> None:
    damage(model_folder)
    outcome = worker.call("push", model_dir=model_folder, repo_id="push/refused")
    assert outcome.error is not None
    assert outcome.error[0] == "ValueError"
    assert message in outcome.error[1]
    # Not a single request left.
    assert hub.requests == []


def test_branches_pull_requests_and_private_repositories(hub: HubServer, worker: Worker, model_folder: Path) -> None:
    first = worker.call(
        "push_checked_before", model_dir=model_folder, repo_id="push/many", private=True, revision="next"
    )
    assert first.result is not None, first.output
    repository = hub.repositories["push/many"]
    assert repository.is_private
    assert set(hub.files("push/many", "next")) == PUBLISHED
    assert hub.files("push/many", "main") == []
    second = worker.call("push_checked_before", model_dir=model_folder, repo_id="push/many", create_pr=True)
    assert second.result is not None, second.output
    assert set(hub.files("push/many", "refs/pr/1")) == PUBLISHED
    assert hub.files("push/many", "main") == []
    assert second.result["url"].endswith("/push/many/discussions/1")


def test_pushing_again_changes_nothing(hub: HubServer, worker: Worker, model_folder: Path) -> None:
    first = worker.call("push_checked_before", model_dir=model_folder, repo_id="push/twice")
    second = worker.call("push_checked_before", model_dir=model_folder, repo_id="push/twice")
    assert first.result is not None
    assert second.result is not None, second.output
    assert second.result["commit"] == first.result["commit"]
    assert len(commits(hub, "push/twice")) == 1


def test_an_author_keeps_the_own_text_and_metadata(hub: HubServer, worker: Worker, model_folder: Path) -> None:
    card = (model_folder / "README.md").read_text()
    card = card.replace("license: apache-2.0", "license: cc-by-4.0\nlanguage: de").replace("tags:\n", "tags:\n- mine\n")
    (model_folder / "README.md").write_text(card + "\n## My evaluation\n\nGood.\n")
    outcome = worker.call("push_checked_before", model_dir=model_folder, repo_id="push/own-text", dry_run=True)
    assert outcome.result is not None, outcome.output
    pushed = outcome.result["card"]
    assert pushed.rstrip().endswith("## My evaluation\n\nGood.")
    for part in ("license: cc-by-4.0", "language: de", "- mine", "- ocr", 'source = "push/own-text"'):
        assert part in pushed
    assert "path/to/this/folder" not in pushed
    assert pushed.count(START_MARK) == pushed.count(END_MARK) == 1
    plain = update_card(parse_card("# Mine\n"), ENCODER, {}, "G")
    assert plain.endswith(f"\n\n# Mine\n\n{START_MARK}\nG\n{END_MARK}\n")


def test_a_model_saved_by_save_pretrained_can_be_pushed(hub: HubServer, worker: Worker, tmp_path: Path) -> None:
    config, weights = encoder_weights(dtype=torch.bfloat16)
    model = ImageEncoderViTModel(config).to(torch.bfloat16)
    model.load_state_dict(weights)
    model.save_pretrained(tmp_path / "model")
    ImageEncoderViTImageProcessorPil(size=128).save_pretrained(tmp_path / "model")
    outcome = worker.call("push_checked_before", model_dir=tmp_path / "model", repo_id="push/fine-tuned")
    assert outcome.result is not None, outcome.output
    assert any("no license" in notice for notice in outcome.result["notices"])
    outcome = worker.call("pull", source="push/fine-tuned", output_dir=tmp_path / "again")
    assert outcome.error is None, outcome.output
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


# What a folder of a stranger may not do


def hostile_provenance() -> dict[str, Any]:
    attack = "x`|\n| <script>alert(1)</script> ![x](https://example.org/x.png) \x1b[2J"
    source = dict.fromkeys(("name", "repository", "commit", "layout", "prefix", "license"), attack)
    tensors = {attack: {"shape": [attack], "sha256": attack}, "encoder.pos_embed": 3}
    return {"source": source | {"files": [attack]}, "notices": [attack, END_MARK], "tensors": tensors}


def test_what_a_provenance_says_reaches_the_card_escaped() -> None:
    for provenance in (hostile_provenance(), {"source": [1], "notices": "x", "tensors": 3}, {"source": {"files": 1}}):
        config, _ = encoder_weights()
        block = describe_model(config, provenance, usage="USAGE", measurements={"a|b": "<c>"})
        card = update_card(parse_card(""), ENCODER, provenance, block)
        assert "<script>" not in card
        assert "![x]" not in card
        assert "\x1b" not in card
        assert card.count(END_MARK) == 1
        rows = [line for line in card.splitlines() if line.startswith("| ")]
        assert all(len(re.findall(r"(?<!\\)\|", row)) in (3, 4) for row in rows), rows
        assert parse_card(card).data.get("base_model") is None
        assert parse_card(card).data.get("license") is None


def test_keys_that_nobody_knows_survive_in_a_card() -> None:
    text = "---\nmine: {a: [1, 2]}\nlicense: mit\nmodel-index:\n- name: n\n  results: []\n---\n# Mine\n"
    card = update_card(parse_card(text), ENCODER, {}, "G")
    assert parse_card(card).data.to_dict()["mine"] == {"a": [1, 2]}
    assert card.startswith("---\nmine:")


@pytest.mark.parametrize("broken", ["---\nlicense: [mit\n---\n", "---\n- a\n---\n", "---\n1: 2\n---\n"])
def test_an_own_card_that_cannot_be_read_is_refused_by_name(broken: str, model_folder: Path) -> None:
    (model_folder / "README.md").write_text(broken)
    with pytest.raises(ValueError, match=r"front matter of README\.md cannot be read") as error:
        push(model_folder, "push/broken-card", dry_run=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["LICENSE", "NOTICE", "provenance.json", "README.md", "config.json", "attention.py"])
def test_a_link_that_leads_out_of_the_folder_is_refused(name: str, model_folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "id_rsa"
    secret.write_bytes((model_folder / name).read_bytes() if (model_folder / name).exists() else b"secret")
    (model_folder / name).unlink(missing_ok=True)
    (model_folder / name).symlink_to(secret)
    with pytest.raises(ValueError, match="is a link that leads out of its folder"):
        push(model_folder, "push/linked", dry_run=True)


def test_the_links_of_a_cache_are_its_own(model_folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(model_folder.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
    assert set(collect_files(snapshot)) == PUBLISHED - {"README.md"}


SPY = """
import os, pathlib
from huggingface_hub import get_token
raise ImportError(repr([str(pathlib.Path.home()), get_token(), sorted(os.environ)]))
"""


def test_a_folder_s_code_runs_without_home_token_and_environment_and_is_announced(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    home = tmp_path / "home"
    (home / ".cache" / "huggingface").mkdir(parents=True)
    (home / ".cache" / "huggingface" / "token").write_text(WRITE_TOKEN)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "mine")
    append(model_folder / "attention.py", SPY)
    with pytest.raises(ValueError, match="does not work when it is loaded") as error:
        push(model_folder, "push/spied", dry_run=True)
    assert "attention.py" in caplog.text
    assert "is not this package's" in caplog.text
    assert str(home) not in str(error.value)
    assert ", None, [" in str(error.value)
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        assert name not in str(error.value)
    (tmp_path / "scratch").mkdir()
    assert clean_environment(tmp_path / "scratch").keys() <= {*KEPT_VARIABLES, *REPLACED}


REPLACED = (
    *("HOME", "USERPROFILE", "TMPDIR", "HF_HOME", "HF_MODULES_CACHE", "PYTHONUSERBASE"),
    *("HF_HUB_OFFLINE", "HF_HUB_DISABLE_IMPLICIT_TOKEN", "HF_HUB_DISABLE_PROGRESS_BARS"),
)


def test_the_package_s_own_code_is_not_announced(model_folder: Path) -> None:
    assert foreign_code(collect_files(model_folder).values()) == []


def test_a_bare_name_is_completed_by_the_hub(hub: HubServer, worker: Worker, model_folder: Path) -> None:
    outcome = worker.call("push_checked_before", model_dir=model_folder, repo_id="bare-name")
    assert outcome.result is not None, outcome.output
    assert outcome.result["repository"] == "user/bare-name"
    assert outcome.result["url"].endswith("/user/bare-name")
    assert set(hub.files("user/bare-name")) == PUBLISHED
    assert 'source = "user/bare-name"' in hub.content("user/bare-name", "README.md").decode()


# Export


@pytest.mark.parametrize(
    ("layout", "kind", "example"),
    [
        ("deepseek-ocr", "deepseek-ocr", "model.sam_model.blocks.0.attn.qkv.weight"),
        ("deepseek-ocr", "deepseek-ocr-2-896", "model.sam_model.net_3.weight"),
        ("sam", "sam-pth", "image_encoder.neck.0.weight"),
        ("transformers", "sam-hf", "vision_encoder.neck.conv1.weight"),
        ("transformers", "deepseek-ocr", "model.vision_tower.sam_encoder.proj.conv2.weight"),
    ],
)
def test_export_goes_back_bit_by_bit(layout: str, kind: str, example: str, tmp_path: Path) -> None:
    _, weights = write_checkpoint(tmp_path / "source", RECIPES[kind])
    pull(tmp_path / "source", tmp_path / "model")
    names = export_weights(tmp_path / "model", tmp_path / "out.safetensors", layout)
    exported = load_file(tmp_path / "out.safetensors")
    assert example in exported
    assert exported.keys() == set(names.values())
    assert all(torch.equal(exported[names[name]], value) for name, value in weights.items())
    if (layout, kind) in (("deepseek-ocr", "deepseek-ocr"), ("transformers", "sam-hf")):
        original: dict[str, torch.Tensor] = {}
        for file in (tmp_path / "source").glob("*.safetensors"):
            original |= load_file(file)
        assert all(torch.equal(original[name], value) for name, value in exported.items())
    pull(tmp_path / "out.safetensors", tmp_path / "again")
    first, again = (tmp_path / name / "model.safetensors" for name in ("model", "again"))
    assert first.read_bytes() == again.read_bytes()


def test_export_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", RECIPES["deepseek-ocr"])
    pull(tmp_path / "source", tmp_path / "model")
    with pytest.raises(ValueError, match="no place for the 2 convolutions"):
        export_weights(tmp_path / "model", tmp_path / "out.safetensors", "sam")
    (tmp_path / "out.safetensors").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        export_weights(tmp_path / "model", tmp_path / "out.safetensors", "deepseek-ocr")
    assert (tmp_path / "out.safetensors").read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.safetensors", "source"]


def test_exports_can_be_pushed_and_written_by_the_script(
    hub: HubServer, worker: Worker, model_folder: Path, home: Path, tmp_path: Path
) -> None:
    outcome = worker.call("push_checked_before", model_dir=model_folder, repo_id="push/exported", layout="sam")
    assert outcome.result is not None, outcome.output
    assert hub.files("push/exported") == ["README.md", "model.safetensors", "provenance.json"]
    assert "layout `sam`" in hub.content("push/exported", "README.md").decode()
    done = run_script(
        "push_to_hub.py", "model", "--layout", "sam", "--export-to", "sam.safetensors",
        environment=client_environment("http://127.0.0.1:9", home), cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "sam.safetensors").read_bytes() == hub.content("push/exported", "model.safetensors")


# Faults


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", origin="storage", method="PUT", status=500, count=2),
        Fault("status", origin="storage", method="PUT", status=503, retry_after_s=0, count=2),
        Fault("status", origin="hub", method="POST", path="/commit/", status=500, count=2),
        Fault("status", origin="hub", method="POST", path="/commit/", status=429, retry_after_s=0, count=2),
        Fault("status", origin="hub", method="POST", path="/preupload/", status=502, count=2),
        Fault("status", origin="hub", method="POST", path="/lfs/objects/batch", status=503, count=2),
        Fault("status", origin="hub", method="POST", path="/repos/create", status=500, count=2),
        Fault("status", origin="hub", method="POST", path="/tag/", status=500, count=2),
    ],
    ids=lambda fault: f"{fault.path or fault.method} {fault.status}",
)
def test_faults_of_the_hub_are_survived(
    fault: Fault, hub: HubServer, worker: Worker, model_folder: Path, request: pytest.FixtureRequest
) -> None:
    name = "push/fault-" + re.sub(r"\W+", "-", request.node.name).strip("-")
    hub.forget((model_folder / "model.safetensors").read_bytes())
    hub.faults[:] = [Fault(**vars(fault))]
    outcome = worker.call("push_checked_before", model_dir=model_folder, repo_id=name, retry=QUICK)
    assert outcome.result is not None, outcome.output
    assert hub.faults[0].count == 0
    assert set(hub.files(name)) == PUBLISHED
    assert len(commits(hub, name)) == 1


class Killer:
    """Kills a call when the server gets its request number `last`."""

    def __init__(self, last: int, dice: random.Random) -> None:
        self.last = last
        self.dice = dice
        self.seen = 0
        self.call: Call | None = None

    def __call__(self, origin: str, method: str, target: str) -> None:
        self.seen += 1
        if self.seen == self.last and self.call is not None:
            self.call.kill()
        elif self.seen == self.last - 1 and self.call is not None and self.dice.random() < 0.5:
            # Or somewhat earlier: while this request is answered.
            time.sleep(0.005 * self.dice.random())


def test_kill_9_mid_push_leaves_nothing_or_a_whole_commit(hub: HubServer, worker: Worker, model_folder: Path) -> None:
    """Killed at each of its requests in turn, twice: the branch is empty or complete, and the next push finishes."""
    dice = random.Random(4)
    weights = (model_folder / "model.safetensors").read_bytes()
    killed = 0
    for number in range(1, 27):
        name = f"push/killed-{number}"
        hub.forget(weights)
        killer = Killer(1 + number // 2, dice)
        hub.before_request = killer
        killer.call = worker.start("push_checked_before", model_dir=model_folder, repo_id=name, retry=QUICK)
        killed += killer.call.wait().killed_by == 9
        hub.before_request = None
        if name in hub.repositories:
            assert set(hub.files(name)) in (set(), PUBLISHED)
        outcome = worker.call("push_checked_before", model_dir=model_folder, repo_id=name, retry=QUICK)
        assert outcome.result is not None, outcome.output
        assert set(hub.files(name)) == PUBLISHED
        assert len(commits(hub, name)) == 1
        assert hub.content(name, "model.safetensors") == weights
        assert hub.repositories[name].refs[outcome.result["revision"]] == outcome.result["commit"]
    assert killed >= 12


def test_the_token_of_a_push_is_nowhere(hub: HubServer, worker: Worker, model_folder: Path) -> None:
    hub.forget((model_folder / "model.safetensors").read_bytes())
    outcome = worker.call("push_checked_before", model_dir=model_folder, repo_id="push/secret")
    assert outcome.result is not None
    assert WRITE_TOKEN not in outcome.output + json.dumps(outcome.result)
    for name in hub.files("push/secret"):
        assert WRITE_TOKEN.encode() not in hub.content("push/secret", name)
    stored = [request for request in hub.requests if request.origin == "storage"]
    assert stored
    assert not any("authorization" in request.headers for request in stored)
