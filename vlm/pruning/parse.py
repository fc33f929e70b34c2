"""Methods by name, as text: `fastv:layer=2,keep=0.5`, `pyramiddrop:layers=8/16/24,keep=0.5/0.25/0.125`, `evs`."""

import math
import re
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

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
    name, _, rest = text.strip().partition(":")
    method = METHODS.get(name.strip().lower())
    if method is None:
        raise ValueError(f"method is {name!r}; accepted: {', '.join(METHODS)}")
    name = name.strip().lower()
    hints = get_type_hints(method)
    known = [field.name for field in fields(method)]
    given: dict[str, Any] = {}
    for item in rest.split(",") if rest.strip() else ():
        field, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise ValueError(f"{name}: {item!r} is not FIELD=VALUE; accepted fields: {', '.join(known)}")
        if field not in known:
            raise ValueError(f"{name} has no field {field!r}; accepted: {', '.join(known)}")
        if field in given:
            raise ValueError(f"{name}: {field} is given twice; accepted: once")
        try:
            given[field] = _read(hints[field], value)
        except ValueError:
            raise ValueError(f"{name}: {field} is {value!r}; accepted: {_accepted(hints[field])}") from None
    try:
        return method(**given)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def method_text(method: Any) -> str:
    """The text, with every field, that `parse_method` makes the method from."""
    [name] = [name for name, kind in METHODS.items() if kind is type(method)]
    return f"{name}:" + ",".join(f"{field.name}={_write(getattr(method, field.name))}" for field in fields(method))


def _read(hint: Any, text: str) -> Any:
    """The value of a type that a text means; ValueError where it means none."""
    if get_origin(hint) in (Union, UnionType):
        for option in get_args(hint):
            try:
                return _read(option, text)
            except ValueError:
                continue
    elif get_origin(hint) is tuple:
        return tuple(_read(get_args(hint)[0], part) for part in text.split("/"))
    elif hint is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    elif hint is int and re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    elif hint is float and math.isfinite(float(text)):
        return float(text)
    elif hint is NoneType and text.lower() == "none":
        return None
    raise ValueError(text)


def _write(value: Any) -> str:
    if isinstance(value, tuple):
        return "/".join(map(_write, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _accepted(hint: Any) -> str:
    """What `_read` takes, in words."""
    if get_origin(hint) in (Union, UnionType):
        return ", or ".join(map(_accepted, get_args(hint)))
    if get_origin(hint) is tuple:
        return _accepted(get_args(hint)[0]).removeprefix("a ") + "s joined by '/'"
    return {bool: "true or false", int: "a whole number", float: "a number", NoneType: "none"}[hint]
