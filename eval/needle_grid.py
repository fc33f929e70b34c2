"""The experiment of docs/needle.md, which scripts/needle_grid.py runs: its settings, tables and picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..data.needles import NEEDLES
from .facts import result
from .haystack import ALL, FRAMES, NO_CLIP, OTHER, TAKEN_OUT, VISUAL, picture, summary
from .results import find
from .statistics import mcnemar
from .tables import bold_with_interval, markdown

REACHED = 256  # frames, up to which twice as many questions are asked of `FULL`
SLOW = 2048  # frames, where a quarter as many are
PRUNED = (64,)  # frames of clips some of whose frames the LLM stops reading
FULL = f"{NEEDLES} needles"
SINGLE = "1 needle"
COMPARED = "above nothing reduced"
SHORT = 8  # frames of clips of a control with more questions
TAKEN_OUT_SHORT = f"{TAKEN_OUT}, {SHORT} frames"

Point = dict[str, Any]  # what is published of a setting and a model


@dataclass(frozen=True)
class Setting:
    """What a model is asked, and how it reads it.

    Attributes:
        frames: of clips.
        needles: digits in each.
        prune, kv: as the options of `foveate eval`; empty for none. {half} stands for half of the frames.
        ulysses: processes.
        every_seed: whether the models of all seeds are asked, or that of the first alone.
    """

    name: str
    frames: tuple[int, ...]
    needles: int = NEEDLES
    prune: str = ""
    kv: str = ""
    ulysses: int = 1
    every_seed: bool = False


SETTINGS = (
    Setting(FULL, (*FRAMES, 2048), every_seed=True),
    Setting("KV cache in int4", (64, 256, 1024), kv="int4:group=32,residual=32"),
    Setting("2 processes (Ulysses)", (64, 256), ulysses=2),
    Setting("SparseVLM, half from layer 1 on", PRUNED, prune="sparsevlm:tokens={half},layers=0,per=0"),
    Setting("FastV, half from layer 1 on", PRUNED, prune="fastv:layer=1,keep=0.5"),
    Setting("control: a random half from layer 1 on", PRUNED, prune="random:layer=1,keep=0.5"),
    Setting("control: a random half from layer 2 on", PRUNED, prune="random:layer=2,keep=0.5"),
    Setting(SINGLE, (8, 64, 256), needles=1),
)


def questions_a_cell(setting: Setting, frames: int, questions: int) -> int:
    """How many are asked at each depth of clips of so many frames, where `questions` are as a rule."""
    if setting.name == FULL and frames <= REACHED:
        return 2 * questions
    return max(1, questions // 4) if frames >= SLOW else questions


def point(setting: Setting, seed: int, written: Sequence[dict[str, Any]]) -> Point:
    """What is published of a setting.

    Args:
        seed: of the model's training.
        written: by `evaluate_haystack`, for each number of frames.
    """
    told = {key: written[0][key] for key in ("depths", "kv", "parallel") if key in written[0]}
    rows = [row | {"command": one["command"]} for one in written for row in one["rows"]]
    one = {"setting": setting.name, "seed": seed, "needles": setting.needles}
    return one | told | {"rows": rows, "results": summary(rows)}


def compare(points: Sequence[Point]) -> None:
    """Adds to the rows of the settings that reduce something how far they are above the same model's `FULL`.

    Rows of `FULL` may have more questions; those that both have come first.
    """
    for one in points:
        if one["setting"] in (FULL, SINGLE):
            continue
        [full] = [other for other in points if (other["setting"], other["seed"]) == (FULL, one["seed"])]
        of_full = {row["frames"]: row["right"] for row in full["rows"]}
        for row in one["rows"]:
            own = [flag == "1" for flag in row["right"]]
            paired = mcnemar(own, [flag == "1" for flag in of_full[row["frames"]][: len(own)]])
            told = result(COMPARED, paired.difference, "fraction", paired.n, low=paired.low, high=paired.high)
            row["results"].append(told | {"p": paired.p})


def draw(results: dict[str, Any]) -> bytes:
    """A PNG: the heat maps; of docs/results/needle_grid.json."""
    whole = [one for one in results["points"] if one["setting"] in (FULL, SINGLE)]
    return picture([(f"{one['setting']}, model of seed {one['seed']}", one) for one in whole])


def tables(results: dict[str, Any]) -> dict[str, str]:
    """By mark; of docs/results/needle_grid.json."""
    points = results["points"]
    return {"grid": _grid(points), "settings": _settings(points), "controls": _controls(points)}


def _grid(points: Sequence[Point]) -> str:
    """A row a number of frames."""
    whole = [one for one in points if one["setting"] in (FULL, SINGLE)]
    header = ["frames", *(f"{one['setting']}, seed {one['seed']}" for one in whole), OTHER, "KV cache, kB"]
    by_frames = [{row["frames"]: row["results"] for row in one["rows"]} for one in whole]
    rows = []
    for frames, first in by_frames[0].items():
        found = [_told(find(some[frames], ALL)) if frames in some else "" for some in by_frames]
        other, cache = find(first, OTHER)["value"], find(first, "KV cache")["value"]
        rows.append([f"{frames:,}", *found, f"{other:.3f}", f"{cache / 1e3:,.0f}"])
    return markdown(header, rows)


def _settings(points: Sequence[Point]) -> str:
    """A row a setting and number of frames, beside the same model with nothing reduced."""
    header = ["", "frames", "needles found", COMPARED, "p", "KV cache of a process, kB", VISUAL]
    first = points[0]
    shown = {row["frames"] for one in points if one["setting"] not in (FULL, SINGLE) for row in one["rows"]}
    rows = []
    for one in points:
        if one["setting"] == SINGLE or (one["setting"] == FULL and one is not first):
            continue
        for row in one["rows"]:
            if row["frames"] not in shown:
                continue
            entries = {entry["name"]: entry for entry in row["results"]}
            above = entries.get(COMPARED)
            compared = [_told(above, "+.3f"), f"{above['p']:.2g}"] if above else ["", ""]
            costs = [f"{entries['KV cache']['value'] / 1e3:,.0f}", f"{entries[VISUAL]['value']:,.0f}"]
            rows.append([one["setting"], f"{row['frames']:,}", _told(entries[ALL]), *compared, *costs])
    return markdown(header, rows)


def _controls(points: Sequence[Point]) -> str:
    """A row a grid."""
    names = (NO_CLIP, TAKEN_OUT, TAKEN_OUT_SHORT)
    rows = []
    for one in points:
        if one["setting"] in (FULL, SINGLE):
            title = f"{one['setting']}, seed {one['seed']}"
            rows.append([title, *(_told(find(one["results"], name)) for name in names)])
    return markdown(["", *names], rows)


def _told(entry: dict[str, Any], form: str = ".3f") -> str:
    return f"{bold_with_interval(entry, form)}, n = {entry['n']}"
