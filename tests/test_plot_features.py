"""Pictures of what the encoder makes of pages: the plot command and its maths."""

from pathlib import Path

import pytest
import torch
from builders import random_pixels, small_model
from PIL import Image

from image_encoder_vit.commands import plot as script
from image_encoder_vit.commands.loading import load_head, shown_name, warning_of
from image_encoder_vit.corpora.pictures import (
    CLASS_COLORS,
    WARNING_COLOR,
    EncodedPage,
    Heading,
    Legend,
    attention_of_cell,
    cell_at,
    heat_colors,
    inner_cells,
    layout_over_page,
    overview,
    pca_basis,
    pca_over_page,
    sheet,
    similarity_to_cell,
)
from image_encoder_vit.weights.layout_head import LayoutHead, load_layout_head

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("cell", [(0, 0), (4, 2), (7, 5)])
def test_attention_of_a_cell_is_the_model_s_row(block: int, cell: tuple[int, int]) -> None:
    model = small_model()
    pixels = random_pixels(1, 3, 128, 96)
    with torch.no_grad():
        outputs = model(pixels, output_attentions=True, output_hidden_states=True)
    expected = outputs.attentions[block][0, :, cell[0] * 6 + cell[1]].unflatten(1, (8, 6))
    actual = attention_of_cell(model.encoder.blocks[block], outputs.hidden_states[block], cell)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("cell", [(1, 2), (7, 7)])
def test_attention_in_a_window_is_the_model_s_row(cell: tuple[int, int]) -> None:
    model = small_model()  # windows of 3 on a grid of 8 x 8: the last ones stick out
    with torch.no_grad():
        outputs = model(random_pixels(1, 3, 128, 128), output_attentions=True, output_hidden_states=True)
    top, left = cell[0] // 3 * 3, cell[1] // 3 * 3
    window = top // 3 * 3 + left // 3
    query = (cell[0] - top) * 3 + cell[1] - left
    expected = outputs.attentions[2][window, :, query].unflatten(1, (3, 3))[:, : 8 - top, : 8 - left]
    actual = attention_of_cell(model.encoder.blocks[2], outputs.hidden_states[2], cell)
    torch.testing.assert_close(actual[:, top : top + 3, left : left + 3], expected)
    assert (actual.count_nonzero(dim=(1, 2)) == expected[0].numel()).all()


def test_a_cell_is_most_similar_to_itself() -> None:
    values = similarity_to_cell(random_pixels(5, 4, 4), (2, 1), (0, 0, 64, 64), 16)
    assert values[2, 1].item() == pytest.approx(1)
    assert values.argmax().item() == 2 * 4 + 1


def test_points_become_cells() -> None:
    # 400 x 300 px on a canvas of 128 x 128 px: 96 px wide, 16 px from the left.
    assert cell_at((399.9, 0), (400, 300), (0, 16, 128, 96), 16) == (7, 1)
    assert cell_at((0, 299.9), (400, 300), (0, 16, 128, 96), 16) == (0, 6)
    with pytest.raises(ValueError, match="outside of the image of 300 x 400 px"):
        cell_at((0, 300), (400, 300), (0, 16, 128, 96), 16)


def test_cells_lie_where_they_belong_on_the_page() -> None:
    features = torch.zeros(4, 4, 4)
    features[:, 1, 2] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    # The page covers 192 x 128 px of a canvas of 256 px, from (32, 64) on: cell (1, 2) starts 32 px below its corner.
    picture = pca_over_page(features, (32, 64, 192, 128), 64)
    assert picture.size == (128, 192)
    assert picture.getpixel((64 + 5, 32 + 5)) != picture.getpixel((5, 32 + 5))


def test_colours_are_spent_on_the_page_and_not_on_its_border() -> None:
    # 224 px of the page from 16 px on: of the 16 x 16 cells of 16 px, 14 x 14 lie on it; here half a cell sticks out.
    region = (24, 24, 208, 208)
    features = random_pixels(5, 16, 16)
    features[:, 1, :] = features[:, :, 1] = 100.0  # cells that the padding touches
    inner = inner_cells(features, region, 16)
    assert inner.shape == (12 * 12, 5)
    assert inner.abs().max() <= 1
    colors = pca_basis(inner).colors(features[:, 2:14, 2:14])
    assert colors.flatten(1).double().std(dim=1).min() > 40  # of at most 128
    # A page of few cells has no inside: all that touch it count.
    assert inner_cells(features[:, :4, :4], (8, 8, 48, 48), 16).shape == (16, 5)


def test_one_basis_gives_one_colour_on_all_pages() -> None:
    first, second = random_pixels(6, 8, 8), random_pixels(6, 8, 8, seed=1)
    second[:, 3, 4] = first[:, 2, 2]
    basis = pca_basis(torch.cat([first.flatten(1).T, second.flatten(1).T]))
    assert torch.equal(basis.colors(first)[:, 2, 2], basis.colors(second)[:, 3, 4])


def test_the_layout_head_names_the_nearest_prototype(tmp_path: Path) -> None:
    head = LayoutHead(("paper", "text"), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), "neck")
    features = torch.tensor([[[3.0, 1.0]], [[1.0, 5.0]]])  # (2, 1, 2)
    assert head.classify(features).tolist() == [[0, 1]]
    head.save(tmp_path)
    loaded = load_layout_head(tmp_path)
    assert loaded is not None
    assert (loaded.classes, loaded.stage) == (head.classes, head.stage)
    assert torch.equal(loaded.prototypes, head.prototypes)
    assert load_layout_head(tmp_path / "none") is None
    page = Image.new("RGB", (32, 16), (200, 200, 200))
    picture = layout_over_page(page, features, (0, 0, 16, 32), 16, head)
    assert picture.getpixel((4, 8)) == (200, 200, 200)  # Paper leaves the page as it is.
    red, _, blue = picture.getpixel((24, 8))
    assert blue > red
    assert CLASS_COLORS["text"] is not None


def test_a_sheet_says_what_it_shows() -> None:
    panels = [("a caption", Image.new("RGB", (100, 50), "white")), ("b" * 200, Image.new("RGB", (100, 150), "white"))]
    plain = sheet(panels, 2, 300)
    said = sheet(panels, 2, 300, Heading("title", "explanation " * 30), Legend(("text", "paper"), ("0", "1")))
    warned = sheet(panels, 2, 300, Heading("title", warning="RANDOM WEIGHTS"))
    assert plain.width == said.width == warned.width
    assert plain.height < warned.height < said.height
    colors = {color for _, color in said.getcolors(1 << 24)}
    assert CLASS_COLORS["text"] in colors
    assert tuple(heat_colors(torch.ones(1, 1).numpy())[0, 0].tolist()) in colors
    red = [count for count, color in warned.getcolors(1 << 24) if color == WARNING_COLOR]
    assert red
    assert red[0] > 500  # Written large.
    assert WARNING_COLOR not in colors
    assert (warning_of("random"), warning_of("sample")) == ("RANDOM WEIGHTS: these pictures mean nothing", "")
    assert shown_name("some/model") == "some/model"
    assert "not DeepSeek-OCR's" in shown_name("sample")
    assert load_head("random") is None


def test_several_pages_are_rows_of_one_sheet() -> None:
    pages = [
        EncodedPage(
            name, Image.new("RGB", (48, 64)), {"neck": random_pixels(5, 8, 8, seed=n)}, (0, 16, 128, 96), (128, 128)
        )
        for n, name in enumerate("abc")
    ]
    picture = overview(pages, ["neck"], None, Heading("three pages"), 200)
    assert picture.width == 2 * 200 + 3 * 14
    assert 3 * (267 + 26 + 14) < picture.height < 3 * (267 + 26 + 14) + 150


def test_the_script_draws_three_pictures(model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(ROOT / "samples" / "pages.pdf"), "--page", "2", "--checkpoint", model_folder]
    assert script.main([*command, "--output", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "attention.png",
        "similarity.png",
        "stages.png",
    ]
    for path in (tmp_path / "out").iterdir():
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 100
    assert script.main([*command, "--output", str(tmp_path / "none"), "--at", "5000", "1"]) == 2
    assert script.main([*command[:1], "--page", "3", "--output", str(tmp_path / "none")]) == 2
    assert "has 3 page(s), counted from 0" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_several_pages_of_a_pdf_become_one_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the sample, which names the classes."""
    command = [str(ROOT / "samples" / "pages.pdf"), "--output", str(tmp_path / "out"), "--dpi", "50"]
    assert script.main([*command, "--page", "0", "--page", "2"]) == 0
    assert "sample encoder, not DeepSeek-OCR's" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["pages.png"]
    with Image.open(tmp_path / "out" / "pages.png") as picture:
        assert picture.width == 4 * 420 + 5 * 14
