"""The sample encoder: the pages that it is trained on, its training, and what it is worth on pages it has not seen."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from image_encoder_vit import ImageEncoderViTModel
from image_encoder_vit.commands import train_sample
from image_encoder_vit.commands.loading import SAMPLE_FOLDER, load_head, load_model, load_processor
from image_encoder_vit.training.drawn_pages import CLASSES, LABEL_PX, PAPER, PHOTO, DrawnPage, draw_page
from image_encoder_vit.training.page_views import BatchShape, ViewBatches, crop_view, draw_pages, whole_view
from image_encoder_vit.training.sample_encoder import layout_loss, learning_rate, pooled, sample_config
from image_encoder_vit.training.sample_measures import (
    HELD_OUT_SEED,
    LabelledCells,
    cell_measures,
    nearest_neighbour_accuracy,
)

ROOT = Path(__file__).parent.parent


def test_a_seed_draws_one_page_whatever_was_drawn_before() -> None:
    first = draw_page((7, 3), only_built_in_font=True)
    draw_page((7, 4), only_built_in_font=True)
    again = draw_page((7, 3), only_built_in_font=True)
    assert first.image.tobytes() == again.image.tobytes()
    assert np.array_equal(first.labels, again.labels)
    assert first.image.tobytes() != draw_page((7, 4), only_built_in_font=True).image.tobytes()


def test_a_class_lies_where_its_ink_is() -> None:
    kinds: set[int] = set()
    for number in range(20):
        page = draw_page((11, number), only_built_in_font=True)
        width, height = page.image.size
        assert page.labels.shape == (-(-height // LABEL_PX), -(-width // LABEL_PX))
        assert 640 <= max(page.image.size) <= 1000
        kinds |= set(np.unique(page.labels).tolist())
        # Blank places are paper, whatever is around them; a frame, a rule or a picture may lie in few others.
        values = np.asarray(page.image, np.int16)[: height // 4 * 4, : width // 4 * 4]
        ink = values.reshape(height // 4, 4, width // 4, 4, 3).std(axis=(1, 3)).max(axis=2) > 12
        labels = page.labels[: height // 4, : width // 4]
        outside = ink & (labels == PAPER)
        assert outside.sum() < 0.04 * labels.size
    assert kinds == set(range(len(CLASSES) - 1))  # All but what lies outside of a page.


def test_views_show_classes_where_they_are() -> None:
    # The left half is a photograph.
    image = Image.new("RGB", (800, 600), "white")
    image.paste((60, 90, 160), (0, 0, 400, 600))
    labels = np.zeros((150, 200), np.uint8)
    labels[:, :100] = PHOTO
    page = DrawnPage(image, labels)
    for seed in range(12):
        rng = np.random.default_rng(seed)
        for view in (whole_view(page, rng, 128), crop_view(page, rng, 128, (0.3, 1.0))):
            assert view.pixels.shape == (128, 128, 3)
            assert view.shares.shape == (8, 8, len(CLASSES))
            assert (view.shares.sum(axis=-1) == 16).all()
            means = view.pixels.reshape(8, 16, 8, 16, 3).astype(float).mean(axis=(1, 3))
            blueness = means[..., 2] - means[..., 0]
            photo, paper = view.shares[..., PHOTO] == 16, view.shares[..., PAPER] == 16
            if photo.any() and paper.any() and np.abs(blueness[photo].mean()) > 15:  # Not turned to grey.
                assert (np.abs(blueness[photo]) > np.abs(blueness[paper]).max()).mean() > 0.9


def test_batches_depend_on_seed_and_step_alone() -> None:
    pages = draw_pages(8, 1, processes=1, only_built_in_font=True)
    shapes = [BatchShape(64, pairs=2, crops=3, scales=(0.3, 1.0))] * 2
    first, again = ViewBatches(pages, shapes, 5)[1], ViewBatches(pages, shapes, 5)[1]
    other = ViewBatches(pages, shapes, 5)[0]
    assert first["pixels"].shape == (7, 64, 64, 3)
    assert first["shares"].shape == (7, 4, 4, len(CLASSES))
    owners = first["pages"].tolist()
    assert owners[0] == owners[1] != owners[2] == owners[3]
    assert torch.equal(first["pixels"], again["pixels"])
    assert not torch.equal(first["pixels"], other["pixels"])


def test_losses_by_hand() -> None:
    shares = torch.zeros(1, len(CLASSES), 1, 2)
    shares[0, 0, 0, 0] = shares[0, 1, 0, 1] = 1  # A cell of paper (weight 0.4), one of text (0.8).
    logits = torch.zeros(1, len(CLASSES), 1, 2)
    logits[0, 0, 0, 0] = 3.0
    expected = (0.4 * -torch.log_softmax(logits[0, :, 0, 0], 0)[0] + 0.8 * np.log(len(CLASSES))) / 1.2
    assert layout_loss(logits, shares).item() == pytest.approx(expected.item())
    features = torch.tensor([[[[1.0, 3.0, 9.0]]]])
    weights = torch.tensor([[[[1.0, 1.0, 0.0]]]])
    torch.testing.assert_close(pooled(features, weights), torch.tensor([[2.0, 1.0]]), atol=1e-4, rtol=0)
    rates = [learning_rate(step, 100) for step in range(100)]
    assert rates[0] < rates[5] < rates[9]
    assert max(rates) == pytest.approx(1, abs=0.02)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.03


def test_nearest_neighbours_are_of_other_pages() -> None:
    # 40 cells of each of two classes on two pages; features tell the class on page 0 and 1 alike.
    classes = torch.tensor([0, 1] * 80)
    pages = torch.arange(160) // 80
    features = torch.nn.functional.one_hot(classes, 2).float() + 0.01 * torch.rand(160, 2)
    accuracy = nearest_neighbour_accuracy(LabelledCells(features, classes, pages), 30, seed=0)
    assert accuracy == {"paper": 1.0, "text": 1.0, "mean": 1.0}
    # Features that tell only the page: no better than chance.
    told = torch.nn.functional.one_hot(pages, 2).float() + torch.rand(160, 2, generator=torch.manual_seed(0)) * 0.1
    assert nearest_neighbour_accuracy(LabelledCells(told, classes, pages), 40, seed=0)["mean"] < 0.75


def test_a_minute_of_training_writes_a_whole_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "sample"
    command = ["--output", str(folder), "--pages", "12", "--steps", "2", "1", "--held-out", "4"]
    assert train_sample.main(command) == 0
    assert {path.name for path in folder.iterdir()} == {path.name for path in SAMPLE_FOLDER.iterdir()}
    measures = json.loads((folder / "measures.json").read_text())
    assert measures["training"]["steps"] == [2, 1]
    assert measures["found_again"]["pages"] == 4
    assert {"sample", "random", "colors"} <= measures.keys()
    model = AutoModel.from_pretrained(folder)
    assert type(model) is ImageEncoderViTModel
    assert "it knows no letters and no language" in (folder / "README.md").read_text()
    capsys.readouterr()
    assert train_sample.main(command) == 2
    assert "exists already: add --overwrite" in capsys.readouterr().err
    assert train_sample.main(["--output", str(tmp_path / "other"), "--pages", "5"]) == 2
    assert "--pages 5: a batch shows 11 pages" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_the_sample_loads_without_remote_code() -> None:
    assert not list(SAMPLE_FOLDER.glob("*.py"))
    config = json.loads((SAMPLE_FOLDER / "config.json").read_text())
    assert "auto_map" not in config
    model, processor = AutoModel.from_pretrained(SAMPLE_FOLDER), AutoImageProcessor.from_pretrained(SAMPLE_FOLDER)
    inputs = processor(Image.open(ROOT / "samples" / "page.png").convert("RGB"), return_tensors="pt")
    with torch.inference_mode():
        exact = model.float().eval()(inputs["pixel_values"]).last_hidden_state
        rounded = model.bfloat16()(inputs["pixel_values"]).last_hidden_state.float()
    assert torch.nn.functional.cosine_similarity(exact, rounded, dim=1).min() > 0.99
    head = load_head("sample")
    assert head is not None
    assert head.prototypes.numel() < 1000


@pytest.fixture(scope="module")
def held_out_pages() -> list[DrawnPage]:
    """With the one font that is there wherever this runs."""
    return [draw_page((HELD_OUT_SEED, number), only_built_in_font=True) for number in range(48)]


def test_it_tells_layout_classes_on_pages_it_has_not_seen(held_out_pages: list[DrawnPage]) -> None:
    """A small part of what `scripts/train_sample.py` measures: docs/sample.md has the whole, with all fonts."""
    torch.manual_seed(0)
    random_model = ImageEncoderViTModel(sample_config()).eval()
    measures = cell_measures(held_out_pages[:32], load_processor("sample"), load_model("sample"), random_model)
    # Few pages have a table or a formula: the means are less sure than those of 200 pages.
    assert measures["sample"]["16"]["mean"] >= 0.82
    assert measures["sample"]["64"]["mean"] >= 0.82
    for stride in ("16", "64"):
        for baseline in ("random", "colors"):
            assert measures["sample"][stride]["mean"] >= measures[baseline][stride]["mean"] + 0.3
        for kind in ("text", "photo", "paper", "outside"):
            assert measures["sample"][stride][kind] >= 0.75, (stride, kind)


def test_it_finds_a_page_again_by_the_default_mode_of_a_search(held_out_pages: list[DrawnPage]) -> None:
    with train_sample.stored_features(SAMPLE_FOLDER, [page.image for page in held_out_pages]) as store:
        found = train_sample.recall(store, held_out_pages[:24], load_model("sample"), load_processor("sample"))
    assert found["recall@1"] >= 0.85


def test_the_measures_that_came_with_the_sample_hold_their_bounds() -> None:
    """Measured by the training script on 500 pages of another seed; beside random weights and the cells' colours."""
    measures = json.loads((SAMPLE_FOLDER / "measures.json").read_text())
    assert measures["sample"]["16"]["mean"] >= 0.82
    assert measures["sample"]["64"]["mean"] >= 0.85
    for stride in ("16", "64"):
        for kind in ("text", "photo", "paper", "outside"):
            assert measures["sample"][stride][kind] >= 0.8
        for baseline in ("random", "colors"):
            assert measures["sample"][stride]["mean"] > measures[baseline][stride]["mean"] + 0.4
    assert measures["found_again"]["pages"] == 500
    assert measures["found_again"]["recall@1"] >= 0.85
