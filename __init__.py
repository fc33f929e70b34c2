"""Foveate: train vision-language models, and run them with fewer visual tokens and a smaller KV cache."""

from importlib.metadata import version

__version__ = version("foveate")
