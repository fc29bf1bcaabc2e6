"""Bytes, files and locks: HTTP ranges, the safetensors format, folders that appear whole. Knows no encoder."""
