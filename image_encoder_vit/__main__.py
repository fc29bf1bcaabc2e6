"""`python -m image_encoder_vit`: the same as `image-encoder-vit`."""

from .commands import main

if __name__ == "__main__":
    raise SystemExit(main())
