"""The embedded data's tasks: questions about unseen scenes and real mp4 clips, answered by generation."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from ..data.glyphs import (
    SCENE_QUESTIONS,
    SPLITS,
    Clip,
    Question,
    clip_colour_questions,
    digit_clip,
    encode_mp4,
    needle_clip,
    needle_questions,
    random_scene,
)
from ..vlm.model import FoveateForConditionalGeneration
from ..vlm.parallel.inference import parallel_session
from ..vlm.parallel.topology import Topology
from ..vlm.processor import FoveateProcessor
from .sharing import ALONE, joined, own_part
from .statistics import wilson_interval


@dataclass(frozen=True)
class Item:
    """A question about one medium: an image array, an array of frames, or an mp4's bytes with the frames to take of it.

    `answer_frame` is the first frame that shows the answer.
    """

    question: Question
    media: np.ndarray | bytes
    frames: int = 0
    answer_frame: int = 0


def _scene_item(name: str) -> Callable[[np.random.Generator, str], Item]:
    def make(rng: np.random.Generator, split: str) -> Item:
        while True:
            scene = random_scene(rng, split, (4, 16))
            question = SCENE_QUESTIONS[name](scene, rng)
            if question is not None:
                return Item(question, scene.picture)

    return make


def _first_frame(clip: Clip, kind: str) -> int:
    return next(i for i, cells in enumerate(clip.cells) if any(glyph and glyph.kind == kind for glyph in cells))


def _clip_item(frames: int) -> Callable[[np.random.Generator, str], Item]:
    def make(rng: np.random.Generator, split: str) -> Item:
        clip = digit_clip(rng, split, frames, digits=int(rng.integers(1, 5)))
        questions = clip_colour_questions(clip)
        question = questions[rng.integers(len(questions))]
        return Item(question, encode_mp4(clip.frames, scale=4), frames, _first_frame(clip, question.subject))

    return make


def _needle_item(frames: int) -> Callable[[np.random.Generator, str], Item]:
    def make(rng: np.random.Generator, split: str) -> Item:
        clip = needle_clip(rng, split, frames)
        question = needle_questions(clip)[0]
        return Item(question, encode_mp4(clip.frames, scale=4), frames, _first_frame(clip, question.fact))

    return make


TASKS: dict[str, Callable[[np.random.Generator, str], Item]] = {
    **{name: _scene_item(name) for name in SCENE_QUESTIONS},
    "clip_colour_8": _clip_item(8),
    "needle_64": _needle_item(64),
    "needle_128": _needle_item(128),
}


@dataclass
class TaskResult:
    """An accuracy with its 95 % Wilson interval, and what guessing gives.

    `chance` is one over the number of different facts that are asked for (`Question.fact`), `majority` the share of the
    commonest one: what a model would get that repeats the question's subject and always says that fact.
    `visual_tokens` and `processed_visual_tokens` are means over the questions, where tokens were dropped: of those in
    the prompt, and of those that a layer processed, the mean over layers too.
    """

    accuracy: float
    n: int
    low: float
    high: float
    chance: float
    majority: float
    answers: list[dict[str, str]] = field(default_factory=list)
    visual_tokens: float | None = None
    processed_visual_tokens: float | None = None

    def summary(self) -> dict[str, float | int]:
        return {k: v for k, v in asdict(self).items() if k != "answers" and v is not None}


def task_items(task: str, n: int, split: str = "test", seed: int = 0, topology: Topology = ALONE) -> Iterator[Item]:
    """The task's questions, each about its own scene or clip; the same for the same seed and split.

    Args:
        topology: whose sequence groups share the questions out.

    Raises:
        ValueError: no such task or split.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; accepted: {', '.join(TASKS)}")
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; accepted: {', '.join(SPLITS)}")
    for index in own_part(range(n), topology):
        yield TASKS[task](np.random.default_rng([7, seed, SPLITS.index(split), list(TASKS).index(task), index]), split)


@torch.inference_mode()
def answer(
    model: FoveateForConditionalGeneration, processor: FoveateProcessor, items: Sequence[Item], max_new_tokens: int = 12
) -> list[str]:
    """Generates the answers to a batch of questions, greedily."""
    conversations: list[Any] = []
    images: list[Any] = []
    videos: list[Any] = []
    for item in items:
        kind = "video" if isinstance(item.media, bytes) or item.media.ndim == 4 else "image"
        (videos if kind == "video" else images).append(item.media)
        content = [{"type": kind}, {"type": "text", "text": item.question.text}]
        conversations.append([{"role": "user", "content": content}])
    prompts = processor.apply_chat_template(conversations, add_generation_prompt=True)
    inputs = processor(
        text=prompts, images=images or None, videos=videos or None, num_frames=items[0].frames or None, padding=True,
        add_special_tokens=False,
    ).to(model.device)  # fmt: skip
    generate: Any = model.generate  # type: ignore[misc]  # transformers types its self as a protocol
    generated = generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    texts = processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def evaluate(
    model: FoveateForConditionalGeneration,
    processor: FoveateProcessor,
    task: str,
    n: int = 500,
    split: str = "test",
    seed: int = 0,
    batch_tokens: int = 8192,
    after_batch: Callable[[int], None] | None = None,
    topology: Topology = ALONE,
) -> TaskResult:
    """Accuracy of generated answers on a task; right is what equals the truth.

    Args:
        model, processor: what answers.
        task: one of `TASKS`.
        n: questions.
        split: whose digit images are shown; `test` is held out from training and tuning.
        batch_tokens: questions are batched to about so many tokens; under sequence parallelism one at a time.
        after_batch: called with the number of questions done.
        topology: of the ranks, all of which call it; their sequence groups share the questions out.
    """
    results: list[dict[str, str]] = []
    waiting: list[Item] = []

    def flush() -> None:
        answers = answer(model, processor, waiting)
        results.extend(
            {"question": item.question.text, "answer": a, "truth": item.question.answer, "fact": item.question.fact}
            for item, a in zip(waiting, answers, strict=True)
        )
        waiting.clear()
        if after_batch:
            after_batch(len(results))

    alone = parallel_session(model) is not None
    for item in task_items(task, n, split, seed, topology):
        waiting.append(item)
        per_item = 16 + (item.frames * (processor.tokens_per_frame() + 1) or processor.tokens_per_image())
        if alone or len(waiting) * per_item >= batch_tokens:
            flush()
    if waiting:
        flush()
    results = joined(results, topology)
    correct = sum(r["answer"] == r["truth"] for r in results)
    counts = Counter(r["fact"] for r in results)
    low, high = wilson_interval(correct, n)
    return TaskResult(correct / n, n, low, high, 1 / len(counts), max(counts.values()) / n, results)
