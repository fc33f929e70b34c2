"""Settings as text, `NAME:FIELD=VALUE,...`, for frozen dataclasses: `fastv:layer=2,keep=0.5`, `int4:group=32`.

Fields left out have their defaults; tuples are joined by `/`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def read(text: str, named: Mapping[str, Any], noun: str) -> Any:
    """The settings that a text means.

    Args:
        text: `NAME` or `NAME:FIELD=VALUE,...`.
        named: by name, a frozen dataclass, or one of its instances, whose values are the defaults.
        noun: what the names name, for the message.

    Raises:
        ValueError: there is no such name or field, or a value is not one; the message says what is accepted.
    """
    given_name, _, rest = text.strip().partition(":")
    name = given_name.strip().lower()
    if name not in named:
        raise ValueError(f"{noun} is {given_name!r}; accepted: {', '.join(named)}")
    base = named[name]
    kind = base if isinstance(base, type) else type(base)
    hints = get_type_hints(kind)
    known = [field.name for field in fields(kind)]
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
            given[field] = _read_value(hints[field], value)
        except ValueError:
            raise ValueError(f"{name}: {field} is {value!r}; accepted: {accepted(hints[field])}") from None
    try:
        if base is not kind:
            return replace(base, **given)
        missing = [field.name for field in fields(kind) if _is_required(field) and field.name not in given]
        if missing:
            raise ValueError(f"{missing[0]} is missing; accepted: {accepted(hints[missing[0]])}")
        return kind(**given)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def write(settings: Any, named: Mapping[str, Any]) -> str:
    """The text, with every field, that `read` makes the settings from; by the name with the closest defaults."""

    def differing(base: Any) -> int:
        return 0 if isinstance(base, type) else sum(getattr(base, field) != value for field, value in values.items())

    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    names = [name for name, base in named.items() if type(settings) in (base, type(base))]
    name = min(names, key=lambda name: differing(named[name]))
    written = ",".join(f"{field}={_write_value(value)}" for field, value in values.items())
    return f"{name}:{written}" if written else name


def accepted(hint: Any) -> str:
    """What a field of this type takes, in words."""
    if get_origin(hint) in (Union, UnionType):
        return ", or ".join(map(accepted, get_args(hint)))
    if get_origin(hint) is tuple:
        return accepted(get_args(hint)[0]).removeprefix("a ") + "s joined by '/'"
    if get_origin(hint) is Literal:
        return ", ".join(get_args(hint))
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a text", NoneType: "none"}[hint]


def _is_required(field: Any) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _read_value(hint: Any, text: str) -> Any:
    """The value of a type that a text means; ValueError where it means none."""
    if get_origin(hint) in (Union, UnionType):
        for option in get_args(hint):
            try:
                return _read_value(option, text)
            except ValueError:
                continue
    elif get_origin(hint) is tuple:
        return tuple(_read_value(get_args(hint)[0], part) for part in text.split("/"))
    elif get_origin(hint) is Literal and text.lower() in get_args(hint):
        return text.lower()
    elif hint is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    elif hint is int and re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    elif hint is float and math.isfinite(float(text)):
        return float(text)
    elif hint is str and text:
        return text
    elif hint is NoneType and text.lower() == "none":
        return None
    raise ValueError(text)


def _write_value(value: Any) -> str:
    if isinstance(value, tuple):
        return "/".join(map(_write_value, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
