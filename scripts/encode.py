#!/usr/bin/env python
"""The same as `image-encoder-vit encode`."""

from image_encoder_vit.commands.encode import main

if __name__ == "__main__":
    raise SystemExit(main())
