"""Rows and batches of the zoo's models and of tiny text models, run on a KV cache, against brute force."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from foveate.vlm.cache import KVCache
from foveate.vlm.cache.parse import KVSpec
from foveate.vlm.pruning import reduce

from ..pruning import brute as pruning
from ..pruning import zoo
from . import brute

STEPS = 6  # of decoding, teacher-forced
TOLERANCE = 1e-6
PAGE = 4  # columns; batches are padded by whole ones

TEXT_MODELS = ("llama", "qwen2", "qwen3")


def _text_model(kind: str) -> zoo.Animal:
    config = CONFIG_MAPPING[kind](**{name: value for name, value in zoo._text(kind).items() if name != "model_type"})
    return zoo.Animal(f"text {kind}", AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"), {})


for _kind in TEXT_MODELS:
    zoo._MAKERS[f"text {_kind}"] = lambda kind=_kind: _text_model(kind)

NAMES = (*zoo.NAMES, *(f"text {kind}" for kind in TEXT_MODELS))

ROWS: dict[str, tuple[int | str, ...]] = {
    "image": (3, "image", 7),
    "text": (9,),
    "two images": (2, "image", 1, "image", 4),
    "long": (57,),
}

# Batches: rows, and columns of padding beyond what their lengths take.
BATCHES: dict[str, tuple[tuple[str, ...], int]] = {
    "one": (("image",), 0),
    "one, padded": (("image",), PAGE),
    "three": (("two images", "text", "image"), 0),
    "three, padded": (("image", "two images", "text"), 2 * PAGE),
}


@cache
def row(name: str, pieces: str) -> zoo.Row:
    """A row of a VLM, or one as long of words: some whole pages."""
    torch.manual_seed(len(pieces) + 3)
    animal = zoo.animal(name)
    count = 16 if not animal.media else animal.image_tokens() + name.startswith("qwen")
    tokens = sum(count if piece == "image" else int(piece) for piece in ROWS[pieces])
    given = ROWS[pieces] if animal.media else (tokens,)
    return animal.row(*given, tokens=(tokens // PAGE + 1) * PAGE)


@cache
def words(pieces: str, tokens: int = STEPS) -> tuple[int, ...]:
    """What a row's decode steps are given."""
    generator = torch.Generator().manual_seed(len(pieces))
    return tuple(torch.randint(zoo.WORDS + 1, zoo.VOCABULARY, (tokens,), generator=generator).tolist())


class Forced(LogitsProcessor):
    """Lets the next token be what a list says, `words` [batch, steps]."""

    def __init__(self, words: Sequence[Sequence[int]], prompt: int):
        self.words, self.prompt = torch.tensor(words), prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt
        word = self.words[:, min(step, self.words.shape[1] - 1)]  # what comes after the last step is not looked at
        return torch.full_like(scores, -torch.inf).scatter(1, word[:, None], 0.0)


def generated(model: Any, inputs: zoo.Row, forced: Sequence[Sequence[int]], **options: Any) -> tuple[torch.Tensor, Any]:
    """Logits of prefill and forced decode steps, [batch, 1 + steps, vocabulary], and the KV cache."""
    logits: list[torch.Tensor] = []  # those of `generate` are float32
    hook = model.register_forward_hook(lambda module, args, output: logits.append(output.logits[:, -1]))
    try:
        done = model.generate(
            **inputs,
            **options,
            max_new_tokens=len(forced[0]) + 1,
            do_sample=False,
            return_dict_in_generate=True,
            logits_processor=LogitsProcessorList([Forced(forced, inputs["input_ids"].shape[1])]),
        )
    finally:
        hook.remove()
    return torch.stack(logits, dim=1), done.past_key_values


def held(kv: KVCache, sample: int, begin: int) -> dict[int, list[list[int]]]:
    """Of each layer and KV head the tokens that are held, the row's first one being 0."""
    found = {}
    for number, layer in enumerate(kv.layers):
        slots = layer.all_slots()[sample]
        found[number] = [[slot - begin for slot in head.tolist() if slot >= 0] for head in slots]
    return found


def check(
    name: str,
    spec: KVSpec,
    rule: brute.Rule,
    batch: str = "three, padded",
    pruner: tuple[Any, pruning.Rule] | None = None,
    steps: int = STEPS,
) -> float:
    """A batch on a KV cache gives the logits, and holds the columns, that brute force gives of its rows.

    Returns:
        The largest difference of logits.
    """
    animal, (rows, padding) = zoo.animal(name), BATCHES[batch]
    samples, forced = [row(name, pieces) for pieces in rows], [words(pieces, steps) for pieces in rows]
    width = max(sample["input_ids"].shape[1] for sample in samples) + padding
    methods = () if pruner is None else (pruner[0],)
    with reduce(animal.model, *methods, kv=spec) as model:
        logits, kv = generated(model, animal.batch(samples, width), forced)
    worst = 0.0
    for sample, one in enumerate(samples):
        prompt = one["input_ids"].shape[1]
        inputs = animal.alone(one, forced[sample])
        wanted, kept = brute.brute_force(name, inputs, [prompt], rule, None if pruner is None else pruner[1])
        worst = max(worst, (logits[sample] - wanted).abs().max().item())
        assert_held(kv, sample, width - prompt, kept)
    assert worst <= TOLERANCE
    return worst


def assert_held(kv: KVCache, sample: int, begin: int, kept: dict[int, list[list[int]]]) -> None:
    """Each layer and KV head holds these tokens of a row, whose first token is the sequence's token `begin`."""
    for number, heads in held(kv, sample, begin).items():
        assert len(heads) in (1, len(kept[number]))
        assert heads * (len(kept[number]) // len(heads)) == kept[number], f"layer {number}"
