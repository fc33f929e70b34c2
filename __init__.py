"""Foveate: train vision-language models, and run them with fewer visual tokens and a smaller KV cache."""

__version__ = "0.1.0"

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .vlm.pruning import reduce as reduce


def __getattr__(name: str) -> Any:
    """`foveate.reduce` and the pruning methods, which need torch: imported when they are first asked for."""
    if not name.startswith("_"):
        from .vlm import pruning

        if name in pruning.__all__:
            return getattr(pruning, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
