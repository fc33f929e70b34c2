"""Every method on every architecture, against brute force in float64."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from foveate.vlm.pruning import (
    EVS,
    VTCCLS,
    DyCoke,
    FasterVLM,
    FastV,
    HiRED,
    Lowest,
    PyramidDrop,
    Random,
    SparseVLM,
    SparseVLMPlus,
    VisionZip,
    reduce,
    towers,
    videos,
)

from . import brute, zoo

STEPS = 6  # of decoding, teacher-forced
TOLERANCE = 1e-6

# A method is one row: what the package has, and its rule by brute force, for models whose layer k is the first that may
# read fewer tokens and whose layers k + 1 and k + 2 are others. SparseVLM's layers are those whose output is pruned.
METHODS: dict[str, Callable[[int], tuple[Any, brute.Rule]]] = {
    "fastv": lambda k: (FastV(k, 0.5), brute.fastv(k, 0.5)),
    "random": lambda k: (Random(k, 0.5), brute.random(k, 0.5)),
    "lowest": lambda k: (Lowest(k, 0.5), brute.lowest(k, 0.5)),
    "pyramiddrop": lambda k: (
        PyramidDrop((k, k + 1, k + 2), (0.5, 0.25, 0.125)),
        brute.pyramiddrop((k, k + 1, k + 2), (0.5, 0.25, 0.125)),
    ),
    "pyramiddrop, own positions": lambda k: (
        PyramidDrop((k, k + 2), (0.6, 0.3), reindex=False),
        brute.pyramiddrop((k, k + 2), (0.6, 0.3), reindex=False),
    ),
    "sparsevlm": lambda k: (
        SparseVLM(tokens=(6, 3, 2), layers=(k - 1, k, k + 1), per=16),
        brute.sparsevlm((k - 1, k, k + 1), (6, 3, 2), 16),
    ),
    "sparsevlm, own positions": lambda k: (
        SparseVLM(tokens=(6, 3), layers=(k - 1, k + 1), per=16, reindex=False),
        brute.sparsevlm((k - 1, k + 1), (6, 3), 16, reindex=False),
    ),
    "sparsevlm, by rank": lambda k: (
        SparseVLM(scale=3.0, bias=3, layers=(k - 1, k, k + 1)),
        brute.sparsevlm_by_rank((k - 1, k, k + 1), 3.0, 3),
    ),
    "sparsevlm+": lambda k: (
        SparseVLMPlus(tokens=(10, 6, 3), layers=(k - 1, k, k + 1), per=16, heads=2),
        brute.sparsevlm_plus((k - 1, k, k + 1), (10, 6, 3), 16, 2),
    ),
}

# Methods before the LLM: what they keep, and what they merge, is tested elsewhere; here what the LLM makes of it.
BEFORE: dict[str, Any] = {
    "visionzip": VisionZip(keep=0.5),
    "fastervlm": FasterVLM(keep=0.4),
    "vtc-cls": VTCCLS(keep=0.4, reindex=False),
    "hired": HiRED(keep=0.4),
}
VIDEO: dict[str, Any] = {"evs": EVS(keep=0.5), "dycoke": DyCoke(keep=0.5)}

# Rows of inputs by what they hold; the first four are of one length.
ROWS: dict[str, tuple[int | str, ...]] = {
    "image": (3, "image"),
    "text": (4,),
    "two images": (2, "image", 1, "image"),
    "image first": ("image",),
    "short": (1, "image", 6),
    "short text": (5,),
    "eight images": (3, *("image", 1) * 8, 9),
    "video": (2, "video", 7),
    "frames": (2, "frames", 7),
    "image and video": (2, "image", 2, "video", 7),
}
SAME_LENGTH = tuple(ROWS)[:4]

# Batches: rows, and columns of padding beyond what their lengths take.
BATCHES: dict[str, tuple[tuple[str, ...], int]] = {
    "one": (("image",), 0),
    "one, padded": (("image",), 3),
    "three": (("image", "text", "two images"), 0),
    "three, padded": (("two images", "short text", "short"), 2),
}


@cache
def row(name: str, pieces: str) -> zoo.Row:
    torch.manual_seed(len(pieces) + 2)
    animal = zoo.animal(name)
    return animal.row(*ROWS[pieces], tokens=2 * animal.image_tokens() + 10 if pieces in SAME_LENGTH else None)


@cache
def forced(pieces: str, tokens: int = STEPS) -> tuple[int, ...]:
    """Words that a row's decode steps are given."""
    generator = torch.Generator().manual_seed(len(pieces))
    return tuple(torch.randint(zoo.WORDS, zoo.VOCABULARY, (tokens,), generator=generator).tolist())


@cache
def expected(name: str, method: str, rows: tuple[str, ...]) -> list[brute.Outcome]:
    animal = zoo.animal(name)
    rule = METHODS[method](animal.first_prunable)[1]
    if not rule.draws and len(rows) > 1:
        return [expected(name, method, (pieces,))[0] for pieces in rows]
    generator = torch.Generator().manual_seed(0)  # draws go on from sample to sample
    outcomes = []
    for pieces in rows:
        inputs = animal.alone(row(name, pieces), forced(pieces))
        prompt = row(name, pieces)["input_ids"].shape[1]
        outcomes.append(brute.brute_force(zoo.with_weights(name), inputs, [prompt], rule, generator))
    return outcomes


@cache
def expected_before(name: str, method: str, pieces: str) -> brute.Outcome:
    """Where methods act before the LLM, on one row."""
    chosen = (BEFORE | VIDEO)[method]
    animal, model = zoo.animal(name), zoo.with_weights(name)
    one, read = row(name, pieces), []
    hook = model.get_decoder().layers[0].register_forward_pre_hook(lambda module, args: read.append(args[0][0]))
    with (towers if method in BEFORE else videos).attach(model, chosen):
        model(**animal.alone(one))
    hook.remove()
    rule = brute.Rule((), lambda view: ([], []), reindex=chosen.reindex)
    inputs = animal.alone(one, forced(pieces))
    return brute.brute_force(model, inputs, [one["input_ids"].shape[1]], rule, marked=read[0])


class Forced(LogitsProcessor):
    """Lets the next token be what a list says, `words` [batch, steps]."""

    def __init__(self, words: Sequence[Sequence[int]], prompt: int):
        self.words, self.prompt = torch.tensor(words), prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt
        word = self.words[:, min(step, self.words.shape[1] - 1)]  # what comes after the last step is not looked at
        return torch.full_like(scores, -torch.inf).scatter(1, word[:, None], 0.0)


def generated(model: Any, inputs: zoo.Row, words: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits of prefill and teacher-forced decode steps through `generate`, [batch, 1 + steps, vocabulary]."""
    logits: list[torch.Tensor] = []  # those of `generate` are float32
    hook = model.register_forward_hook(lambda module, args, output: logits.append(output.logits[:, -1]))
    prompt = inputs["input_ids"].shape[1]
    try:
        model.generate(
            **inputs,
            max_new_tokens=len(words[0]) + 1,
            do_sample=False,
            logits_processor=LogitsProcessorList([Forced(words, prompt)]),
        )
    finally:
        hook.remove()
    return torch.stack(logits, dim=1)


def check(name: str, method: Any, wanted: Sequence[brute.Outcome], rows: tuple[str, ...], padding: int = 0) -> None:
    """A batch, through a session, gives what brute force gives of its rows."""
    animal = zoo.animal(name)
    samples = [row(name, pieces) for pieces in rows]
    width = max(sample["input_ids"].shape[1] for sample in samples) + padding
    inputs = animal.batch(samples, width)
    reduction = reduce(animal.model, method)
    with reduction as model:
        logits = generated(model, inputs, [forced(pieces) for pieces in rows])
    worst = max((got - want.logits).abs().max().item() for got, want in zip(logits, wanted, strict=True))
    assert worst <= TOLERANCE
    (prefill,) = reduction.prefills
    assert list(prefill.visual) == list(zip(*(want.visual for want in wanted), strict=True))
    for sample, want in enumerate(wanted):
        kept = [stage.kept[sample].tolist() for stage in prefill.stages]
        assert kept == (want.kept or [[]] * len(kept))
    assert list(prefill.text) == [int((sample["input_ids"] >= zoo.WORDS).sum()) for sample in samples]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", zoo.NAMES)
def test_pruned_logits_equal_masked_logits(name: str, method: str, batch: str) -> None:
    (rows, padding), chosen = BATCHES[batch], METHODS[method](zoo.animal(name).first_prunable)[0]
    check(name, chosen, expected(name, method, rows), rows, padding)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("method", BEFORE)
@pytest.mark.parametrize("name", [name for name in zoo.NAMES if "qwen" not in name])
def test_tokens_dropped_before_the_llm_are_masked_ones(name: str, method: str, batch: str) -> None:
    rows, padding = BATCHES[batch]
    check(name, BEFORE[method], [expected_before(name, method, pieces) for pieces in rows], rows, padding)


@pytest.mark.parametrize("rows", [("video",), ("video", "short text", "short")])
@pytest.mark.parametrize("method", VIDEO)
@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl", "foveate"])
def test_tokens_of_videos_dropped_before_the_llm_are_masked_ones(name: str, method: str, rows: tuple[str, ...]) -> None:
    check(name, VIDEO[method], [expected_before(name, method, pieces) for pieces in rows], rows)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("llava", "eight images"),  # so many that what SparseVLM drops makes three clusters
        ("smolvlm", "eight images"),
        ("internvl", "image first"),
        ("llava_onevision", "image and video"),
        ("qwen2_5_vl", "image and video"),
        ("qwen3_vl", "frames"),
        ("foveate", "video"),
    ],
)
def test_many_images_and_videos(name: str, pieces: str, method: str) -> None:
    chosen = METHODS[method](zoo.animal(name).first_prunable)[0]
    check(name, chosen, expected(name, method, (pieces,)), (pieces,))


def test_what_the_matrix_tests_would_show() -> None:
    """Pruning changes logits by far more than the tolerance, and no two methods keep the same."""
    plain = brute.Rule((), lambda view: ([], []))
    inputs = zoo.animal("llava").alone(row("llava", "two images"), forced("two images"))
    full = brute.brute_force(zoo.with_weights("llava"), inputs, [42], plain).logits
    stock = zoo.animal("llava").model(**inputs).logits[0, 41:]
    assert (full - stock).abs().max() < 1e-12
    outcomes = {method: expected("llava", method, ("two images",))[0] for method in METHODS}
    assert all((outcome.logits - full).abs().amax(1).min() > 0.05 for outcome in outcomes.values())
    assert len({str(outcome.kept) for outcome in outcomes.values()}) == len(outcomes)
