"""Methods by name, as text: `fastv:layer=2,keep=0.5`, `pyramiddrop:layers=8/16/24,keep=0.5/0.25/0.125`, `evs`."""

from typing import Any

from ..spec import read, write
from .controls import Lowest, Random
from .dycoke import DyCoke
from .evs import EVS
from .fastervlm import FasterVLM
from .fastv import FastV
from .hired import HiRED
from .pyramiddrop import PyramidDrop
from .sparsevlm import SparseVLM, SparseVLMPlus
from .visionzip import VisionZip
from .vtc_cls import VTCCLS

METHODS: dict[str, type] = {
    "fastv": FastV,
    "sparsevlm": SparseVLM,
    "sparsevlm+": SparseVLMPlus,
    "pyramiddrop": PyramidDrop,
    "random": Random,
    "lowest": Lowest,
    "visionzip": VisionZip,
    "fastervlm": FasterVLM,
    "vtc-cls": VTCCLS,
    "hired": HiRED,
    "dycoke": DyCoke,
    "evs": EVS,
}


def parse_method(text: str) -> Any:
    """A method from `NAME[:FIELD=VALUE,...]`; fields left out have their defaults, tuples are joined by `/`.

    Raises:
        ValueError: there is no such method or field, or a value is not one; the message says what is accepted.
    """
    return read(text, METHODS, "method")


def method_text(method: Any) -> str:
    """The text, with every field, that `parse_method` makes the method from."""
    return write(method, METHODS)
