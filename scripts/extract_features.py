#!/usr/bin/env python
"""The same as `image-encoder-vit extract`."""

import sys

from image_encoder_vit.commands.extract import main

if __name__ == "__main__":
    sys.exit(main())
