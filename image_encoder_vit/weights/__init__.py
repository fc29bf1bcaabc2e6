"""Checkpoints: find the encoder in them, pull it, push it, describe it."""

from .export import export_weights
from .pull import Pulled, pull
from .push import Pushed, push

__all__ = ["Pulled", "Pushed", "export_weights", "pull", "push"]
