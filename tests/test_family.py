"""
More owners of this tower: PaddleOCR's table and formula recognisers and DeepSeek-VL in transformers, by drop-in and by
pull; and the CLIP tower beside the encoder of Unlimited-OCR.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import random_pixels, randomize, relative_error
from deep import small_deep_encoder, unlimited_ocr
from test_pull_native import ENCODER, classes
from torch import nn

from image_encoder_vit import ImageEncoderViTModel
from image_encoder_vit.modeling_image_encoder_vit import ImageEncoderViTBlock, ImageEncoderViTLinear
from image_encoder_vit.runtimes.drop_in import replace_sam_encoder
from image_encoder_vit.weights.pull import pull

BOUND = 1e-5


def slanext() -> nn.Module:
    module = classes("slanext")
    sizes = {"post_conv_in_channels": 8, "post_conv_out_channels": 12, "hidden_size": 16, "max_text_length": 6}
    return module.SLANeXtForTableRecognition(module.SLANeXtConfig(vision_config=ENCODER, **sizes))


def pp_formulanet() -> nn.Module:
    module = classes("pp_formulanet")
    channels = {"post_conv_in_channels": 8, "post_conv_mid_channels": 12, "post_conv_out_channels": 20}
    text = {"d_model": 16, "vocab_size": 64, "encoder_layers": 1, "decoder_layers": 1, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    vision = {**ENCODER, **channels, "decoder_hidden_size": 16}
    return module.PPFormulaNetForConditionalGeneration(
        module.PPFormulaNetConfig(vision_config=vision, text_config={**text, **heads})
    )


def deepseek_vl_hybrid() -> nn.Module:
    module = classes("deepseek_vl_hybrid")
    narrow = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = module.DeepseekVLHybridConfig(
        vision_config={"model_type": "siglip_vision_model", **narrow, "image_size": 64, "patch_size": 16},
        high_res_vision_config={"model_type": "sam_vision_model", **ENCODER},
        text_config={"model_type": "llama", **narrow, "vocab_size": 64},
    )
    return module.DeepseekVLHybridForConditionalGeneration(config)


def outputs_of_slanext(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    return model(pixels).last_hidden_state


def outputs_of_pp_formulanet(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    return model(pixel_values=pixels, decoder_input_ids=torch.tensor([[2, 5, 9]])).logits


def outputs_of_deepseek_vl(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    return model.model.get_image_features(pixels[:, :, :64, :64], pixels).pooler_output


MODELS: dict[str, tuple[Callable[[], nn.Module], str, Callable[[Any, torch.Tensor], torch.Tensor]]] = {
    "slanext": (slanext, "backbone.vision_tower", outputs_of_slanext),
    "pp_formulanet": (pp_formulanet, "model.encoder", outputs_of_pp_formulanet),
    "deepseek_vl_hybrid": (deepseek_vl_hybrid, "model.high_res_vision_model.vision_encoder", outputs_of_deepseek_vl),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_drop_in_gives_the_same_outputs_and_gradients(kind: str) -> None:
    build, path, outputs = MODELS[kind]
    model, pixels = randomize(build()).eval(), random_pixels(1, 3, 128, 128)
    names = set(model.state_dict())
    with torch.no_grad():
        expected = outputs(model, pixels)
    outputs(model, pixels).float().square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    replaced = replace_sam_encoder(model)
    assert list(replaced.originals) == [path]
    assert any(isinstance(block, ImageEncoderViTBlock) for block in model.get_submodule(path).layers)
    assert set(model.state_dict()) == names
    with torch.no_grad():
        assert relative_error(outputs(model, pixels), expected) <= BOUND
    outputs(model, pixels).float().square().mean().backward()
    encoder_gradients = 0
    for name, parameter in model.named_parameters():
        if name in gradients and gradients[name].norm() > 1e-6:
            assert relative_error(parameter.grad, gradients[name]) <= 1e-3, name
            encoder_gradients += name.startswith(path)
    assert encoder_gradients > 40
    replaced.undo()
    assert model.get_submodule(path) is replaced.originals[path]


@pytest.mark.parametrize("kind", MODELS)
def test_pulls_give_the_map_before_the_head(kind: str, tmp_path: Path) -> None:
    """With the convolutions that these models keep beside the encoder, or in their projector."""
    build, path, _ = MODELS[kind]
    model, pixels = randomize(build()).eval(), random_pixels(1, 3, 128, 128)
    model.save_pretrained(tmp_path / "source")
    pulled = pull(tmp_path / "source", tmp_path / "model")
    assert pulled.layout == kind.replace("_", "-")
    assert pulled.prefix == f"{path}."
    told = "adds features of a global block" if kind == "deepseek_vl_hybrid" else "image processor here"
    assert any(told in notice for notice in pulled.notices)
    encoder = ImageEncoderViTModel.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        features = encoder(pixels).last_hidden_state
        neck = model.get_submodule(path)(pixels).last_hidden_state
        if kind == "slanext":
            expected = model.backbone.post_conv(neck)
        elif kind == "deepseek_vl_hybrid":
            projection = model.model.high_res_vision_proj
            expected = projection.conv2(projection.conv1(neck))
        else:
            projector = model.model.encoder.multi_modal_projector
            expected = projector.conv2(projector.conv1(neck))
    assert relative_error(features, expected) <= BOUND


def test_the_clip_tower_beside_the_encoder_gets_fast_linears_too() -> None:
    model = unlimited_ocr(small_deep_encoder())
    pixels = random_pixels(2, 3, 128, 128)
    names = {name: value.data_ptr() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = torch.cat(list(model.model.get_image_features(pixels).pooler_output))
    tower = model.model.vision_tower.vision_encoder
    linears = {name: layer for name, layer in tower.named_modules() if type(layer) is nn.Linear}
    assert len(linears) == 6 * 3

    replaced = replace_sam_encoder(model)
    assert list(replaced.originals) == ["model.vision_tower.sam_encoder"]
    assert len(replaced.clip_linears) == len(linears)
    assert all(type(tower.get_submodule(name)) is ImageEncoderViTLinear for name in linears)
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == names
    with torch.no_grad():
        actual = torch.cat(list(model.model.get_image_features(pixels).pooler_output))
    assert relative_error(actual, expected) <= 1e-6
    model.model.get_image_features(pixels).pooler_output[0].sum().backward()
    assert all(layer.weight.grad is not None for layer in linears.values())

    replaced.undo()
    assert all(tower.get_submodule(name) is layer for name, layer in linears.items())
    assert not [module for module in model.modules() if isinstance(module, ImageEncoderViTLinear)]


def test_undo_refuses_where_clip_s_linears_were_exchanged() -> None:
    model = unlimited_ocr(small_deep_encoder())
    replaced = replace_sam_encoder(model)
    layer = model.model.vision_tower.vision_encoder.encoder.layers[0].mlp
    layer.fc1 = nn.Linear(20, 48)
    with pytest.raises(ValueError, match=r"mlp\.fc1' is not the linear layer that was put there"):
        replaced.undo()


def test_own_deep_encoders_are_no_place_for_the_drop_in() -> None:
    with pytest.raises(ValueError, match="this package's already"):
        replace_sam_encoder(small_deep_encoder())
