"""The encoder and its transformers wrapper: shapes, outputs, precision, gradients, and clear errors."""

import inspect

import pytest
import torch
from builders import random_pixels, relative_error, small_model
from small import SMALL

from image_encoder_vit import (
    ImageEncoderViT,
    ImageEncoderViTConfig,
    ImageEncoderViTModel,
    attention,
    modeling_image_encoder_vit,
)

ATTENTION = ["eager", "sdpa"]


def test_default_encoder_has_the_published_parameters() -> None:
    weights = ImageEncoderViT().state_dict()
    assert len(weights) == 179
    assert sum(weight.numel() for weight in weights.values()) == 95_569_152
    block = {"norm1", "attn.qkv", "attn.proj", "norm2", "mlp.lin1", "mlp.lin2"}
    expected = {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "net_2.weight", "net_3.weight"}
    expected |= {"neck.0.weight", "neck.1.weight", "neck.1.bias", "neck.2.weight", "neck.3.weight", "neck.3.bias"}
    for index in range(12):
        expected |= {f"blocks.{index}.{name}.{kind}" for name in block for kind in ("weight", "bias")}
        expected |= {f"blocks.{index}.attn.rel_pos_{axis}" for axis in "hw"}
        length = 127 if index in (2, 5, 8, 11) else 27
        assert weights[f"blocks.{index}.attn.rel_pos_h"].shape == (length, 64)
    assert weights.keys() == expected


def test_signature_is_the_published_one() -> None:
    parameters = inspect.signature(ImageEncoderViT).parameters
    positional = {name: p.default for name, p in parameters.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY}
    assert positional == {
        "img_size": 1024,
        "patch_size": 16,
        "in_chans": 3,
        "embed_dim": 768,
        "depth": 12,
        "num_heads": 12,
        "mlp_ratio": 4.0,
        "out_chans": 256,
        "global_attn_indexes": (2, 5, 8, 11),
    }


@pytest.mark.parametrize(
    ("numbers", "parameters"),
    [
        # The image encoders of sam_vit_l_0b3195 and sam_vit_h_4b8939, counted from segment-anything's definition.
        ({"embed_dim": 1024, "depth": 24, "num_heads": 16, "global_attn_indexes": (5, 11, 17, 23)}, 308_278_272),
        ({"embed_dim": 1280, "depth": 32, "num_heads": 16, "global_attn_indexes": (7, 15, 23, 31)}, 637_026_048),
        ({}, 89_670_912),
    ],
    ids=["vit_l", "vit_h", "vit_b"],
)
def test_plain_sam_sizes_by_their_numbers(numbers: dict[str, object], parameters: int) -> None:
    with torch.device("meta"):
        encoder = ImageEncoderViT(**numbers, downsample_channels=())
        assert sum(parameter.numel() for parameter in encoder.parameters()) == parameters
        assert encoder(torch.empty(2, 3, 512, 768)).shape == (2, 256, 32, 48)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (16, 16), (128, 128), (144, 80), (16, 272), (208, 208)])
@pytest.mark.parametrize("channels", [[12, 20], [], [12, 7]], ids=str)
def test_any_size_and_batch(height: int, width: int, channels: list[int]) -> None:
    model = small_model(downsample_channels=channels)
    stride = 16 * 2 ** len(channels)
    cells = -(-height // stride), -(-width // stride)
    with torch.no_grad():
        outputs = model(random_pixels(2, 3, height, width))
    last = channels[-1] if channels else SMALL["output_channels"]
    assert outputs.last_hidden_state.shape == (2, last, *cells)
    assert outputs.pooler_output.shape == (2, last)
    assert outputs.patch_embeds.shape == (2, cells[0] * cells[1], last)
    assert torch.isfinite(outputs.last_hidden_state).all()


def test_outputs_hold_the_same_features_in_three_forms(model: ImageEncoderViTModel) -> None:
    outputs = model(random_pixels(2, 3, 128, 192))
    features = outputs.last_hidden_state
    torch.testing.assert_close(outputs.pooler_output, features.mean(dim=(2, 3)))
    # Row by row, as DeepSeek-OCR flattens them for CLIP-L.
    assert torch.equal(outputs.patch_embeds[:, 1 * 3 + 2], features[:, :, 1, 2])
    assert outputs[0] is features
    assert outputs.hidden_states is None
    assert outputs.attentions is None


def test_images_of_a_batch_do_not_influence_each_other(model: ImageEncoderViTModel) -> None:
    pixels = random_pixels(3, 3, 112, 144)
    with torch.no_grad():
        together = model(pixels).last_hidden_state
        alone = torch.cat([model(image[None]).last_hidden_state for image in pixels])
    assert relative_error(together, alone) <= 1e-6


@pytest.mark.parametrize("attn_implementation", ATTENTION)
def test_hidden_states_and_attentions_on_request(attn_implementation: str) -> None:
    model = small_model()
    model.set_attn_implementation(attn_implementation)
    pixels = random_pixels(2, 3, 128, 80)
    with torch.no_grad():
        plain = model(pixels).last_hidden_state
        outputs = model(pixels, output_hidden_states=True, output_attentions=True)
    assert relative_error(outputs.last_hidden_state, plain) <= 1e-6
    assert [tuple(hidden.shape) for hidden in outputs.hidden_states] == [(2, 8, 5, 32)] * 5
    windows = 2 * 3 * 2  # images x rows x columns of windows of 3 in a grid of 8 x 5
    shapes = [(windows, 2, 9, 9), (2, 2, 40, 40)] * 2
    assert [tuple(weights.shape) for weights in outputs.attentions] == shapes
    for weights in outputs.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    # The last hidden state of the blocks is what the neck receives.
    features = model.encoder.neck(outputs.hidden_states[-1].permute(0, 3, 1, 2))
    assert relative_error(model.encoder.net_3(model.encoder.net_2(features)), plain) <= 1e-6


def test_the_attention_implementation_can_change_after_loading(
    model: ImageEncoderViTModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    original = attention.recomputed_attention

    def spy(*args: torch.Tensor) -> torch.Tensor:
        calls.append("sdpa")
        return original(*args)

    monkeypatch.setattr(attention, "recomputed_attention", spy)
    pixels = random_pixels(1, 3, 128, 128)
    results = {}
    for attn_implementation in ("sdpa", "eager", "sdpa"):
        model.set_attn_implementation(attn_implementation)
        calls.clear()
        # With gradients: in training "sdpa" keeps no logits, which inference never does.
        results[attn_implementation] = model(pixels).last_hidden_state.detach()
        assert bool(calls) == (attn_implementation == "sdpa")
    assert relative_error(results["eager"], results["sdpa"]) <= 1e-6


def test_an_unknown_attention_implementation_is_refused(model: ImageEncoderViTModel) -> None:
    with pytest.raises(ValueError, match=r"(?i)flash.attention.2"):
        model.set_attn_implementation("flash_attention_2")


def test_float32_pixels_into_a_bfloat16_model() -> None:
    model = small_model()
    pixels = random_pixels(1, 3, 128, 128)
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
        actual = model.to(torch.bfloat16)(pixels).last_hidden_state
    assert actual.dtype == torch.bfloat16
    assert relative_error(actual, expected) <= 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_precision(dtype: torch.dtype) -> None:
    model = small_model()
    pixels = random_pixels(2, 3, 144, 208)
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
        with torch.autocast("cpu", dtype=dtype):
            assert relative_error(model(pixels).last_hidden_state, expected) <= 0.05
        assert relative_error(model.to(dtype)(pixels).last_hidden_state, expected) <= 0.05


def test_an_exported_encoder_gives_the_same() -> None:
    model = small_model()
    pixels = random_pixels(1, 3, 144, 208)
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
        exported = torch.export.export(model.encoder, (pixels,), strict=False).module()
        assert relative_error(exported(pixels), expected) <= 1e-6


@pytest.mark.parametrize("attn_implementation", ATTENTION)
def test_gradients_reach_every_parameter_and_equal_the_other_path_s(attn_implementation: str) -> None:
    gradients = {}
    for name in ("eager", attn_implementation):
        model = small_model().train()
        model.set_attn_implementation(name)
        model(random_pixels(2, 3, 112, 144)).last_hidden_state.square().sum().backward()
        gradients[name] = {key: parameter.grad for key, parameter in model.named_parameters()}
    for name, gradient in gradients[attn_implementation].items():
        assert gradient is not None, name
        assert gradient.abs().sum() > 0, name
        assert relative_error(gradient, gradients["eager"][name]) <= 1e-4, name


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    gradients, recomputed = [], []
    for checkpointing in (False, True):
        model = small_model().train()
        if checkpointing:
            # Renamed in later releases of transformers, with a warning at the old name.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": use_reentrant})
        runs = []
        model.encoder.blocks[1].norm1.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        pixels = random_pixels(1, 3, 128, 128).requires_grad_()
        model(pixels).last_hidden_state.square().sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
        recomputed.append(len(runs))
    assert recomputed == [1, 2]
    assert relative_error(gradients[1], gradients[0]) <= 1e-6


def test_pixel_mask_restricts_the_pooled_output(model: ImageEncoderViTModel) -> None:
    pixels = random_pixels(2, 3, 128, 192)
    mask = torch.ones(2, 128, 192, dtype=torch.long)
    mask[1, 64:] = 0
    mask[1, :, 65:] = 0  # reaches one px into the second column of cells
    outputs = model(pixels, pixel_mask=mask)
    features = outputs.last_hidden_state
    torch.testing.assert_close(outputs.pooler_output[0], features[0].mean(dim=(1, 2)))
    torch.testing.assert_close(outputs.pooler_output[1], features[1, :, 0, :2].mean(dim=1))
    with pytest.raises(ValueError, match=r"\(2, 128, 192\), got \(2, 64, 64\)"):
        model(pixels, pixel_mask=mask[:, :64, :64])


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(3, 128, 128), r"3 dimensions: \(3, 128, 128\).*pixel_values\[None\]"),
        (torch.zeros(1, 1, 3, 128, 128), "5 dimensions"),
        (torch.zeros(1, 1, 128, 128), "3 channels in dimension 1, got 1"),
        (torch.zeros(1, 128, 128, 3), "3 channels in dimension 1, got 128"),
        (torch.zeros(0, 3, 128, 128), "holds no image"),
        (torch.zeros(1, 3, 128, 100), "patch_size=16 px, got 128 x 100 px"),
        (torch.zeros(1, 3, 8, 128), "got 8 x 128 px"),
        (torch.zeros(1, 3, 0, 128), "got 0 x 128 px"),
        (torch.zeros(1, 3, 128, 128, dtype=torch.uint8), "floating point and normalised, got torch.uint8"),
    ],
)
def test_bad_pixels_are_one_clear_error(model: ImageEncoderViTModel, pixels: torch.Tensor, message: str) -> None:
    for forward in (model, model.encoder):
        with pytest.raises(ValueError, match=message):
            forward(pixels)


def test_new_models_are_random_everywhere_and_reproducible() -> None:
    torch.manual_seed(0)
    first = ImageEncoderViTModel(ImageEncoderViTConfig(**SMALL)).state_dict()
    torch.manual_seed(0)
    second = ImageEncoderViTModel(ImageEncoderViTConfig(**SMALL)).state_dict()
    for name, weight in first.items():
        assert torch.equal(weight, second[name])
        if weight.ndim > 1:
            assert 0.01 < weight.std() < 0.03, name


def test_tuple_output_and_config_flags() -> None:
    model = small_model()
    features, pooled, tokens, hidden = model(random_pixels(1, 3, 64, 64), return_dict=False, output_hidden_states=True)
    assert (features.ndim, pooled.ndim, tokens.ndim, len(hidden)) == (4, 2, 3, 5)
    model.config.output_hidden_states = True
    assert len(model(random_pixels(1, 3, 64, 64)).hidden_states) == 5


@pytest.mark.parametrize("tokens", [1, 200])
def test_bands_of_any_size_give_the_same(
    monkeypatch: pytest.MonkeyPatch, model: ImageEncoderViTModel, tokens: int
) -> None:
    pixels = random_pixels(2, 3, 480, 320)  # 30 x 20 patches, so that 200 tokens are 10 rows, or 9 of windows of 3
    with torch.no_grad():
        in_one_band = model(pixels).last_hidden_state
        monkeypatch.setattr(modeling_image_encoder_vit, "TOKENS_PER_BAND", tokens)
        assert relative_error(model(pixels).last_hidden_state, in_one_band) <= 1e-6


def test_hooks_on_linear_layers_see_their_outputs_in_inference(model: ImageEncoderViTModel) -> None:
    pixels = random_pixels(1, 3, 128, 128)
    with torch.inference_mode():
        expected = model(pixels).last_hidden_state
    mlp = model.encoder.blocks[0].mlp
    seen = []
    mlp.lin1.register_forward_hook(lambda _module, inputs, output: seen.append((inputs[0].clone(), output.clone())))
    with torch.inference_mode():
        hooked = model(pixels).last_hidden_state
        # What a hook is given is the layer's own output, before the GELU.
        linear = [
            (output, torch.nn.functional.linear(hidden, mlp.lin1.weight, mlp.lin1.bias)) for hidden, output in seen
        ]
    assert relative_error(hooked, expected) <= 1e-6
    assert linear
    assert all(relative_error(actual, wanted) <= 1e-6 for actual, wanted in linear)
