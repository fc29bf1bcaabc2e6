"""Training keeps no logits and no GELU: gradients against autograd's own, and every way of training with them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import random_pixels, relative_error, small_model
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from image_encoder_vit import ImageEncoderViTModel, recomputation
from image_encoder_vit.attention import eager_attention, relative_logits


def random_inputs(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def attention_inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Two images, three heads, a grid of 2 x 3."""
    tokens = (2, 3, 6, 4)
    return random_inputs(tokens, tokens, tokens, (3, 4), (5, 4), dtype=dtype)


@pytest.fixture(params=[20, 80, 1 << 21], ids=["queries", "heads", "whole"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of a head's queries at a time, two heads at a time, and all at once."""
    monkeypatch.setattr(recomputation, "LOGITS_PER_CHUNK_ON_CPU", request.param)


@pytest.mark.usefixtures("chunks")
def test_attention_s_gradients_are_right_and_can_be_differentiated_again() -> None:
    assert gradcheck(recomputation.recomputed_attention, attention_inputs())
    assert gradgradcheck(recomputation.recomputed_attention, attention_inputs())


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_attention_is_as_exact_as_eager_attention(dtype: torch.dtype, bound: float) -> None:
    def eager(query: Tensor, key: Tensor, value: Tensor, table_h: Tensor, table_w: Tensor) -> Tensor:
        return eager_attention(query, key, value, relative_logits(query, table_h, table_w, (2, 3)))[0]

    inputs = attention_inputs(dtype)
    results = []
    for attend, given in (
        (recomputation.recomputed_attention, inputs),
        (eager, inputs),
        (eager, [part.detach().double().requires_grad_() for part in inputs]),
    ):
        attended = attend(*given)
        assert attended.dtype == given[0].dtype
        results.append([attended, *torch.autograd.grad(attended.square().sum(), given)])
    for mine, theirs, exact in zip(*results, strict=True):
        assert relative_error(mine, exact) <= 1.2 * relative_error(theirs, exact) + 1e-7
    for mine, exact in zip(results[0][:4], results[2][:4], strict=True):  # All but the tables', which sum over all.
        assert relative_error(mine, exact) <= bound


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_mlp_s_gradients_are_right_and_can_be_differentiated_again(has_bias: bool) -> None:
    hidden, weight, bias = random_inputs((2, 3, 2, 5), (4, 5), (4,))
    given = (hidden, weight, bias if has_bias else None)
    assert gradcheck(recomputation.gelu_linear, given)
    assert gradgradcheck(recomputation.gelu_linear, given)
    # In float32 by oneDNN.
    single = [None if part is None else part.detach().float().requires_grad_() for part in given]
    wanted = [part for part in single if part is not None]
    expected = F.linear(F.gelu(single[0]), single[1], single[2])
    wanted_gradients = torch.autograd.grad(expected.square().sum(), wanted)
    for actual in (
        recomputation.gelu_linear(*single),
        recomputation.trained_linear(F.gelu(single[0]), single[1], single[2]),
    ):
        torch.testing.assert_close(actual, expected)
        for mine, theirs in zip(torch.autograd.grad(actual.square().sum(), wanted), wanted_gradients, strict=True):
            assert relative_error(mine, theirs) <= 1e-6


def test_a_norm_and_linear_layer_s_gradients_are_right_and_can_be_differentiated_again() -> None:
    torch.manual_seed(0)
    norm, layer = torch.nn.LayerNorm(5, eps=1e-6), torch.nn.Linear(5, 4)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        parameters = [*norm.to(dtype).parameters(), *layer.to(dtype).parameters()]
        (hidden,) = random_inputs((2, 3, 2, 5), dtype=dtype)
        given = [hidden, *parameters]
        results = recomputation.norm_linear(hidden, norm, layer), layer(norm(hidden))
        torch.testing.assert_close(*results)
        mine, theirs = (torch.autograd.grad(result.square().sum(), given, create_graph=True) for result in results)
        again = [
            torch.autograd.grad(sum(part.square().sum() for part in gradients), given) for gradients in (mine, theirs)
        ]
        for actual, expected in zip([*mine, *again[0]], [*theirs, *again[1]], strict=True):
            assert relative_error(actual, expected) <= bound
    assert gradcheck(
        lambda given: recomputation.norm_linear(given, norm.double(), layer.double()), random_inputs((2, 3, 2, 5))
    )


def gradients_of(model: ImageEncoderViTModel, pixels: Tensor, **options: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(pixels, **options).last_hidden_state.float().square().mean()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return random_pixels(2, 3, 128, 96)


@pytest.fixture(scope="module")
def exact(pixels: Tensor) -> dict[str, Tensor]:
    """Gradients of the eager path in float64, which recomputes nothing of attention."""
    model = small_model().double().train()
    model.set_attn_implementation("eager")
    return gradients_of(model, pixels)


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        assert relative_error(gradient, expected[name]) <= bound, name


def checkpointed(model: ImageEncoderViTModel) -> ImageEncoderViTModel:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    return model


def compiled(model: ImageEncoderViTModel) -> ImageEncoderViTModel:
    model.compile(backend="aot_eager")
    return model


@pytest.mark.parametrize(
    "change", [lambda model: model, checkpointed, compiled], ids=["plain", "checkpointed", "compiled"]
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradients_of_the_model_are_those_of_the_eager_path(
    change: Callable[[ImageEncoderViTModel], ImageEncoderViTModel],
    attention: str,
    pixels: Tensor,
    exact: dict[str, Tensor],
) -> None:
    model = small_model().train()
    model.set_attn_implementation(attention)
    assert_close(gradients_of(change(model), pixels), exact, 1e-5)


def test_gradients_under_autocast_are_as_exact_as_without_recomputation(
    pixels: Tensor, exact: dict[str, Tensor]
) -> None:
    errors = {}
    for attention in ("sdpa", "eager"):
        model = small_model().train()
        model.set_attn_implementation(attention)
        with torch.autocast("cpu", torch.bfloat16):
            gradients = gradients_of(model, pixels)
        assert gradients.keys() == exact.keys()
        assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
        errors[attention] = max(relative_error(gradients[name], exact[name]) for name in exact)
    assert errors["sdpa"] <= 2 * errors["eager"], errors


def test_a_penalty_on_gradients_can_be_trained(pixels: Tensor) -> None:
    penalties = {}
    for attention in ("sdpa", "eager"):
        model = small_model().double().train()
        model.set_attn_implementation(attention)
        given = pixels.double().requires_grad_()
        (gradient,) = torch.autograd.grad(model(given).last_hidden_state.square().mean(), given, create_graph=True)
        gradient.square().sum().backward()
        penalties[attention] = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_close(penalties["sdpa"], penalties["eager"], 1e-9)


@pytest.mark.parametrize("trained", ["", "rel_pos_h", "norm1", "qkv.weight", "lin2.bias"])
def test_a_penalty_on_gradients_goes_through_frozen_weights(trained: str) -> None:
    penalties = []
    for attention in ("sdpa", "eager"):
        model = small_model().double().train()
        model.set_attn_implementation(attention)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(bool(trained) and trained in name)
        given = random_pixels(1, 3, 64, 96).double().requires_grad_()
        wanted = [given, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
        (gradient,) = torch.autograd.grad(model(given).last_hidden_state.square().mean(), given, create_graph=True)
        penalties.append(torch.autograd.grad(gradient.square().sum(), wanted))
    for mine, theirs in zip(*penalties, strict=True):
        assert relative_error(mine, theirs) <= 1e-9


def norms_without_weights(model: ImageEncoderViTModel) -> None:
    model.encoder.blocks[1].norm1 = torch.nn.LayerNorm(model.config.hidden_size, elementwise_affine=False).double()


def norms_over_the_grid(model: ImageEncoderViTModel) -> None:
    model.encoder.blocks[1].norm1 = torch.nn.LayerNorm((6, model.config.hidden_size)).double()


@pytest.mark.parametrize("change", [norms_without_weights, norms_over_the_grid, lambda model: None], ids=str)
def test_other_norms_and_float64_under_autocast_train_as_eagerly(
    change: Callable[[ImageEncoderViTModel], None],
) -> None:
    gradients = []
    for attention in ("sdpa", "eager"):
        model = small_model().double().train()
        model.set_attn_implementation(attention)
        change(model)
        with torch.autocast("cpu", torch.bfloat16):
            gradients.append(gradients_of(model, random_pixels(1, 3, 64, 96).double()))
    assert_close(*gradients, bound=1e-5)


def test_what_autograd_keeps_does_not_grow_with_the_square_of_the_page() -> None:
    """The largest tensor kept is a few channels for each patch, and never a logit for each pair of them."""
    model = small_model().train()
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(random_pixels(1, 3, 512, 512))
    patches, pixels_bytes = 32 * 32, 4 * 3 * 512 * 512
    assert max(kept) <= pixels_bytes < 4 * patches**2  # the logits of one head


@pytest.mark.parametrize("name", ["attn", "mlp", "norm1", "mlp.lin1"])
def test_what_others_put_into_a_block_is_called_in_training(name: str, pixels: Tensor) -> None:
    model = small_model().train()
    block = model.encoder.blocks[1]
    calls: list[int] = []

    class Wrapper(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any) -> Any:
            calls.append(1)
            return self.inner(*args)

    expected = gradients_of(model, pixels)
    block.set_submodule(name, Wrapper(block.get_submodule(name)))
    gradients = gradients_of(model, pixels)
    assert calls == [1]
    assert_close({key.replace(".inner", ""): value for key, value in gradients.items()}, expected, 1e-5)


def test_frozen_and_adapted_layers_train(pixels: Tensor, exact: dict[str, Tensor]) -> None:
    model = small_model().train()
    model.encoder.blocks[0].requires_grad_(False)
    model.encoder.blocks[3].mlp.lin2.weight.requires_grad_(False)
    trained = {name: value for name, value in exact.items() if not name.startswith("encoder.blocks.0.")}
    del trained["encoder.blocks.3.mlp.lin2.weight"]
    assert_close(gradients_of(model, pixels), trained, 1e-5)
