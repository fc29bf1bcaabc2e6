"""
Prints as JSON what PyTorch says of this processor, and for each precision whether it is computed in float32, whether
the kernel takes it, and the relative errors against float64: with the kernel, without it, and of transformers' class.
"""

import json
import sys
from unittest import mock

import torch
from builders import random_pixels, relative_error, small_model
from native import native_twin

from image_encoder_vit import attention
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
        model, theirs, pages = model.to(dtype), theirs.to(dtype), pixels.to(dtype)
        features = [one(pages).last_hidden_state for one in (model, theirs)]
        with mock.patch.object(attention, "has_attention_kernel", return_value=False):
            features.insert(1, model(pages).last_hidden_state)
        errors[str(dtype)] = [relative_error(some, exact.last_hidden_state) for some in features]
    return {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "in float32": [str(dtype) for dtype in DTYPES if runs_in_float32(dtype)],
        "kernel": [str(dtype) for dtype in DTYPES if has_attention_kernel(dtype)],
        "errors": errors,
    }


with torch.inference_mode():
    sys.stdout.write(json.dumps(measured()))
