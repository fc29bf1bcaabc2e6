"""Every layout of the family is recognised by its tensors, and what does not fit is refused with what was found."""

import pytest
import torch
from checkpoints import RECIPES, encoder_weights, laid_out
from hypothesis import given, settings
from hypothesis import strategies as st

from image_encoder_vit import ImageEncoderViTConfig
from image_encoder_vit.weights.layouts import (
    EXPORT_LAYOUTS,
    expected_shapes,
    export_names,
    find_layout,
)

HINT_KEYS = ("window_size", "downsample_channels", "image_size", "width", "heads", "model_type")
ARCHITECTURE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "mlp_ratio",
    "output_channels",
    "downsample_channels",
    "window_size",
    "global_attn_indexes",
    "qkv_bias",
    "use_abs_pos",
    "use_rel_pos",
)


def shapes_of(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def under(prefix: str, config: ImageEncoderViTConfig) -> dict[str, tuple[int, ...]]:
    return {prefix + name: shape for name, shape in expected_shapes(config).items()}


def small_config(**changes: object) -> ImageEncoderViTConfig:
    return encoder_weights(**changes)[0]


@pytest.mark.parametrize("kind", RECIPES)
def test_every_layout_is_recognised(kind: str) -> None:
    recipe = RECIPES[kind]
    config, weights = encoder_weights(dtype=recipe.dtype, downsample_channels=recipe.downsample_channels)
    layout = find_layout(shapes_of(laid_out(recipe, weights)))
    assert layout.family.name == recipe.layout
    assert layout.prefix == recipe.prefix
    assert layout.is_channels_last == recipe.is_channels_last
    assert layout.shapes == expected_shapes(config)
    assert {name: getattr(layout.config, name) for name in ARCHITECTURE} == {
        name: getattr(config, name) for name in ARCHITECTURE
    }


@pytest.mark.parametrize(
    ("kind", "mean", "padding", "position", "resample", "keep"),
    [
        ("deepseek-ocr", 0.5, [127, 127, 127], "center", 3, None),
        ("deepseek-ocr-2", 0.5, [127, 127, 127], "center", 3, None),
        ("unlimited-ocr-native", 0.5, [127, 127, 127], "center", 3, None),
        ("sam-pth", 0.485, "mean", "bottom_right", 2, None),
        ("sam-hf", 0.485, "mean", "bottom_right", 2, None),
        ("timm", 0.485, "mean", "bottom_right", 2, None),
        ("got-ocr2", 0.48145466, None, None, 3, False),
        ("got-ocr2-hf", 0.48145466, None, None, 3, False),
        ("vary", 0.48145466, None, None, 3, False),
        ("vary-tiny", 0.485, None, None, 2, False),
        ("onechart", 0.0, None, None, 2, False),
        ("deepseek-vl", 0.48145466, [122, 116, 104], "center", 3, None),
    ],
)
def test_each_family_has_its_own_preprocessing(
    kind: str, mean: float, padding: object, position: str | None, resample: int, keep: bool | None
) -> None:
    recipe = RECIPES[kind]
    _, weights = encoder_weights(downsample_channels=recipe.downsample_channels)
    settings = find_layout(shapes_of(laid_out(recipe, weights))).preprocessing
    assert settings["image_mean"][0] == mean
    assert settings.get("padding_color") == padding
    assert settings.get("padding_position") == position
    assert settings["keep_aspect_ratio"] is (keep is not False)
    assert settings["resample"] == resample
    assert settings["size"] == {"height": 128, "width": 128}
    assert settings.get("tile_size") == (768 if kind == "deepseek-ocr-2" else None)


@pytest.mark.parametrize(
    ("width", "depth", "heads", "global_blocks"),
    [(768, 12, 12, [2, 5, 8, 11]), (1024, 24, 16, [5, 11, 17, 23]), (1280, 32, 16, [7, 15, 23, 31])],
)
def test_full_size_architectures_are_inferred(width: int, depth: int, heads: int, global_blocks: list[int]) -> None:
    config = ImageEncoderViTConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        global_attn_indexes=global_blocks,
        downsample_channels=[],
    )
    layout = find_layout(under("image_encoder.", config))
    inferred = layout.config
    assert (inferred.hidden_size, inferred.num_hidden_layers, inferred.num_attention_heads) == (width, depth, heads)
    assert inferred.global_attn_indexes == global_blocks
    assert (inferred.window_size, inferred.image_size, inferred.mlp_ratio) == (14, 1024, 4.0)
    assert layout.notices == ()


def test_tensors_are_trusted_over_config_json() -> None:
    shapes = under("model.sam_model.", ImageEncoderViTConfig(downsample_channels=[512, 896]))
    said = {"vision_config": {"width": {"sam_vit_b": {"global_attn_indexes": [2, 5, 8, 11], "layers": 12}}}}
    said["vision_config"]["width"]["sam_vit_b"]["downsample_channels"] = [512, 1024]
    layout = find_layout(shapes, source_config=said)
    assert layout.config.downsample_channels == [512, 896]
    assert layout.family.name == "deepseek-ocr-2"
    (notice,) = layout.notices
    assert "[512, 1024]" in notice
    assert "[512, 896]" in notice


def test_windows_as_large_as_the_grid_ask_config_json_and_tell() -> None:
    config = small_config(window_size=8)
    shapes = under("encoder.", config)
    hinted = find_layout(
        shapes, source_config={"global_attn_indexes": [0, 2], "window_size": 8, "model_type": "image_encoder_vit"}
    )
    assert hinted.config.global_attn_indexes == [0, 2]
    assert "config.json" in hinted.notices[0]
    unhinted = find_layout(shapes)
    assert unhinted.config.global_attn_indexes == [0, 1, 2, 3]
    assert "usual spacing" in unhinted.notices[0]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(HINT_KEYS), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=60, deadline=None)
@given(said=st.fixed_dictionaries({"global_attn_indexes": json_values}, optional=dict.fromkeys(HINT_KEYS, json_values)))
def test_any_config_json_is_a_hint_or_refused(said: dict[str, object]) -> None:
    """Also where the tensors leave the choice to it; nothing but a ValueError may come out."""
    shapes = under("encoder.", small_config(window_size=8))
    for source_config in (said, {"vision_config": said}):
        try:
            layout = find_layout(shapes, source_config=source_config)
        except ValueError:
            continue
        assert layout.config.hidden_size == 32


def test_encoders_without_relative_positions_or_biases() -> None:
    config = small_config(use_rel_pos=False, qkv_bias=False)
    hints = {"model_type": "image_encoder_vit", "window_size": 3, "global_attn_indexes": [1, 3]}
    layout = find_layout(under("encoder.", config), source_config=hints | {"num_attention_heads": 2})
    assert {name: getattr(layout.config, name) for name in ARCHITECTURE} == {
        name: getattr(config, name) for name in ARCHITECTURE
    }
    assert "heads" in " ".join(layout.notices)


def test_encoders_without_absolute_positions() -> None:
    config = small_config(use_abs_pos=False)
    layout = find_layout(
        under("encoder.", config), source_config={"model_type": "image_encoder_vit", "image_size": 128}
    )
    assert layout.config.use_abs_pos is False
    assert layout.config.global_attn_indexes == [1, 3]


@pytest.mark.parametrize("mlp_size", [1, 17, 49, 98, 103, 399])
def test_odd_mlp_widths_are_exact(mlp_size: int) -> None:
    shapes = under("encoder.", small_config(hidden_size=6))
    for block in range(4):
        shapes[f"encoder.blocks.{block}.mlp.lin1.weight"] = (mlp_size, 6)
        shapes[f"encoder.blocks.{block}.mlp.lin1.bias"] = (mlp_size,)
        shapes[f"encoder.blocks.{block}.mlp.lin2.weight"] = (6, mlp_size)
    config = find_layout(shapes).config
    assert int(config.hidden_size * config.mlp_ratio) == mlp_size


def test_two_encoders_are_named_and_one_can_be_chosen() -> None:
    shapes = under("model.vision_tower_high.", small_config()) | under("image_encoder.", small_config(hidden_size=16))
    with pytest.raises(ValueError, match="2 encoders") as error:
        find_layout(shapes)
    for part in ("'image_encoder.'", "'model.vision_tower_high.'", "--prefix"):
        assert part in str(error.value)
    assert find_layout(shapes, prefix="image_encoder").config.hidden_size == 16
    assert find_layout(shapes, prefix="model.vision_tower_high.").config.hidden_size == 32
    with pytest.raises(ValueError, match=r"No encoder under the prefix 'other\.'"):
        find_layout(shapes, prefix="other")


def test_an_unknown_layout_lists_what_was_found_and_looked_for() -> None:
    shapes = {"model.layers.0.weight": (2, 2), "model.layers.1.weight": (2, 2), "lm_head.weight": (2, 2)}
    with pytest.raises(ValueError, match="No encoder found among 3 tensors") as error:
        find_layout(shapes)
    for part in ("model.layers.* (2)", "lm_head.weight.* (1)", "pos_embed", "model.sam_model.", "vision_encoder."):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="the checkpoint is empty"):
        find_layout({})


@pytest.mark.parametrize(
    ("name", "relative"),
    [
        ("image_encoder.layers.0.blocks.0.conv1.c.weight", "MobileSAM"),
        ("image_encoder.trunk.blocks.0.attn.qkv.weight", "SAM 2"),
        ("vision_encoder.backbone.blocks.0.attn.qkv.weight", "SAM 2 and 3"),
    ],
)
def test_relatives_with_other_encoders_are_refused_by_name(name: str, relative: str) -> None:
    with pytest.raises(ValueError, match=f"{relative} encodes? images by"):
        find_layout({name: (4, 4), "mask_decoder.iou_token.weight": (1, 256)})


def test_an_unknown_prefix_is_converted_with_a_notice() -> None:
    layout = find_layout(under("module.backbone.", small_config()))
    assert layout.family.name == "unknown"
    assert layout.preprocessing["image_mean"][0] == 0.5
    assert layout.family.license is None
    assert "preprocessor_config.json" in layout.notices[0]
    plain = find_layout(under("", small_config(downsample_channels=[])))
    assert plain.preprocessing["padding_color"] == "mean"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": "blocks.2.attn.qkv.weight"}, r"missing \(1\): blocks\.2\.attn\.qkv\.weight"),
        ({"drop": "neck.0.weight"}, "neck.0.weight missing"),
        ({"drop": "neck.3.bias"}, "neck.3.bias"),
        ({"add": ("net_5.weight", (8, 8, 3, 3))}, "net_5.weight"),
        ({"add": ("blocks.0.attn.q_norm.weight", (32,))}, "another architecture"),
        ({"add": ("blocks.0.attn.qkv.scales", (32,))}, "Quantised"),
        ({"add": ("blocks.99999999.norm1.weight", (32,))}, "names block 99999999"),
        ({"add": ("blocks.1.mlp.lin1.weight", (64, 64))}, r"blocks\.1\.mlp\.lin1\.weight \(64, 64\) instead of"),
        ({"add": ("pos_embed", (1, 8, 9, 32))}, "pos_embed must be"),
        ({"add": ("pos_embed", (1, 64, 32))}, "pos_embed must be"),
        ({"add": ("patch_embed.proj.weight", (32, 3, 16))}, "must have 4 dimensions"),
        ({"add": ("patch_embed.proj.weight", (0, 3, 16, 16))}, "none of them 0"),
        ({"add": ("blocks.0.attn.rel_pos_h", (5, 7))}, r"block 0 differ: \(5, 7\)"),
        ({"add": ("blocks.2.attn.rel_pos_h", (7, 16))}, "differ"),
        ({"add": ("blocks.0.attn.rel_pos_w", (9, 16))}, "differ"),
        ({"add": ("neck.2.weight", (8, 8, 5, 5))}, "neck.2.weight"),
    ],
)
def test_misfits_are_refused_by_name(change: dict[str, object], message: str) -> None:
    shapes = under("model.sam_model.", small_config())
    if "drop" in change:
        del shapes[f"model.sam_model.{change['drop']}"]
    else:
        name, shape = change["add"]
        shapes[f"model.sam_model.{name}"] = shape
    with pytest.raises(ValueError, match=message):
        find_layout(shapes)


@pytest.mark.parametrize("layout", EXPORT_LAYOUTS)
@pytest.mark.parametrize("downsample_channels", [[], [12, 20], [12, 896]])
def test_exported_names_are_found_again(layout: str, downsample_channels: list[int]) -> None:
    config = small_config(downsample_channels=downsample_channels)
    if layout == "sam" and downsample_channels:
        with pytest.raises(ValueError, match="no place"):
            export_names(config, layout)
        return
    names = export_names(config, layout)
    shapes = expected_shapes(config)
    found = find_layout({names[name]: shape for name, shape in shapes.items()})
    assert found.sources == names
    assert found.config.downsample_channels == downsample_channels


def test_an_unknown_export_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="Known: deepseek-ocr, sam, transformers"):
        export_names(small_config(), "timm")
