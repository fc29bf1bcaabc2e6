"""
What a stranger does with a published folder: loads it by transformers alone, with the code that lies in it, and runs
it. Run in a process of its own, which does not import this package: see `push.check_remote_code`.

Arguments: the folder, a safetensors file with `image` (height, width, 3) and `pixel_values` (1, 3, height in px, width
in px), and the safetensors file to write the results to.
"""

import sys

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification


def main(folder: str, probe_file: str, result_file: str) -> None:
    probe = load_file(probe_file)
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True, backend="pil")
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    if type(model).__module__.startswith("image_encoder_vit."):
        raise RuntimeError("The installed package was loaded instead of the code in the folder.")
    with torch.no_grad():
        features = model(probe["pixel_values"]).last_hidden_state
    pixels = processor(Image.fromarray(probe["image"].numpy()), return_tensors="pt")["pixel_values"]
    results = {"features": features, "processed": pixels}
    if any(name.endswith("ForImageClassification") for name in model.config.architectures or ()):
        classifier = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
        with torch.no_grad():
            results["logits"] = classifier(probe["pixel_values"]).logits
    save_file({name: result.contiguous() for name, result in results.items()}, result_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
