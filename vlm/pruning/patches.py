"""Attributes of one instance that are others for a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """While open, a module has these attributes; its class and other modules keep theirs."""
    parameters = getattr(owner, "_parameters", {})
    own = {name: getattr(owner, name) for name in attributes if name in vars(owner) or name in parameters}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name in attributes:
            if name in own:
                setattr(owner, name, own[name])
            else:
                delattr(owner, name)
