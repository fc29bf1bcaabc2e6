"""
Where the encoder's weights sit in the checkpoints of its family: found by the tensors' names and shapes, renamed to the
published names and back. Nothing here reads a file.

"Published names" are those of segment-anything and of DeepSeek-OCR (`blocks.0.attn.qkv.weight`, `net_2.weight`), which
`ImageEncoderViT` uses. Letters in shapes: O and I output and input channels of a convolution, H and W its kernel.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import inf, nextafter
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from huggingface_hub.errors import StrictDataclassError

from ..configuration_image_encoder_vit import ImageEncoderViTConfig
from ..image_presets import preset_settings
from ..modeling_image_encoder_vit import encoder_of

Shape = tuple[int, ...]
MAX_NAMES_SHOWN = 8

# Parts of published names, and what they are called elsewhere.
TRANSFORMERS_NAMES = {
    "patch_embed.proj": "patch_embed.projection",
    # Before the norms, so that `neck.layer_norm1` is not taken for a block's.
    "neck.0": "neck.conv1",
    "neck.1": "neck.layer_norm1",
    "neck.2": "neck.conv2",
    "neck.3": "neck.layer_norm2",
    "blocks": "layers",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "net_2": "proj.conv1",
    "net_3": "proj.conv2",
}
TIMM_NAMES = {"mlp.lin1": "mlp.fc1", "mlp.lin2": "mlp.fc2"}
DEEPSEEK_VL_NAMES = {"net_2": "downsamples.0", "net_3": "downsamples.1"}
PUBLISHED_NAMES: dict[str, str] = {}

# GOT-OCR2 in transformers keeps the two convolutions in its projector, beside the encoder.
GOT_TOWER = "vision_tower."
GOT_PROJECTOR = "multi_modal_projector."
GOT_DOWNSAMPLING = {"net_2.weight": "conv_upsampler1.weight", "net_3.weight": "conv_upsampler2.weight"}

# What a source's config.json may say about its encoder.
HINTED_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "window_size",
    "output_channels",
)
HINTED_LISTS = ("global_attn_indexes", "downsample_channels")

ANCHORS = ("patch_embed.proj.weight", "patch_embed.projection.weight")
# A name below one of these belongs to the encoder's own path, so one that we do not know means another architecture.
OWN_MODULES = ("patch_embed", "blocks", "layers", "neck", "proj")

CLIP_STRETCHED = preset_settings("got-ocr2")
CENTRED_ON_GREY = preset_settings("base")
SEGMENT_ANYTHING = preset_settings("sam")


class Family(NamedTuple):
    """
    Checkpoints that share where the encoder is and what its images look like.

    `preprocessing` holds settings of the image processor. `license` is the one that the original weights were
    published under, None where that is unknown.
    """

    name: str
    title: str
    prefixes: tuple[str, ...]
    renamed: dict[str, str]
    preprocessing: dict[str, Any]
    license: str | None
    note: str | None = None


OWN_LAYOUT = "image-encoder-vit"
DEEPSEEK_OCR = Family(
    "deepseek-ocr",
    "DeepSeek-OCR, Unlimited-OCR",
    ("model.sam_model.", "sam_model."),
    PUBLISHED_NAMES,
    CENTRED_ON_GREY,
    "mit",
)
DEEPSEEK_OCR_2 = DEEPSEEK_OCR._replace(
    name="deepseek-ocr-2", title="DeepSeek-OCR-2", preprocessing=preset_settings("deepseek-ocr-2"), license=None
)
IN_MEMORY_PREFIXES = ("model.vision_tower.sam_encoder.", "vision_tower.sam_encoder.", "sam_encoder.")
SAM = Family("sam", "Segment Anything", ("image_encoder.",), PUBLISHED_NAMES, SEGMENT_ANYTHING, "apache-2.0")
FAMILIES = (
    Family(OWN_LAYOUT, "this package", ("encoder.",), PUBLISHED_NAMES, {}, None),
    DEEPSEEK_OCR,
    Family(
        "unlimited-ocr-transformers",
        "Unlimited-OCR in transformers",
        IN_MEMORY_PREFIXES,
        TRANSFORMERS_NAMES,
        CENTRED_ON_GREY,
        "mit",
    ),
    Family("got-ocr2", "GOT-OCR2, Vary", ("model.vision_tower_high.",), PUBLISHED_NAMES, CLIP_STRETCHED, None),
    Family("vary-tiny", "Vary-tiny", ("model.vision_tower.",), PUBLISHED_NAMES, CLIP_STRETCHED, None),
    Family(
        "got-ocr2-transformers",
        "GOT-OCR2 in transformers",
        ("vision_tower.", "model.vision_tower."),
        TRANSFORMERS_NAMES,
        CLIP_STRETCHED,
        None,
    ),
    SAM,
    SAM._replace(
        name="sam-transformers",
        title="Segment Anything in transformers",
        prefixes=("vision_encoder.",),
        renamed=TRANSFORMERS_NAMES,
    ),
    SAM._replace(name="timm", title="timm's samvit", prefixes=("",), renamed=TIMM_NAMES),
    Family(
        "deepseek-vl",
        "DeepSeek-VL",
        ("vision_model.vision_tower_high.vision_tower.",),
        DEEPSEEK_VL_NAMES,
        CENTRED_ON_GREY
        | {name: CLIP_STRETCHED[name] for name in ("image_mean", "image_std")}
        | {"padding_color": [122, 116, 104]},
        None,
        note="DeepSeek-VL resizes the neck's output to 96 x 96 before its stride-2 convolutions and adds features of a "
        "global block to it; this encoder does neither, so its last feature map differs from DeepSeek-VL's.",
    ),
)


@dataclass(frozen=True)
class Layout:
    """
    An encoder found in a checkpoint.

    `sources` maps each published name to the checkpoint's, `shapes` to the shape in (O, I, H, W) order;
    `is_channels_last` says that the checkpoint holds convolutions as (O, H, W, I), as MLX does. `notices` are
    sentences that the user should read.
    """

    family: Family
    prefix: str
    sources: dict[str, str]
    shapes: dict[str, Shape]
    is_channels_last: bool
    config: ImageEncoderViTConfig
    notices: tuple[str, ...] = field(default=())

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Settings of the family's image processor, for the size of image that the weights were trained for."""
        size = {"height": self.config.image_size, "width": self.config.image_size}
        return {**self.family.preprocessing, "size": size, "patch_size": self.config.patch_size}


def rename(name: str, parts: Mapping[str, str]) -> str:
    """Replaces whole dotted parts of a parameter's name, such as `neck.0` by `neck.conv1`."""
    dotted = f".{name}."
    for ours, theirs in parts.items():
        dotted = dotted.replace(f".{ours}.", f".{theirs}.", 1)
    return dotted[1:-1]


def rename_back(name: str, parts: Mapping[str, str]) -> str:
    """Undoes `rename`."""
    return rename(name, {theirs: ours for ours, theirs in parts.items()})


def encoder_prefixes(names: Iterable[str]) -> list[str]:
    """
    Prefixes in a checkpoint below which an encoder of this kind may be: those with a patch embedding and a neck, which
    CLIP towers and plain ViTs lack. Sorted. Needs no shapes, so that an index is enough.
    """
    known = set(names)
    with_neck = {name[: match.start(1)] for name in known if (match := re.search(r"(?:^|\.)(neck\.)", name))}
    return sorted(prefix for prefix in with_neck if any(prefix + anchor in known for anchor in ANCHORS))


def choose_prefix(names: Iterable[str], prefix: str | None = None) -> str:
    """
    The prefix of the one encoder in a checkpoint, or the one asked for.

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
        tops = Counter(".".join(name.split(".")[:2]) for name in names)
        shown = ", ".join(f"{top}.* ({count})" for top, count in tops.most_common(MAX_NAMES_SHOWN))
        looked_for = ", ".join(
            f"{prefix or '(no prefix)'} [{family.title}]" for family in FAMILIES for prefix in family.prefixes
        )
        raise ValueError(
            f"No encoder found among {len(names)} tensors: {shown or 'the checkpoint is empty'}. "
            f"Looked for pos_embed, patch_embed and neck below any prefix, such as {looked_for}."
        )
    return found[0]


def weights_below(names: Iterable[str], prefix: str) -> dict[str, str]:
    """
    The encoder's weights below a prefix: published name to name in the checkpoint. Needs no shapes, so that an index
    is enough to know which files are wanted.
    """
    known = set(names)
    parts = naming_below(known, prefix)
    weights = {}
    for name in sorted(known):
        if not name.startswith(prefix):
            continue
        published = rename_back(name.removeprefix(prefix), parts)
        if _is_published(published):
            weights[published] = name
    if prefix.endswith(GOT_TOWER):
        projector = prefix.removesuffix(GOT_TOWER) + GOT_PROJECTOR
        for published, theirs in GOT_DOWNSAMPLING.items():
            if projector + theirs in known:
                weights[published] = projector + theirs
    return weights


def naming_below(known: set[str], prefix: str) -> dict[str, str]:
    """Which parts of the published names are called otherwise below a prefix."""
    if f"{prefix}patch_embed.projection.weight" in known:
        return TRANSFORMERS_NAMES
    if f"{prefix}blocks.0.mlp.fc1.weight" in known:
        return TIMM_NAMES
    if f"{prefix}downsamples.0.weight" in known:
        return DEEPSEEK_VL_NAMES
    return PUBLISHED_NAMES


def _is_published(name: str) -> bool:
    return re.fullmatch(
        r"pos_embed|patch_embed\.proj\.(weight|bias)|neck\.([02]\.weight|[13]\.(weight|bias))|net_\d+\.weight"
        r"|blocks\.\d+\.(norm[12]|attn\.qkv|attn\.proj|mlp\.lin[12])\.(weight|bias)|blocks\.\d+\.attn\.rel_pos_[hw]",
        name,
    ) is not None  # fmt: skip


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
    strangers = _strangers(shapes, prefix, sources)
    is_channels_last = _is_channels_last(shapes, sources)
    ours = {
        name: to_channels_first(shapes[source]) if is_channels_last else tuple(shapes[source])
        for name, source in sources.items()
    }
    notices: list[str] = []
    hints = config_hints(source_config or {})
    config = infer_config(ours, hints, notices)
    check_shapes(ours, config, prefix)
    if strangers:
        notices.append(f"Left out, as no part of this encoder: {_listed(strangers)}.")
    notices += disagreements(config, hints)
    family = _choose_family(shapes, prefix, sources, config, notices)
    if family.note:
        notices.append(family.note)
    return Layout(family, prefix, sources, ours, is_channels_last, config, tuple(notices))


def _strangers(shapes: Mapping[str, Shape], prefix: str, sources: Mapping[str, str]) -> list[str]:
    """Names below the prefix that are no weights of the encoder. Raises a ValueError if they are in its own path."""
    taken = set(sources.values())
    strangers = sorted(name for name in shapes if name.startswith(prefix) and name not in taken)
    own = [name for name in strangers if name.removeprefix(prefix).split(".")[0] in OWN_MODULES]
    if own:
        raise ValueError(
            f"Below {prefix!r} is an encoder of another architecture: it also has {_listed(own)}. "
            "Quantised checkpoints and other variants cannot be converted."
        )
    # Without a prefix the rest of the file is no part of the encoder's module, so there is nothing to tell.
    return strangers if prefix else []


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


def infer_config(shapes: Mapping[str, Shape], hints: Mapping[str, Any], notices: list[str]) -> ImageEncoderViTConfig:
    """
    The configuration that weights of these shapes belong to, by published name. Where the shapes leave a choice,
    `hints` or the usual value decides, and `notices` is told.

    Raises:
        ValueError: If a weight that is needed is missing, or the shapes belong to no encoder.
    """
    needed = ("patch_embed.proj.weight", "neck.0.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.lin1.weight")
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise ValueError(f"The encoder is incomplete: {_listed(missing)} missing.")
    ranks = {"patch_embed.proj.weight": 4, "neck.0.weight": 4, "blocks.0.mlp.lin1.weight": 2}
    for name, rank in ranks.items():
        if len(shapes[name]) != rank or 0 in shapes[name]:
            raise ValueError(f"{name} must have {rank} dimensions, none of them 0, got {shapes[name]}.")
    hidden_size, num_channels, patch_size, _ = shapes["patch_embed.proj.weight"]
    depth = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
    if depth > len(shapes):
        # A file of a few bytes can name block 10 ** 9: names must be plausible before anything is built for them.
        raise ValueError(f"The encoder names block {depth - 1}, but has only {len(shapes)} weights.")
    grid = _grid_size(shapes, hints, patch_size)
    window_size, global_attn_indexes = _attention_pattern(shapes, depth, grid, hints, notices)
    mlp_size = shapes["blocks.0.mlp.lin1.weight"][0]
    return build_config(
        hidden_size=hidden_size,
        num_hidden_layers=depth,
        num_attention_heads=_num_heads(shapes, hidden_size, hints, notices),
        num_channels=num_channels,
        image_size=grid * patch_size,
        patch_size=patch_size,
        mlp_ratio=_exact_ratio(mlp_size, hidden_size),
        output_channels=shapes["neck.0.weight"][0],
        downsample_channels=_downsample_channels(shapes),
        window_size=window_size,
        global_attn_indexes=global_attn_indexes,
        qkv_bias="blocks.0.attn.qkv.bias" in shapes,
        use_abs_pos="pos_embed" in shapes,
        use_rel_pos="blocks.0.attn.rel_pos_h" in shapes,
    )


def build_config(**fields: Any) -> ImageEncoderViTConfig:
    """
    A configuration of these fields.

    Raises:
        ValueError: If they make no encoder; what huggingface_hub's strict dataclasses raise is none.
    """
    try:
        return ImageEncoderViTConfig(**fields)
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error).strip().splitlines()[-1].strip()) from None


def read_config(folder: Path) -> ImageEncoderViTConfig:
    """
    The configuration of a folder that `save_pretrained` wrote.

    Raises:
        ValueError: As `build_config`.
        OSError: If there is no config.json that can be read.
    """
    try:
        return cast(ImageEncoderViTConfig, ImageEncoderViTConfig.from_pretrained(folder))
    except StrictDataclassError as error:
        raise ValueError(f"config.json: {str(error.__cause__ or error).strip().splitlines()[-1].strip()}") from None


def _grid_size(shapes: Mapping[str, Shape], hints: Mapping[str, Any], patch_size: int) -> int:
    if "pos_embed" not in shapes:
        return int(hints.get("image_size", 1024)) // patch_size
    shape = shapes["pos_embed"]
    if len(shape) != 4 or shape[0] != 1 or shape[1] != shape[2] or not shape[1]:
        raise ValueError(f"pos_embed must be (1, H, W, C) for a square image, got {shape}.")
    return shape[1]


def _num_heads(shapes: Mapping[str, Shape], hidden_size: int, hints: Mapping[str, Any], notices: list[str]) -> int:
    table = shapes.get("blocks.0.attn.rel_pos_h")
    if table is None:
        heads = int(hints.get("num_attention_heads") or max(1, hidden_size // 64))
        notices.append(f"Without relative positions the tensors do not say how many heads there are: taking {heads}.")
        return heads
    if len(table) != 2 or not table[1] or hidden_size % table[1]:
        raise ValueError(
            f"rel_pos_h must be (length, hidden_size / heads), got {table} with hidden_size {hidden_size}."
        )
    return hidden_size // table[1]


def _attention_pattern(
    shapes: Mapping[str, Shape], depth: int, grid: int, hints: Mapping[str, Any], notices: list[str]
) -> tuple[int, list[int]]:
    """The window in patches and the global blocks, from the lengths 2 * side - 1 of the relative position tables."""
    usual = 14, [depth // 4 * (quarter + 1) - 1 for quarter in range(4)] if depth >= 4 else [depth - 1]
    sides = {}
    for index in range(depth):
        tables = [shapes.get(f"blocks.{index}.attn.rel_pos_{axis}", ()) for axis in "hw"]
        if tables[0] and tables[0] != tables[1]:
            raise ValueError(f"The relative position tables of block {index} differ: {tables[0]} and {tables[1]}.")
        if tables[0]:
            sides[index] = (tables[0][0] + 1) // 2
    windows = {side for side in sides.values() if side != grid}
    if len(windows) > 1:
        raise ValueError(
            f"The attention windows differ between blocks: {sorted(windows)} patches, in a grid of {grid}."
        )
    if windows:
        return windows.pop(), [index for index, side in sides.items() if side == grid]
    window_size = int(hints.get("window_size") or (grid if sides else usual[0]))
    global_attn_indexes = [int(index) for index in hints.get("global_attn_indexes", usual[1])]
    reason = f"tables as long as the grid of {grid} patches in every block" if sides else "no relative position tables"
    notices.append(
        f"With {reason}, the tensors do not say which blocks attend globally: taking {global_attn_indexes} and windows "
        f"of {window_size} patches from {'config.json' if 'global_attn_indexes' in hints else 'the usual spacing'}."
    )
    if sides and window_size != grid:
        # Blocks with tables of the grid's length cannot be windowed by anything smaller: all of them are global.
        global_attn_indexes = list(range(depth))
    return window_size, global_attn_indexes


def _exact_ratio(mlp_size: int, hidden_size: int) -> float:
    """The smallest float that makes `int(hidden_size * ratio)` the size of the MLP."""
    ratio = mlp_size / hidden_size
    return ratio if int(hidden_size * ratio) == mlp_size else nextafter(ratio, inf)


def _downsample_channels(shapes: Mapping[str, Shape]) -> list[int]:
    channels: list[int] = []
    while shape := shapes.get(f"net_{len(channels) + 2}.weight"):
        channels.append(shape[0])
    return channels


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
    expected = expected_shapes(config)
    missing = sorted(expected.keys() - shapes.keys())
    unexpected = sorted(shapes.keys() - expected.keys())
    wrong = [f"{n} {shapes[n]} instead of {expected[n]}" for n in expected if n in shapes and shapes[n] != expected[n]]
    problems = [
        f"{what} ({len(names)}): {_listed(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        if names
    ]
    if problems:
        raise ValueError(f"The encoder below {prefix!r} is not complete. Weights {'; '.join(problems)}.")


def config_hints(source_config: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's config.json says about its encoder, under the names of `ImageEncoderViTConfig`."""
    aliases = {"width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"}
    aliases |= ImageEncoderViTConfig.attribute_map
    for section in _encoder_sections(source_config):
        named = {aliases.get(key, key): value for key, value in section.items()}
        hints = {name: named[name] for name in HINTED_SIZES if _is_size(named.get(name))}
        lists = {name: named[name] for name in HINTED_LISTS if isinstance(named.get(name), list)}
        return hints | {name: sizes for name, sizes in lists.items() if all(map(_is_size, sizes))}
    return {}


def _is_size(value: Any) -> bool:
    """Whether a value of a stranger's JSON can be a size or an index."""
    return type(value) is int and 0 <= value < 1 << 20


def _encoder_sections(source_config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The sections of a config.json that describe a SAM encoder: those that know global attention blocks."""
    pending: list[Any] = [source_config]
    while pending:
        section = pending.pop(0)
        if isinstance(section, Mapping):
            if "global_attn_indexes" in section or section.get("model_type") == ImageEncoderViTConfig.model_type:
                yield section
            pending.extend(section.values())


def disagreements(config: ImageEncoderViTConfig, hints: Mapping[str, Any]) -> list[str]:
    """A sentence for each value of a config.json that the tensors contradict."""
    return [
        f"config.json says {name} = {value}, the tensors say {getattr(config, name)}: trusting the tensors."
        for name, value in hints.items()
        if getattr(config, name) != value
    ]


def _choose_family(
    shapes: Mapping[str, Shape],
    prefix: str,
    sources: Mapping[str, str],
    config: ImageEncoderViTConfig,
    notices: list[str],
) -> Family:
    parts = naming_below(set(shapes), prefix)
    has_qwen = any(name.startswith("model.qwen2_model.") for name in shapes)
    is_second = has_qwen or config.downsample_channels[-1:] == [896]
    for family in FAMILIES:
        if prefix in family.prefixes and parts is family.renamed:
            if is_second and family.name == DEEPSEEK_OCR.name:
                return DEEPSEEK_OCR_2
            if is_second and prefix in IN_MEMORY_PREFIXES:
                return DEEPSEEK_OCR_2._replace(name="deepseek-ocr-2-transformers", renamed=TRANSFORMERS_NAMES)
            return family
    closest = DEEPSEEK_OCR if config.downsample_channels else SAM
    notices.append(
        f"No known model keeps its encoder under {prefix!r}: assuming {closest.title}'s preprocessing. "
        "Check preprocessor_config.json."
    )
    return closest._replace(name="unknown", title=f"unknown, like {closest.title}", renamed=parts, license=None)


def _quoted(prefixes: Iterable[str]) -> str:
    return " and ".join(repr(prefix) for prefix in prefixes)


def _listed(names: list[str]) -> str:
    more = f", and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
    return ", ".join(names[:MAX_NAMES_SHOWN]) + more


EXPORT_LAYOUTS = ("deepseek-ocr", "sam", "transformers")


def export_names(config: ImageEncoderViTConfig, layout: str) -> dict[str, str]:
    """
    Published name to name in another family's checkpoints, for weights that go back where they came from.

    - "deepseek-ocr": `model.sam_model.*`, as DeepSeek-OCR, DeepSeek-OCR-2 and Unlimited-OCR publish them.
    - "sam": `image_encoder.*`, as segment-anything; it has no place for net_2 and net_3.
    - "transformers": `vision_encoder.*` as SamModel without net_2 and net_3, else `model.vision_tower.sam_encoder.*`
      as UnlimitedOcr and DeepseekOcr2 hold them.

    Raises:
        ValueError: For an unknown layout, or one that cannot hold this encoder.
    """
    if layout not in EXPORT_LAYOUTS:
        raise ValueError(f"Unknown layout {layout!r}. Known: {', '.join(EXPORT_LAYOUTS)}.")
    depth = len(config.downsample_channels)
    if (layout == "sam" and depth) or (layout == "transformers" and depth not in (0, 2)):
        raise ValueError(
            f"The layout {layout!r} has no place for the {depth} convolutions after the neck "
            f"(downsample_channels = {list(config.downsample_channels)}). Choose another layout."
        )
    if layout == "transformers":
        prefix = "model.vision_tower.sam_encoder." if depth else "vision_encoder."
        return {name: prefix + rename(name, TRANSFORMERS_NAMES) for name in expected_shapes(config)}
    prefix = "model.sam_model." if layout == "deepseek-ocr" else "image_encoder."
    return {name: prefix + name for name in expected_shapes(config)}
