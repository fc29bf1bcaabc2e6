"""`python -m image_encoder_vit`: the same as `image-encoder-vit`."""

import sys

from .commands import main

if __name__ == "__main__":
    sys.exit(main())
