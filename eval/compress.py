"""Scale, then compress: how well thin digits are read at how many visual tokens (NVILA, arXiv 2412.04468, section 2.1).

The questions, the scores, the table and the picture of the experiment that `scripts/scale_then_compress.py` runs.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.fine_glyphs import CELLS, MOMENTS, FineClip, clip_questions, fine_clip, fine_scene, scene_question
from ..data.glyphs import SPLITS, Question
from ..vlm.model import FoveateForConditionalGeneration
from ..vlm.processor import FoveateProcessor
from .facts import result
from .glyphs import Item, answer
from .report import plt, png
from .statistics import wilson_interval


@dataclass(frozen=True)
class Score:
    """How many of n answers are right."""

    correct: int
    n: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval."""
        return wilson_interval(self.correct, self.n)


@dataclass(frozen=True)
class Measured:
    """A trained variant: its seed, visual tokens, scores by what was asked for, and seconds of training."""

    name: str
    seed: int
    tokens: int
    scores: dict[str, Score]
    seconds: float

    def line(self) -> str:
        """What is printed of it."""
        scores = "  ".join(
            f"{asked} {score.accuracy:.3f} [{score.interval[0]:.3f}, {score.interval[1]:.3f}]"
            for asked, score in self.scores.items()
        )
        return f"{self.name:>28}  {self.tokens:4} tokens  {scores}  {self.seconds:.0f} s"


def scene_items(n: int, split: str = "test", seed: int = 0) -> Iterator[Item]:
    """What is at one cell of each of n scenes; the same for the same seed and split."""
    for index in range(n):
        rng = np.random.default_rng([21, seed, SPLITS.index(split), index])
        scene = fine_scene(rng)
        cell = int(rng.integers(len(CELLS)))
        question, said = scene_question(scene, cell)
        place, fact = said.split(" ", 1)
        yield Item(Question("fine_scene", question, place, fact, cell), scene.picture)


def clips(n: int, side: int, split: str = "test", seed: int = 0) -> list[tuple[FineClip, Question]]:
    """n clips at their full rate, frames `side` pixels wide and high, and a question about a digit of each."""
    made = []
    for index in range(n):
        rng = np.random.default_rng([22, seed, SPLITS.index(split), index])
        clip = fine_clip(rng, side)
        asked = list(clip_questions(clip).items())
        question, said = asked[int(rng.integers(len(asked)))]
        kind, colour = said.split(" ")
        made.append((clip, Question("fine_clip", question, kind, colour)))
    return made


def clip_items(made: Sequence[tuple[FineClip, Question]], frames: int) -> Iterator[Item]:
    """The clips' questions about so many of their frames, taken evenly as `media.sample_indices` takes them.

    The digit that is asked for may stand in none of them: what too few frames cost.
    """
    taken = np.linspace(0, MOMENTS - 1, frames).round().astype(int)
    for clip, question in made:
        yield Item(question, clip.frames[taken])


def score_scenes(
    model: FoveateForConditionalGeneration, processor: FoveateProcessor, n: int, batch: int = 16, seed: int = 0
) -> dict[str, Score]:
    """Scores of generated answers ("b3 7 red") on test scenes: of the `digit` at the cell, and of its `colour`."""
    answers = _answers(model, processor, scene_items(n, seed=seed), batch)
    right = [(_words(said)[:2] == _words(true)[:2], _words(said) == _words(true)) for said, true in answers]
    colours = [_words(said)[::2] == _words(true)[::2] for said, true in answers]
    return {"digit": Score(sum(digit for digit, _ in right), n), "colour": Score(sum(colours), n)}


def score_clips(
    model: FoveateForConditionalGeneration,
    processor: FoveateProcessor,
    made: Sequence[tuple[FineClip, Question]],
    frames: int,
    batch: int = 32,
) -> Score:
    """Score of generated answers ("7 red") about so many frames of the clips."""
    answers = _answers(model, processor, clip_items(made, frames), batch)
    return Score(sum(said == true for said, true in answers), len(made))


def _answers(
    model: FoveateForConditionalGeneration, processor: FoveateProcessor, items: Iterator[Item], batch: int
) -> list[tuple[str, str]]:
    """What was said and what is true, question by question."""
    answers: list[tuple[str, str]] = []
    waiting: list[Item] = []
    for item in items:
        waiting.append(item)
        if len(waiting) == batch:
            answers += _asked(model, processor, waiting)
            waiting = []
    return answers + (_asked(model, processor, waiting) if waiting else [])


def _asked(
    model: FoveateForConditionalGeneration, processor: FoveateProcessor, items: list[Item]
) -> list[tuple[str, str]]:
    said = answer(model, processor, items, max_new_tokens=4)
    return list(zip(said, (item.question.answer for item in items), strict=True))


def _words(text: str) -> list[str]:
    return (text.split() + [""] * 3)[:3]


def as_json(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """For a results file; see `facts.result`."""
    return [
        {
            "name": one.name,
            "seed": one.seed,
            "visual_tokens": one.tokens,
            "training_seconds": one.seconds,
            "results": [
                result(f"{asked}_accuracy", score.accuracy, "fraction", score.n, low=low, high=high)
                for asked, score in one.scores.items()
                for low, high in [score.interval]
            ],
        }
        for one in measured
    ]


def from_json(variants: Sequence[dict[str, Any]]) -> list[Measured]:
    """What `as_json` was given."""
    return [
        Measured(
            one["name"],
            one["seed"],
            one["visual_tokens"],
            {
                entry["name"].removesuffix("_accuracy"): Score(round(entry["value"] * entry["n"]), entry["n"])
                for entry in one["results"]
            },
            one["training_seconds"],
        )
        for one in variants
    ]


def over_seeds(variants: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By name: visual tokens, seconds of training a seed, seeds, and for each thing asked for the score of all seeds.

    Args:
        variants: as `as_json` gives them.
    """
    together: dict[str, dict[str, Any]] = {}
    for one in from_json(variants):
        row = together.setdefault(one.name, {"tokens": one.tokens, "seconds": 0.0, "seeds": 0})
        row["seconds"] += one.seconds
        row["seeds"] += 1
        for asked, score in one.scores.items():
            before = row.get(asked, Score(0, 0))
            row[asked] = Score(before.correct + score.correct, before.n + score.n)
    for row in together.values():
        row["seconds"] /= row["seeds"]
    return together


def gain_kept(rows: dict[str, dict[str, Any]], name: str) -> float:
    """What part of `scaled`'s gain over `low` in reading digits a variant has."""
    low, scaled, own = (rows[one]["digit"].accuracy for one in ("low", "scaled", name))
    return (own - low) / (scaled - low)


def tables(results: dict[str, Any]) -> dict[str, str]:
    """By mark; of docs/results/scale_then_compress.json."""
    return {"images": images_table(results["variants"]), "videos": videos_table(results["variants"])}


def images_table(variants: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each variant that reads scenes, all seeds together."""
    rows = {name: row for name, row in over_seeds(variants).items() if "digit" in row}
    lines = ["| variant | visual tokens | digit | 95 % interval | gain kept | colour | seeds | training |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        low, high = row["digit"].interval
        kept = "" if name.startswith("low") else f"{100 * gain_kept(rows, name):.0f} %"
        lines.append(
            f"| {name} | {row['tokens']} | **{row['digit'].accuracy:.3f}** | {low:.3f} – {high:.3f} | {kept} | "
            f"{row['colour'].accuracy:.3f} | {row['seeds']} | {row['seconds']:.0f} s |"
        )
    return "\n".join(lines)


def videos_table(variants: Sequence[dict[str, Any]]) -> str:
    """Markdown: accuracy and visual tokens by frames and pooling."""
    cells = _videos(variants)
    pools, frames = sorted({pool for pool, _ in cells}), sorted({count for _, count in cells})
    lines = ["| frames averaged | " + " | ".join(f"{count} frames" for count in frames) + " |"]
    lines.append("|---" * (1 + len(frames)) + "|")
    for pool in pools:
        row = (cells[pool, count] for count in frames)
        said = " | ".join(f"**{score.accuracy:.3f}** ({tokens} tokens)" for tokens, score in row)
        lines.append(f"| {pool} | {said} |")
    return "\n".join(lines)


def _videos(variants: Sequence[dict[str, Any]]) -> dict[tuple[int, int], tuple[int, Score]]:
    """(pool, frames) → visual tokens and score."""
    found = {}
    for name, row in over_seeds(variants).items():
        if match := re.fullmatch(r"video, (\d+) frames, pool (\d+)", name):
            found[int(match[2]), int(match[1])] = (row["tokens"], row["colour"])
    return found


def picture(variants: Sequence[dict[str, Any]]) -> bytes:
    """A PNG: accuracy over visual tokens, of scenes by variant and of clips by pooling."""
    figure, (scenes, videos) = plt.subplots(1, 2, figsize=(11, 4))
    for name, row in over_seeds(variants).items():
        if "digit" in row:
            low, high = row["digit"].interval
            value = row["digit"].accuracy
            scenes.errorbar(row["tokens"], value, [[value - low], [high - value]], fmt="o", capsize=3, label=name)
    scenes.set_title("Thin digits in scenes of 256 × 256")
    cells = _videos(variants)
    for pool in sorted({pool for pool, _ in cells}):
        points = sorted((tokens, score.accuracy, frames) for (p, frames), (tokens, score) in cells.items() if p == pool)
        label = "every frame" if pool == 1 else f"{pool} frames averaged"
        (line,) = videos.plot([tokens for tokens, *_ in points], [value for _, value, _ in points], "o-", label=label)
        for tokens, value, frames in points:
            place = {"textcoords": "offset points", "xytext": (-4, 7), "fontsize": 8, "color": line.get_color()}
            videos.annotate(f"{frames}", (tokens, value), **place)
    videos.set_title("A digit's colour in a clip; numbers: frames")
    for axes in (scenes, videos):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_xlabel("visual tokens")
        axes.set_ylabel("accuracy")
        axes.set_ylim(0, 1.03)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower right")
    return png(figure)
