"""Writes how many bytes a training step takes with gradient checkpointing, and then how many without."""

import resource
import sys

import torch
from builders import random_pixels

from image_encoder_vit import ImageEncoderViTConfig, ImageEncoderViTModel

UNIT_BYTES = 1 if sys.platform == "darwin" else 1024

# Deep and narrow, so that activations outweigh parameters: 5 M of them, 32 x 32 patches.
MEDIUM = ImageEncoderViTConfig(
    hidden_size=192, num_attention_heads=6, image_size=512, output_channels=32, downsample_channels=[32, 32]
)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT_BYTES


model = ImageEncoderViTModel(MEDIUM).train()
pixels = random_pixels(1, 3, 512, 512)
for parameter in model.parameters():
    parameter.grad = torch.zeros_like(parameter)
before = peak_bytes()
for checkpointing in (True, False):  # The peak never falls, so the smaller one has to come first.
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if checkpointing:
        getattr(model, f"{prefix}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{prefix}_checkpointing_disable")()
    model(pixels).last_hidden_state.square().mean().backward()
    sys.stdout.write(f"{peak_bytes() - before}\n")
