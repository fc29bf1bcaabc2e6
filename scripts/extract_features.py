#!/usr/bin/env python
"""The same as `image-encoder-vit extract`."""

from image_encoder_vit.commands.extract import main

if __name__ == "__main__":
    raise SystemExit(main())
