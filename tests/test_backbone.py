"""The backbone: its feature maps are the model's, chosen by name or index, and heads of transformers train on them."""

import json
from pathlib import Path

import pytest
import torch
from builders import random_pixels, randomize, small_model
from fresh_python import FreshPython
from small import SMALL
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    Mask2FormerConfig,
    Mask2FormerModel,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from image_encoder_vit import ImageEncoderViTBackbone, ImageEncoderViTConfig, ImageEncoderViTModel

STAGES = ["stem", "stage1", "stage2", "stage3", "stage4", "neck", "net_2", "net_3"]
CHANNELS = [32, 32, 32, 32, 32, 8, 12, 20]


def small_config(**changes: object) -> ImageEncoderViTConfig:
    return ImageEncoderViTConfig(**{**SMALL, **changes})


def test_the_full_size_stages_are_those_of_sam_b() -> None:
    with torch.device("meta"):
        backbone = AutoBackbone.from_config(ImageEncoderViTConfig(out_features=["stem", "stage12", "neck", "net_2"]))
    assert backbone.channels == [768, 768, 256, 512]
    assert backbone.stage_names == ["stem", *(f"stage{i}" for i in range(1, 13)), "neck", "net_2", "net_3"]
    assert backbone.num_features == [768] * 13 + [256, 512, 1024]
    assert backbone.out_feature_channels["net_3"] == 1024


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("gradients", [False, True])
def test_each_stage_is_bit_equal_to_the_model(attn_implementation: str, gradients: bool) -> None:
    model = small_model(attn_implementation=attn_implementation)
    backbone = AutoBackbone.from_config(small_config(out_features=STAGES), attn_implementation=attn_implementation)
    backbone.eval().load_state_dict(model.state_dict())
    pixels = random_pixels(2, 3, 96, 176)
    with torch.set_grad_enabled(gradients):
        maps = dict(zip(STAGES, backbone(pixels).feature_maps, strict=True))
        outputs = model(pixels, output_hidden_states=True)
        hidden = [state.permute(0, 3, 1, 2) for state in outputs.hidden_states]
        neck = model.encoder.neck(hidden[-1])
        expected = [*hidden, neck, model.encoder.net_2(neck), outputs.last_hidden_state]
    for name, channels, theirs in zip(STAGES, CHANNELS, expected, strict=True):
        stride = {"net_2": 32, "net_3": 64}.get(name, 16)
        assert maps[name].shape == (2, channels, -(-96 // stride), -(-176 // stride)), name
        assert torch.equal(maps[name], theirs), name


@pytest.mark.parametrize("chosen", [["stem"], ["stage2"], ["stem", "neck"], ["stage1", "stage4", "net_2"], ["net_3"]])
def test_only_what_is_asked_for_is_computed(chosen: list[str]) -> None:
    backbone = randomize(ImageEncoderViTBackbone(small_config(out_features=chosen))).eval()
    ran = []
    modules = [*backbone.encoder.blocks, backbone.encoder.neck, backbone.encoder.net_2, backbone.encoder.net_3]
    for name, module in zip(STAGES[1:], modules, strict=True):
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    maps = backbone(random_pixels(1, 3, 128, 128)).feature_maps
    assert [m.shape[1] for m in maps] == backbone.channels == [CHANNELS[STAGES.index(name)] for name in chosen]
    assert ran == STAGES[1 : STAGES.index(chosen[-1]) + 1]


def test_names_and_indices_are_two_ways_to_choose() -> None:
    config = small_config(out_indices=(1, -3))
    assert config.out_features == ["stage1", "neck"]
    config.out_features = ["stage2", "net_3"]
    assert config.out_indices == [2, 7]
    backbone = ImageEncoderViTBackbone(config)
    backbone.out_indices = [0]
    assert backbone.out_features == config.out_features == ["stem"]
    assert len(backbone(random_pixels(1, 3, 64, 64)).feature_maps) == 1
    backbone.out_features = None
    assert backbone.channels == [20]


def test_hidden_states_and_attentions_on_request() -> None:
    backbone = ImageEncoderViTBackbone(small_config(out_features=["stage2"])).eval()
    outputs = backbone(random_pixels(1, 3, 128, 128), output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in outputs.hidden_states] == [(1, 8, 8, 32)] * 3
    assert [weights.shape for weights in outputs.attentions] == [(9, 2, 9, 9), (1, 2, 64, 64)]
    (feature_map,) = outputs.feature_maps
    assert torch.equal(feature_map, outputs.hidden_states[-1].permute(0, 3, 1, 2))
    (as_tuple,) = backbone(random_pixels(1, 3, 128, 128), return_dict=False)
    torch.testing.assert_close(as_tuple[0], feature_map)


@pytest.mark.parametrize(
    ("values", "seen"),
    [
        ({"out_features": "neck"}, "list of some of the stages 0 stem.*got 'neck'"),
        ({"out_features": []}, r"got \[\]"),
        ({"out_features": ["nec"]}, r"no stages \['nec'\].*5 neck"),
        ({"out_indices": [99]}, r"no stages \[99\]"),
        ({"out_indices": [1.0]}, r"got \[1.0\]"),
        ({"out_features": ["neck", "stem"]}, "same order"),
        ({"out_features": ["neck"], "out_indices": [1]}, "correspond"),
        ({"out_features": ["neck", "neck"]}, "duplicates"),
    ],
)
def test_a_bad_choice_is_named(values: dict[str, object], seen: str) -> None:
    with pytest.raises(ValueError, match=seen):
        small_config(**values)


def test_the_choice_is_saved_and_no_choice_leaves_no_trace(tmp_path: Path) -> None:
    small_config(out_features=["stage2", "neck"]).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).out_indices == [2, 5]
    small_config().save_pretrained(tmp_path)
    assert (
        not {"out_features", "out_indices", "stage_names"} & json.loads((tmp_path / "config.json").read_text()).keys()
    )
    config = small_config()
    config.downsample_channels = []
    assert config.out_features == ["neck"]


def test_folders_of_model_and_backbone_load_into_each_other(tmp_path: Path, model_folder: str) -> None:
    pixels = random_pixels(1, 3, 128, 128)
    expected = small_model()(pixels).last_hidden_state
    backbone = ImageEncoderViTBackbone.from_pretrained(model_folder, out_features=["neck", "net_3"])
    assert torch.equal(backbone(pixels).feature_maps[1], expected)
    backbone.save_pretrained(tmp_path)
    assert ImageEncoderViTBackbone.from_pretrained(tmp_path).out_features == ["neck", "net_3"]
    assert ImageEncoderViTBackbone.from_pretrained(tmp_path, out_indices=[1]).out_features == ["stage1"]
    model = AutoModel.from_pretrained(tmp_path)
    assert type(model) is ImageEncoderViTModel
    assert torch.equal(model(pixels).last_hidden_state, expected)


def test_loading_is_strict(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(ValueError, match=r"Missing weights \(14\): encoder.blocks.4.attn"):
        ImageEncoderViTBackbone.from_pretrained(tmp_path)


WITHOUT_PACKAGE = """
import sys
sys.modules["image_encoder_vit"] = None
import torch
from transformers import AutoBackbone, AutoConfig, AutoModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
folder = sys.argv[1]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True, out_features=["stem", "net_3"])
assert type(AutoBackbone.from_config(config, trust_remote_code=True)).__name__ == "ImageEncoderViTBackbone"
backbone_class = get_class_from_dynamic_module(config.auto_map["AutoBackbone"], folder)
backbone = backbone_class.from_pretrained(folder, out_features=["stem", "net_3"])
assert type(backbone).__module__.startswith("transformers_modules."), type(backbone)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
pixels = torch.rand(1, 3, 128, 128)
assert torch.equal(backbone(pixels).feature_maps[1], model(pixels).last_hidden_state)
"""


@pytest.mark.parametrize("saved_as", [ImageEncoderViTModel, ImageEncoderViTBackbone])
def test_the_saved_code_makes_a_backbone(saved_as: type, run_python: FreshPython, tmp_path: Path) -> None:
    saved_as(small_config()).save_pretrained(tmp_path / "encoder")
    run_python(WITHOUT_PACKAGE, str(tmp_path / "encoder"), cache=tmp_path)


def assert_trains(model: torch.nn.Module, loss: torch.Tensor, backbone: ImageEncoderViTBackbone, last: str) -> None:
    """A backward pass of the whole model reaches every weight of the backbone up to the stage `last`."""
    assert torch.isfinite(loss)
    loss.backward()
    unused = tuple(f"encoder.{name}" for name in STAGES[STAGES.index(last) + 1 :] if not name.startswith("stage"))
    for name, parameter in backbone.named_parameters():
        if name.startswith(unused):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_upernet_segments_on_it() -> None:
    config = UperNetConfig(
        backbone_config=small_config(out_features=["stage1", "stage2", "stage3", "stage4"]),
        hidden_size=16,
        pool_scales=[1, 2],
        auxiliary_channels=8,
        auxiliary_in_channels=32,
        num_labels=5,
    )
    model = UperNetForSemanticSegmentation(config)
    assert type(model.backbone) is ImageEncoderViTBackbone
    randomize(model.backbone)
    labels = torch.randint(0, 5, (2, 96, 128), generator=torch.Generator().manual_seed(0))
    outputs = model(random_pixels(2, 3, 96, 128), labels=labels)
    assert outputs.logits.shape == (2, 5, 96, 128)
    assert_trains(model, outputs.loss, model.backbone, last="stage4")


def test_mask2former_segments_on_maps_of_several_strides(tmp_path: Path) -> None:
    config = Mask2FormerConfig(
        backbone_config=small_config(out_features=["stage4", "neck", "net_2", "net_3"]),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=5,
        feature_strides=[16, 16, 32, 64],
        common_stride=16,
        num_labels=3,
    )
    model = Mask2FormerModel(config)
    backbone = model.pixel_level_module.encoder
    assert type(backbone) is ImageEncoderViTBackbone
    randomize(backbone)
    outputs = model(random_pixels(1, 3, 128, 128))
    queries, masks = outputs.transformer_decoder_last_hidden_state, outputs.masks_queries_logits[-1]
    assert (queries.shape, masks.shape) == ((1, 5, 32), (1, 5, 8, 8))
    # Its own loss matches queries to objects, which takes SciPy.
    loss = queries[..., 0].square().mean() + masks.square().mean()
    assert_trains(model, loss, backbone, last="net_3")
    model.eval().save_pretrained(tmp_path)
    loaded = Mask2FormerModel.from_pretrained(tmp_path)
    pixels = random_pixels(1, 3, 128, 128, seed=1)
    torch.testing.assert_close(loaded(pixels).masks_queries_logits[-1], model(pixels).masks_queries_logits[-1])
