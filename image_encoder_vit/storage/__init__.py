"""Bytes, files and locks: HTTP ranges, the safetensors format, folders that appear whole. Knows no encoder."""

from .atomic_file import atomic_file
from .retries import RetryPolicy, TransferError

__all__ = ["RetryPolicy", "TransferError", "atomic_file"]
