"""FlexAttention: the same as the plain path, and "sdpa" with a message where there is no GPU."""

import pytest
import torch
from builders import random_pixels, relative_error, small_model
from torch import Tensor

from image_encoder_vit import ImageEncoderViTModel
from image_encoder_vit.attention import eager_attention, flex_attention, relative_logits

pytest.importorskip("torch.nn.attention.flex_attention", reason="torch before 2.5 has no FlexAttention")
GRID = (5, 7)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def parts(seed: int) -> tuple[Tensor, ...]:
    """Queries, keys and values (2, 3, 35, 16), and position tables for the grid."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, 2, 3, GRID[0] * GRID[1], 16, generator=generator)
    tables = (torch.randn(2 * side - 1, 16, generator=generator) for side in GRID)
    return (query, key, value, *tables)


# Outside of a compiled function it warns that it is slow, which is the point here: the same formula without a GPU.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_equals_eager_attention() -> None:
    query, key, value, table_h, table_w = parts(seed=0)
    relative = relative_logits(query, table_h, table_w, GRID)
    expected = eager_attention(query, key, value, relative)[0]
    assert relative_error(flex_attention(query, key, value, relative), expected) <= 1e-6


def test_falls_back_to_sdpa_on_the_cpu_with_one_message(
    model: ImageEncoderViTModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = random_pixels(1, 3, 128, 128)
    messages: list[str] = []
    monkeypatch.setattr("image_encoder_vit.modeling_image_encoder_vit.logger.warning_once", messages.append)
    expected = model(pixels).last_hidden_state
    assert not messages
    model.set_attn_implementation("flex_attention")
    assert torch.equal(model(pixels).last_hidden_state, expected)
    assert len(messages) == 1
    assert "'flex_attention' is for CUDA GPUs" in messages[0]
    assert "'cpu'" in messages[0]


@needs_gpu
@pytest.mark.parametrize("size_px", [(128, 128), (96, 208)])
def test_equals_sdpa_on_a_gpu_with_its_gradients(size_px: tuple[int, int]) -> None:
    pixels = random_pixels(2, 3, *size_px).cuda()
    features, gradients = {}, {}
    for implementation in ("sdpa", "flex_attention"):
        model = small_model().cuda()
        model.set_attn_implementation(implementation)
        features[implementation] = model(pixels).last_hidden_state
        features[implementation].square().mean().backward()
        gradients[implementation] = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert relative_error(features["flex_attention"].detach(), features["sdpa"].detach()) <= 1e-4
    assert relative_error(gradients["flex_attention"], gradients["sdpa"]) <= 1e-3
