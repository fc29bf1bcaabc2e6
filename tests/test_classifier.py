"""The encoder with a head: its loss, its folder and every way of loading that, its pipeline and its card."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from builders import random_pixels, randomize, relative_error
from fresh_python import FreshPython
from hub_client import Worker, client_environment, run_script
from hub_server import WRITE_TOKEN, HubServer
from huggingface_hub import metadata_load
from PIL import Image
from safetensors.torch import load_file, save_file
from small import SMALL
from transformers import AutoBackbone, AutoModel, AutoModelForImageClassification, pipeline

from image_encoder_vit import (
    ImageEncoderViTBackbone,
    ImageEncoderViTConfig,
    ImageEncoderViTForImageClassification,
    ImageEncoderViTImageProcessorPil,
    ImageEncoderViTModel,
)
from image_encoder_vit.commands.loading import load_model

pytest_plugins = ["hub_fixtures"]

SAMPLE_PAGE = Path(__file__).parent.parent / "samples" / "page.png"
LABELS = ["form", "letter", "receipt"]


def classifier(**changes: object) -> ImageEncoderViTForImageClassification:
    """A small random classifier in eval mode."""
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
    config = ImageEncoderViTConfig(**{**SMALL, **labels, **changes})
    return randomize(ImageEncoderViTForImageClassification(config)).eval()


@contextmanager
def transformers_warnings(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Lets pytest see what transformers and this package, which use their logger, warn of."""
    loggers = [logging.getLogger(name) for name in ("transformers", "image_encoder_vit")]
    before = [logger.propagate for logger in loggers]
    for logger in loggers:
        logger.propagate = True
    try:
        with caplog.at_level(logging.WARNING):
            yield
    finally:
        for logger, propagate in zip(loggers, before, strict=True):
            logger.propagate = propagate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier and its processor (canvas 128 x 128 px), as save_pretrained writes them."""
    folder = tmp_path_factory.mktemp("classifier") / "model"
    classifier().save_pretrained(folder)
    ImageEncoderViTImageProcessorPil(size={"height": 128, "width": 128}).save_pretrained(folder)
    return folder


def test_logits_are_the_head_s_of_pooled_features(folder: Path) -> None:
    model = classifier()
    pixels = random_pixels(2, 3, 128, 96)
    mask = torch.ones(2, 128, 96)
    mask[1, 64:] = 0
    encoder = AutoModel.from_pretrained(folder)
    for options in ({}, {"pixel_mask": mask}):
        with torch.no_grad():
            logits = model(pixels, **options).logits
            pooled = encoder(pixels, **options).pooler_output
        assert logits.shape == (2, 3)
        norm, head = model.layernorm, model.classifier
        normed = F.layer_norm(pooled, pooled.shape[1:], norm.weight, norm.bias, eps=1e-6)
        assert relative_error(logits, normed @ head.weight.T + head.bias) <= 1e-6
    with torch.no_grad():
        outputs = model(pixels, output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == SMALL["num_hidden_layers"] + 1
    assert len(outputs.attentions) == SMALL["num_hidden_layers"]


@pytest.mark.parametrize(
    ("problem_type", "labels", "loss"),
    [
        ("single_label_classification", torch.tensor([2, 0]), F.cross_entropy),
        ("multi_label_classification", torch.tensor([[1.0, 0, 1], [0, 1, 0]]), F.binary_cross_entropy_with_logits),
        ("regression", torch.tensor([[0.5, 1, 2], [3, 4, 5]]), F.mse_loss),
    ],
)
def test_the_loss_is_the_problem_s(problem_type: str, labels: torch.Tensor, loss: object) -> None:
    assert callable(loss)
    pixels = random_pixels(2, 3, 64, 64)
    model = classifier(problem_type=problem_type)
    outputs = model(pixels, labels=labels)
    torch.testing.assert_close(outputs.loss, loss(outputs.logits, labels))
    outputs.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    if problem_type != "regression":  # Left open, the kind of the problem is told by the labels.
        told = classifier()
        torch.testing.assert_close(told(pixels, labels=labels).loss, outputs.loss)
        assert told.config.problem_type == problem_type


def test_a_folder_loads_into_every_class(folder: Path) -> None:
    model = classifier()
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    assert type(loaded) is ImageEncoderViTForImageClassification
    assert loaded.config.id2label == dict(enumerate(LABELS))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in model.state_dict().items())
    pixels = random_pixels(1, 3, 128, 128)
    with torch.no_grad():
        expected = model.encoder(pixels)
        for encoder in (AutoModel.from_pretrained(folder), load_model(str(folder))):
            assert type(encoder) is ImageEncoderViTModel
            assert torch.equal(encoder(pixels).last_hidden_state, expected)
        backbone = ImageEncoderViTBackbone.from_pretrained(folder)
        assert torch.equal(backbone(pixels).feature_maps[-1], expected)
    assert type(AutoBackbone.from_config(loaded.config)) is ImageEncoderViTBackbone


def test_an_encoder_s_folder_gets_a_new_head(model_folder: str, caplog: pytest.LogCaptureFixture) -> None:
    with transformers_warnings(caplog):
        model, info = AutoModelForImageClassification.from_pretrained(
            model_folder, num_labels=5, output_loading_info=True
        )
    assert "classifier.weight" in caplog.text
    assert sorted(info["missing_keys"]) == [
        f"{layer}.{kind}" for layer in ("classifier", "layernorm") for kind in ("bias", "weight")
    ]
    assert model.classifier.out_features == 5
    assert model.classifier.weight.abs().sum() > 0
    for name, weight in AutoModel.from_pretrained(model_folder).state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_state_dicts_load_with_a_head_and_of_a_head_alone() -> None:
    model = classifier()
    heads = {name: weight for name, weight in model.state_dict().items() if not name.startswith("encoder.")}
    for bare in ({}, model.encoder.state_dict()):
        loaded = ImageEncoderViTForImageClassification(model.config)
        missing, unexpected = loaded.load_state_dict({**bare, **heads}, strict=bool(bare))
        assert (bool(missing), unexpected) == (not bare, [])
        assert torch.equal(loaded.classifier.weight, model.classifier.weight)


def test_a_new_head_starts_undecided_whatever_the_size_of_the_features() -> None:
    model = ImageEncoderViTForImageClassification(ImageEncoderViTConfig(**SMALL, num_labels=4)).eval()
    with torch.no_grad():
        model.encoder.net_3.weight.mul_(1e5)
        probabilities = model(random_pixels(3, 3, 128, 128)).logits.softmax(dim=1)
    assert (probabilities - 1 / 4).abs().max() < 0.1


@pytest.mark.parametrize(
    ("left_out", "load", "message"),
    [
        ("encoder.neck.2.weight", AutoModel, r"Missing weights \(1\): encoder.neck.2.weight"),
        ("encoder.neck.2.weight", AutoModelForImageClassification, r"Missing weights \(1\): encoder.neck.2.weight"),
        ("classifier.bias", AutoModelForImageClassification, r"Missing weights \(1\): classifier.bias"),
    ],
)
def test_loading_is_strict_about_all_but_a_whole_head(
    left_out: str, load: type, message: str, folder: Path, tmp_path: Path
) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[left_out]
    for name in ("config.json", *(path.name for path in folder.glob("*.py"))):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load.from_pretrained(tmp_path)


def test_a_head_for_other_labels_takes_ignore_mismatched_sizes(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"classifier.weight \(3, 20\) instead of \(4, 20\)"):
        AutoModelForImageClassification.from_pretrained(folder, num_labels=4)
    model = AutoModelForImageClassification.from_pretrained(folder, num_labels=4, ignore_mismatched_sizes=True)
    assert model.classifier.out_features == 4
    assert torch.equal(model.encoder.net_3.weight, classifier().encoder.net_3.weight)


def test_what_trainers_write_into_the_configuration_is_known(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = classifier()
    model.config.use_cache = False
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["use_cache"] is False
    with transformers_warnings(caplog):
        AutoModel.from_pretrained(tmp_path)
    assert not caplog.records


def test_the_pipeline_shows_labels(folder: Path) -> None:
    classify = pipeline("image-classification", model=str(folder))
    page = Image.open(SAMPLE_PAGE).convert("RGB")
    with torch.no_grad():
        scores = classify.model(**classify.image_processor(page, return_tensors="pt")).logits[0].softmax(-1)
    for image in (page, str(SAMPLE_PAGE)):
        found = {entry["label"]: entry["score"] for entry in classify(image)}
        assert found == pytest.approx(dict(zip(LABELS, scores.tolist(), strict=True)))
    assert [len(entries) for entries in classify([str(SAMPLE_PAGE)] * 3, batch_size=2, top_k=2)] == [2, 2, 2]


WITHOUT_PACKAGE = """
import sys
sys.modules["image_encoder_vit"] = None
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
from safetensors.torch import save_file
import torch
folder, page, output = sys.argv[1:]
classify = pipeline("image-classification", model=folder, trust_remote_code=True)
assert type(classify.model).__module__.startswith("transformers_modules."), type(classify.model)
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True, backend="pil")
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    logits = model(**processor(page, return_tensors="pt")).logits
scores = {entry["label"]: torch.tensor(entry["score"]) for entry in classify(page)}
save_file({"logits": logits, **scores}, output)
model.save_pretrained(folder + "-again")
processor.save_pretrained(folder + "-again")
"""


def test_remote_code_classifies_without_the_package(run_python: FreshPython, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "outputs.safetensors"
    run_python(WITHOUT_PACKAGE, str(folder), str(SAMPLE_PAGE), str(output), cache=tmp_path)
    remote = load_file(output)
    processor = ImageEncoderViTImageProcessorPil.from_pretrained(folder)
    with torch.no_grad():
        logits = classifier()(**processor(str(SAMPLE_PAGE), return_tensors="pt")).logits
    assert relative_error(remote["logits"], logits) <= 1e-6
    for label, score in zip(LABELS, logits[0].softmax(-1), strict=True):
        torch.testing.assert_close(remote[label], score)
    again = Path(f"{folder}-again")
    assert sorted(path.name for path in again.iterdir()) == sorted(path.name for path in folder.iterdir())
    assert json.loads((again / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


def test_a_classifier_is_pushed_with_its_head_and_the_card_says_so(
    hub: HubServer, worker: Worker, home: Path, folder: Path, tmp_path: Path
) -> None:
    environment = client_environment(hub.endpoint, home, WRITE_TOKEN)
    done = run_script("push_to_hub.py", str(folder), "push/classifier", environment=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert hub.content("push/classifier", "model.safetensors") == (folder / "model.safetensors").read_bytes()
    card = tmp_path / "README.md"
    card.write_bytes(hub.content("push/classifier", "README.md"))
    assert metadata_load(card)["pipeline_tag"] == "image-classification"
    assert 'pipeline("image-classification", "push/classifier", revision="content-' in card.read_text()
    parameters = sum(parameter.numel() for parameter in classifier().parameters())
    assert f"{parameters:,} in {len(classifier().state_dict())} tensors" in card.read_text()
    # The encoder comes out of it again, without the head.
    outcome = worker.call("pull", source="push/classifier", output_dir=tmp_path / "encoder")
    assert outcome.error is None, outcome.output
    assert metadata_load(tmp_path / "encoder" / "README.md")["pipeline_tag"] == "image-feature-extraction"
    assert not any(name.startswith("classifier.") for name in load_file(tmp_path / "encoder" / "model.safetensors"))
