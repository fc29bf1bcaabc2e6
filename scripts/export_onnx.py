#!/usr/bin/env python
"""The same as `image-encoder-vit export`."""

from image_encoder_vit.commands.export import main

if __name__ == "__main__":
    raise SystemExit(main())
