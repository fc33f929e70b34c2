"""Foveate: train vision-language models, and run them with fewer visual tokens and a smaller KV cache."""

__version__ = "0.1.0"
