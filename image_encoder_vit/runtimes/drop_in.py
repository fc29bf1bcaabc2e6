"""
A drop-in for the SAM encoder inside a model of transformers or of remote code: this package's, over the same weights.

What differs between SAM's encoders in speed is their transformer blocks. The drop-in is a copy of the encoder module
whose blocks are `ImageEncoderViTBlock`s. Patch embedding, positions, neck and convolutions, output class and layout,
checks of the input and recorded hidden states stay the encoder's own, and so do all names: state dicts,
`save_pretrained`, optimizers, PEFT and device maps see the model that they saw before.
"""

from collections.abc import Iterator
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.hooks import add_hook_to_module
from torch import Tensor, nn

from ..cpu_inference import is_watched, linear
from ..modeling_image_encoder_vit import (
    ImageEncoderViTAttention,
    ImageEncoderViTBlock,
    ImageEncoderViTLinear,
    ImageEncoderViTMLP,
)
from ..weights.naming import encoder_prefixes

# Two calls on different threads may want different things, so this is no attribute of the blocks.
_attn_implementation: ContextVar[str] = ContextVar("attn_implementation", default="sdpa")

# Set on modules after they are built, and so to be carried back by an undo.
MODES = ("training", "gradient_checkpointing", "_gradient_checkpointing_func")
# What Accelerate's hooks put on a module; the hook is attached to the copy anew, since it wraps the module's `forward`.
ACCELERATE_ATTRIBUTES = ("_hf_hook", "_old_forward", "forward")


@dataclass(frozen=True)
class ReplacedEncoders:
    """
    What `replace_sam_encoder` took out of `model`: `originals` by path, and the `replacements` that are there now; and
    of CLIP towers beside them, the `clip_linears` by path, in whose place this package's linear layers are.

    Both hold the same parameters, so the originals go on working, and training either trains both.
    """

    model: nn.Module
    originals: dict[str, nn.Module]
    replacements: dict[str, nn.Module]
    clip_linears: dict[str, nn.Module]

    def undo(self) -> None:
        """
        Puts the original modules back, in the mode (training, gradient checkpointing) that the replacements are in.

        Raises:
            ValueError: If the model has other modules there by now, as after an undo or with adapters inside.
        """
        for path, replacement in self.replacements.items():
            if self.model.get_submodule(path) is not replacement:
                raise ValueError(f"{path!r} is not the encoder that was put there: nothing to undo.")
            if _parameter_ids(replacement) != _parameter_ids(self.originals[path]):
                raise ValueError(
                    f"Modules inside {path!r} were exchanged since, as adapters do: the original would lack them. "
                    "Unload or merge them first."
                )
        for path, layer in self.clip_linears.items():
            now = self.model.get_submodule(path)
            if type(now) is not ImageEncoderViTLinear or _parameter_ids(now) != _parameter_ids(layer):
                raise ValueError(
                    f"{path!r} is not the linear layer that was put there, as with adapters: unload or merge them "
                    "first."
                )
        for path, layer in self.clip_linears.items():
            layer.training = self.model.get_submodule(path).training
            _put(self.model, path, layer)
        for path, replacement in self.replacements.items():
            modules = dict(replacement.named_modules())
            for name, original in self.originals[path].named_modules():
                state = vars(modules[name])
                vars(original).update({mode: state[mode] for mode in MODES if mode in state})
            _put(self.model, path, self.originals[path])


def replace_sam_encoder(model: nn.Module) -> ReplacedEncoders:
    """
    Replaces every SAM image encoder inside `model`, in place, by this package's over the same parameters, and returns
    what it replaced.

    Takes SamModel, SamHQModel, GOT-OCR2, DeepSeek-OCR-2, Unlimited-OCR, SLANeXt, PP-FormulaNet and the high-resolution
    tower of DeepseekVLHybrid of transformers, and by their structure the modules of segment-anything and of the remote
    code of DeepSeek-OCR, GOT-OCR2 and Vary. Hooks on replaced modules
    are copied; layers that are no plain `nn.Linear` (quantised, with adapters) are called as they are. Where a CLIP
    tower reads the encoder's features, as in DeepSeek-OCR and Unlimited-OCR, its linear layers become this package's
    too, which is all that differs in speed there.

    Raises:
        ValueError: If there is no such encoder, it is replaced already, it is the model itself, or it computes
            something else (another activation, attention dropout, a patched `forward`).
    """
    originals = find_sam_encoders(model)
    replacements = {path: _drop_in_encoder(path, original) for path, original in originals.items()}
    clip_linears = {path: layer for encoder in originals for path, layer in _clip_linears(model, encoder)}
    for path, replacement in (replacements | {path: _linear(layer) for path, layer in clip_linears.items()}).items():
        _put(model, path, replacement)
    return ReplacedEncoders(model, originals, replacements, clip_linears)


def _clip_linears(model: nn.Module, encoder_path: str) -> Iterator[tuple[str, nn.Module]]:
    """The plain linear layers, by path, of the CLIP tower beside an encoder; none where there is no such tower."""
    parent, _, own_name = encoder_path.rpartition(".")
    for name, sibling in model.get_submodule(parent).named_children():
        if name != own_name and hasattr(sibling, "pre_layrnorm"):
            for path, layer in sibling.named_modules(prefix=f"{parent}.{name}".lstrip(".")):
                if type(layer) is nn.Linear and not _is_patched(layer):
                    yield path, layer


def find_sam_encoders(model: nn.Module) -> dict[str, nn.Module]:
    """
    The SAM encoders inside a model that are not replaced yet, by path.

    Raises:
        ValueError: If there is none, or the model is an encoder itself.
    """
    prefixes = encoder_prefixes(name for name, _ in model.named_parameters(remove_duplicate=False))
    found = {prefix.rstrip("."): model.get_submodule(prefix.rstrip(".")) for prefix in prefixes}
    encoders = {path: encoder for path, encoder in found.items() if _has_sam_blocks(encoder)}
    fresh = {path: encoder for path, encoder in encoders.items() if not _is_ours(encoder)}
    if "" in fresh:
        raise ValueError(
            f"{type(model).__name__} is a SAM image encoder itself, which cannot be replaced in place: pass the model "
            "that holds it."
        )
    if encoders and not fresh:
        paths = ", ".join(map(repr, encoders))
        raise ValueError(f"The encoder of {type(model).__name__} at {paths} is this package's already.")
    if not fresh:
        raise ValueError(
            f"No SAM image encoder in {type(model).__name__}: looked for a module with patch_embed.projection or "
            "patch_embed.proj, a neck, and layers or blocks with attn.qkv, attn.proj, mlp.lin1 and mlp.lin2, as "
            "SamModel, SamHQModel, GOT-OCR2, DeepSeek-OCR, DeepSeek-OCR-2 and Unlimited-OCR have."
        )
    return fresh


class DropInAttention(ImageEncoderViTAttention):
    """Attention that returns its weights as transformers' SAM classes do, (B * windows * heads, Q, K)."""

    def forward(self, hidden: Tensor, attn_implementation: str = "sdpa") -> tuple[Tensor, Tensor | None]:
        attended, weights = super().forward(hidden, attn_implementation)
        return attended, None if weights is None else weights.flatten(0, 1)


class DropInMLP(ImageEncoderViTMLP):
    """An MLP that calls the activation it came with where that is watched."""

    act: Any

    def forward(self, hidden: Tensor) -> Tensor:
        if isinstance(self.act, nn.Module) and is_watched(self.act):
            return linear(self.lin2, self.act(linear(self.lin1, hidden)))
        return super().forward(hidden)


class DropInBlock(ImageEncoderViTBlock):
    """A block for encoders that call theirs with nothing but the hidden states (B, H, W, C)."""

    def __call__(self, hidden: Tensor) -> Tensor:
        # Here and not in `forward`, which gradient checkpointing calls again outside of the encoder's.
        implementation = "sdpa" if torch.compiler.is_compiling() else _attn_implementation.get()
        # Theirs leave the patch embedding channels first in memory.
        return super().__call__(hidden.contiguous(), attn_implementation=implementation)


class DropInTransformersBlock(DropInBlock):
    """The same under transformers' names of the norms."""

    norm1: Any = property(lambda self: self.layer_norm1)
    norm2: Any = property(lambda self: self.layer_norm2)


class EagerEncoder:
    """Mixed into encoders with eager attention: those return weights on request, which only our eager path has."""

    config: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.get("output_attentions")
        if wanted is None:
            wanted = getattr(self.config, "output_attentions", False)
        if not wanted:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return self._forward_with_attentions(*args, **kwargs)

    @torch.compiler.disable  # Compiled blocks cannot read the variable.
    def _forward_with_attentions(self, *args: Any, **kwargs: Any) -> Any:
        token = _attn_implementation.set("eager")
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            _attn_implementation.reset(token)


@cache
def _stand_in_class(ours: Any, theirs: Any) -> Any:
    """
    Our class as a subclass of theirs, under the name of theirs: transformers records outputs by class, Accelerate and
    FSDP know by the class's name what must stay on one device.
    """
    members = {
        "__module__": theirs.__module__,
        "__qualname__": theirs.__qualname__,
        "__doc__": ours.__doc__,
        # Pickle would look for it under that name.
        "__reduce__": lambda self: (_empty_stand_in, (ours, theirs), vars(self)),
    }
    return type(theirs.__name__, (ours, theirs), members)


def _empty_stand_in(ours: type, theirs: type) -> Any:
    cls = _stand_in_class(ours, theirs)
    return cls.__new__(cls)


def _class_of(module: nn.Module) -> Any:
    return type(module)  # Any, since mypy takes modules' classes for unhashable.


def _drop_in_encoder(path: str, encoder: Any) -> nn.Module:
    name = _name_of_blocks(encoder)
    blocks = encoder.get_submodule(name)
    _check_forward(path, encoder)
    for index, block in blocks.named_children():
        _check_block(f"{path}.{name}.{index}", block)
    is_eager = getattr(getattr(encoder, "config", None), "_attn_implementation", None) == "eager"
    cls = _stand_in_class(EagerEncoder, _class_of(encoder)) if is_eager else type(encoder)
    return _view(encoder, cls, **{name: _view(blocks, type(blocks), **dict(_drop_in_blocks(blocks)))})


def _drop_in_blocks(blocks: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    block: Any
    for name, block in blocks.named_children():
        attention, mlp = block.attn, block.mlp
        new_attention = _view(attention, _stand_in_class(DropInAttention, _class_of(attention)))
        new_attention.window_size = block.window_size
        heads = "num_attention_heads" if hasattr(attention, "num_attention_heads") else "num_heads"
        new_attention.num_heads = getattr(attention, heads)
        new_mlp = _view(mlp, DropInMLP)
        ours = DropInTransformersBlock if hasattr(block, "layer_norm1") else DropInBlock
        yield name, _view(block, _stand_in_class(ours, _class_of(block)), attn=new_attention, mlp=new_mlp)


def _linear(layer: nn.Module) -> nn.Module:
    """Our linear layer over the parameters of a plain one."""
    return _view(layer, ImageEncoderViTLinear)


def _view(module: nn.Module, cls: Any, **children: nn.Module) -> Any:
    """
    A module of class `cls` with the state of `module` and some other children.

    The dictionaries of parameters and buffers are the same objects, so that what a parameter is replaced by, as `to`
    and `load_state_dict(assign=True)` may do, is shared too. Those of children and hooks are copies.
    """
    view = cls.__new__(cls)
    shared = ("_parameters", "_buffers")
    for name, value in vars(module).items():
        vars(view)[name] = copy(value) if isinstance(value, dict) and name not in shared else value
    view._modules.update(children)
    hook = vars(view).get("_hf_hook")
    if hook is not None:
        for name in ACCELERATE_ATTRIBUTES:
            vars(view).pop(name, None)
        add_hook_to_module(view, copy(hook))
    return view


def _name_of_blocks(encoder: nn.Module) -> str:
    return "layers" if hasattr(encoder, "layers") else "blocks"


def _has_sam_blocks(encoder: nn.Module) -> bool:
    blocks = getattr(encoder, _name_of_blocks(encoder), None)
    needed = {"attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2"}
    return isinstance(blocks, nn.ModuleList) and all(
        hasattr(block, "window_size") and needed <= {name for name, _ in block.named_modules()} for block in blocks
    )


def _is_ours(encoder: nn.Module) -> bool:
    blocks = encoder.get_submodule(_name_of_blocks(encoder))
    return any(isinstance(block, ImageEncoderViTBlock) for block in blocks.children())


def _is_patched(module: nn.Module) -> bool:
    """Whether something other than Accelerate's hooks has put a `forward` of its own on the module."""
    return "forward" in vars(module) and "_hf_hook" not in vars(module)


def _check_forward(where: str, module: nn.Module) -> None:
    if _is_patched(module):
        name = type(module).__name__
        raise ValueError(f"{where}: this {name} has a patched forward, which would be lost. Remove the patch first.")


def _check_block(where: str, block: Any) -> None:
    """
    Checks that a block computes what ours does.

    Raises:
        ValueError: Naming the block and what is different in it.
    """
    for module in (block, block.attn, block.mlp):
        _check_forward(where, module)
    dropout = getattr(block.attn, "dropout", 0)
    if isinstance(dropout, float | int) and dropout > 0:
        raise ValueError(f"{where}: attention dropout {dropout}, which this encoder does not have. Set it to 0.")
    probe = torch.linspace(-4, 4, 9, device="cpu")
    if not torch.equal(block.mlp.act(probe), F.gelu(probe)):
        raise ValueError(f"{where}: the activation {block.mlp.act} is not the exact GELU, which this encoder has.")


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _parameter_ids(module: nn.Module) -> dict[str, int]:
    return {name: id(parameter) for name, parameter in module.named_parameters()}
