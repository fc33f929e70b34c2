"""What a frontier's questions are, and how they are answered: one prefill for all KV stores that only change its end.

See `frontier.py`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar, Literal

import torch

from ..data.drawing import CELL
from ..data.glyphs import SCENE_QUESTIONS, Question
from ..data.sorting import COLUMNS, ROWS
from ..vlm.cache.cache import KVCache
from ..vlm.cache.dense import DenseConfig
from ..vlm.cache.packed import PackedConfig
from ..vlm.cache.parse import KVSpec
from ..vlm.cache.report import KVCosts, costs
from ..vlm.model import FoveateForConditionalGeneration
from ..vlm.processor import FoveateProcessor
from ..vlm.pruning import Prefill, Reduction
from ..vlm.pruning.base import check_keep
from ..vlm.pruning.costs import summary
from ..vlm.pruning.parse import METHODS
from ..vlm.pruning.session import new_cache
from ..vlm.pruning.towers import Choice, TowerPruner, VisualMap, best_of_tiles
from ..vlm.spec import read
from .glyphs import Item, task_items
from .needle import ask
from .prune import AFTER_TOWER, row_items

BATCH_TOKENS = 10_000  # of prompts that are read at a time, at most, or else one question


@dataclass(frozen=True)
class Task:
    """Questions that models of one recipe answer.

    Attributes:
        of: the recipe, for messages.
        items: (number, split, seed, frames) → questions, the same again for the same arguments.
        tokens: (processor) → how many visual tokens a still or a frame is.
        accepted: how many they must be.
        before_llm: names of the methods that drop tokens before the LLM and apply here.
    """

    of: str
    items: Callable[[int, str, int, int], Iterator[Item]]
    tokens: Callable[[FoveateProcessor], int]
    accepted: int
    before_llm: tuple[str, ...] = AFTER_TOWER

    def check(self, processor: FoveateProcessor) -> None:
        """Raises ValueError where the model is one of another task."""
        if (tokens := self.tokens(processor)) != self.accepted:
            raise ValueError(
                f"the model reads {tokens} tokens of a picture of this task; accepted: {self.accepted}, as models of "
                f"the recipe {self.of} do"
            )


def _scenes(n: int, split: str, seed: int, frames: int) -> Iterator[Item]:
    """The questions about scenes, one kind after the other."""
    kinds = [task_items(name, -(-n // len(SCENE_QUESTIONS)), split, seed) for name in SCENE_QUESTIONS]
    return islice((item for some in zip(*kinds, strict=True) for item in some), n)


def _needles(n: int, split: str, seed: int, frames: int) -> Iterator[Item]:
    for asked in ask(n, frames, split, seed):
        yield Item(Question("needle", asked.questions[0], "", asked.answers[0]), asked.frames, frames, asked.places[0])


TASKS: dict[str, Task] = {
    "rows": Task(
        "sort-row",
        lambda n, split, seed, frames: iter(row_items(n, split, seed)),
        lambda processor: processor.plan_image((ROWS * CELL, COLUMNS * CELL)).tokens,
        ROWS * COLUMNS,
    ),
    "glyphs": Task(
        "quickstart", _scenes, lambda processor: processor.plan_image((4 * CELL, 4 * CELL)).tokens, 16
    ),
    "clips": Task(
        "quickstart",
        lambda n, split, seed, frames: task_items("clip_colour_8", n, split, seed),
        lambda processor: processor.tokens_per_frame() * processor.tokens_per_image(),
        4 * 16,
        (*AFTER_TOWER, "evs", "dycoke"),
    ),
    "needles": Task("needle", _needles, lambda processor: processor.tokens_per_frame(), 1, ("evs", "dycoke")),
}  # fmt: skip


# Controls before the LLM, which nobody but this comparison needs


@dataclass(frozen=True)
class RandomOfTower(TowerPruner):
    """Any tokens of each tile (of a video: of each frame), as many as FasterVLM keeps."""

    keep: float = 0.25
    seed: int = 0
    reindex: bool = True
    generator: torch.Generator = field(default_factory=torch.Generator, compare=False)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        self.generator.manual_seed(self.seed)

    def choose(self, image: VisualMap) -> Choice:
        return Choice(best_of_tiles(torch.rand(len(image.tile), generator=self.generator), image, self.keep))


@dataclass(frozen=True)
class RandomOfVideo:
    """Any tokens of a video."""

    keep: float = 0.25
    seed: int = 0
    reindex: bool = False
    generator: torch.Generator = field(default_factory=torch.Generator, compare=False)
    family: ClassVar[Literal["video"]] = "video"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        self.generator.manual_seed(self.seed)

    def compared_with(self, frame: int, frames: int) -> int | None:
        return None

    def select(self, video: torch.Tensor) -> torch.Tensor:
        return self.kept(torch.zeros(video.shape[:2]))

    def kept(self, similarity: torch.Tensor) -> torch.Tensor:
        kept = torch.zeros(similarity.numel(), dtype=torch.bool)
        kept[torch.randperm(len(kept), generator=self.generator)[: max(1, round(len(kept) * self.keep))]] = True
        return kept.view(similarity.shape)


KNOWN: dict[str, Any] = METHODS | {"random-of-tower": RandomOfTower, "random-of-video": RandomOfVideo}


# Questions in batches


@dataclass(frozen=True)
class Batch:
    """Questions whose prompts are equally long.

    Attributes:
        numbers: theirs, in the task.
        answers: the true ones.
        ids: int64 [questions, tokens].
        visual: visual tokens of a question.
        media: what the processor gave, for methods that act before the LLM.
        features: instead, what the LLM reads of the media.
    """

    numbers: tuple[int, ...]
    answers: tuple[str, ...]
    ids: torch.Tensor
    visual: int
    media: dict[str, torch.Tensor]
    features: dict[str, torch.Tensor]


@torch.inference_mode()
def batches(model: FoveateForConditionalGeneration, processor: FoveateProcessor, items: Sequence[Item]) -> list[Batch]:
    """The questions, with their media encoded: once, for all settings. Prompts of a batch have no padding."""
    prompts = []
    for item in items:
        content = [{"type": _kind(item)}, {"type": "text", "text": item.question.text}]
        dialogue: Any = [{"role": "user", "content": content}]
        prompts.append(processor.apply_chat_template(dialogue, add_generation_prompt=True))
    alike: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        length = len(processor.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        alike.setdefault(length, []).append(number)
    made = []
    for numbers in alike.values():
        size = max(1, BATCH_TOKENS // _read(model, processor, [items[numbers[0]]], [prompts[numbers[0]]])[0].shape[1])
        for start in range(0, len(numbers), size):
            some = numbers[start : start + size]
            asked = [items[number] for number in some]
            ids, media = _read(model, processor, asked, [prompts[number] for number in some])
            seen = torch.isin(
                ids, torch.tensor([processor.image_token_id, processor.video_token_id], device=ids.device)
            )
            answers = tuple(item.question.answer for item in asked)
            made.append(Batch(tuple(some), answers, ids, int(seen[0].sum()), media, _features(model, media)))
    return made


def _kind(item: Item) -> str:
    return "video" if isinstance(item.media, bytes) or item.media.ndim == 4 else "image"


def _read(
    model: FoveateForConditionalGeneration, processor: FoveateProcessor, items: Sequence[Item], prompts: list[str]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Ids and media as `answer` of `glyphs.py` gives them to the model."""
    media: Any = [item.media for item in items]
    images, videos = (media, None) if _kind(items[0]) == "image" else (None, media)
    inputs = processor(
        text=prompts, images=images, videos=videos, num_frames=items[0].frames or None, add_special_tokens=False,
        return_tensors="pt",
    ).to(model.device)  # fmt: skip
    return inputs["input_ids"], {
        name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")
    }


def _features(model: FoveateForConditionalGeneration, media: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    images = {name: one for name, one in media.items() if name == "pixel_values" or name.startswith("image_")}
    if images:
        return {"image_features": torch.cat(model.encode_images(**images))}
    return {"video_features": torch.cat(model.encode_videos(**media))}


# Answers


@dataclass(frozen=True)
class Answered:
    """What came of the questions with a KV store.

    Attributes:
        said: of each question.
        right, words: of each question, words that are right, each at its place, and words of the true answer.
        exact: of each question, whether all of it is right.
        kv_bytes: of a question's KV cache at the end of the prefill, as allocated; mean.
        bits: allocated for each number of all the prompt's keys and values, dropped ones too.
        held: of the prompt's tokens, those that a layer holds then; mean over layers, KV heads and questions.
        packed: of these, the quantised ones.
        visual: visual tokens that a layer processes; mean over layers and questions.
        flops, full_flops: of the LLM's prefill of a question, and of the same with nothing dropped; mean.
    """

    right: tuple[int, ...]
    words: tuple[int, ...]
    exact: tuple[bool, ...]
    kv_bytes: float
    bits: float
    held: float
    packed: float
    visual: float
    flops: float
    full_flops: float


@torch.inference_mode()
def answers(
    model: FoveateForConditionalGeneration,
    processor: FoveateProcessor,
    asked: Sequence[Batch],
    method: str,
    stores: Mapping[str, KVSpec],
) -> dict[str, Answered]:
    """Generates the answers, greedily, with a pruning method and each of the KV stores.

    A store that packs all alike, and evicts nothing, does so after the prefill, which is that of any such store: it is
    run once for all of them.

    Args:
        asked: what `batches` gave.
        method: as `parse_method` reads it, or one of `KNOWN`; empty where nothing is dropped.
        stores: by the name that the answers get.
    """
    alike = {name: spec for name, spec in stores.items() if _packs_later(spec)}
    others = [{name: spec} for name, spec in stores.items() if name not in alike]
    found: dict[str, Answered] = {}
    for group in [alike, *others] if alike else others:
        first = KVSpec() if group is alike else next(iter(group.values()))
        methods = [read(method, KNOWN, "method")] if method else []
        reduction = Reduction(model, methods, kv=first)
        told: dict[str, list[tuple[list[str], KVCosts]]] = {name: [] for name in group}
        with reduction:
            before_llm = any(one.family != "llm" for one in methods)
            for batch in asked:
                cache: Any = new_cache(model)
                given = batch.media if before_llm else batch.features
                logits = model(
                    input_ids=batch.ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **given
                ).logits[:, -1]
                steps = 1 + max(len(true.split()) for true in batch.answers)
                for name, spec in group.items():
                    own = repacked(model, cache, spec) if group is alike else cache
                    held = costs(own)
                    told[name].append((generated(model, processor, own, logits, steps), held))
        spent = _flops(model, reduction.prefills, methods, asked)
        found |= {name: _answered(asked, some, spent) for name, some in told.items()}
    return {name: found[name] for name in stores}


def _packs_later(spec: KVSpec) -> bool:
    only_store = spec.policy is None and spec.selector is None and spec.duo is None
    return only_store and isinstance(spec.store, (DenseConfig, PackedConfig))


def repacked(model: FoveateForConditionalGeneration, cache: KVCache, spec: KVSpec) -> KVCache:
    """A KV cache as it were if the prompt that a dense one holds had been read with it; see `_packs_later`."""
    made = KVCache(model, spec)
    made.attention.visual = cache.attention.visual
    for new, old in zip(made.layers, cache.layers, strict=True):
        keys, values = old.store.dense()
        new.lazy_initialization(keys, values)
        new.store.append(keys, values)
        new.store.settle(_unasked)
        new.slots, new.length = deepcopy(old.slots), old.length
    return made


def _unasked() -> Any:
    raise RuntimeError("a store that packs by what a prefill saw can't be filled after it")


def generated(
    model: FoveateForConditionalGeneration,
    processor: FoveateProcessor,
    cache: KVCache,
    logits: torch.Tensor,
    steps: int,
) -> list[str]:
    """Greedy answers of `steps` tokens, at most, that read the cache.

    Args:
        logits: for the first token, [questions, vocabulary].
    """
    ends = model.generation_config.eos_token_id
    end = torch.tensor(ends if isinstance(ends, list) else [ends], device=logits.device)
    tokens = [logits.argmax(-1)]
    ended = torch.isin(tokens[0], end)
    while len(tokens) < steps and not bool(ended.all()):
        out = model(input_ids=tokens[-1][:, None], past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens.append(torch.where(ended, end[0], out.logits[:, -1].argmax(-1)))
        ended |= torch.isin(tokens[-1], end)
    texts = processor.batch_decode(torch.stack(tokens, 1), skip_special_tokens=True)
    return [text.strip() for text in texts]


def _flops(
    model: FoveateForConditionalGeneration, prefills: Sequence[Prefill], methods: Sequence[Any], asked: Sequence[Batch]
) -> tuple[float, float, float]:
    """Visual tokens that a layer processes, FLOPs, and those with nothing dropped; of a question, mean."""
    if not methods:
        layers = model.config.text_config.num_hidden_layers
        prefills = [
            Prefill((0,) * len(b.ids), (b.ids.shape[1] - b.visual,) * len(b.ids), (b.visual,) * len(b.ids),
                    ((b.visual,) * len(b.ids),) * layers, ())
            for b in asked
        ]  # fmt: skip
    spent = [summary(model.config, prefill, methods) for prefill in prefills]
    questions = sum(len(prefill.given) for prefill in prefills)
    visual = sum(one.pruned.mean_visual for one in spent) / questions
    return visual, *(sum(getattr(one, name).flops for one in spent) / questions for name in ("pruned", "full"))


def _answered(
    asked: Sequence[Batch], told: Sequence[tuple[list[str], KVCosts]], spent: tuple[float, float, float]
) -> Answered:
    said: dict[int, tuple[str, str]] = {}
    for batch, (texts, _) in zip(asked, told, strict=True):
        said |= dict(zip(batch.numbers, zip(texts, batch.answers, strict=True), strict=True))
    pairs = [said[number] for number in sorted(said)]
    sizes = [len(batch.numbers) for batch in asked]

    def mean(value: Callable[[KVCosts], float]) -> float:
        return sum(size * value(kept) for size, (_, kept) in zip(sizes, told, strict=True)) / sum(sizes)

    return Answered(
        tuple(sum(a == b for a, b in zip(text.split(), true.split(), strict=False)) for text, true in pairs),
        tuple(len(true.split()) for _, true in pairs),
        tuple(text == true for text, true in pairs),
        sum(kept.bytes for _, kept in told) / sum(sizes),
        mean(lambda kept: kept.bits),
        mean(lambda kept: kept.mean_tokens / kept.length),
        mean(lambda kept: kept.mean_packed / kept.mean_tokens),
        *spent,
    )
