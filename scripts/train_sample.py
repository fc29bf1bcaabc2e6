#!/usr/bin/env python
"""Trains the sample encoder that the package brings, on pages that it draws."""

import sys

from image_encoder_vit.commands.train_sample import main

if __name__ == "__main__":
    sys.exit(main())
