#!/usr/bin/env python
"""The same as `image-encoder-vit plot`."""

import sys

from image_encoder_vit.commands.plot import main

if __name__ == "__main__":
    sys.exit(main())
