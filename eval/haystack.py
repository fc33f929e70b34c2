"""The needle-in-a-haystack grid, depth × frames, on mp4 files: `foveate eval --task haystack` (docs/needle.md).

As V-NIAH of LongVA (arXiv 2406.16852) and the grid of LongVILA (arXiv 2408.10188): what is asked for stands in one
frame, at a depth of the clip that is set. Each question is about a clip of its own, which goes from an mp4 file through
the same decoding, encoding and chat as in `foveate ask clip.mp4`, and is answered by generating.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ..data.drawing import COLOURS, DIGITS, SPLITS, Glyph
from ..data.glyphs import encode_mp4
from ..data.needles import NEEDLES, haystack, needle_question, without_first
from ..vlm.cache.parse import KVSpec
from ..vlm.cache.report import costs
from ..vlm.chat import Chat
from ..vlm.media import DEFAULT_LIMITS
from ..vlm.model import FoveateForConditionalGeneration
from ..vlm.parallel.topology import Topology
from ..vlm.processor import FoveateProcessor, VideoSource
from ..vlm.pruning import Reduction
from ..vlm.pruning.report import mean_visual_tokens
from .facts import result, run_facts
from .needle import ANSWER_TOKENS
from .report import options_of, plt, png
from .sharing import ALONE, joined, of_all_groups, own_part
from .statistics import wilson_interval

FRAMES = (8, 16, 32, 64, 128, 256, 512, 1024)
DEPTHS = 8
ALL = "all depths"  # names of results
OTHER = "digit of another needle"
NO_CLIP = "no clip"
TAKEN_OUT = "needle taken out"
VISUAL = "visual tokens a layer processes"


@dataclass(frozen=True)
class HaystackItem:
    """A question about a clip.

    Attributes:
        clip: an mp4 file.
        frames: of the clip, all of which are read.
        depth: of the frame that shows the answer: 0 the first, 1 the last.
        place: its number.
        question: names the colour of what is asked for.
        answer: colour and digit.
        needles: the answers to the same question about all the clip's digits; this one's first.
    """

    clip: bytes
    frames: int
    depth: float
    place: int
    question: str
    answer: str
    needles: tuple[str, ...]


def haystack_items(
    n: int,
    frames: int,
    depths: int = DEPTHS,
    split: str = "test",
    seed: int = 0,
    needles: int = NEEDLES,
    topology: Topology = ALONE,
    taken_out: bool = False,
) -> Iterator[HaystackItem]:
    """Questions at depths in turn, from the first frame to the last; the same for the same arguments.

    Args:
        n: at each depth.
        frames: of each clip.
        depths: evenly spread, 0 and 1 among them.
        seed: of clips and questions.
        needles: digits of different colours in a clip, the others at depths that are drawn.
        topology: whose sequence groups share the questions out, as `own_part` does.
        taken_out: a control: instead of the digit that is asked for its frame shows a shape of the same colour.

    Raises:
        ValueError: an argument out of range; the message says what is accepted.
    """
    _check(n, [frames], depths, needles, split)
    for index in own_part(range(n * depths), topology):
        number, depth = divmod(index, depths)
        place = int(depth * (frames - 1) / (depths - 1) + 0.5)
        rng = np.random.default_rng([37, seed, SPLITS.index(split), frames, needles, place, number])
        clip = haystack(rng, split, frames, needles, place)
        asked = [needle_question(clip.glyphs[needle]) for needle in clip.needles]
        shown = without_first(clip, rng, split) if taken_out else clip
        (question, answer), answers = asked[0], tuple(answer for _, answer in asked)
        yield HaystackItem(encode_mp4(shown.frames), frames, depth / (depths - 1), place, question, answer, answers)


def _check(n: int, frames: Sequence[int], depths: int, needles: int, split: str) -> None:
    """Raises ValueError where a grid can't be made."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; accepted: {', '.join(SPLITS)}")
    if n < 1:
        raise ValueError(f"n is {n}; accepted: 1 or more questions a cell")
    if depths < 2:
        raise ValueError(f"depths is {depths}; accepted: 2 or more, the first and the last frame among them")
    if not frames:
        raise ValueError("frames is empty; accepted: at least one number of frames")
    if wrong := [count for count in frames if not max(depths, needles) <= count <= DEFAULT_LIMITS.max_frames]:
        raise ValueError(
            f"frames is {wrong[0]} with {depths} depths and {needles} needles; accepted: {max(depths, needles)} to "
            f"{DEFAULT_LIMITS.max_frames}"
        )


@dataclass(frozen=True)
class Row:
    """What was answered about clips of equally many frames.

    Attributes:
        frames: of each clip.
        depths: question number i was asked at depth (i mod depths) / (depths - 1).
        said: the answers.
        right: whether each is the true one.
        other: whether it names the digit of another needle of the clip.
        blind: whether what is said without the clip is the true one.
        absent: whether the true one is said at each depth, once, where the clip does not show it.
        kv_bytes: of a question's KV cache, mean; what this rank has of it.
        visual: visual tokens that a layer processes, mean over layers and questions.
    """

    frames: int
    depths: int
    said: tuple[str, ...]
    right: tuple[bool, ...]
    other: tuple[bool, ...]
    blind: tuple[bool, ...]
    kv_bytes: float
    visual: float
    absent: tuple[bool, ...] = ()

    @property
    def cells(self) -> list[float]:
        """The accuracy at each depth."""
        return np.reshape(self.right, (-1, self.depths)).mean(0).tolist()

    def as_json(self) -> dict[str, Any]:
        """Results, and `right`, `blind` and `absent` as texts of 0 and 1."""
        n, cells = len(self.right), np.reshape(self.right, (-1, self.depths)).T
        named = [f"depth {depth / (self.depths - 1):.2f}" for depth in range(self.depths)]
        parts = [(ALL, self.right), *zip(named, cells.tolist(), strict=True), (OTHER, self.other)]
        results = [fraction(name, part) for name, part in parts]
        results += [result("KV cache", self.kv_bytes, "bytes", n), result(VISUAL, self.visual, "tokens", n)]
        flags = {"right": self.right, "blind": self.blind, "absent": self.absent}
        texts = {name: "".join(str(int(one)) for one in given) for name, given in flags.items()}
        return {"frames": self.frames} | texts | {"results": results}


def fraction(name: str, right: Sequence[bool]) -> dict[str, Any]:
    """An accuracy, with its Wilson interval."""
    low, high = wilson_interval(sum(right), len(right))
    return result(name, sum(right) / len(right), "fraction", len(right), low=low, high=high)


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a whole grid the accuracy and those of its controls.

    Args:
        rows: what `Row.as_json` gives.
    """
    parts = {ALL: "right", NO_CLIP: "blind", TAKEN_OUT: "absent"}
    return [fraction(name, [one == "1" for row in rows for one in row[part]]) for name, part in parts.items()]


def search(
    model: FoveateForConditionalGeneration,
    processor: FoveateProcessor,
    items: Iterable[HaystackItem],
    frames: int,
    depths: int,
    unseen: Mapping[str, str],
    reduction: Reduction | None = None,
    topology: Topology = ALONE,
) -> Row:
    """Answers questions about clips of so many frames, one by one, greedily.

    Args:
        items: this rank's, as `haystack_items` gives them for the topology.
        unseen: what `said_without_clip` gives.
        reduction: within which it is called.
        topology: of the ranks, all of which call it; what all found is given.
    """
    found, held, visual = [], 0, 0.0
    begun = len(reduction.prefills) if reduction else 0
    for item in items:
        chat = Chat(model, processor, [VideoSource(item.clip, item.frames)])
        answer = chat.ask(item.question, max_new_tokens=ANSWER_TOKENS)
        others = {needle.split()[1] for needle in item.needles[1:]}
        confused, guessed = not others.isdisjoint(answer.text.split()), unseen[item.question] == item.answer
        found.append((answer.text, answer.text == item.answer, confused, guessed))
        assert chat.cache is not None  # it has been asked
        held += costs(chat.cache).bytes
        visual += answer.visual_tokens
    visual /= max(1, len(found))
    if reduction and reduction.methods:
        of_groups = of_all_groups(reduction.prefills[begun:], topology)
        _, visual = mean_visual_tokens([prefill for of_group in of_groups for prefill in of_group])
    said, right, other, blind = zip(*joined(found, topology), strict=True)
    return Row(frames, depths, said, right, other, blind, held / max(1, len(found)), visual)


def said_without_clip(model: FoveateForConditionalGeneration, processor: FoveateProcessor) -> dict[str, str]:
    """Every question, and what the model says that sees nothing."""
    questions = [needle_question(Glyph(DIGITS[0], colour))[0] for colour in COLOURS]
    return {one: Chat(model, processor).ask(one, max_new_tokens=ANSWER_TOKENS).text for one in questions}


def evaluate_haystack(
    model: FoveateForConditionalGeneration,
    processor: FoveateProcessor,
    out: Path | None,
    n: int,
    split: str,
    console: Console,
    methods: Sequence[Any] = (),
    kv: KVSpec | None = None,
    topology: Topology = ALONE,
    frames: Sequence[int] = FRAMES,
    depths: int = DEPTHS,
    needles: int = NEEDLES,
) -> list[Row]:
    """Asks for a needle at each depth of clips of each length, prints the grid, and draws and writes it in `out`.

    Two controls: the questions without a clip, and, at each depth and length once, the clip without the needle.

    Args:
        model, processor: trained on needles, as by the recipe `needle`.
        out: for `metrics.json` and `haystack.png`; None: nothing is written.
        n: questions a cell, each about its own clip.
        split: whose digit images are shown.
        methods, kv: within which everything is asked; see `foveate.reduce`.
        topology: of the ranks, all of which call it; the first one writes.
        frames: of clips, in any order.
        depths, needles: see `haystack_items`.

    Raises:
        ValueError: as `haystack_items`.
    """
    frames = sorted(set(frames))
    _check(n, frames, depths, needles, split)
    grid: dict[str, Any] = {"depths": depths, "split": split, "needles": needles}
    rows: list[Row] = []
    console.print(f"frames  {'  '.join(f'{d / (depths - 1):4.2f}' for d in range(depths))}  depth, n={n} a cell")
    reduction = Reduction(model, list(methods), kv) if methods or kv else None
    with reduction or nullcontext():
        unseen = said_without_clip(model, processor)
        for count in frames:
            with console.status(f"{count} frames"):
                asked = haystack_items(n, count, topology=topology, **grid)
                row = search(model, processor, asked, count, depths, unseen, reduction, topology)
                without = haystack_items(1, count, topology=topology, taken_out=True, **grid)
                absent = search(model, processor, without, count, depths, unseen, topology=topology)
                rows.append(replace(row, absent=absent.right))
            _print_row(rows[-1], console)
    told = [row.as_json() for row in rows]
    results = summary(told)
    for one in results:
        interval = f"[{one['low']:.3f}, {one['high']:.3f}]"
        console.print(f"{one['name']:>16}  {one['value']:.3f}  {interval}  n={one['n']}", highlight=False)
    if out is not None and topology.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        options, asked_for = options_of(methods, kv, topology)
        lengths = "".join(f" --frames {count}" for count in frames)
        facts = run_facts(
            f"foveate eval --task haystack{lengths} --depths {depths} --needles {needles} --n {n} --split {split}"
            f"{options}"
        )
        grid |= {"results": results, "rows": told, "answers": {str(row.frames): row.said for row in rows}}
        (out / "metrics.json").write_text(json.dumps(facts | asked_for | grid, indent=1))
        (out / "haystack.png").write_bytes(picture([(f"{needles} needles", grid)]))
        console.print(f"metrics and picture in {out}")
    return rows


def _print_row(row: Row, console: Console) -> None:
    low, high = wilson_interval(sum(row.right), len(row.right))
    cells = "  ".join(f"{cell:4.2f}" for cell in row.cells)
    accuracy = f"{sum(row.right) / len(row.right):.3f}  [{low:.3f}, {high:.3f}]  n={len(row.right)}"
    console.print(f"{row.frames:6}  {cells}  {accuracy}", highlight=False, soft_wrap=True)


def picture(grids: Sequence[tuple[str, dict[str, Any]]]) -> bytes:
    """A PNG: a heat map for each grid, depth over frames, with the accuracy in each cell.

    Args:
        grids: titles, and what `evaluate_haystack` writes.
    """
    widths = [len(grid["rows"]) for _, grid in grids]
    figure, panels = plt.subplots(
        1, len(grids), figsize=(1.2 + 0.62 * sum(widths), 4.4), width_ratios=widths, squeeze=False, layout="constrained"
    )
    for axes, (title, grid) in zip(panels[0], grids, strict=True):
        cells = [[one for one in row["results"] if one["name"].startswith("depth ")] for row in grid["rows"]]
        values = np.array([[one["value"] for one in column] for column in cells]).T  # [depths, lengths]
        image = axes.imshow(values, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        for (depth, length), value in np.ndenumerate(values):
            colour = "white" if abs(value - 0.5) > 0.35 else "black"
            text = f"{value:.2f}".removeprefix("0")
            axes.text(length, depth, text, ha="center", va="center", fontsize=7.5, color=colour)
        counts = [max(one["n"] for one in column) for column in cells]
        lengths = [f"{row['frames']:,}\nn = {n}" for row, n in zip(grid["rows"], counts, strict=True)]
        axes.set_xticks(range(len(cells)), lengths, fontsize=8)
        axes.set_yticks(range(len(values)), [one["name"].removeprefix("depth ") for one in cells[0]], fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("frames of the clip, n questions a cell")
    panels[0][0].set_ylabel("depth of the needle")
    figure.colorbar(image, ax=panels[0], label="needles found", pad=0.01)
    return png(figure)
