#!/usr/bin/env python
"""The same as `image-encoder-vit push`."""

import sys

from image_encoder_vit.commands.push import main

if __name__ == "__main__":
    sys.exit(main())
