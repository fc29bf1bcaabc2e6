"""
Where the encoder's weights sit in the checkpoints of its family: found by the tensors' names and shapes. Nothing here
reads a file.

Letters in shapes: O and I output and input channels of a convolution, H and W its kernel.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

from ..configuration_deep_encoder import DeepEncoderConfig
from ..configuration_image_encoder_vit import ImageEncoderViTConfig
from ..modeling_image_encoder_vit import encoder_of
from ..support import visible
from .deep_encoder import (
    SAM_PREFIX,
    deep_encoder_weights,
    expected_deep_shapes,
    infer_deep_config,
    left_out,
    stem_of,
)
from .families import FAMILIES, OWN_LAYOUT, Family, choose_family
from .inference import Shape, infer_config
from .naming import MAX_NAMES_SHOWN, TRANSFORMERS, encoder_prefixes, listed, weights_below

# A name below one of these belongs to the encoder's own path, so one that we do not know means another architecture.
OWN_MODULES = ("patch_embed", "blocks", "layers", "neck", "proj")
# By a part of a tensor's name: relatives of SAM whose image encoder is another network.
OTHER_ENCODERS = {
    "image_encoder.layers.0.": "MobileSAM encodes images by a TinyViT, not by SAM's ViT: nothing here can be taken.",
    "image_encoder.trunk.": "SAM 2 encodes images by a Hiera, not by SAM's ViT: nothing here can be taken.",
    "vision_encoder.backbone.": "SAM 2 and 3 encode images by other networks: nothing here can be taken.",
}
# What can be taken out of a checkpoint.
ENCODER_PART, DEEP_ENCODER_PART = PARTS = ("encoder", "deep-encoder")


@dataclass(frozen=True)
class Layout:
    """
    An encoder, or a whole DeepEncoder, found in a checkpoint.

    `sources` maps each published name to the checkpoint's, `shapes` to the shape in (O, I, H, W) order;
    `is_channels_last` says that the checkpoint holds convolutions as (O, H, W, I), as MLX does. `notices` are
    sentences that the user should read.
    """

    family: Family
    prefix: str
    sources: dict[str, str]
    shapes: dict[str, Shape]
    is_channels_last: bool
    config: PreTrainedConfig
    notices: tuple[str, ...] = ()

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Settings of the family's image processor, for the size of image that the weights were trained for."""
        return preprocessing_of(self.family, self.config)


def preprocessing_of(family: Family, config: PreTrainedConfig) -> dict[str, Any]:
    """Settings of a family's image processor, for the size of image that such an encoder was trained for."""
    size = {"height": config.image_size, "width": config.image_size}
    return {**family.preprocessing, "size": size, "patch_size": config.patch_size}


class Choice(NamedTuple):
    """
    What of a source is wanted, as far as the user said: which file, the encoder below which prefix, and which of
    `PARTS`.
    """

    filename: str | None = None
    prefix: str | None = None
    part: str = ENCODER_PART

    def weights(self, names: Iterable[str]) -> dict[str, str]:
        """Published name to name in the checkpoint, from the names in an index. Raises as `layout`."""
        below = deep_encoder_weights if self.part == DEEP_ENCODER_PART else weights_below
        return below(names, choose_prefix(names, self.prefix))

    def layout(self, shapes: Mapping[str, Shape], source_config: Mapping[str, Any]) -> Layout:
        """As `find_layout` or `find_deep_layout`."""
        find = find_deep_layout if self.part == DEEP_ENCODER_PART else find_layout
        return find(shapes, prefix=self.prefix, source_config=source_config)


def find_layout(
    shapes: Mapping[str, Shape], *, prefix: str | None = None, source_config: Mapping[str, Any] | None = None
) -> Layout:
    """
    Finds the encoder in a checkpoint from its tensors' names and shapes.

    `prefix` chooses between several encoders. `source_config` is the content of the checkpoint's config.json: a hint
    where the tensors leave something open, and where it disagrees with them a notice says so.

    Raises:
        ValueError: If there is no encoder, several, or one of another architecture, with what was found.
    """
    prefix = choose_prefix(shapes, prefix)
    sources = weights_below(shapes, prefix)
    left_out = _unknown_names(shapes, prefix, sources)
    is_channels_last = _is_channels_last(shapes, sources)
    ours = {
        name: to_channels_first(shapes[source]) if is_channels_last else tuple(shapes[source])
        for name, source in sources.items()
    }
    config, notices = infer_config(ours, source_config or {})
    check_shapes(ours, config, prefix)
    if left_out:
        notices += (f"Left out, as no part of this encoder: {listed(left_out)}.",)
    family, family_notices = choose_family(shapes, prefix, config)
    return Layout(family, prefix, sources, ours, is_channels_last, config, notices + family_notices)


def find_deep_layout(
    shapes: Mapping[str, Shape], *, prefix: str | None = None, source_config: Mapping[str, Any] | None = None
) -> Layout:
    """
    Finds the whole DeepEncoder in a checkpoint; arguments as in `find_layout`, `prefix` is that of its SAM encoder.

    Raises:
        ValueError: If there is none, with what is there instead, or one of another architecture.
    """
    sam = find_layout(shapes, prefix=prefix, source_config=source_config)
    sources = deep_encoder_weights(shapes, sam.prefix)
    stem = stem_of(shapes, sam.prefix)
    unread = left_out(shapes, stem, sources.values())
    ours = {name: tuple(shapes[source]) for name, source in sources.items()}
    ours |= {SAM_PREFIX + name: shape for name, shape in sam.shapes.items()}
    config, notices = infer_deep_config(ours, sam.config, source_config or {})
    _check_shapes(ours, expected_deep_shapes(config), f"The DeepEncoder below {stem!r}")
    if unread:
        notices += (f"Left out, as nothing reads it: {listed(unread)}.",)
    family = sam.family
    if (source_config or {}).get("model_type") == DeepEncoderConfig.model_type:
        family = next(family for family in FAMILIES if family.name == OWN_LAYOUT)
    return Layout(family, stem, sources, ours, sam.is_channels_last, config, sam.notices + notices)


def choose_prefix(names: Iterable[str], prefix: str | None = None) -> str:
    """
    The prefix of the one encoder in a checkpoint, or the one asked for. Needs no shapes, so that an index is enough.

    Raises:
        ValueError: If there is none, or several and none was asked for, listing what was found.
    """
    names = list(names)
    found = encoder_prefixes(names)
    if prefix is not None:
        wanted = prefix if not prefix or prefix.endswith(".") else f"{prefix}."
        if wanted not in found:
            raise ValueError(f"No encoder under the prefix {wanted!r}. Found: {_quoted(found) or 'none'}.")
        return wanted
    if len(found) > 1:
        raise ValueError(f"The checkpoint holds {len(found)} encoders, under {_quoted(found)}: choose one by --prefix.")
    if not found:
        raise ValueError(_nothing_found(names))
    return found[0]


def _nothing_found(names: list[str]) -> str:
    tops = Counter(".".join(name.split(".")[:2]) for name in names)
    shown = ", ".join(f"{visible(top)}.* ({count})" for top, count in tops.most_common(MAX_NAMES_SHOWN))
    looked_for = ", ".join(
        f"{prefix or '(no prefix)'} [{family.title}]" for family in FAMILIES for prefix in family.prefixes
    )
    found = f"No encoder found among {len(names)} tensors: {shown or 'the checkpoint is empty'}."
    for part, told in OTHER_ENCODERS.items():
        if any(part in name for name in names):
            return f"{found} {told}"
    return f"{found} Looked for pos_embed, patch_embed and neck below any prefix, such as {looked_for}."


def _unknown_names(names: Iterable[str], prefix: str, sources: Mapping[str, str]) -> list[str]:
    """Names below the prefix that are no weights of the encoder. Raises a ValueError if they are in its own path."""
    taken = set(sources.values())
    unknown = sorted(name for name in names if name.startswith(prefix) and name not in taken)
    own = [name for name in unknown if name.removeprefix(prefix).split(".")[0] in OWN_MODULES]
    if own:
        raise ValueError(
            f"Below {prefix!r} is an encoder of another architecture: it also has {listed(own)}. "
            "Quantised checkpoints and other variants cannot be converted."
        )
    # Without a prefix the rest of the file is no part of the encoder's module, so there is nothing to tell.
    return unknown if prefix else []


def _is_channels_last(shapes: Mapping[str, Shape], sources: Mapping[str, str]) -> bool:
    """Whether the 3x3 convolution of the neck is (O, 3, 3, I) instead of (O, I, 3, 3)."""
    shape = tuple(shapes[sources["neck.2.weight"]]) if "neck.2.weight" in sources else ()
    return len(shape) == 4 and shape[1:3] == (3, 3) and shape[2:] != (3, 3)


def to_channels_first(shape: Shape) -> Shape:
    """The shape of a convolution's weights (O, H, W, I) as (O, I, H, W). Other shapes stay, `pos_embed` too."""
    # pos_embed is (1, H, W, C) in every layout; no convolution of this encoder has one output channel only.
    if len(shape) != 4 or shape[0] == 1:
        return tuple(shape)
    return shape[0], shape[3], shape[1], shape[2]


def expected_shapes(config: ImageEncoderViTConfig) -> dict[str, Shape]:
    """Published name to shape of every weight of an encoder, without allocating any."""
    with torch.device("meta"):
        encoder = encoder_of(config)
    return {name: tuple(value.shape) for name, value in encoder.state_dict().items()}


def check_shapes(shapes: Mapping[str, Shape], config: ImageEncoderViTConfig, prefix: str) -> None:
    """
    Checks that the weights are exactly those of an encoder of this configuration.

    Raises:
        ValueError: Naming the weights that are missing, unexpected or of another shape.
    """
    _check_shapes(shapes, expected_shapes(config), f"The encoder below {prefix!r}")


def _check_shapes(shapes: Mapping[str, Shape], expected: Mapping[str, Shape], what: str) -> None:
    missing = sorted(expected.keys() - shapes.keys())
    unexpected = sorted(shapes.keys() - expected.keys())
    wrong = [f"{n} {shapes[n]} instead of {expected[n]}" for n in expected if n in shapes and shapes[n] != expected[n]]
    problems = [
        f"{kind} ({len(names)}): {listed(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        if names
    ]
    if problems:
        raise ValueError(f"{what} is not complete. Weights {'; '.join(problems)}.")


def _quoted(prefixes: Iterable[str]) -> str:
    return " and ".join(repr(prefix) for prefix in prefixes)


EXPORT_LAYOUTS = ("deepseek-ocr", "sam", "transformers")


def export_names(config: PreTrainedConfig, layout: str) -> dict[str, str]:
    """
    Published name to name in another family's checkpoints, for weights that go back where they came from.

    - "deepseek-ocr": `model.sam_model.*`, as DeepSeek-OCR, DeepSeek-OCR-2 and Unlimited-OCR publish them; a whole
      DeepEncoder likewise, `model.*`. The only one that holds such a one.
    - "sam": `image_encoder.*`, as segment-anything; it has no place for net_2 and net_3.
    - "transformers": `vision_encoder.*` as SamModel without net_2 and net_3, else `model.vision_tower.sam_encoder.*`
      as UnlimitedOcr and DeepseekOcr2 hold them.

    Raises:
        ValueError: For an unknown layout, or one that cannot hold this encoder.
    """
    if layout not in EXPORT_LAYOUTS:
        raise ValueError(f"Unknown layout {layout!r}. Known: {', '.join(EXPORT_LAYOUTS)}.")
    if config.model_type == DeepEncoderConfig.model_type:
        if layout != "deepseek-ocr":
            raise ValueError(f"The layout {layout!r} has no place for a whole DeepEncoder: choose 'deepseek-ocr'.")
        return {name: f"model.{name}" for name in expected_deep_shapes(config)}
    depth = len(config.downsample_channels)
    if (layout == "sam" and depth) or (layout == "transformers" and depth not in (0, 2)):
        raise ValueError(
            f"The layout {layout!r} has no place for the {depth} convolutions after the neck "
            f"(downsample_channels = {list(config.downsample_channels)}). Choose another layout."
        )
    if layout == "transformers":
        prefix = "model.vision_tower.sam_encoder." if depth else "vision_encoder."
        return {name: prefix + TRANSFORMERS.from_published(name) for name in expected_shapes(config)}
    prefix = "model.sam_model." if layout == "deepseek-ocr" else "image_encoder."
    return {name: prefix + name for name in expected_shapes(config)}
