"""
Prints as JSON what PyTorch says of this processor, and for each precision whether it is computed in float32 and the
relative errors against float64 of this package and of transformers' class, which some precisions have none of.
"""

import json
import sys

import torch
from builders import random_pixels, relative_error, small_model
from native import native_twin

from image_encoder_vit.cpu_inference import runs_in_float32
from image_encoder_vit.cpu_kernel import has_attention_kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def measured() -> dict[str, object]:
    pixels = random_pixels(2, 3, 144, 208)
    model = small_model(window_size=4, image_size=256, downsample_channels=[512, 1024])
    exact = small_model(window_size=4, image_size=256, downsample_channels=[512, 1024]).double()(pixels.double())
    theirs = native_twin("unlimited_ocr", model, "sdpa")
    errors = {}
    for dtype in DTYPES:
        model, theirs = model.to(dtype), theirs.to(dtype)
        errors[str(dtype)] = [
            relative_error(one(pixels.to(dtype)).last_hidden_state, exact.last_hidden_state) for one in (model, theirs)
        ]
    return {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "in float32": [str(dtype) for dtype in DTYPES if runs_in_float32(dtype)],
        "kernel": [str(dtype) for dtype in DTYPES if has_attention_kernel(dtype)],
        "errors": errors,
    }


with torch.inference_mode():
    sys.stdout.write(json.dumps(measured()))
