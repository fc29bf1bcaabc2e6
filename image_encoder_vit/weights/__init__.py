"""Checkpoints: find the encoder in them, pull it, push it, describe it."""
