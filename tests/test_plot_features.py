"""Pictures of what the encoder makes of a page: scripts/plot_features.py and its maths."""

from pathlib import Path

import pytest
import torch
from builders import random_pixels, small_model
from PIL import Image

from image_encoder_vit.commands import plot as script
from image_encoder_vit.corpora.pictures import attention_of_cell, cell_at, similarity_to_cell

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
