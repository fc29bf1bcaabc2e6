"""
Encodes a page where OpenMP grants fewer threads than PyTorch asks for, as the environment says and as is set after the
import; prints the relative errors against float64 as JSON.
"""

import copy
import ctypes
import json
import sys
from contextlib import nullcontext

import torch
from builders import random_pixels, relative_error, small_model

torch.set_num_threads(2)
openmp = ctypes.CDLL(torch._C.__file__)
SETTINGS = {
    "as started": nullcontext,
    "dynamic": lambda: openmp.omp_set_dynamic(1),
    "no active levels": lambda: openmp.omp_set_max_active_levels(0),
}
# Wide enough for oneDNN to share a product among threads.
WIDE = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 2, "global_attn_indexes": [1]}
model = small_model(**WIDE)
pixels = random_pixels(1, 3, 256, 256)
errors = {}
with torch.no_grad():
    exact = small_model(**WIDE).double()(pixels.double())
    for name, change in SETTINGS.items():
        change()
        for dtype in (torch.float32, torch.bfloat16):
            one = copy.deepcopy(model).to(dtype)
            features = [one(pixels).last_hidden_state for _ in range(4)]
            errors[f"{name}, {dtype}"] = max(relative_error(some, exact.last_hidden_state) for some in features)
sys.stdout.write(json.dumps(errors))
