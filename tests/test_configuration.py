"""The configuration: published names, JSON round trips, and clear errors."""

import json
import logging
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError
from small import SMALL
from transformers import AutoConfig

from image_encoder_vit import ImageEncoderViT, ImageEncoderViTConfig

PUBLISHED_NAMES = {
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "in_chans": "num_channels",
    "img_size": "image_size",
    "out_chans": "output_channels",
}


def test_defaults_are_sam_b_as_deepseek_ocr_uses_it() -> None:
    config = ImageEncoderViTConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (768, 12, 12)
    assert (config.image_size, config.patch_size, config.window_size, config.mlp_ratio) == (1024, 16, 14, 4.0)
    assert (config.output_channels, config.downsample_channels) == (256, [512, 1024])
    assert config.global_attn_indexes == [2, 5, 8, 11]
    assert config.qkv_bias
    assert config.use_abs_pos
    assert config.use_rel_pos


def test_published_names_are_second_names_of_the_fields() -> None:
    values = {
        "embed_dim": 64,
        "depth": 3,
        "num_heads": 4,
        "in_chans": 3,
        "img_size": 256,
        "out_chans": 8,
    }
    config = ImageEncoderViTConfig(**values, global_attn_indexes=[1])
    for published, name in PUBLISHED_NAMES.items():
        assert getattr(config, published) == getattr(config, name) == values[published]
    config.embed_dim = 128
    assert config.hidden_size == 128


def test_round_trip_through_json(tmp_path: Path) -> None:
    config = ImageEncoderViTConfig(**SMALL)
    config.save_pretrained(tmp_path)
    assert ImageEncoderViTConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert isinstance(AutoConfig.from_pretrained(tmp_path), ImageEncoderViTConfig)


@pytest.mark.parametrize(
    ("values", "seen"),
    [
        ({"hidden_size": 100, "num_attention_heads": 12}, "100 and 12"),
        ({"hidden_size": 0}, "got 0"),
        ({"image_size": 1000}, "1000 px and 16 px"),
        ({"patch_size": -16}, "got -16"),
        ({"window_size": 0}, "got 0"),
        ({"mlp_ratio": 0.0}, "got 0.0 x 768"),
        ({"downsample_channels": [512, 0]}, r"downsample_channels\[1\] must be at least 1, got 0"),
        ({"global_attn_indexes": [2, 12]}, r"\[12\] in \[2, 12\]"),
        ({"global_attn_indexes": [-1]}, r"\[-1\]"),
        ({"global_attn_indexes": [2, 2]}, r"twice: \[2, 2\]"),
        ({"num_hidden_layers": 4}, "blocks 0 to 3"),
    ],
)
def test_a_bad_value_is_named(values: dict[str, object], seen: str) -> None:
    with pytest.raises((ValueError, StrictDataclassError), match=seen):
        ImageEncoderViTConfig(**values)


def test_a_value_of_the_wrong_type_is_named() -> None:
    with pytest.raises(StrictDataclassError, match="hidden_size"):
        ImageEncoderViTConfig(hidden_size="768")


@pytest.mark.parametrize(
    ("keyword", "meant"),
    [
        ("hidden_dim", "hidden_size"),
        ("window_sise", "window_size"),
        ("embed_dims", "embed_dim"),
        ("downsample_chanels", "downsample_channels"),
    ],
)
def test_a_misspelt_keyword_is_an_error_with_the_right_one(keyword: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"no keyword '{keyword}' \(got {keyword}=7\). Did you mean '{meant}'\?"):
        ImageEncoderViTConfig(**{keyword: 7})


def test_an_unknown_keyword_is_an_error_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no keyword 'temperature'.*Known: depth, downsample_channels, embed_dim"):
        ImageEncoderViTConfig(temperature=1)


def test_a_config_file_of_a_newer_library_still_loads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ImageEncoderViTConfig(**SMALL).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"future_feature": True}))
    logger = logging.getLogger("image_encoder_vit.configuration_image_encoder_vit")
    logger.addHandler(caplog.handler)
    config = ImageEncoderViTConfig.from_pretrained(tmp_path)
    logger.removeHandler(caplog.handler)
    assert config.hidden_size == SMALL["hidden_size"]
    assert "future_feature" in caplog.text

    path.write_text(json.dumps(content | {"hidden_sise": 64}))
    with pytest.raises(ValueError, match="Did you mean 'hidden_size'"):
        ImageEncoderViTConfig.from_pretrained(tmp_path)


def test_the_plain_encoder_checks_its_arguments_too() -> None:
    with pytest.raises(ValueError, match=r"num_attention_heads \(num_heads\), got 768 and 7"):
        ImageEncoderViT(num_heads=7)
