#!/usr/bin/env python
"""The same as `image-encoder-vit export`."""

import sys

from image_encoder_vit.commands.export import main

if __name__ == "__main__":
    sys.exit(main())
