#!/usr/bin/env python
"""The same as `image-encoder-vit push`."""

from image_encoder_vit.commands.push import main

if __name__ == "__main__":
    raise SystemExit(main())
