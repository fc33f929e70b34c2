"""What a results file is: the JSON in docs/results, from which figures, tables and the README's numbers are made.

Facts (`facts.run_facts`) and entries (`facts.result`), the latter in lists under `results`, at the top or in groups
that say more: `points: [{"frames": 64, ..., "results": [...]}]`. Any list of objects that have a name and a value is
one of entries. The quickstart has `tasks` instead, as `foveate eval --task glyphs` writes them. Files may hold more.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StrictInt, ValidationError, model_validator

# What values are counted in. "times" is a ratio of rates, "ratio" one of amounts; perplexities have none.
UNITS = frozenset({
    "", "fraction", "points", "ratio", "times", "times its time", "nats", "nats a token",
    "s", "us", "ms/step", "ms/token", "s/step", "bytes", "bytes/s", "MB/s", "bytes a rank", "FLOPs", "FLOP/s",
    "documents/s", "images/s", "frames/s", "tokens/s", "tokens", "frames", "steps", "kills", "tries", "ranks",
    "weights", "questions", "tests", "tokens in the device's memory", "documents a pack", "tiles a pack", "a node",
    "max/mean",
    "costliest group / mean", "mean over layers", "of the pairs needed", "of the tokens", "fraction of the budget",
    "fraction of the copy bandwidth", "fraction of the time", "fraction of positions", "bytes, not sent: by formula",
})  # fmt: skip
SAME = 1e-6  # relative, of a ratio and the quotient that it stands for
Model = TypeVar("Model", bound=BaseModel)


class ResultsError(ValueError):
    """A results file is not what it must be."""


class Entry(BaseModel):
    """A measured value.

    Attributes:
        n: measurements that it is made of: questions, rounds, packs.
        low, high: of its 95 % interval, or of its rounds.
        baseline: name of the entry that it is compared with; see `baseline_value`.
        ratio: value / the baseline's.
        p: of a paired test against the control that the name tells.
        each: what it is the mean of.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(min_length=1)]
    value: FiniteFloat
    unit: str
    n: Annotated[StrictInt, Field(ge=1)]
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    baseline: str | None = None
    ratio: FiniteFloat | None = None
    p: Annotated[float, Field(ge=0, le=1)] | None = None
    each: list[FiniteFloat] | None = None

    @model_validator(mode="after")
    def _check(self) -> "Entry":
        if self.unit not in UNITS:
            raise ValueError(f"unit is {self.unit!r}; accepted: {', '.join(sorted(map(repr, UNITS)))}")
        if (self.low is None) != (self.high is None):
            raise ValueError(f"low is {self.low} and high {self.high}; accepted: both or neither")
        if self.low is not None and self.high is not None and not self.low <= self.value <= self.high:
            raise ValueError(f"value is {self.value} with low {self.low} and high {self.high}; accepted: in between")
        if self.ratio is not None and self.baseline is None:
            raise ValueError("ratio without a baseline; accepted: the name of the entry that it is against")
        return self


class TaskScore(BaseModel):
    """Accuracy on a task of the embedded data, as `glyphs.TaskResult.summary` tells it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    accuracy: Annotated[float, Field(ge=0, le=1)]
    n: Annotated[StrictInt, Field(ge=1)]
    low: float
    high: float
    chance: Annotated[float, Field(ge=0, le=1)]
    majority: Annotated[float, Field(ge=0, le=1)]
    visual_tokens: float | None = None
    processed_visual_tokens: float | None = None

    @model_validator(mode="after")
    def _check(self) -> "TaskScore":
        if not self.low <= self.accuracy <= self.high:
            raise ValueError(f"accuracy is {self.accuracy} with low {self.low}, high {self.high}; accepted: in between")
        return self


class Results(BaseModel):
    """A results file: what was run, where, and what came out. `results` and `tasks` may be in groups of its own fields.

    Attributes:
        command: what prints it again.
        commit: of the code that was run, 40 hexadecimal digits.
        versions: of Python, this package and the libraries that matter.
    """

    model_config = ConfigDict(extra="allow")

    command: Annotated[str, Field(min_length=1)]
    commit: Annotated[str, Field(pattern="^[0-9a-f]{40}$")]
    date: date
    device: Annotated[str, Field(min_length=1)]
    versions: dict[str, str]
    results: list[Entry] | None = None
    tasks: dict[str, TaskScore] | None = None

    @model_validator(mode="after")
    def _check(self) -> "Results":
        if missing := {"python", "foveate"} - set(self.versions):
            raise ValueError(f"versions lack {' and '.join(sorted(missing))}")
        return self


def load_results(path: Path) -> dict[str, Any]:
    """A results file's content.

    Raises:
        ResultsError: it is no JSON, or not what a results file must be; names file and field.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"{path.name}: {error.strerror}; accepted: a results file") from error
    except ValueError as error:
        raise ResultsError(f"{path.name}: no JSON ({error})") from error
    check_results(content, path.name)
    return content


def check_results(content: Any, name: str) -> None:
    """Checks a results file's content.

    Args:
        name: of the file, for errors.

    Raises:
        ResultsError: names file and field.
    """
    lists = list(_entry_lists(content))
    _validated(Results, content, f"{name}: ")
    if not any(entries for _, entries, _ in lists) and not content.get("tasks"):
        raise ResultsError(f"{name}: no entries; accepted: a list `results`, at the top or in groups, or `tasks`")
    for where, entries, groups in lists:
        checked = [_validated(Entry, entry, f"{name}: {where}[{i}].") for i, entry in enumerate(entries)]
        names = [entry.name for entry in checked]
        if twice := [one for one in names if names.count(one) > 1]:
            raise ResultsError(f"{name}: {where}: {twice[0]!r} is the name of several entries")
        for entry in checked:
            _check_baseline(entry, entries, groups, f"{name}: {where}: {entry.name}")


def find(entries: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """The entry of this name.

    Raises:
        KeyError: there is none.
    """
    for one in entries:
        if one["name"] == name:
            return one
    raise KeyError(f"no entry {name!r}; there are {', '.join(one['name'] for one in entries)}")


def _check_baseline(entry: Entry, entries: Sequence[dict[str, Any]], groups: Sequence[Any], where: str) -> None:
    """Whether there is what the entry is compared with, and whether its ratio is that of the values.

    Args:
        entries: those beside it, one of which may be called as its baseline is.
        groups: those beside its group, of which some may have the baseline's name in a field (setting, curve), and an
            entry called as this one.
    """
    if entry.baseline is None:
        return
    beside = [one for one in entries if one["name"] == entry.baseline]
    of_groups = [
        one
        for group in groups
        if isinstance(group, dict) and entry.baseline in group.values()
        for one in group.get("results", ())
        if one["name"] == entry.name
    ]
    if not beside and not of_groups:
        raise ResultsError(
            f"{where}: baseline is {entry.baseline!r}; accepted: the name of an entry beside it, or a field of a group "
            "beside its own that has an entry of the same name"
        )
    # With another n, a group's baseline was compared on the same questions, which are not all of its own.
    same = beside or [one for one in of_groups if one["n"] == entry.n]
    if entry.ratio is None or not same:
        return
    if not any(math.isclose(entry.ratio * one["value"], entry.value, rel_tol=SAME) for one in same):
        against = " or ".join(f"{entry.value} / {one['value']}" for one in same)
        raise ResultsError(f"{where}: ratio is {entry.ratio}, but value / baseline is {against}")


def _entry_lists(node: Any, where: str = "", groups: Sequence[Any] = ()) -> Iterator[tuple[str, list[Any], Sequence]]:
    """(path, entries, groups beside the one that they are in) of each list of entries."""
    if isinstance(node, list):
        for i, one in enumerate(node):
            yield from _entry_lists(one, f"{where}[{i}]", node)
    elif isinstance(node, dict):
        for key, value in node.items():
            path = f"{where}.{key}".lstrip(".")
            if isinstance(value, list) and (key == "results" or _are_entries(value)):
                yield path, value, groups
            else:
                yield from _entry_lists(value, path, groups)


def _are_entries(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(one, dict) and {"name", "value"} <= set(one) for one in values)


def _validated(model: type[Model], content: Any, where: str) -> Model:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = re.sub(r"\.(\d+)", r"[\1]", ".".join(map(str, first["loc"])))
        told = first["msg"].removeprefix("Value error, ")
        raise ResultsError(f"{f'{where}{field}'.rstrip('.: ')}: {told}") from error
