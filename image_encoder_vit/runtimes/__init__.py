"""The encoder in other models and other runtimes."""
