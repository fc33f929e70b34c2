"""Pruning visual tokens at inference, on any transformers VLM: one method a file, named in `parse.METHODS`."""

from typing import TYPE_CHECKING, Any

from .base import Prefill, Pruner
from .parse import METHODS, method_text, parse_method
from .session import Reduction, reduce

if TYPE_CHECKING:
    from .parse import *  # noqa: F403

__all__ = ["METHODS", "Prefill", "Pruner", "Reduction", "method_text", "parse_method", "reduce"]
__all__ += [method.__name__ for method in METHODS.values()]


def __getattr__(name: str) -> Any:
    """The methods, by the names of their classes."""
    for method in METHODS.values():
        if method.__name__ == name:
            return method
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
