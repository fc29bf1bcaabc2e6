"""
What a stranger does with a published folder: loads it by transformers alone, with the code that lies in it, and runs
it. Run in a process of its own, which does not import this package: see `folder_check.run_check`.

Arguments: the folder, a JSON object that maps classes of transformers to the field of their output to compare, a
safetensors file with `image` (height, width, 3) and `pixel_values` (1, 3, height in px, width in px), and the
safetensors file to write the results to, by field, and `pixels`.
"""

import json
import sys

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file


def main(folder: str, outputs: str, probe_file: str, result_file: str) -> None:
    probe = load_file(probe_file)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True, backend="pil")
    results = {"pixels": processor(Image.fromarray(probe["image"].numpy()), return_tensors="pt")["pixel_values"]}
    for auto_class, output in json.loads(outputs).items():
        model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True).eval()
        if type(model).__module__.startswith("image_encoder_vit."):
            raise RuntimeError("The installed package was loaded instead of the code in the folder.")
        with torch.no_grad():
            results[output] = getattr(model(probe["pixel_values"]), output)
    save_file({name: result.contiguous() for name, result in results.items()}, result_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
