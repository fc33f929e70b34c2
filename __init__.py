"""Foveate: train vision-language models, and run them with fewer visual tokens and a smaller KV cache."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .vlm.pruning import (
        EVS,
        VTCCLS,
        DyCoke,
        FasterVLM,
        FastV,
        HiRED,
        Lowest,
        PyramidDrop,
        Random,
        SparseVLM,
        SparseVLMPlus,
        VisionZip,
        reduce,
    )

__all__ = [
    "EVS",
    "VTCCLS",
    "DyCoke",
    "FastV",
    "FasterVLM",
    "HiRED",
    "Lowest",
    "PyramidDrop",
    "Random",
    "SparseVLM",
    "SparseVLMPlus",
    "VisionZip",
    "reduce",
]


def __getattr__(name: str) -> Any:
    """What needs torch and transformers is imported when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .vlm import pruning

    return getattr(pruning, name)
