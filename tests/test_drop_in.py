"""
The drop-in inside whole models: the same outputs, gradients, tokens and files as with the encoder that it replaces,
over the same parameters.
"""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload, infer_auto_device_map
from accelerate.utils import compute_module_sizes
from builders import random_pixels, randomize, relative_error, small_model
from safetensors.torch import load_file
from test_pull_native import CLIP, ENCODER, KINDS, TEXT, classes
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from image_encoder_vit import ImageEncoderViT, cpu_inference
from image_encoder_vit.cpu_inference import cpu_linear
from image_encoder_vit.modeling_image_encoder_vit import ImageEncoderViTBlock
from image_encoder_vit.runtimes.drop_in import find_sam_encoders, replace_sam_encoder

BOUND = 1e-5
IMAGE_TOKEN = 5


def unlimited_ocr() -> nn.Module:
    module = classes("unlimited_ocr")
    # CLIP-L takes the encoder's tokens in place of its own patches, so it is as wide as their channels.
    clip = {**CLIP, "hidden_size": 20, "patch_size": 14}
    vision = {"sam_config": {**ENCODER, "downsample_channels": [12, 20]}, "encoder_config": clip}
    return module.UnlimitedOcrForConditionalGeneration(
        module.UnlimitedOcrConfig(vision_config=vision, text_config=TEXT)
    )


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    **{kind: KINDS[kind][0] for kind in KINDS},
    "unlimited_ocr": unlimited_ocr,
}
PATHS = {
    "unlimited_ocr": "model.vision_tower.sam_encoder",
    "deepseek_ocr2": "model.vision_tower.sam_encoder",
    "got_ocr2": "model.vision_tower",
    "sam": "vision_encoder",
    "sam_hq": "vision_encoder",
}
OCR = ["unlimited_ocr", "deepseek_ocr2", "got_ocr2"]
SEGMENTING = ["sam", "sam_hq"]


def built(kind: str, attn_implementation: str | None = None) -> Any:
    """A small random model of a kind in eval mode, no parameter of it zero."""
    torch.manual_seed(0)
    model = BUILDERS[kind]()
    if attn_implementation:
        # Its SAM classes take the attention of their configuration when they are built.
        encoder = model.get_submodule(PATHS[kind])
        encoder = type(encoder)._from_config(encoder.config, attn_implementation=attn_implementation)
        parent, _, name = PATHS[kind].rpartition(".")
        setattr(model.get_submodule(parent), name, encoder)
    return randomize(model).eval()


def encoder_in(model: nn.Module, kind: str) -> Any:
    return model.get_submodule(PATHS[kind])


def enable_checkpointing(model: Any) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def prompt(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Token ids with a placeholder for each feature of the image."""
    model.config.image_token_id = IMAGE_TOKEN
    with torch.no_grad():
        features = model.model.get_image_features(pixels).pooler_output
    count = features[0].shape[0]
    return torch.tensor([[1, 7, *[IMAGE_TOKEN] * count, 9, 11]])


def logits_of(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What a whole model makes of the image: logits of the text, or mask logits at two prompted points."""
    if hasattr(model, "mask_decoder"):
        points = torch.tensor([[[[20.0, 30.0]], [[90.0, 60.0]]]]).expand(pixels.shape[0], -1, -1, -1)
        return model(pixel_values=pixels, input_points=points).pred_masks
    return model(input_ids=prompt(model, pixels), pixel_values=pixels).logits


def parameter_pointers(model: nn.Module) -> dict[str, int]:
    return {name: value.data_ptr() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", BUILDERS)
def test_whole_models_give_the_same_logits(kind: str) -> None:
    model, pixels = built(kind), random_pixels(1, 3, 128, 128)
    with torch.no_grad():
        expected = logits_of(model, pixels)
        features = encoder_in(model, kind)(pixels).last_hidden_state
        replaced = replace_sam_encoder(model)
        assert list(replaced.originals) == [PATHS[kind]]
        assert all(isinstance(block, ImageEncoderViTBlock) for block in encoder_in(model, kind).layers)
        assert relative_error(logits_of(model, pixels), expected) <= BOUND
        # The logits do depend on the encoder.
        encoder_in(model, kind).layers[1].attn.rel_pos_h.mul_(2)
        assert relative_error(encoder_in(model, kind)(pixels).last_hidden_state, features) > 100 * BOUND
        assert relative_error(logits_of(model, pixels), expected) > 10 * BOUND


@pytest.mark.parametrize("kind", OCR)
def test_generated_tokens_are_the_same(kind: str) -> None:
    model, pixels = built(kind), random_pixels(1, 3, 128, 128)
    model.config.image_token_id = IMAGE_TOKEN
    inputs = {"input_ids": prompt(model, pixels), "pixel_values": pixels}
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    options |= {"eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(**inputs, **options)
    replace_sam_encoder(model)
    actual = model.generate(**inputs, **options)
    assert actual.sequences.shape[1] == inputs["input_ids"].shape[1] + 12
    assert torch.equal(actual.sequences, expected.sequences)
    for ours, theirs in zip(actual.logits, expected.logits, strict=True):
        assert relative_error(ours, theirs) <= BOUND


@pytest.mark.parametrize("attn_implementation", ["eager", None])
@pytest.mark.parametrize("kind", BUILDERS)
def test_outputs_have_the_same_class_fields_and_layout(kind: str, attn_implementation: str | None) -> None:
    model, pixels = built(kind, attn_implementation), random_pixels(2, 3, 128, 128)
    wanted = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        expected = encoder_in(model, kind)(pixels, **wanted)
        replaced = replace_sam_encoder(model)
        encoder = encoder_in(model, kind)
        for again in range(2):  # Recording leaves nothing behind that records twice.
            actual = encoder(pixels, **wanted)
            assert type(actual) is type(expected), again
            assert list(actual.keys()) == list(expected.keys())
            assert_same_values(actual.to_tuple(), expected.to_tuple())
        assert set(encoder(pixels).keys()) == set(expected.keys()) - {"hidden_states", "attentions"}
        as_tuple = encoder(pixels, return_dict=False)
        assert isinstance(as_tuple, tuple)
        assert relative_error(as_tuple[0], expected[0]) <= BOUND
        assert_same_values(replaced.originals[PATHS[kind]](pixels, **wanted).to_tuple(), expected.to_tuple())
    if attn_implementation == "eager":
        assert len(expected.attentions) == len(encoder.layers)


def assert_same_values(actual: Any, expected: Any) -> None:
    if torch.is_tensor(expected):
        assert actual.dtype == expected.dtype
        assert relative_error(actual, expected) <= BOUND
        return
    assert type(actual) is type(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_same_values(ours, theirs)


def test_attentions_asked_of_the_whole_model_and_by_configuration() -> None:
    model, pixels = built("got_ocr2"), random_pixels(1, 3, 128, 128)
    replace_sam_encoder(model)
    encoder = encoder_in(model, "got_ocr2")
    assert encoder(pixels).attentions is None
    encoder.config.output_attentions = True
    assert len(encoder(pixels).attentions) == 4
    assert encoder(pixels, output_attentions=False).attentions is None
    encoder.config.output_attentions = False
    assert model.model.get_image_features(pixels, output_attentions=True).attentions[0].shape == (18, 9, 9)


def test_the_hand_off_to_clip_is_unlimited_ocr_s() -> None:
    model, pixels = built("unlimited_ocr"), random_pixels(2, 3, 128, 128)
    tower = model.model.vision_tower
    with torch.no_grad():
        expected = tower(pixels).last_hidden_state
        replace_sam_encoder(model)
        actual = tower(pixels).last_hidden_state
        assert relative_error(actual, expected) <= BOUND
        features = tower.sam_encoder(pixels).last_hidden_state
        # The tokens that CLIP-L takes in place of its patches come out again, beside what it makes of them.
        tokens = small_model().eval()
        tokens.encoder.load_state_dict(published(tower.sam_encoder))
        assert relative_error(tokens(pixels).patch_embeds, features.flatten(2).transpose(1, 2)) <= BOUND
        assert torch.equal(actual[..., -features.shape[1] :], features.flatten(2).transpose(1, 2))


def published(encoder: nn.Module) -> dict[str, torch.Tensor]:
    from image_encoder_vit.weights.naming import weights_below

    weights = encoder.state_dict()
    return {name: weights[theirs] for name, theirs in weights_below(weights, "").items()}


@pytest.mark.parametrize("size", [(96, 160), (64, 64)])
@pytest.mark.parametrize("kind", ["unlimited_ocr", "deepseek_ocr2"])
def test_other_image_sizes(kind: str, size: tuple[int, int]) -> None:
    model, pixels = built(kind), random_pixels(1, 3, *size)
    with torch.no_grad():
        expected = encoder_in(model, kind)(pixels).last_hidden_state
        replace_sam_encoder(model)
        assert relative_error(encoder_in(model, kind)(pixels).last_hidden_state, expected) <= BOUND


@pytest.mark.parametrize("kind", ["sam", "sam_hq", "got_ocr2"])
def test_images_that_the_original_refuses_are_refused(kind: str) -> None:
    model = built(kind)
    replace_sam_encoder(model)
    with pytest.raises(ValueError, match=r"Input image size \(64\*64\) doesn't match model"):
        encoder_in(model, kind)(random_pixels(1, 3, 64, 64))


@pytest.mark.parametrize("kind", BUILDERS)
def test_bfloat16_errs_no_more_than_the_original(kind: str) -> None:
    model, pixels = built(kind), random_pixels(16, 3, 128, 128)
    encoder = encoder_in(model, kind)
    with torch.no_grad():
        exact = encoder(pixels).last_hidden_state
        replaced = replace_sam_encoder(model)
        model.to(torch.bfloat16)  # the original follows, for the parameters are the same
        halves = pixels.to(torch.bfloat16)
        actual = encoder_in(model, kind)(halves).last_hidden_state
        expected = replaced.originals[PATHS[kind]](halves).last_hidden_state
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert 0 < relative_error(actual, exact) <= 1.15 * relative_error(expected, exact)


@pytest.mark.parametrize(
    ("size", "sizes"),
    {"base": (768, 12, 12), "large": (1024, 24, 16), "huge": (1280, 32, 16)}.items(),
)
def test_sam_s_sizes(size: str, sizes: tuple[int, int, int]) -> None:
    hidden_size, depth, heads = sizes
    module = classes("sam")
    config = module.SamVisionConfig(
        hidden_size=hidden_size,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        global_attn_indexes=[depth // 4 * (quarter + 1) - 1 for quarter in range(4)],
    )
    with torch.device("meta"):  # Full size without the memory of it.
        model = module.SamVisionModel(config)
        replace_sam_encoder(model)
        assert model(torch.empty(1, 3, 1024, 1024)).last_hidden_state.shape == (1, 256, 64, 64)
    assert [block.attn.num_heads for block in model.vision_encoder.layers] == [heads] * depth
    # Heads of the same width (64 and 80), depth and order of blocks, small otherwise.
    narrow = {**ENCODER, "hidden_size": 2 * hidden_size // heads, "num_hidden_layers": depth, "mlp_dim": 64}
    narrow |= {"image_size": 64, "output_channels": 16, "global_attn_indexes": config.global_attn_indexes}
    model = randomize(module.SamVisionModel(module.SamVisionConfig(**narrow))).eval()
    pixels = random_pixels(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
        replace_sam_encoder(model)
        assert relative_error(model(pixels).last_hidden_state, expected) <= BOUND


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", BUILDERS)
def test_gradients_are_the_same(kind: str, checkpointing: bool) -> None:
    model, pixels = built(kind).train(), random_pixels(2, 3, 128, 128)
    expected = gradients_of(encoder_in(model, kind), pixels)
    replace_sam_encoder(model)
    if checkpointing:
        enable_checkpointing(model)
        assert encoder_in(model, kind).layers[0].gradient_checkpointing
    actual = gradients_of(encoder_in(model, kind), pixels)
    assert list(actual) == list(expected)
    for name, gradient in actual.items():
        assert relative_error(gradient, expected[name]) <= BOUND, name


def gradients_of(encoder: Any, pixels: torch.Tensor, **wanted: bool) -> dict[str, torch.Tensor]:
    encoder.zero_grad()
    output = encoder(pixels, **wanted)
    loss = output.last_hidden_state.square().mean()
    if wanted:
        loss = loss + sum(attention.square().mean() for attention in output.attentions)
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in encoder.named_parameters()}


def test_attentions_are_differentiable_under_gradient_checkpointing() -> None:
    model, pixels = built("got_ocr2").train(), random_pixels(1, 3, 128, 128)
    expected = gradients_of(encoder_in(model, "got_ocr2"), pixels, output_attentions=True)
    replace_sam_encoder(model)
    enable_checkpointing(model)
    actual = gradients_of(encoder_in(model, "got_ocr2"), pixels, output_attentions=True)
    for name, gradient in actual.items():
        assert relative_error(gradient, expected[name]) <= BOUND, name


@pytest.mark.parametrize("kind", BUILDERS)
def test_parameters_are_shared_and_keep_their_names(kind: str) -> None:
    model = built(kind)
    pointers, identities = parameter_pointers(model), [(name, id(p)) for name, p in model.named_parameters()]
    replaced = replace_sam_encoder(model)
    assert parameter_pointers(model) == pointers
    assert list(model.state_dict()) == list(pointers)
    assert [(name, id(parameter)) for name, parameter in model.named_parameters()] == identities
    assert parameter_pointers(encoder_in(model, kind)) == parameter_pointers(replaced.originals[PATHS[kind]])


@pytest.mark.parametrize("kind", ["unlimited_ocr", "sam_hq"])
def test_training_either_trains_both(kind: str) -> None:
    model, pixels = built(kind).train(), random_pixels(1, 3, 128, 128)
    replaced = replace_sam_encoder(model)
    ours, theirs = encoder_in(model, kind), replaced.originals[PATHS[kind]]
    before = theirs(pixels).last_hidden_state.detach()
    for trained, other in ((ours, theirs), (theirs, ours)):
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        trained(pixels).last_hidden_state.square().mean().backward()
        optimizer.step()
        after = other(pixels).last_hidden_state.detach()
        assert relative_error(after, before) > 1e-3
        assert relative_error(trained(pixels).last_hidden_state.detach(), after) <= BOUND
        before = after


def test_parameters_stay_shared_when_they_are_exchanged() -> None:
    model, pixels = built("sam"), random_pixels(1, 3, 128, 128)
    replaced = replace_sam_encoder(model)
    model.double()
    other = {name: value.double() * 1.1 for name, value in built("sam").state_dict().items()}
    model.load_state_dict(other, assign=True)
    original = replaced.originals["vision_encoder"]
    assert parameter_pointers(model.vision_encoder) == parameter_pointers(original)
    assert original.pos_embed.data_ptr() == other["vision_encoder.pos_embed"].data_ptr()
    with torch.no_grad():
        actual, expected = (encoder(pixels.double())[0] for encoder in (model.vision_encoder, original))
    assert relative_error(actual, expected) <= 1e-12


@pytest.mark.parametrize("kind", BUILDERS)
def test_saved_files_are_the_original_s(kind: str, tmp_path: Path) -> None:
    model, pixels = built(kind), random_pixels(1, 3, 128, 128)
    model.save_pretrained(tmp_path / "before")
    replace_sam_encoder(model)
    model.save_pretrained(tmp_path / "after")
    files = {path.name: path.read_bytes() for path in (tmp_path / "before").iterdir()}
    assert "model.safetensors" in files
    assert {path.name: path.read_bytes() for path in (tmp_path / "after").iterdir()} == files
    again, info = type(model).from_pretrained(tmp_path / "after", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert len(load_file(tmp_path / "after" / "model.safetensors")) > 60
    with torch.no_grad():
        assert relative_error(logits_of(model, pixels), logits_of(again.eval(), pixels)) <= BOUND


@pytest.mark.parametrize("kind", BUILDERS)
def test_undo_restores_the_very_modules(kind: str) -> None:
    model, pixels = built(kind), random_pixels(1, 3, 128, 128)
    modules = [(name, id(module), type(module)) for name, module in model.named_modules()]
    with torch.no_grad():
        expected = logits_of(model, pixels)
    replaced = replace_sam_encoder(model)
    assert next(entry for entry in modules if entry[0] == PATHS[kind])[1] == id(replaced.originals[PATHS[kind]])
    model.train()
    enable_checkpointing(model)
    replaced.undo()
    assert [(name, id(module), type(module)) for name, module in model.named_modules()] == modules
    assert all(module.training for module in model.modules())
    assert encoder_in(model, kind).layers[0].gradient_checkpointing
    model.eval()
    with torch.no_grad():
        assert torch.equal(logits_of(model, pixels), expected)
    with pytest.raises(ValueError, match="nothing to undo"):
        replaced.undo()
    replace_sam_encoder(model).undo()


# By structure: segment-anything's encoder as the remote code of DeepSeek-OCR writes it, with its own small classes.


class RemoteAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, side: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.use_rel_pos = True
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, dim // num_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, dim // num_heads))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, height, width, dim = x.shape
        qkv = self.qkv(x).reshape(batch, height * width, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        by_row = query.reshape(batch, self.num_heads, height, width, -1)
        rows = self.rel_pos_h[torch.arange(height)[:, None] - torch.arange(height) + height - 1]
        columns = self.rel_pos_w[torch.arange(width)[:, None] - torch.arange(width) + width - 1]
        bias = torch.einsum("bnhwd,hkd->bnhwk", by_row, rows)[..., None]
        bias = bias + torch.einsum("bnhwd,wkd->bnhwk", by_row, columns)[..., None, :]
        logits = self.scale * query @ key.transpose(2, 3) + bias.reshape(batch, self.num_heads, height * width, -1)
        attended = logits.softmax(-1) @ value
        return self.proj(attended.transpose(1, 2).reshape(batch, height, width, dim))


class RemoteMLP(nn.Module):
    def __init__(self, dim: int, act: nn.Module) -> None:
        super().__init__()
        self.lin1, self.lin2, self.act = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim), act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin2(self.act(self.lin1(x)))


class RemoteBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, window_size: int, grid: int, act: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = RemoteAttention(dim, num_heads, window_size or grid)
        self.mlp = RemoteMLP(dim, act)
        self.window_size = window_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm1(x)
        batch, height, width, dim = x.shape
        if self.window_size:
            side = self.window_size
            hidden = F.pad(hidden, (0, 0, 0, -width % side, 0, -height % side))
            rows, columns = hidden.shape[1] // side, hidden.shape[2] // side
            windows = hidden.reshape(batch, rows, side, columns, side, dim).transpose(2, 3).flatten(0, 2)
            hidden = self.attn(windows).reshape(batch, rows, columns, side, side, dim).transpose(2, 3)
            hidden = hidden.reshape(batch, rows * side, columns * side, dim)[:, :height, :width]
        else:
            hidden = self.attn(hidden)
        x = x + hidden
        return x + self.mlp(self.norm2(x))


class RemoteNorm2d(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class RemotePatchEmbed(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, 16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).movedim(1, -1)


class RemoteEncoder(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.patch_embed = RemotePatchEmbed(32)
        self.pos_embed = nn.Parameter(torch.zeros(1, 8, 8, 32))
        self.blocks = nn.ModuleList(RemoteBlock(32, 2, 0 if index in (1, 3) else 3, 8, act) for index in range(4))
        self.neck = nn.Sequential(
            nn.Conv2d(32, 8, 1, bias=False),
            RemoteNorm2d(8, eps=1e-6),
            nn.Conv2d(8, 8, 3, padding=1, bias=False),
            RemoteNorm2d(8, eps=1e-6),
        )
        self.net_2 = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.net_3 = nn.Conv2d(12, 20, 3, stride=2, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.net_3(self.net_2(self.neck(x.movedim(-1, 1))))


class RemoteModel(nn.Module):
    """The names of DeepSeek-OCR's remote code: `model.sam_model`, and CLIP-L fed with its tokens."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.sam_model = RemoteEncoder(act or nn.GELU())
        self.model.vision_model = nn.Linear(20, 16)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        features = self.model.sam_model(pixels).flatten(2).permute(0, 2, 1)
        return torch.cat((self.model.vision_model(features), features), dim=-1)


def test_remote_code_is_known_by_its_structure() -> None:
    model, pixels = randomize(RemoteModel()).eval(), random_pixels(2, 3, 128, 128)
    names = list(model.state_dict())
    with torch.no_grad():
        expected = model(pixels)
        replaced = replace_sam_encoder(model)
        actual = model(pixels)
    assert list(replaced.originals) == ["model.sam_model"]
    assert all(isinstance(block, ImageEncoderViTBlock) for block in model.model.sam_model.blocks)
    assert relative_error(actual, expected) <= BOUND
    assert list(model.state_dict()) == names
    # The stand-in is the published encoder, not merely something that the drop-in agrees with.
    sizes = {"img_size": 128, "embed_dim": 32, "depth": 4, "num_heads": 2, "out_chans": 8, "window_size": 3}
    twin = ImageEncoderViT(**sizes, global_attn_indexes=[1, 3], downsample_channels=[12, 20])
    twin.load_state_dict(model.model.sam_model.state_dict())
    replaced.undo()
    with torch.no_grad():
        theirs = model.double()(pixels.double())[..., 16:]
        assert relative_error(theirs, twin.double()(pixels.double()).flatten(2).transpose(1, 2)) <= 1e-12
    model.float()
    with torch.no_grad():
        assert torch.equal(model(pixels), expected)


def test_remote_code_trains() -> None:
    model, pixels = randomize(RemoteModel()), random_pixels(2, 3, 128, 128)
    model(pixels).square().mean().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    replace_sam_encoder(model)
    model(pixels).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, expected[name]) <= BOUND, name


def test_every_encoder_of_a_model_is_replaced() -> None:
    models = nn.ModuleList([built("sam"), randomize(RemoteModel()).eval()])
    pixels = random_pixels(1, 3, 128, 128)
    with torch.no_grad():
        expected = models[0].vision_encoder(pixels)[0], models[1](pixels)
        replaced = replace_sam_encoder(models)
        assert list(replaced.originals) == ["0.vision_encoder", "1.model.sam_model"]
        actual = models[0].vision_encoder(pixels)[0], models[1](pixels)
    assert_same_values(actual, expected)
    replaced.undo()
    assert not any(isinstance(module, ImageEncoderViTBlock) for module in models.modules())


# Refusals.


def test_a_model_without_sam_encoder_is_refused() -> None:
    message = r"No SAM image encoder in Linear: looked for a module with patch_embed\.projection .* as SamModel, "
    with pytest.raises(ValueError, match=message):
        replace_sam_encoder(nn.Linear(2, 2))
    unlimited = built("unlimited_ocr").model.vision_tower.vision_encoder  # CLIP-L
    with pytest.raises(ValueError, match="No SAM image encoder in UnlimitedOcrVisionEncoder"):
        replace_sam_encoder(unlimited)


def test_the_encoder_itself_cannot_be_replaced_in_place() -> None:
    with pytest.raises(ValueError, match=r"SamVisionEncoder is a SAM image encoder itself.*pass the model that holds"):
        replace_sam_encoder(built("sam").vision_encoder)


def test_a_second_replacement_is_refused() -> None:
    model = built("sam")
    replaced = replace_sam_encoder(model)
    with pytest.raises(ValueError, match="The encoder of SamModel at 'vision_encoder' is this package's already"):
        replace_sam_encoder(model)
    replaced.undo()
    assert list(find_sam_encoders(model)) == ["vision_encoder"]
    with pytest.raises(ValueError, match="this package's already"):
        replace_sam_encoder(small_model())


def patched(model: Any) -> Any:
    model.vision_encoder.layers[2].forward = lambda hidden: hidden
    return model


def with_dropout(model: Any) -> Any:
    model.vision_encoder.layers[1].attn.dropout = 0.1
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RemoteModel(nn.GELU(approximate="tanh")), r"model\.sam_model\.blocks\.0: the activation GELU.*tanh"),
        (lambda: with_dropout(built("sam")), r"vision_encoder\.layers\.1: attention dropout 0\.1"),
        (lambda: patched(built("sam")), r"vision_encoder\.layers\.2: this SamVisionLayer has a patched forward"),
    ],
)
def test_encoders_that_compute_something_else_are_refused(build: Callable[[], nn.Module], message: str) -> None:
    model = build()
    modules = [id(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        replace_sam_encoder(model)
    assert [id(module) for module in model.modules()] == modules


# Beside other libraries.


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks by that name
@pytest.mark.parametrize("adapted_first", [False, True])
def test_adapters(adapted_first: bool) -> None:
    peft = pytest.importorskip("peft")
    pixels = random_pixels(1, 3, 128, 128)
    config = peft.LoraConfig(r=2, target_modules=["qkv", "lin1"], init_lora_weights=False)
    expected_model, model = built("sam"), built("sam")
    torch.manual_seed(1)
    expected_model = peft.get_peft_model(expected_model, config)
    if adapted_first:
        model = peft.get_peft_model(model, config)
        replaced = replace_sam_encoder(model)
        model.load_state_dict(expected_model.state_dict())
    else:
        replaced = replace_sam_encoder(model)
        model = peft.get_peft_model(model, config)
        model.load_state_dict(expected_model.state_dict())
        with pytest.raises(ValueError, match="Modules inside 'vision_encoder' were exchanged since"):
            replaced.undo()
    assert list(model.state_dict()) == list(expected_model.state_dict())
    with torch.no_grad():
        expected = expected_model.base_model.model.vision_encoder(pixels)[0]
        plain = built("sam").vision_encoder(pixels)[0]
    actual = model.base_model.model.vision_encoder(pixels)[0]
    assert relative_error(actual.detach(), expected) <= BOUND
    assert relative_error(actual.detach(), plain) > 1e-3
    actual.square().mean().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(trained) == 2 * 2 * 4
    assert all("lora_" in name for name in trained)
    if adapted_first:  # The original has the adapters too.
        replaced.undo()
        assert relative_error(model.base_model.model.vision_encoder(pixels)[0].detach(), expected) <= BOUND
    else:
        model.unload()
        replaced.undo()


@pytest.mark.parametrize("offloaded_first", [False, True])
def test_offloading(offloaded_first: bool) -> None:
    model, pixels = built("sam"), random_pixels(1, 3, 128, 128)
    with torch.no_grad():
        expected = model.vision_encoder(pixels)[0]
        for step in ("offload", "replace") if offloaded_first else ("replace", "offload"):
            if step == "offload":
                cpu_offload(model, execution_device="cpu")
            else:
                replaced = replace_sam_encoder(model)
        assert model.vision_encoder.layers[0].attn.rel_pos_h.is_meta
        assert relative_error(model.vision_encoder(pixels)[0], expected) <= BOUND
        assert relative_error(model.vision_encoder(pixels)[0], expected) <= BOUND
        assert model.vision_encoder.layers[0].attn.qkv.weight.is_meta
        if offloaded_first:
            replaced.undo()
            assert relative_error(model.vision_encoder(pixels)[0], expected) <= BOUND


def test_device_maps_split_no_block() -> None:
    encoder = encoder_in(built("unlimited_ocr"), "unlimited_ocr")
    memory = {"cpu": int(0.6 * compute_module_sizes(encoder)[""]), "disk": 1 << 30}
    names = encoder._no_split_modules
    before = infer_auto_device_map(encoder, memory, names)
    holder = nn.ModuleDict({"encoder": encoder})
    replace_sam_encoder(holder)
    assert infer_auto_device_map(holder["encoder"], memory, names) == before
    # Without those names it does split them.
    assert infer_auto_device_map(holder["encoder"], memory, []) != before


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules")  # pos_embed
@pytest.mark.parametrize("blocks_on", ["cpu", "disk"])
def test_models_loaded_with_a_device_map(blocks_on: str, tmp_path: Path) -> None:
    model, pixels = built("sam"), random_pixels(1, 3, 128, 128)
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        expected = model.vision_encoder(pixels)[0]
    device_map = {**dict.fromkeys(top_modules(model), "cpu"), "vision_encoder.layers": blocks_on}
    loaded = type(model).from_pretrained(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "disk")
    assert loaded.vision_encoder.layers[0].attn.qkv.weight.is_meta == (blocks_on == "disk")
    replaced = replace_sam_encoder(loaded)
    with torch.no_grad():
        assert relative_error(loaded.vision_encoder(pixels)[0], expected) <= BOUND
        replaced.undo()
        assert relative_error(loaded.vision_encoder(pixels)[0], expected) <= BOUND


def top_modules(model: nn.Module) -> set[str]:
    """What a device map has to name, the encoder's blocks apart."""
    inside = {f"vision_encoder.{name}" for name, _ in model.vision_encoder.named_children()}
    inside |= {"vision_encoder.pos_embed"}
    return (inside | {name for name, _ in model.named_children()}) - {"vision_encoder", "vision_encoder.layers"}


def test_hooks_are_kept() -> None:
    model, pixels = built("sam"), random_pixels(1, 3, 128, 128)
    seen: list[str] = []
    block = model.vision_encoder.layers[1]
    block.register_forward_hook(lambda *_: seen.append("block"))
    block.mlp.lin1.register_forward_hook(lambda *_: seen.append("linear"))
    model.vision_encoder.register_forward_pre_hook(lambda *_: seen.append("encoder"))
    replace_sam_encoder(model)
    model.vision_encoder(pixels)
    assert seen == ["encoder", "linear", "block"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_replaced_models_are_copied_whole(copied: Callable[[Any], Any]) -> None:
    model, pixels = built("got_ocr2"), random_pixels(1, 3, 128, 128)
    replace_sam_encoder(model)
    twin = copied(model)
    assert type(encoder_in(twin, "got_ocr2")) is type(encoder_in(model, "got_ocr2"))
    with torch.no_grad():
        expected = encoder_in(model, "got_ocr2")(pixels)[0]
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(encoder_in(twin, "got_ocr2")(pixels)[0], expected)


def test_linear_layers_take_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    model, weights = built("sam"), []
    monkeypatch.setattr(cpu_inference, "cpu_linear", lambda *call: weights.append(call[1]) or cpu_linear(*call))
    replace_sam_encoder(model)
    with torch.no_grad():
        model.vision_encoder(random_pixels(1, 3, 128, 128))
    expected = [module.weight for module in model.vision_encoder.layers.modules() if isinstance(module, nn.Linear)]
    assert {id(weight) for weight in weights} == {id(weight) for weight in expected}


def test_a_compiled_drop_in_returns_attention_weights() -> None:
    model, pixels = built("got_ocr2"), random_pixels(1, 3, 128, 128)
    with torch.no_grad():
        expected = encoder_in(model, "got_ocr2")(pixels, output_attentions=True)
        replace_sam_encoder(model)
        compiled = torch.compile(encoder_in(model, "got_ocr2"), backend="eager")
        assert relative_error(compiled(pixels)[0], expected[0]) <= BOUND
        assert_same_values(compiled(pixels, output_attentions=True).to_tuple(), expected.to_tuple())


def test_the_drop_in_compiles_in_one_graph() -> None:
    model, pixels = randomize(RemoteModel()).eval(), random_pixels(1, 3, 128, 128)
    with torch.no_grad():
        expected = model(pixels)
        replace_sam_encoder(model)
        assert relative_error(torch.compile(model, backend="eager", fullgraph=True)(pixels), expected) <= BOUND


def test_the_output_of_the_original_is_what_the_tests_take_it_for() -> None:
    with torch.no_grad():
        output = encoder_in(built("unlimited_ocr"), "unlimited_ocr")(random_pixels(1, 3, 128, 128))
    assert type(output) is BaseModelOutput
    assert output.last_hidden_state.shape == (1, 20, 2, 2)
