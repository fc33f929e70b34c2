"""What a smaller KV cache costs: answers, perplexity, divergence and bytes of stores, policies and selectors.

The questions, scores, tables and the picture of the experiment that `scripts/kv_quality.py` runs (docs/kv.md).

Conversations of the embedded data are read through the cache token by token, each token the true one, and an answer is
right where each of its tokens was the likeliest: what greedy generation would have answered, too. In a set of questions
that come *later* only the media are prefilled, so every word of question and answer reads what the cache kept of them,
as further turns of a conversation do. In one *asked* at once the prompt is prefilled but for its last token, as methods
want that choose by the question.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from ..data.encoding import IGNORE, Sample, encode
from ..data.glyphs import GlyphSource
from ..vlm.cache.dense import DenseConfig
from ..vlm.cache.parse import parse_kv
from ..vlm.cache.report import costs
from ..vlm.model import FoveateForConditionalGeneration
from ..vlm.processor import FoveateProcessor
from ..vlm.pruning import Reduction, parse_method
from ..vlm.pruning.session import new_cache
from .facts import result
from .report import plt, png

LATER, ASKED = "later", "asked"
RESAMPLES = 4000  # of documents, for intervals
WORST = 4  # tasks that are told of what breaks
BREAKS = 0.03  # a loss of accuracy from which something counts as broken, where its interval is below 0


@dataclass(frozen=True)
class Task:
    """Conversations of one kind.

    Attributes:
        name: is printed.
        kind: of `GlyphSource`.
        documents: how many.
        when: `later` or `asked`, see above.
        objects, turns, frames: lowest and highest, of `GlyphSource`.
    """

    name: str
    kind: str
    documents: int
    when: str
    objects: tuple[int, int] = (4, 16)
    turns: tuple[int, int] = (1, 1)
    frames: tuple[int, int] = (8, 8)


GLYPH_TASKS = (
    Task("scene, 12 turns", "scene_chat", 60, LATER, objects=(12, 16), turns=(12, 12)),
    Task("clip of 8 frames", "clip_chat", 80, LATER),
    Task("needle in 64 frames", "needle_chat", 60, LATER, frames=(64, 64)),
    Task("needle in 128 frames", "needle_chat", 40, LATER, frames=(128, 128)),
    Task("scene, asked", "scene_chat", 600, ASKED),
    Task("clip of 8 frames, asked", "clip_chat", 300, ASKED),
    Task("needle in 64 frames, asked", "needle_chat", 80, ASKED, frames=(64, 64)),
    Task("needle in 128 frames, asked", "needle_chat", 40, ASKED, frames=(128, 128)),
)
ROW_TASKS = (
    Task("rows, 8 turns", "row_chat", 60, LATER, turns=(8, 8)),
    Task("row, asked", "row_chat", 400, ASKED),
)


@dataclass(frozen=True)
class Setting:
    """How keys and values are kept.

    Attributes:
        name: is printed.
        kv: as `foveate.KVCache` reads it; empty for transformers' DynamicCache.
        prune: a method that drops visual tokens meanwhile, as `parse_method` reads it; or empty.
    """

    name: str
    kv: str = ""
    prune: str = ""

    @property
    def is_packed_alone(self) -> bool:
        """Whether quantising is all that is done."""
        if not self.kv or self.prune:
            return False
        spec = parse_kv(self.kv)
        return not (spec.policy or spec.selector or spec.duo or isinstance(spec.store, DenseConfig))


FULL = Setting("DynamicCache")
# Conversations here have 26 to 660 tokens: groups and residuals are small, so that most of them are quantised.
SMALL, WINDOW = "group=16,residual=0", "group=16,residual=16"
SETTINGS = (
    FULL,
    Setting("dense", "dense"),
    *(Setting(f"int{bits}", f"int{bits}:{SMALL}") for bits in (8, 4, 2)),
    *(Setting(f"int{bits}, residual 16", f"int{bits}:{WINDOW}") for bits in (4, 2)),
    Setting("int2, residual 32", "int2:group=16,residual=32"),
    *(Setting(f"int{bits}, rotated", f"int{bits}:hadamard=true,{WINDOW}") for bits in (4, 2)),
    *(Setting(f"int{bits}, keys per token", f"int{bits}:keys_per=token,{WINDOW}") for bits in (4, 2)),
    *(Setting(f"zipvl, tau {tau}", f"zipvl:tau={tau},{WINDOW}") for tau in (0.975, 0.5)),
    Setting("akvq-vl", f"akvq-vl:{WINDOW}"),
    Setting("vidkv", f"vidkv:{WINDOW}"),
    *(Setting(f"streaming {window}", f"streaming:sink=4,window={window}") for window in (128, 32)),
    *(Setting(f"snapkv {keep:.0%}", f"snapkv:keep={keep},window=4") for keep in (0.5, 0.25, 0.1)),
    *(Setting(f"h2o {keep:.0%}", f"h2o:keep={keep}") for keep in (0.5, 0.25)),
    Setting("h2o 64 tokens", "h2o:tokens=64"),
    *(Setting(f"look-m {keep:.0%}", f"look-m:keep={keep}") for keep in (0.5, 0.25, 0.1)),
    *(Setting(f"quest {keep:.0%}", f"quest:keep={keep},first=0+paged:page=8") for keep in (0.5, 0.25, 0.1)),
    Setting("quest 25% of int4", f"quest:keep=0.25,first=0+int4:{SMALL}"),
    Setting("snapkv 25% in int4", f"snapkv:keep=0.25,window=4+int4:{SMALL}"),
    Setting("look-m 50% in int4", f"look-m:keep=0.5+int4:{SMALL}"),
    Setting("fastv 50%", "", "fastv:layer=2,keep=0.5"),
    Setting("fastv 50% in int4", f"int4:{SMALL}", "fastv:layer=2,keep=0.5"),
)


# Conversations


@dataclass(frozen=True)
class Batch:
    """Conversations whose prefills are equally long.

    Attributes:
        documents: their numbers in the task.
        ids: int64 [documents, tokens], padded on the right.
        labels: the same, IGNORE where nothing is asked.
        prefill: tokens that are read at once.
        media: what `encode_images` and `encode_videos` gave.
    """

    documents: tuple[int, ...]
    ids: torch.Tensor
    labels: torch.Tensor
    prefill: int
    media: dict[str, torch.Tensor]


@torch.inference_mode()
def batches(
    model: FoveateForConditionalGeneration, processor: FoveateProcessor, task: Task, split: str, rows: int = 100
) -> list[Batch]:
    """A task's conversations, with their media encoded.

    Args:
        split: whose digit images are shown.
        rows: conversations of a batch, at most.
    """
    source = GlyphSource(task.kind, processor, split, 1, task.objects, task.turns, task.frames)
    alike: dict[int, list[tuple[int, Sample]]] = {}
    for number in range(task.documents):
        sample = encode(source.document(number), processor)
        alike.setdefault(_prefill(sample, task.when, processor), []).append((number, sample))
    made = []
    for prefill, samples in sorted(alike.items()):
        for start in range(0, len(samples), rows):
            numbers, some = zip(*samples[start : start + rows], strict=True)
            ends = [_end(sample, task.when) for sample in some]
            ids = np.full((2, len(some), max(ends)), IGNORE)
            for row, (sample, end) in enumerate(zip(some, ends, strict=True)):
                ids[0, row, :end], ids[1, row, :end] = sample.input_ids[:end], sample.labels[:end]
            both = torch.from_numpy(ids).to(model.device)
            tokens = both[0].masked_fill(both[0] == IGNORE, processor.tokenizer.pad_token_id)
            made.append(Batch(numbers, tokens, both[1], prefill, _features(model, processor, some)))
    return made


def _prefill(sample: Sample, when: str, processor: FoveateProcessor) -> int:
    """How many tokens of a conversation are read at once."""
    if when == ASKED:
        return int((sample.labels != IGNORE).argmax()) - 1
    visual = np.isin(sample.input_ids, (processor.image_token_id, processor.video_token_id))
    return int(visual.nonzero()[0][-1]) + 1


def _end(sample: Sample, when: str) -> int:
    """How many tokens of a conversation are read at all: up to the end of an answer."""
    answers = sample.labels != IGNORE
    ends = (answers & ~np.append(answers[1:], False)).nonzero()[0]
    return int(ends[0 if when == ASKED else -1]) + 1


def _features(
    model: FoveateForConditionalGeneration, processor: FoveateProcessor, samples: Sequence[Sample]
) -> dict[str, torch.Tensor]:
    given = {name: one.to(model.device) for name, one in processor.media_inputs([s.media for s in samples]).items()}
    images = {name: one for name, one in given.items() if name == "pixel_values" or name.startswith("image_")}
    videos = {name: one for name, one in given.items() if name not in images}
    features = {}
    if images:
        features["image_features"] = torch.cat(model.encode_images(**images))
    if videos:
        features["video_features"] = torch.cat(model.encode_videos(**videos))
    return features


# A setting


@dataclass(frozen=True)
class Read:
    """What came of a task's conversations.

    Attributes:
        task: its name.
        right, questions: of each conversation, answers that were right, and all.
        nll: of the answers' tokens, their sum in nats.
        tokens: of the answers.
        bits: allocated for a number of a key or value of the whole sequence, at the end of the last batch.
        held: part of the sequence's columns that were kept then, mean over layers.
        packed: columns that were quantised then, mean over layers.
        length: tokens of the sequence then.
    """

    task: str
    right: tuple[int, ...]
    questions: tuple[int, ...]
    nll: float
    tokens: int
    bits: float
    held: float
    packed: float
    length: int


@dataclass(frozen=True)
class Measured:
    """A setting of one model.

    Attributes:
        seed: number of the model.
        read: of each task.
        kl: nats a token to the full cache, on random prompts.
    """

    setting: Setting
    seed: int
    read: tuple[Read, ...]
    kl: float

    def line(self) -> str:
        """What is printed of it."""
        parts = [f"{sum(one.right) / sum(one.questions):.3f} ({one.bits:.2f} bits)" for one in self.read]
        return f"{self.setting.name:>28}  KL {self.kl:.1e}  " + "  ".join(parts)


def measure(
    model: FoveateForConditionalGeneration,
    tasks: dict[str, list[Batch]],
    setting: Setting,
    prompts: torch.Tensor,
    seed: int = 0,
) -> Measured:
    """Reads all conversations, and random prompts, in a setting.

    Args:
        tasks: what `batches` gave, by name.
        prompts: int64 [rows, tokens], of which the second half is read token by token.
        seed: is noted.
    """
    with reduction(model, setting):
        read = tuple(read_task(model, name, some) for name, some in tasks.items())
        own = log_probabilities(model, prompts)
    full = log_probabilities(model, prompts)
    kl = (full.exp() * (full - own)).sum(-1).mean().item()
    return Measured(setting, seed, read, max(kl, 0.0))


def reduction(model: FoveateForConditionalGeneration, setting: Setting) -> Any:
    """A context in which the model keeps its keys and values so."""
    methods = [parse_method(setting.prune)] if setting.prune else []
    return Reduction(model, methods, kv=setting.kv or None) if setting.kv or methods else nullcontext()


def random_prompts(model: FoveateForConditionalGeneration, rows: int = 8, tokens: int = 256) -> torch.Tensor:
    """Ids drawn from the vocabulary without the media's placeholders, int64 [rows, tokens]."""
    placeholders = (model.config.image_token_id, model.config.video_token_id)
    vocabulary = [i for i in range(model.config.text_config.vocab_size) if i not in placeholders]
    drawn = torch.randint(len(vocabulary), (rows, tokens), generator=torch.Generator().manual_seed(0))
    return torch.tensor(vocabulary)[drawn].to(model.device)


@torch.inference_mode()
def _steps(
    model: FoveateForConditionalGeneration, cache: Any, ids: torch.Tensor, prefill: int, media: dict[str, torch.Tensor]
) -> Iterator[tuple[int, torch.Tensor]]:
    """(number of the next token, logits for it [rows, vocabulary]): after the prefill, then after each token."""
    out = model(input_ids=ids[:, :prefill], **media, past_key_values=cache, use_cache=True, logits_to_keep=1)
    yield prefill, out.logits[:, -1]
    for place in range(prefill, ids.shape[1] - 1):
        out = model(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        yield place + 1, out.logits[:, -1]


def log_probabilities(model: FoveateForConditionalGeneration, prompts: torch.Tensor) -> torch.Tensor:
    """Of each step that reads the cache, float64 [rows, steps, vocabulary]."""
    steps = list(_steps(model, new_cache(model), prompts, prompts.shape[1] // 2, {}))
    return torch.stack([logits.double().log_softmax(-1) for _, logits in steps[1:]], 1)


def read_task(model: FoveateForConditionalGeneration, task: str, some: Sequence[Batch]) -> Read:
    """What comes of a task's conversations, with the KV cache that the model has now."""
    right: dict[int, int] = {}
    questions: dict[int, int] = {}
    nll, tokens = 0.0, 0
    for batch in some:
        cache = new_cache(model)
        likeliest = torch.zeros_like(batch.labels)
        for place, logits in _steps(model, cache, batch.ids, batch.prefill, batch.media):
            likeliest[:, place] = logits.argmax(-1)
            nll += functional.cross_entropy(
                logits.double(), batch.labels[:, place], reduction="sum", ignore_index=IGNORE
            ).item()
        tokens += int((batch.labels != IGNORE).sum())
        for number, told, wanted in zip(
            batch.documents, likeliest.cpu().numpy(), batch.labels.cpu().numpy(), strict=True
        ):
            answers = right_answers(told, wanted)
            right[number], questions[number] = sum(answers), len(answers)
    order = sorted(right)
    counts = tuple(right[i] for i in order), tuple(questions[i] for i in order)
    kept = costs(cache)
    held = kept.mean_tokens / kept.length
    return Read(task, *counts, nll, tokens, kept.bits, held, kept.mean_packed, kept.length)


def right_answers(told: np.ndarray, wanted: np.ndarray) -> list[bool]:
    """Of each answer, a run of labels, whether all its tokens were told; both are int [tokens]."""
    asked = wanted != IGNORE
    starts = (asked & ~np.append(False, asked[:-1])).nonzero()[0]
    ends = (asked & ~np.append(asked[1:], False)).nonzero()[0] + 1
    return [bool((told[a:b] == wanted[a:b]).all()) for a, b in zip(starts, ends, strict=True)]


def measure_once(
    folder: Path,
    model: FoveateForConditionalGeneration,
    tasks: dict[str, list[Batch]],
    setting: Setting,
    prompts: torch.Tensor,
    seed: int,
) -> Measured:
    """`measure`, or what it has written to the folder before."""
    file = folder / f"{re.sub('[^a-z0-9.=]+', '-', f'{seed} {setting.name}'.lower()).strip('-')}.json"
    if file.exists():
        done = from_json(json.loads(file.read_text()))
        asked = {name: sum(len(batch.documents) for batch in some) for name, some in tasks.items()}
        if (done.setting, done.seed, {one.task: len(one.right) for one in done.read}) == (setting, seed, asked):
            return done
    measured = measure(model, tasks, setting, prompts, seed)
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asdict(measured)))
    return measured


def from_json(content: dict[str, Any]) -> Measured:
    """What `dataclasses.asdict` was given."""
    read = tuple(
        Read(**one | {"right": tuple(one["right"]), "questions": tuple(one["questions"])}) for one in content["read"]
    )
    return Measured(Setting(**content["setting"]), content["seed"], read, content["kl"])


# Results


def loss_interval(
    own: Sequence[Read], full: Sequence[Read], resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """Accuracy of answers less that of the full cache: the difference, and a paired bootstrap's 95 % interval.

    Conversations are drawn anew within each of the tasks (Efron 1979), together in both: answers of one conversation
    read the same cache, so they are no independent questions.

    Args:
        own, full: of the same tasks, in the same order, of one or more models.
    """
    rng = np.random.default_rng(seed)
    gained, questions = np.zeros(resamples), np.zeros(resamples)
    seen, asked = 0, 0
    for one, other in zip(own, full, strict=True):
        difference, counts = np.subtract(one.right, other.right), np.asarray(one.questions)
        drawn = rng.integers(len(counts), size=(resamples, len(counts)))
        gained, questions = gained + difference[drawn].sum(1), questions + counts[drawn].sum(1)
        seen, asked = seen + int(difference.sum()), asked + int(counts.sum())
    low, high = np.quantile(gained / questions, [0.025, 0.975])
    return seen / asked, float(low), float(high)


def as_json(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """One entry a setting, all models together: see `facts.result`."""
    by_name: dict[str, list[Measured]] = {}
    for one in measured:
        by_name.setdefault(one.setting.name, []).append(one)
    full = {one.seed: one for one in by_name[FULL.name]}
    return [_entry(some, [full[one.seed] for one in some]) for some in by_name.values()]


def _entry(own: Sequence[Measured], full: Sequence[Measured]) -> dict[str, Any]:
    """A setting's results: of the tasks together that come later, of those asked, and of each.

    Where a cache only quantises, tasks too short for it to quantise anything don't count among those together.
    """
    pairs = [pair for a, b in zip(own, full, strict=True) for pair in zip(a.read, b.read, strict=True)]
    tasks = list(dict.fromkeys(one.task for one, _ in pairs))
    idle = own[0].setting.is_packed_alone
    acted = [task for task in tasks if not idle or any(one.packed for one, _ in pairs if one.task == task)]
    groups = {LATER: [t for t in acted if not t.endswith(ASKED)], ASKED: [t for t in acted if t.endswith(ASKED)]}
    results = []
    for name, some in [*((name, some) for name, some in groups.items() if some), *((task, [task]) for task in tasks)]:
        mine, base = zip(*(pair for pair in pairs if pair[0].task in some), strict=True)
        n, tokens = sum(sum(one.questions) for one in mine), sum(one.tokens for one in mine)
        accuracy, loss = sum(sum(one.right) for one in mine) / n, loss_interval(mine, base)
        results.append(result(f"{name}: accuracy", accuracy, "fraction", n))
        results.append(
            result(f"{name}: difference", loss[0], "fraction", n, low=loss[1], high=loss[2], baseline=FULL.name)
        )
        perplexity = float(np.exp(sum(one.nll for one in mine) / tokens))
        of_full = float(np.exp(sum(one.nll for one in base) / tokens))
        results.append(
            result(f"{name}: perplexity", perplexity, "", tokens, baseline=FULL.name, ratio=perplexity / of_full)
        )
    kl = float(np.mean([one.kl for one in own]))
    fields = ("bits", "held", "packed", "length")
    return {
        "setting": own[0].setting.name,
        "kv": own[0].setting.kv,
        "prune": own[0].setting.prune,
        "cache": {
            task: {f: float(np.mean([getattr(r, f) for r, _ in pairs if r.task == task])) for f in fields}
            for task in tasks
        },
        "results": [*results, result("KL on random prompts", kl, "nats a token", len(own))],
    }


def table(entries: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a setting; points of accuracy with their intervals."""
    columns = ["setting", "bits", "held", "quantised", "later", "asked", "perplexity ×", "KL"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for entry in entries:
        found = {one["name"]: one for one in entry["results"]}
        cache = entry["cache"][_longest(entry)]
        cells = [
            f"`{entry['kv']}`" if entry["kv"] else FULL.name,
            f"{cache['bits']:.1f}",
            f"{cache['held']:.0%}",
            f"{cache['packed']:.0f} of {cache['length']:.0f}",
            *(_points(found.get(f"{when}: difference")) for when in (LATER, ASKED)),
            f"{perplexity['ratio']:.3f}" if (perplexity := found.get(f"{LATER}: perplexity")) else "",
            f"{found['KL on random prompts']['value']:.1e}",
        ]
        if entry["prune"]:
            cells[0] += f" with `{entry['prune']}`"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def what_breaks(entries: Sequence[dict[str, Any]]) -> str:
    """Markdown: the tasks of each setting whose accuracy is surely lower, and by `BREAKS` or more; the worst first."""
    lines = ["| setting | breaks (points) |", "|---|---|"]
    for entry in entries:
        tasks = {one["name"].removesuffix(": difference"): one for one in entry["results"] if "high" in one}
        broken = [
            (one["value"], f"{name} {100 * one['value']:+.0f}")
            for name, one in tasks.items()
            if name not in (LATER, ASKED) and one["high"] < 0 and one["value"] <= -BREAKS
        ]
        if broken:
            more = f"; {len(broken) - WORST} more" if len(broken) > WORST else ""
            lines.append(f"| {entry['setting']} | {'; '.join(text for _, text in sorted(broken)[:WORST])}{more} |")
    return "\n".join(lines)


def _points(difference: dict[str, Any] | None) -> str:
    if difference is None:
        return "nothing quantised"
    return f"{100 * difference['value']:+.1f} [{100 * difference['low']:+.1f}, {100 * difference['high']:+.1f}]"


def _longest(entry: dict[str, Any]) -> str:
    """The task whose sequences are longest."""
    return max(entry["cache"], key=lambda task: entry["cache"][task]["length"])


def picture(entries: Sequence[dict[str, Any]]) -> bytes:
    """A PNG: points lost over bits a number, of stores and of what evicts, selects or prunes."""
    figure, axes = plt.subplots(1, 2, figsize=(12.5, 5))
    for entry in entries:
        setting = Setting(entry["setting"], entry["kv"], entry["prune"])
        if setting == FULL:
            continue
        panel = axes[0 if setting.is_packed_alone else 1]
        colour = None
        for when, fill in ((LATER, "full"), (ASKED, "none")):
            one = next((r for r in entry["results"] if r["name"] == f"{when}: difference"), None)
            if one is None:
                continue
            tasks = [task for task in entry["cache"] if task.endswith(ASKED) == (when == ASKED)]
            bits = entry["cache"][max(tasks, key=lambda task: entry["cache"][task]["length"])]["bits"]
            error = [[100 * (one["value"] - one["low"])], [100 * (one["high"] - one["value"])]]
            at = (bits, 100 * one["value"])
            bar = panel.errorbar(*at, error, fmt="o", fillstyle=fill, markersize=5, capsize=2, color=colour)
            colour = bar[0].get_color()
            if when == LATER:
                panel.annotate(entry["setting"], at, (5, 3), fontsize=7, textcoords="offset points", color=colour)
    figure.suptitle("filled: questions that come later; open: asked with the prompt", fontsize=9)
    axes[1].set_xscale("log", base=2)
    for panel, title in zip(axes, ("quantised", "evicted, selected or pruned"), strict=True):
        panel.axhline(0, color="0.6", linewidth=0.8)
        panel.set_xlabel("bits a number of the sequence's keys and values, as allocated")
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("points of accuracy against the full cache")
    return png(figure)
