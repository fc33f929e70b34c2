"""Every policy and selector on every architecture, against brute force in float64; and together with all else."""

import copy
import dataclasses
import itertools
import os
from collections.abc import Callable

import pytest
import torch

from foveate.vlm.cache import layer
from foveate.vlm.cache.packed import PackedConfig
from foveate.vlm.cache.paged import PagedConfig
from foveate.vlm.cache.parse import KVSpec
from foveate.vlm.cache.quest import Quest
from foveate.vlm.pruning import FastV, reduce

from ..pruning import brute as pruning
from ..pruning import zoo
from . import agreement, brute, matrix

# Every model with every family of cases; the family's cases and the batches take turns. FOVEATE_EXHAUSTIVE=1: all.
EXHAUSTIVE = [
    (name, case, batch)
    for name, case, batch in itertools.product(agreement.NAMES, matrix.CASES, agreement.BATCHES)
    if matrix.works(name, case)
]


def _pairs() -> list[tuple[str, str, str]]:
    chosen = []
    for model, name in enumerate(agreement.NAMES):
        for family, cases in enumerate(matrix.FAMILIES.values()):
            some = [one for one in EXHAUSTIVE if one[0] == name and one[1] in cases]
            chosen += some[5 * (model + family) % len(some) :][:1] if some else []
    return chosen


@pytest.mark.parametrize(("name", "case", "batch"), EXHAUSTIVE if os.environ.get("FOVEATE_EXHAUSTIVE") else _pairs())
def test_logits_and_columns_are_those_of_brute_force(
    name: str, case: str, batch: str, record_property: Callable[[str, object], None]
) -> None:
    record_property("worst", agreement.check(name, matrix.spec(case), matrix.rule(case), batch))


SOME = ["streaming", "snapkv", "h2o", "look-m, pivotal", "quest"]  # one of each family


def test_what_the_matrix_would_show() -> None:
    """Every case changes the logits by far more than the tolerance, and no two do the same."""
    name, pieces = "llava", "image"
    inputs = zoo.animal(name).alone(agreement.row(name, pieces), agreement.words(pieces))
    prompt = inputs["input_ids"].shape[1] - agreement.STEPS
    full = brute.brute_force(name, inputs, [prompt], brute.Rule())[0]
    stock = zoo.animal(name).model(**inputs).logits[0, prompt - 1 :]
    assert (full - stock).abs().max() < 1e-12
    outcomes = [brute.brute_force(name, inputs, [prompt], matrix.rule(case))[0] for case in matrix.CASES]
    assert all((logits - full)[1:].abs().amax(1).min() > 1e-3 for logits in outcomes)
    assert all((one - other).abs().max() > 1e-3 for one, other in itertools.combinations(outcomes, 2))


@pytest.mark.parametrize("case", [*SOME, "streaming, windowed"])
def test_a_second_question_goes_on_with_the_same_cache(case: str) -> None:
    """An answer of 4 words, a question of 9, and an answer of 4, in rows of different lengths."""
    name, rows = "llava", ("two images", "text", "image")
    animal, samples = zoo.animal(name), [agreement.row(name, pieces) for pieces in rows]
    words = [agreement.words(pieces, 4 + 9 + 4) for pieces in rows]
    inputs = animal.batch(samples)
    with reduce(animal.model, kv=matrix.spec(case)) as model:
        first, kv = agreement.generated(model, inputs, [some[:4] for some in words])
        asked = torch.tensor([some[:13] for some in words])
        question = {
            "input_ids": torch.cat([inputs["input_ids"], asked], dim=1),
            "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(asked)], dim=1),
        }
        second, _ = agreement.generated(model, question, [some[13:] for some in words], past_key_values=kv)
    for sample, one in enumerate(samples):
        prompt = one["input_ids"].shape[1]
        ends = [prompt, *(prompt + i for i in range(1, 5)), prompt + 13]
        wanted, kept = brute.brute_force(name, animal.alone(one, words[sample]), ends, matrix.rule(case))
        assert (wanted[:5] - first[sample]).abs().max() <= agreement.TOLERANCE
        assert (wanted[13:] - second[sample]).abs().max() <= agreement.TOLERANCE
        agreement.assert_held(kv, sample, inputs["input_ids"].shape[1] - prompt, kept)


@pytest.mark.parametrize("case", ["look-m, pivotal", "snapkv"])
def test_a_second_prompt_evicts_among_its_own_columns(case: str) -> None:
    """It brings another image."""
    animal, one = zoo.animal("llava"), agreement.row("llava", "image")
    new = animal.row(2, "image", 5)
    both = {field: torch.cat([one[field], new[field]], dim=int(field == "input_ids")) for field in one}
    with reduce(animal.model, kv=matrix.spec(case)) as model:
        kv = model(**one).past_key_values
        logits = model(**new, past_key_values=kv).logits
    ends = [one["input_ids"].shape[1], both["input_ids"].shape[1]]
    wanted, kept = brute.brute_force("llava", animal.alone(both), ends, matrix.rule(case))
    assert (wanted[-1] - logits[0, -1]).abs().max() <= agreement.TOLERANCE
    agreement.assert_held(kv, 0, 0, kept)


@pytest.mark.parametrize("case", ["streaming", "snapkv", "h2o", "look-m, weighted"])
def test_beams_have_the_probabilities_of_brute_force(case: str) -> None:
    name, rows = "llava", ("text", "image")
    animal, samples = zoo.animal(name), [agreement.row(name, pieces) for pieces in rows]
    inputs = animal.batch(samples)
    with reduce(animal.model, kv=matrix.spec(case)) as model:
        found = model.generate(
            **inputs, max_new_tokens=5, num_beams=3, num_return_sequences=3, do_sample=False, length_penalty=0.0,
            bad_words_ids=[[zoo.PAD], [zoo.IMAGE], [zoo.VIDEO]], output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
    words = found.sequences[:, inputs["input_ids"].shape[1] :]
    assert len(words.unique(dim=0)) > len(samples)  # beams differ
    for beam, chosen in enumerate(words):
        one = samples[beam // 3]
        full = animal.alone(one, chosen.tolist())
        logits = brute.brute_force(name, full, [one["input_ids"].shape[1]], matrix.rule(case))[0][:5]
        total = logits.log_softmax(-1).gather(1, chosen[:, None]).sum()
        assert abs(found.sequences_scores[beam] - total) < 1e-5


@pytest.mark.parametrize("case", SOME)
def test_pruning_and_eviction_together(case: str) -> None:
    """Layers below FastV's hold all that the prompt has, those above what it left; each evicts from that."""
    pruner = (FastV(2, 0.5), pruning.fastv(2, 0.5))
    batch = "one" if case == "quest" else "three, padded"  # rows differ in what is left of their first page
    agreement.check("llava", matrix.spec(case), matrix.rule(case), batch, pruner)


def test_a_step_reads_pages_of_what_a_policy_left() -> None:
    """Which each head has chosen for itself."""
    policy, (selector, pages) = matrix.SNAPKV["snapkv"][0], matrix.QUEST["quest"]
    rule = dataclasses.replace(matrix.rule("snapkv"), read=pages.read)
    agreement.check("llava", KVSpec(PagedConfig(agreement.PAGE), policy, selector), rule, "one", steps=10)


@pytest.mark.parametrize("case", ["streaming", "h2o, few recent"])
def test_holes_are_taken_out_now_and_then(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which changes nothing but the columns that are stored."""
    monkeypatch.setattr(layer, "STALE", 5)
    agreement.check("text llama", matrix.spec(case), matrix.rule(case), steps=14)


@pytest.mark.parametrize("case", [*SOME[:-1], "quest on packed keys"])
def test_what_stays_is_packed(case: str) -> None:
    """After the eviction; sinks stay as they are, so that they can move."""
    store, rule = PackedConfig(keys=4, values=4, group=4, residual=2), brute.quest(4, 0.4, 1, residual=2)
    spec = KVSpec(store, selector=Quest(0.4, first=1))
    if case in matrix.CASES:
        spec, rule = matrix.spec(case, store=store), matrix.rule(case)
    sink = spec.policy.sinks if spec.policy is not None else 0
    agreement.check("llava", spec, brute.packed(rule, 4, 4, 2, sink), "one", steps=10)


@pytest.mark.parametrize("case", SOME)
def test_lower_precision(case: str) -> None:
    """In float32 all is as in float64, and the cache of a bfloat16 model holds bfloat16."""
    animal, rows = zoo.animal("llava"), ("two images", "text", "image")
    inputs, words = animal.batch([agreement.row("llava", pieces) for pieces in rows]), [agreement.words("image")] * 3
    caches, logits = [], []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        with reduce(copy.deepcopy(animal.model).to(dtype), kv=matrix.spec(case)) as model:
            made, kv = agreement.generated(model, inputs, words)
        assert all(part.dtype == dtype for one in kv.layers for part in one.store.dense())
        caches.append(kv)
        logits.append(made)
    assert (logits[1] - logits[0]).abs().max() < 1e-3
    assert all(agreement.held(caches[0], row, 0) == agreement.held(caches[1], row, 0) for row in range(3))
    counts = [[one.store.columns for one in kv.layers] for kv in caches]
    assert counts[0] == counts[2]
    assert bool(logits[2].isfinite().all())
