"""Pruning visual tokens at inference, on any transformers VLM: one method a file."""

from .controls import Lowest, Random
from .dycoke import DyCoke
from .evs import EVS
from .fastervlm import FasterVLM
from .fastv import FastV
from .hired import HiRED
from .pyramiddrop import PyramidDrop
from .session import Reduction, reduce
from .sparsevlm import SparseVLM, SparseVLMPlus
from .visionzip import VisionZip
from .vtc_cls import VTCCLS

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
    "Reduction",
    "SparseVLM",
    "SparseVLMPlus",
    "VisionZip",
    "reduce",
]
