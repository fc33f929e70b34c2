"""Markdown tables."""

from collections.abc import Iterable, Sequence
from typing import Any


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; no row may have another length than the header."""
    lines = [_line(header), "|---" * len(header) + "|"]
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row of {len(row)} cells under {len(header)} columns: {' | '.join(row)}")
        lines.append(_line(row))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def with_interval(entry: dict[str, Any], form: str = ".3f") -> str:
    """An entry of a results file, with its 95 % interval: `0.950 [0.940, 0.960]`."""
    return f"{entry['value']:{form}} [{entry['low']:{form}}, {entry['high']:{form}}]"


def bold_with_interval(entry: dict[str, Any], form: str = ".3f") -> str:
    """The same for tables that are read down: `**0.950** (0.940 – 0.960)`."""
    return f"**{entry['value']:{form}}** ({entry['low']:{form}} – {entry['high']:{form}})"
