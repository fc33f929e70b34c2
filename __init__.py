"""Foveate: train vision-language models, and run them with fewer visual tokens and a smaller KV cache."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .vlm.pruning import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """`reduce` and the pruning methods, which need torch: imported when they are first asked for."""
    if name == "reduce" or name[0].isupper():
        from .vlm import pruning

        return getattr(pruning, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
