#!/usr/bin/env python
"""The same as `image-encoder-vit finetune`."""

from image_encoder_vit.commands.finetune import main

if __name__ == "__main__":
    raise SystemExit(main())
