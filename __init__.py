"""Foveate: train vision-language models, and run them with fewer visual tokens and a smaller KV cache."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .vlm.cache import *  # noqa: F403
    from .vlm.pruning import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """`reduce`, the pruning methods, KV caches: they need torch, and are imported when they are first asked for."""
    if name == "reduce" or name[0].isupper():
        from .vlm import cache, pruning

        return getattr(cache if name in cache.__all__ else pruning, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
