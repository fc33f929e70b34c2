"""The README's table of the papers' findings at small scale, from the results of their pages."""

from typing import Any

from .haystack import ALL
from .in_context import point
from .needle_grid import FULL
from .results import find
from .retention import LAST, RE_BLENDED, WITHOUT
from .statistics import wilson_interval
from .tables import markdown, with_interval

Results = dict[str, Any]
STORES = ("int8", "int4", "int4, keys by channel")


def tables(needles: Results, in_context: Results, text: Results, frontier: Results) -> dict[str, str]:
    """By mark.

    Args:
        needles, in_context, text, frontier: of docs/results: needle_grid, in_context, text_retention, frontier_rows.
    """
    rows = [_needles(needles), _in_context(in_context), _text(text), _frontier(frontier)]
    return {"findings": markdown(["looked at", "found on tiny models trained here, 95 % intervals", "page"], rows)}


def _needles(results: Results) -> list[str]:
    rows = {row["frames"]: row for row in results["points"][0]["rows"]}
    assert results["points"][0]["setting"] == FULL
    short = "".join(row["right"] for frames, row in rows.items() if frames <= 64)
    low, high = wilson_interval(short.count("1"), len(short))
    told = [f"{short.count('1') / len(short):.3f} [{low:.3f}, {high:.3f}] of them to 64 frames"]
    told += [f"{with_interval(find(rows[frames]['results'], ALL))} at {frames:,}" for frames in (128, 256, 1024)]
    return ["needles in mp4 clips, the question names which of four", ", ".join(told), "[needle](docs/needle.md)"]


def _in_context(results: Results) -> list[str]:
    arms = {arm["arm"]: arm for arm in results["arms"]}

    def right(arm: str, kind: str = "images") -> dict[str, Any]:
        return find(point(arms[arm], kind)["results"], "forced_choice")

    own, new = right("unfrozen, interleaved + captions"), right("unfrozen, interleaved + captions", "classes")
    frozen = right("frozen, interleaved + captions")["each"]
    told = (
        f"interleaved documents {with_interval(own)} on held-out pictures, {with_interval(new)} on new classes with "
        f"new names; captions alone {with_interval(right('unfrozen, captions'))}, chance .5; a frozen LLM with "
        f"induction {' / '.join(f'{one:.3f}' for one in frozen)} (seeds)"
    )
    return ["names learned from 4 examples in the prompt", told, "[in-context learning](docs/in_context.md)"]


def _text(results: Results) -> list[str]:
    points = {one["name"]: one["results"] for one in results["points"]}
    told = [
        f"{_change(find(points[f'{arm}, {LAST}'], 'all: loss / before'))} {name}"
        for arm, name in ((RE_BLENDED, "with text re-blended"), (WITHOUT, "without"))
    ]
    return [
        "text lost in becoming a VLM",
        f"loss on held-out text after all stages: {', '.join(told)}",
        "[text retention](docs/text_retention.md)",
    ]


def _frontier(results: Results) -> list[str]:
    claims = results["claims"]
    part, above = (find(claims["results"], name) for name in ("exact_match: of full", "exact_match less random"))
    packed = {one["store"]: find(one["results"], "nothing dropped") for one in claims["stores"]}
    stores = [f"{store} {with_interval(packed[store], '+.3f')}" for store in STORES]
    told = (
        f"{claims['best'].removesuffix(', dense')} of the visual tokens: {with_interval(part, '.1%')} of the full "
        f"accuracy, {with_interval(above, '+.3f')} above random tokens; smaller KV caches: {'; '.join(stores)}"
    )
    return ["accuracy over FLOPs and KV bytes", told, "[frontier](docs/frontier.md)"]


def _change(ratio: dict[str, Any]) -> str:
    value, low, high = (100 * (ratio[key] - 1) for key in ("value", "low", "high"))
    return f"{value:+.1f} % [{low:+.1f}, {high:+.1f}]"
