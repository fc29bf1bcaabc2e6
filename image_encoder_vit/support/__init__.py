"""What every other room may use: optional packages by the extra they come with, and text made fit to be shown."""

from .extras import import_extra
from .text import message_of, visible

__all__ = ["import_extra", "message_of", "visible"]
