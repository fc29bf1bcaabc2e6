#!/usr/bin/env python
"""The same as `image-encoder-vit pull`."""

from image_encoder_vit.commands.pull import main

if __name__ == "__main__":
    raise SystemExit(main())
