"""
Loads a model folder with a torchao configuration; prints the weight's class and the cosines to the float features, as
loaded and with its blocks compiled.
"""

import sys

folder, torchao_folder, name = sys.argv[1:]
sys.path.append(torchao_folder)

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import torchao.quantization  # noqa: E402
from builders import random_pixels  # noqa: E402
from transformers import AutoModel, TorchAoConfig  # noqa: E402

import image_encoder_vit  # noqa: E402, F401

settings = TorchAoConfig(getattr(torchao.quantization, name)())
pixels = random_pixels(1, 3, 144, 208)
with torch.inference_mode():
    expected = AutoModel.from_pretrained(folder)(pixels).last_hidden_state.double().flatten()
    quantized = AutoModel.from_pretrained(folder, quantization_config=settings, dtype=torch.bfloat16)
    loaded = quantized(pixels).last_hidden_state
    for block in quantized.encoder.blocks:
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    compiled = quantized(pixels).last_hidden_state
sys.stdout.write(f"{type(quantized.encoder.blocks[0].mlp.lin1.weight).__name__}\n")
for features in (loaded, compiled):
    sys.stdout.write(f"{float(F.cosine_similarity(features.double().flatten(), expected, dim=0))}\n")
