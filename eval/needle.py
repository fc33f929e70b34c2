"""A needle in a long clip, found through any KV cache: `foveate eval --task needles` (docs/kv.md)."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ..data.drawing import SPLITS
from ..data.needles import haystack, needle_question
from ..vlm.cache.parse import KVSpec
from ..vlm.cache.report import costs
from ..vlm.encode import encode_video
from ..vlm.media import load_video
from ..vlm.model import FoveateForConditionalGeneration
from ..vlm.parallel.inference import parallel_session
from ..vlm.parallel.topology import Topology
from ..vlm.processor import FoveateProcessor
from ..vlm.pruning.session import new_cache, reduce
from .facts import process_peak_bytes, result, run_facts
from .report import options_of
from .sharing import ALONE, joined, of_all_ranks
from .statistics import wilson_interval

ANSWER_TOKENS = 3  # colour, digit, end
BATCH_TOKENS = 1024  # visual tokens that are read at a time, at most, or else one question
DEPTHS = ("first", "second", "third", "last")  # quarters of a clip


@dataclass(frozen=True)
class Asked:
    """Two questions about a clip, each for a needle of its own.

    Attributes:
        frames: uint8 [frames, height, width, 3].
        questions: the first, and one that may follow it.
        answers: the true ones.
        places: numbers of the frames that show the answers.
    """

    frames: np.ndarray
    questions: tuple[str, str]
    answers: tuple[str, str]
    places: tuple[int, int]


@dataclass(frozen=True)
class Batch:
    """Questions about clips of equally many frames, as the LLM reads them.

    Attributes:
        asked: the questions.
        features: [tokens, D], of all clips; under sequence parallelism this rank's share of them.
        first: int64 [batch, tokens], up to where the first answer begins.
        later: up to where the second does; the first answer is the true one.
    """

    asked: tuple[Asked, ...]
    features: torch.Tensor
    first: torch.Tensor
    later: torch.Tensor


@dataclass(frozen=True)
class Found:
    """Which questions were answered right.

    Attributes:
        right: whether the answer is the true one, word by word.
        depths: where in its clip what was asked for is shown, from 0 to 1.
        kv_bytes: of a question's KV cache at the end, mean; what this rank has of it.
    """

    right: tuple[bool, ...]
    depths: tuple[float, ...]
    kv_bytes: float

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.right)

    def by_depth(self) -> dict[str, float | None]:
        """The accuracy of each quarter of the clips, from the first frames to the last; None where it has none."""
        quarters: list[list[bool]] = [[] for _ in DEPTHS]
        for right, depth in zip(self.right, self.depths, strict=True):
            quarters[int(depth * len(DEPTHS))].append(right)
        return {name: float(np.mean(some)) if some else None for name, some in zip(DEPTHS, quarters, strict=True)}


def ask(n: int, frames: int, split: str = "test", seed: int = 0, topology: Topology = ALONE) -> Iterator[Asked]:
    """Questions, each pair about its own clip; the same for the same seed, split and number of frames.

    Args:
        topology: whose sequence groups share the questions out, as `own_part` does.

    Raises:
        ValueError: no such split, or fewer frames than needles.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; accepted: {', '.join(SPLITS)}")
    for index in range(topology.data_rank, n, topology.data_size):
        clip = haystack(np.random.default_rng([31, seed, SPLITS.index(split), frames, index]), split, frames)
        here, there, *_ = clip.needles
        (first, answer), (other, then) = needle_question(clip.glyphs[here]), needle_question(clip.glyphs[there])
        yield Asked(clip.frames, (first, other), (answer, then), (here, there))


@torch.inference_mode()
def prepare(
    model: FoveateForConditionalGeneration, processor: FoveateProcessor, asked: Iterable[Asked]
) -> Iterator[Batch]:
    """Questions in batches, their clips encoded: once, however many KV caches they are asked through.

    Under sequence parallelism one at a time, of which each rank encodes its share.
    """
    session = parallel_session(model)
    waiting = iter(asked)
    while one := next(waiting, None):
        size = 1 if session is not None else max(1, BATCH_TOKENS // len(one.frames))
        some = (one, *islice(waiting, size - 1))
        clips = [load_video(one.frames) for one in some]
        plans = processor.plan(videos=clips).videos
        dialogues = [_dialogue(one) for one in some]
        prompts: Any = processor.apply_chat_template([one[:1] for one in dialogues], add_generation_prompt=True)
        whole = processor.apply_chat_template(dialogues, add_generation_prompt=True)
        texts, _ = processor.get_text_with_replacements(list(prompts), [], [plan.text for plan in plans])
        first = processor.tokenizer(texts, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
        rest = [text.removeprefix(prompt) for text, prompt in zip(whole, prompts, strict=True)]
        more = processor.tokenizer(rest, add_special_tokens=False, return_tensors="pt")["input_ids"].to(first)
        if session is None:
            encoded = [encode_video(model, processor, clip, plan) for clip, plan in zip(clips, plans, strict=True)]
        else:
            costs = [(plan.frames, 1.0) for plan in plans]
            parts = zip(clips, plans, session.share([], costs).frames, strict=True)
            encoded = [encode_video(model, processor, clip, plan, part=own) for clip, plan, own in parts if own]
            encoded = session.drop(encoded, [], costs)
        features = torch.cat(encoded) if encoded else model.language_model.get_input_embeddings().weight[:0]
        yield Batch(some, features, first, torch.cat([first, more], dim=1))


def _dialogue(asked: Asked) -> list[dict]:
    first, other = asked.questions
    return [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": first}]},
        {"role": "assistant", "content": asked.answers[0]},
        {"role": "user", "content": [{"type": "text", "text": other}]},
    ]


@torch.inference_mode()
def find(
    model: FoveateForConditionalGeneration,
    processor: FoveateProcessor,
    batches: Iterable[Batch],
    methods: Sequence[Any] = (),
    kv: KVSpec | str | None = None,
    later: bool = False,
    topology: Topology = ALONE,
) -> Found:
    """Generates the answers, greedily.

    Args:
        methods: that drop visual tokens meanwhile; see `foveate.reduce`.
        kv: how keys and values are kept meanwhile; likewise.
        later: the second questions instead, in the KV cache that the first ones were read into.
        topology: whose sequence groups each have some of the questions; what all found is given.
    """
    found: list[tuple[bool, float]] = []
    held = 0  # bytes
    generate: Any = model.generate  # type: ignore[misc]  # transformers types its self as a protocol
    with reduce(model, *methods, kv=kv) if methods or kv is not None else nullcontext():
        for batch in batches:
            cache, prompt = new_cache(model), batch.later if later else batch.first
            given = {"video_features": batch.features}
            if later:
                model(input_ids=batch.first, past_key_values=cache, logits_to_keep=1, **given)
                given = {}
            said = generate(
                input_ids=prompt, past_key_values=cache, max_new_tokens=ANSWER_TOKENS, do_sample=False, **given
            )
            texts = processor.batch_decode(said[:, prompt.shape[1] :], skip_special_tokens=True)
            held += costs(cache).bytes
            found += [
                (text.strip() == one.answers[later], one.places[later] / len(one.frames))
                for text, one in zip(texts, batch.asked, strict=True)
            ]
    right, depths = zip(*joined(found, topology), strict=True)
    return Found(right, depths, held / max(1, len(found)))


def evaluate_needles(
    model: FoveateForConditionalGeneration,
    processor: FoveateProcessor,
    out: Path | None,
    n: int,
    split: str,
    console: Console,
    methods: Sequence[Any] = (),
    kv: KVSpec | None = None,
    frames: int = 64,
    topology: Topology = ALONE,
) -> Found:
    """Asks for needles, prints what is right, and writes `metrics.json` in `out`.

    Args:
        model, processor: trained on needles, as by the recipe `needle`.
        out: None: nothing is written.
        n: questions, each about its own clip.
        methods, kv: see `find`.
        frames: of each clip.
        topology: of the ranks, all of which call it; the first one writes.
    """
    loaded = process_peak_bytes(model.device)
    batches = prepare(model, processor, ask(n, frames, split, topology=topology))
    found = find(model, processor, batches, methods, kv, topology=topology)
    memory = {"kv_bytes": found.kv_bytes, "loaded_bytes": loaded, "peak_bytes": process_peak_bytes(model.device)}
    ranks = of_all_ranks(memory, topology)
    low, high = wilson_interval(sum(found.right), n)
    console.print(f"needle_{frames}  {found.accuracy:.3f}  [{low:.3f}, {high:.3f}]  n={n}", highlight=False)
    quarters = ", ".join(f"{name} {value:.3f}" for name, value in found.by_depth().items() if value is not None)
    console.print(f"by quarter of the clip: {quarters}", highlight=False)
    for rank, of_rank in enumerate(ranks):
        where = f"rank {rank}, " if len(ranks) > 1 else ""
        console.print(
            f"{where}KV cache of a question: {of_rank['kv_bytes'] / 1e3:.4g} kB, peak memory "
            f"{of_rank['peak_bytes'] / 1e6:.4g} MB ({of_rank['loaded_bytes'] / 1e6:.4g} MB after loading)",
            highlight=False,
            soft_wrap=True,
        )
    if out is not None and topology.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        options, asked_for = options_of(methods, kv, topology)
        facts = run_facts(f"foveate eval --task needles --frames {frames} --n {n} --split {split}{options}")
        entry = result(f"needle_{frames}", found.accuracy, "fraction", n, low=low, high=high)
        told = {"by_depth": found.by_depth(), "kv_bytes": found.kv_bytes, "ranks": ranks, "results": [entry]}
        (out / "metrics.json").write_text(json.dumps(facts | asked_for | told, indent=1))
        console.print(f"metrics in {out / 'metrics.json'}")
    return found
