#!/usr/bin/env python
"""The same as `image-encoder-vit plot`."""

from image_encoder_vit.commands.plot import main

if __name__ == "__main__":
    raise SystemExit(main())
