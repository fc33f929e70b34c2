"""Pruning visual tokens at inference, on any transformers VLM: one method a file."""

from .base import Prefill, Pruner
from .controls import Lowest, Random
from .dycoke import DyCoke
from .evs import EVS
from .fastervlm import FasterVLM
from .fastv import FastV
from .hired import HiRED
from .parse import METHODS, method_text, parse_method
from .pyramiddrop import PyramidDrop
from .session import Reduction, reduce
from .sparsevlm import SparseVLM, SparseVLMPlus
from .visionzip import VisionZip
from .vtc_cls import VTCCLS

__all__ = [
    "EVS",
    "METHODS",
    "VTCCLS",
    "DyCoke",
    "FastV",
    "FasterVLM",
    "HiRED",
    "Lowest",
    "Prefill",
    "Pruner",
    "PyramidDrop",
    "Random",
    "Reduction",
    "SparseVLM",
    "SparseVLMPlus",
    "VisionZip",
    "method_text",
    "parse_method",
    "reduce",
]
