"""The checkpoints that hold this encoder, by family: where it lies in them, and how their images are prepared."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from ..configuration_image_encoder_vit import ImageEncoderViTConfig
from ..image_presets import preset_settings
from .naming import DEEPSEEK_VL, PUBLISHED, TIMM, TRANSFORMERS, Naming, naming_below

CLIP_STRETCHED = preset_settings("got-ocr2")
CENTRED_ON_GREY = preset_settings("base")
SEGMENT_ANYTHING = preset_settings("sam")


class Family(NamedTuple):
    """
    Checkpoints that share where the encoder is and what its images look like.

    `preprocessing` holds settings of the image processor. `license` is the one that the original weights were
    published under, None where that is unknown. `note` is what a user of the converted weights should know.
    """

    name: str
    title: str
    prefixes: tuple[str, ...]
    naming: Naming
    preprocessing: dict[str, Any]
    license: str | None
    note: str | None = None


OWN_LAYOUT = "image-encoder-vit"
DEEPSEEK_OCR = Family(
    "deepseek-ocr",
    "DeepSeek-OCR, Unlimited-OCR",
    ("model.sam_model.", "sam_model."),
    PUBLISHED,
    CENTRED_ON_GREY,
    "mit",
)
UNLIMITED_OCR = DEEPSEEK_OCR._replace(
    name="unlimited-ocr-transformers",
    title="Unlimited-OCR in transformers",
    prefixes=("model.vision_tower.sam_encoder.", "vision_tower.sam_encoder.", "sam_encoder."),
    naming=TRANSFORMERS,
)
DEEPSEEK_OCR_2 = DEEPSEEK_OCR._replace(
    name="deepseek-ocr-2", title="DeepSeek-OCR-2", preprocessing=preset_settings("deepseek-ocr-2"), license=None
)
DEEPSEEK_OCR_2_IN_TRANSFORMERS = DEEPSEEK_OCR_2._replace(
    name="deepseek-ocr-2-transformers", prefixes=UNLIMITED_OCR.prefixes, naming=TRANSFORMERS
)
# DeepSeek-OCR-2 keeps its encoder where the first one does, and other things beside it.
SECOND_VERSIONS = {DEEPSEEK_OCR.name: DEEPSEEK_OCR_2, UNLIMITED_OCR.name: DEEPSEEK_OCR_2_IN_TRANSFORMERS}
VARY_TINY = Family(
    "vary-tiny",
    "Vary-tiny",
    ("model.vision_tower.",),
    PUBLISHED,
    CLIP_STRETCHED
    | {name: SEGMENT_ANYTHING[name] for name in ("image_mean", "image_std", "resample")},  # ImageNet's, bilinear
    None,
    note="Vary-tiny and OneChart shrink pages by OpenCV's bilinear filter, which skips pixels, where the image "
    "processor here weighs all of them.",
)
ONECHART = VARY_TINY._replace(
    name="onechart",
    title="OneChart",
    preprocessing=VARY_TINY.preprocessing | {"image_mean": [0.0] * 3, "image_std": [1.0] * 3},
)
SAM = Family("sam", "Segment Anything", ("image_encoder.",), PUBLISHED, SEGMENT_ANYTHING, "apache-2.0")
DEEPSEEK_VL_7B = Family(
    "deepseek-vl",
    "DeepSeek-VL",
    ("vision_model.vision_tower_high.vision_tower.",),
    DEEPSEEK_VL,
    CENTRED_ON_GREY
    | {name: CLIP_STRETCHED[name] for name in ("image_mean", "image_std")}
    | {"padding_color": [122, 116, 104]},
    None,
    note="DeepSeek-VL resizes the neck's output to 96 x 96 before its stride-2 convolutions and adds features of a "
    "global block to it; this encoder does neither, so its last feature map differs from DeepSeek-VL's.",
)
FAMILIES = (
    Family(OWN_LAYOUT, "this package", ("encoder.",), PUBLISHED, {}, None),
    DEEPSEEK_OCR,
    UNLIMITED_OCR,
    Family(
        "got-ocr2",
        "GOT-OCR2, Vary",
        # Vary and Vary-toy are built on Qwen, whose layers lie below `transformer`, GOT-OCR2 on Qwen2.
        ("model.vision_tower_high.", "transformer.vision_tower_high."),
        PUBLISHED,
        CLIP_STRETCHED,
        None,
    ),
    VARY_TINY,
    Family(
        "got-ocr2-transformers",
        "GOT-OCR2 in transformers",
        ("vision_tower.", "model.vision_tower."),
        TRANSFORMERS,
        CLIP_STRETCHED,
        None,
    ),
    Family(
        "slanext",
        "SLANeXt in transformers",
        ("backbone.vision_tower.",),
        TRANSFORMERS,
        SEGMENT_ANYTHING,
        None,
        note="SLANeXt resizes images by a rounding of its own: SLANeXtImageProcessor of transformers makes its exact "
        "pixels, the image processor here comes close.",
    ),
    Family(
        "pp-formulanet",
        "PP-FormulaNet in transformers",
        ("model.encoder.",),
        TRANSFORMERS,
        CENTRED_ON_GREY | {"image_mean": [0.7931] * 3, "image_std": [0.1738] * 3, "padding_color": [0, 0, 0]},
        None,
        note="PP-FormulaNet crops the margins of a formula and enlarges nothing: PPFormulaNetImageProcessor of "
        "transformers does, the image processor here does not.",
    ),
    SAM,
    SAM._replace(
        name="sam-transformers",
        title="Segment Anything in transformers",
        prefixes=("vision_encoder.",),
        naming=TRANSFORMERS,
    ),
    SAM._replace(name="timm", title="timm's samvit", prefixes=("",), naming=TIMM),
    DEEPSEEK_VL_7B,
    DEEPSEEK_VL_7B._replace(
        name="deepseek-vl-hybrid",
        title="DeepSeek-VL in transformers",
        prefixes=("model.high_res_vision_model.vision_encoder.",),
        naming=TRANSFORMERS,
    ),
)


def choose_family(names: Iterable[str], prefix: str, config: ImageEncoderViTConfig) -> tuple[Family, tuple[str, ...]]:
    """
    The family of the checkpoint with tensors of these names, whose encoder lies below `prefix`; the closest one for a
    prefix that none has. With it come sentences that the user should read.
    """
    names = list(names)
    naming = naming_below(names, prefix)
    for family in FAMILIES:
        if prefix in family.prefixes and naming == family.naming:
            chosen = told_by_the_rest(family, names, config)
            return chosen, (chosen.note,) if chosen.note else ()
    closest = closest_family(config)
    unknown = closest._replace(name="unknown", title=f"unknown, like {closest.title}", naming=naming, license=None)
    return unknown, (
        f"No known model keeps its encoder under {prefix!r}: assuming {closest.title}'s preprocessing. "
        "Check preprocessor_config.json.",
    )


def told_by_the_rest(family: Family, names: list[str], config: ImageEncoderViTConfig) -> Family:
    """The family itself, or the one that keeps its encoder in the same place and is told by what lies beside it."""
    if family is VARY_TINY and any(name.startswith("num_decoder.") for name in names):
        return ONECHART
    is_second = config.downsample_channels[-1:] == [896] or any(name.startswith("model.qwen2_model.") for name in names)
    return SECOND_VERSIONS.get(family.name, family) if is_second else family


def closest_family(config: ImageEncoderViTConfig) -> Family:
    """The family that an encoder of unknown origin resembles most."""
    return DEEPSEEK_OCR if config.downsample_channels else SAM
