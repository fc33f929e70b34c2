"""In-context learning: what is the last picture called, told by a few examples in the prompt (docs/in_context.md).

Each question is an episode of `data/episodes.py`: `ways` classes with a name each, every class shown `shots` times,
then one of them once more. It is answered by forced choice between the episode's names, and by free generation.
"""

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
from ..data.episodes import KEYS, KNOWN_CLASSES, KNOWN_NAMES, NAMES, NEW_CLASSES, NEW_NAMES, draw_classes, draw_episode
from ..vlm.cache.parse import KVSpec
from ..vlm.model import MEDIA_INPUTS, FoveateForConditionalGeneration
from ..vlm.parallel.topology import Topology
from ..vlm.processor import FoveateProcessor
from ..vlm.pruning import Reduction
from .facts import result, run_facts
from .report import options_of
from .sharing import ALONE, joined
from .statistics import wilson_interval

# Of questions: which classes are shown, and which names they can have.
KINDS = {
    "images": (KNOWN_CLASSES, KNOWN_NAMES),  # held-out pictures of the classes and names of training
    "classes": (NEW_CLASSES, NEW_NAMES),  # neither was in an image document
    "words": (KEYS, NAMES),  # words in the place of pictures
}
SHOTS = (0, 1, 2, 4, 8)
BATCH_TOKENS = 8192


@dataclass(frozen=True)
class ShotItem:
    """A few-shot question.

    Attributes:
        messages: a user's turn with a picture (or a word) and an assistant's with its name, for each example; then the
            picture that is asked about.
        images: uint8 [height, width, 3] each, in the order of their parts.
        answer: its name.
        choices: the names of the episode, the answer among them, in an order that tells nothing.
    """

    messages: tuple[dict[str, Any], ...]
    images: tuple[np.ndarray, ...]
    answer: str
    choices: tuple[str, ...]


def shot_items(
    n: int, shots: int, ways: int = 2, kind: str = "images", split: str = "test", seed: int = 0
) -> Iterator[ShotItem]:
    """Questions, the same for the same arguments; the first m of n are those of m.

    Args:
        n: how many.
        shots: examples of each class.
        ways: classes of an episode.
        kind: one of `KINDS`.
        split: whose pictures are shown.

    Raises:
        ValueError: no such kind or split, or there are too few classes for so many ways.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; accepted: {', '.join(KINDS)}")
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; accepted: {', '.join(SPLITS)}")
    classes, names = KINDS[kind]
    if not 2 <= ways <= min(len(classes), len(names)):
        raise ValueError(f"ways is {ways}; accepted: 2 to {min(len(classes), len(names))}")
    if shots < 0:
        raise ValueError(f"shots is {shots}; accepted: 0 or more")
    for index in range(n):
        rng = np.random.default_rng([13, seed, SPLITS.index(split), list(KINDS).index(kind), ways, shots, index])
        yield _item(rng, classes, names, ways, shots, split, kind)


def _item(
    rng: np.random.Generator,
    classes: Sequence[str],
    names: Sequence[str],
    ways: int,
    shots: int,
    split: str,
    kind: str,
) -> ShotItem:
    episode = draw_episode(rng, classes, names, ways, ways * shots)
    order = [*episode.order.tolist(), int(rng.integers(ways))]
    keys = [episode.keys[number] for number in order]
    images: tuple[np.ndarray, ...] = () if kind == "words" else tuple(draw_classes(keys, split, rng).pixels)
    messages: list[dict[str, Any]] = []
    for number, key in zip(order, keys, strict=True):
        shown = {"type": "text", "text": key} if kind == "words" else {"type": "image"}
        named = {"type": "text", "text": episode.names[number]}
        messages += [{"role": "user", "content": [shown]}, {"role": "assistant", "content": [named]}]
    return ShotItem(tuple(messages[:-1]), images, episode.names[order[-1]], episode.names)


@dataclass(frozen=True)
class Answer:
    """What a model says.

    Attributes:
        scores: log-likelihood of each of the item's choices after the prompt, in nats, of its tokens together.
        chosen: the choice of the highest.
        said: what is generated, greedily.
    """

    scores: tuple[float, ...]
    chosen: str
    said: str


@dataclass(frozen=True)
class ShotBatch:
    """Questions as a model reads them.

    Attributes:
        items: the questions.
        choices: token ids of each item's choices.
        rows: (item's number, tokens) of each row: an item's prompt alone, then followed by each beginning of a choice.
        inputs: of the model, padded on the left.
    """

    items: tuple[ShotItem, ...]
    choices: tuple[tuple[tuple[int, ...], ...], ...]
    rows: tuple[tuple[int, tuple[int, ...]], ...]
    inputs: dict[str, torch.Tensor]


def prepare_shots(processor: FoveateProcessor, items: Sequence[ShotItem]) -> ShotBatch:
    """Renders and encodes a batch of questions; nothing of it depends on the model's weights."""
    prompts = [processor.apply_chat_template(list(item.messages), add_generation_prompt=True) for item in items]
    choices = tuple(tuple(_ids(processor, choice) for choice in item.choices) for item in items)
    rows = tuple((i, prefix) for i, some in enumerate(choices) for prefix in dict.fromkeys(_prefixes(some)))
    shown = [image for i, _ in rows for image in items[i].images]
    encoded = processor(
        text=[prompts[i] for i, _ in rows],
        images=shown or None,
        padding=True,
        add_special_tokens=False,
        return_tensors="pt",
    )
    unpadded = [
        ids[kept.bool()].tolist() for ids, kept in zip(encoded["input_ids"], encoded["attention_mask"], strict=True)
    ]
    full = [ids + list(prefix) for ids, (_, prefix) in zip(unpadded, rows, strict=True)]
    padded = processor.tokenizer.pad({"input_ids": full}, padding=True, padding_side="left", return_tensors="pt")
    media = {name: encoded[name] for name in MEDIA_INPUTS if name in encoded}
    return ShotBatch(tuple(items), choices, rows, dict(padded) | media)


def answer_shots(
    model: FoveateForConditionalGeneration, processor: FoveateProcessor, items: Sequence[ShotItem]
) -> list[Answer]:
    """Answers a batch of questions; see `answer_batch`."""
    return answer_batch(model, processor, prepare_shots(processor, items))


@torch.inference_mode()
def answer_batch(model: FoveateForConditionalGeneration, processor: FoveateProcessor, batch: ShotBatch) -> list[Answer]:
    """Answers by forced choice and freely.

    A choice's log-likelihood is the sum over its tokens of what the first step of a generation gives after the prompt
    and the tokens before, so that it is measured just as answers are generated: of pruned prompts, in any KV cache.
    """
    longest = max(len(ids) for some in batch.choices for ids in some)
    inputs = {name: tensor.to(model.device) for name, tensor in batch.inputs.items()}
    generate: Any = model.generate  # type: ignore[misc]  # transformers types its self as a protocol
    output = generate(
        **inputs, max_new_tokens=longest + 1, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    first = output.logits[0].float().log_softmax(-1).cpu()  # [rows, vocabulary]
    said = processor.batch_decode(output.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    row = {key: number for number, key in enumerate(batch.rows)}
    answers = []
    for i, (item, some) in enumerate(zip(batch.items, batch.choices, strict=True)):
        scores = tuple(sum(float(first[row[i, ids[:k]], ids[k]]) for k in range(len(ids))) for ids in some)
        answers.append(Answer(scores, item.choices[int(np.argmax(scores))], said[row[i, ()]].strip()))
    return answers


def _ids(processor: FoveateProcessor, text: str) -> tuple[int, ...]:
    return tuple(processor.tokenizer(text, add_special_tokens=False)["input_ids"])


def _prefixes(choices: Iterable[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    for ids in choices:
        yield from (ids[:k] for k in range(len(ids)))


@dataclass(frozen=True)
class Measured:
    """Which of the same questions are answered right, by forced choice and freely.

    Attributes:
        kind, ways, shots: see `shot_items`.
    """

    kind: str
    ways: int
    shots: int
    forced: tuple[bool, ...]
    free: tuple[bool, ...]

    @property
    def results(self) -> list[dict[str, Any]]:
        """Both accuracies with their 95 % Wilson intervals, as entries of a results file."""
        entries = []
        for name, right in (("forced_choice", self.forced), ("generated", self.free)):
            low, high = wilson_interval(sum(right), len(right))
            entries.append(result(name, sum(right) / len(right), "fraction", len(right), low=low, high=high))
        return entries


def shot_batches(
    processor: FoveateProcessor,
    n: int,
    shots: int,
    ways: int = 2,
    kind: str = "images",
    split: str = "test",
    seed: int = 0,
    topology: Topology = ALONE,
) -> Iterator[ShotBatch]:
    """The questions of `shot_items`, ready to be asked: under sequence parallelism one at a time, its group's."""
    size = 1 if topology.degree > 1 else max(1, BATCH_TOKENS // (2 * ways * shots + 2))
    items = islice(shot_items(n, shots, ways, kind, split, seed), topology.data_rank, None, topology.data_size)
    while some := list(islice(items, size)):
        yield prepare_shots(processor, some)


def measure_shots(
    model: FoveateForConditionalGeneration,
    processor: FoveateProcessor,
    batches: Iterable[ShotBatch],
    topology: Topology = ALONE,
) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
    """Which questions are answered right by forced choice, and which freely; of all groups of a topology."""
    found = [
        (answer.chosen == item.answer, answer.said == item.answer)
        for batch in batches
        for answer, item in zip(answer_batch(model, processor, batch), batch.items, strict=True)
    ]
    forced, free = zip(*joined(found, topology), strict=True)
    return forced, free


@torch.inference_mode()
def answer_captions(
    model: FoveateForConditionalGeneration, processor: FoveateProcessor, n: int, split: str = "test", seed: int = 0
) -> list[tuple[str, str]]:
    """What is generated after one picture alone, and the picture's true caption (colour and class), n times."""
    rng = np.random.default_rng([17, seed, SPLITS.index(split)])
    classes = [KNOWN_CLASSES[i] for i in rng.integers(len(KNOWN_CLASSES), size=n)]
    pictures = draw_classes(classes, split, rng)
    shown = processor(text=[processor.image_token] * n, images=list(pictures.pixels), padding=True)
    generate: Any = model.generate  # type: ignore[misc]  # transformers types its self as a protocol
    said = generate(**shown.to(model.device), max_new_tokens=4, do_sample=False)[:, shown["input_ids"].shape[1] :]
    texts = processor.batch_decode(said, skip_special_tokens=True)
    truths = [f"{colour} {name}" for colour, name in zip(pictures.colours, classes, strict=True)]
    return [(text.strip(), truth) for text, truth in zip(texts, truths, strict=True)]


def evaluate_shots(
    model: FoveateForConditionalGeneration,
    processor: FoveateProcessor,
    out: Path | None,
    n: int,
    split: str,
    console: Console,
    methods: Sequence[Any] = (),
    kv: KVSpec | None = None,
    *,
    shots: Sequence[int] = SHOTS,
    ways: int = 2,
    topology: Topology = ALONE,
) -> list[Measured]:
    """`foveate eval --task shots`: asks about held-out pictures and about new classes with new names, prints what is
    right, and writes `metrics.json` in `out`.

    Args:
        model, processor: trained on episodes, as by the recipe `in-context`; any that names pictures can be asked.
        out: None: nothing is written.
        n: questions of each kind and number of shots.
        methods, kv: what drops visual tokens, and how keys and values are kept meanwhile; see `foveate.reduce`.
        shots: examples of each class, one number or several.
        ways: classes of an episode; chance is one in so many.
        topology: of the ranks, all of which call it; the first one writes.
    """
    measured = []
    with Reduction(model, methods, kv) if methods or kv else nullcontext():
        for kind in ("images", "classes"):
            for number in shots:
                batches = shot_batches(processor, n, number, ways, kind, split, topology=topology)
                measured.append(Measured(kind, ways, number, *measure_shots(model, processor, batches, topology)))
                told = "  ".join(
                    f"{r['name']} {r['value']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" for r in measured[-1].results
                )
                line = f"{kind:>8}  {number} shots  {told}  n={n}  chance {1 / ways:.2f}"
                console.print(line, highlight=False, soft_wrap=True)
    if out is not None and topology.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        options, asked_for = options_of(methods, kv, topology)
        numbers = " ".join(f"--shots {number}" for number in shots)
        facts = run_facts(f"foveate eval --task shots {numbers} --ways {ways} --n {n} --split {split}{options}")
        points = [{"kind": m.kind, "ways": m.ways, "shots": m.shots, "results": m.results} for m in measured]
        (out / "metrics.json").write_text(json.dumps(facts | asked_for | {"points": points}, indent=1))
        console.print(f"metrics in {out / 'metrics.json'}")
    return measured
