"""
What the encoder's parameters are called in the checkpoints of its family: renamed to the published names and back, and
found below a prefix. Needs no shapes, so that an index is enough, and reads no file.

"Published names" are those of segment-anything and of DeepSeek-OCR (`blocks.0.attn.qkv.weight`, `net_2.weight`), which
`ImageEncoderViT` uses.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..support import visible

ANCHORS = ("patch_embed.proj.weight", "patch_embed.projection.weight")
PUBLISHED_NAME = re.compile(
    r"pos_embed|patch_embed\.proj\.(weight|bias)|neck\.([02]\.weight|[13]\.(weight|bias))|net_\d+\.weight"
    r"|blocks\.\d+\.(norm[12]|attn\.qkv|attn\.proj|mlp\.lin[12])\.(weight|bias)|blocks\.\d+\.attn\.rel_pos_[hw]"
)
MAX_NAMES_SHOWN = 8


@dataclass(frozen=True)
class Naming:
    """
    One way to name the encoder's parameters: `renamed` maps whole dotted parts of the published names to theirs.
    `marker` is a name that only checkpoints with this naming have, "" where there is none.
    """

    name: str
    renamed: Mapping[str, str] = field(default_factory=dict)
    marker: str = ""

    def from_published(self, name: str) -> str:
        """A published name in this naming."""
        return _rename(name, self.renamed)

    def to_published(self, name: str) -> str:
        """A name in this naming as it was published."""
        return _rename(name, {theirs: ours for ours, theirs in self.renamed.items()})


def _rename(name: str, parts: Mapping[str, str]) -> str:
    dotted = f".{name}."
    for before, after in parts.items():
        dotted = dotted.replace(f".{before}.", f".{after}.", 1)
    return dotted[1:-1]


PUBLISHED = Naming("published")
TRANSFORMERS = Naming(
    "transformers",
    {
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
    },
    marker="patch_embed.projection.weight",
)
TIMM = Naming("timm", {"mlp.lin1": "mlp.fc1", "mlp.lin2": "mlp.fc2"}, marker="blocks.0.mlp.fc1.weight")
DEEPSEEK_VL = Naming("deepseek-vl", {"net_2": "downsamples.0", "net_3": "downsamples.1"}, marker="downsamples.0.weight")
MARKED_NAMINGS = (TRANSFORMERS, TIMM, DEEPSEEK_VL)

# Models of transformers that keep the convolutions after the neck elsewhere than in the encoder: the end of the
# encoder's prefix, what stands in its place, and their names below that.
PROJECTOR = "multi_modal_projector."
CONVOLUTIONS_ELSEWHERE: tuple[tuple[str, str, Mapping[str, str]], ...] = (
    # GOT-OCR2
    ("vision_tower.", PROJECTOR, {"net_2.weight": "conv_upsampler1.weight", "net_3.weight": "conv_upsampler2.weight"}),
    # SLANeXt
    ("backbone.vision_tower.", "backbone.", {"net_2.weight": "post_conv.weight"}),
    # DeepSeek-VL
    (
        "high_res_vision_model.vision_encoder.",
        "high_res_vision_proj.",
        {"net_2.weight": "conv1.weight", "net_3.weight": "conv2.weight"},
    ),
    # PP-FormulaNet, whose projector is a child of the encoder
    ("encoder.", f"encoder.{PROJECTOR}", {"net_2.weight": "conv1.weight", "net_3.weight": "conv2.weight"}),
)


def encoder_prefixes(names: Iterable[str]) -> list[str]:
    """
    Prefixes in a checkpoint below which an encoder of this kind may be: those with a patch embedding and a neck, which
    CLIP towers and plain ViTs lack. Sorted.
    """
    known = set(names)
    with_neck = {name[: match.start(1)] for name in known if (match := re.search(r"(?:^|\.)(neck\.)", name))}
    return sorted(prefix for prefix in with_neck if any(prefix + anchor in known for anchor in ANCHORS))


def naming_below(names: Iterable[str], prefix: str) -> Naming:
    """The naming that is used below a prefix."""
    known = set(names)
    return next((naming for naming in MARKED_NAMINGS if prefix + naming.marker in known), PUBLISHED)


def weights_below(names: Iterable[str], prefix: str) -> dict[str, str]:
    """The encoder's weights below a prefix: published name to name in the checkpoint."""
    known = set(names)
    naming = naming_below(known, prefix)
    weights = {}
    for name in sorted(known):
        if name.startswith(prefix):
            published = naming.to_published(name.removeprefix(prefix))
            if PUBLISHED_NAME.fullmatch(published):
                weights[published] = name
    for end, place, convolutions in CONVOLUTIONS_ELSEWHERE:
        if prefix.endswith(end):
            found = {ours: prefix.removesuffix(end) + place + theirs for ours, theirs in convolutions.items()}
            weights |= {ours: name for ours, name in found.items() if name in known}
    return weights


def listed(names: list[str]) -> str:
    """Names, which may be a stranger's, for one line of a message: the first ones, and how many more there are."""
    more = f", and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
    return ", ".join(map(visible, names[:MAX_NAMES_SHOWN])) + more
