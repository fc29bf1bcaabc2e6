#!/usr/bin/env python
"""The same as `image-encoder-vit benchmark`."""

from image_encoder_vit.commands.benchmark import main

if __name__ == "__main__":
    raise SystemExit(main())
