"""What smaller KV caches cost: what is read, counted and told is what a model says."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foveate.data.encoding import IGNORE
from foveate.eval import kv_quality as quality
from foveate.eval import weights_quality
from foveate.eval.kv_quality import ASKED, FULL, LATER, Measured, Read, Setting, Task
from foveate.vlm.cache.cache import KVCache
from foveate.vlm.cache.parse import parse_kv
from foveate.vlm.cache.report import costs
from foveate.vlm.pruning import parse_method

COMMITTED = Path(__file__).resolve().parents[2] / "docs" / "results" / "kv_quality.json"
LATER_TASK = Task("rows", "row_chat", 3, LATER, turns=(2, 3))
ASKED_TASK = Task("rows, asked", "row_chat", 3, ASKED, turns=(2, 3))


def test_media_are_prefilled_before_later_questions_and_prompts_of_those_asked(row_model: Any) -> None:
    model, processor = row_model
    [later] = quality.batches(model, processor, LATER_TASK, "test")
    assert later.prefill == 1 + 32 and (later.ids[:, 1:33] == processor.image_token_id).all()
    assert (later.ids[:, 33:] != processor.image_token_id).all()
    asked = quality.batches(model, processor, ASKED_TASK, "test")
    for batch in asked:
        assert (batch.labels[:, : batch.prefill + 1] == IGNORE).all()
        assert (batch.labels[:, batch.prefill + 1] != IGNORE).all()
        assert (batch.ids[:, batch.prefill] == processor.tokenizer.convert_tokens_to_ids("<|assistant|>")).all()
    assert sorted(number for batch in asked for number in batch.documents) == [0, 1, 2]
    counts = [sum(len(quality.right_answers(r, r)) for r in batch.labels.numpy()) for batch in (later, *asked)]
    assert counts[0] in range(6, 10) and counts[1:] == [len(batch.documents) for batch in asked]


@pytest.mark.parametrize("kv", ["", "dense"])
def test_an_answer_is_right_where_greedy_generation_says_it(row_model: Any, kv: str) -> None:
    model, processor = row_model
    [batch, *_] = quality.batches(model, processor, ASKED_TASK, "test")
    prompt = batch.prefill + 1
    said = model.generate(
        input_ids=batch.ids[:, :prompt], image_features=batch.media["image_features"], do_sample=False,
        max_new_tokens=5, min_new_tokens=5,
    )  # fmt: skip
    labels = said.masked_fill(torch.arange(said.shape[1]) < prompt, IGNORE)
    as_said = replace(batch, ids=said, labels=labels)
    logits = model(input_ids=said, image_features=batch.media["image_features"], use_cache=False).logits.double()
    nll = -logits.log_softmax(-1)[:, prompt - 1 : -1].gather(2, said[:, prompt:, None]).sum().item()
    with quality.reduction(model, Setting("", kv)):
        read = quality.read_task(model, "", [as_said])
        assert sum(read.right) == len(said) == sum(read.questions)
        assert (read.tokens, read.length) == (5 * len(said), prompt + 4)
        assert read.nll == pytest.approx(nll, rel=1e-4)
        assert read.held == 1 and read.packed == 0 and read.bits >= 32
        other = labels.clone()
        other[0, -2] = (other[0, -2] + 1) % 50
        assert quality.read_task(model, "", [replace(as_said, labels=other)]).right == (0, *[1] * (len(said) - 1))


def test_a_cache_that_quantises_or_evicts_is_told_from_a_full_one(row_model: Any) -> None:
    model, processor = row_model
    tasks = {"rows": quality.batches(model, processor, LATER_TASK, "test")}
    prompts = quality.random_prompts(model, 2, 48)
    assert model.config.image_token_id not in prompts
    dense, packed, evicted = (
        quality.measure(model, tasks, Setting("", kv), prompts)
        for kv in ("dense", "int2:group=8,residual=0", "streaming:sink=2,window=8")
    )
    assert dense.kl < 1e-9 < 1e-6 < packed.kl < evicted.kl
    assert packed.read[0].packed > 30 and packed.read[0].held == 1 and packed.read[0].bits < 16
    assert evicted.read[0].packed == 0 and 9 <= evicted.read[0].held * evicted.read[0].length <= 11
    assert packed.read[0].nll != dense.read[0].nll != evicted.read[0].nll


def test_heads_that_are_kept_apart_are_counted_together(row_model: Any, tmp_path: Path) -> None:
    model, _ = row_model
    heads = {"gates": [[1.0, 0.0]] * 4, "threshold": 0.5, "sink": 2, "window": 4}
    (tmp_path / "heads.json").write_text(json.dumps(heads))
    cache = KVCache(model, f"duo:heads={tmp_path / 'heads.json'}")
    model(input_ids=quality.random_prompts(model, 3, 20), past_key_values=cache, use_cache=True)
    held = costs(cache)
    window = 2 + 3  # the next query is the window's fourth
    assert (held.length, held.tokens, held.packed) == (20, ((20 + window) / 2,) * 4, (0,) * 4)
    layers, batch, heads_of_both, head_dim = 4, 3, 2 * 2, 16
    assert held.numbers == layers * batch * heads_of_both * head_dim * 20
    assert held.full_bytes == 4 * held.numbers


def test_answers_are_runs_of_labels() -> None:
    wanted = np.array([IGNORE, 4, 5, IGNORE, IGNORE, 6, IGNORE, 7, 8])
    told = np.array([9, 4, 5, 9, 9, 1, 9, 7, 8])
    assert quality.right_answers(told, wanted) == [True, False, True]
    assert quality.right_answers(told, np.full(9, IGNORE)) == []


def read(task: str, right: list[int], questions: int = 4, **more: Any) -> Read:
    fields: dict[str, Any] = {"nll": 3.0, "tokens": 30, "bits": 8.0, "held": 1.0, "packed": 16.0, "length": 40}
    return Read(task, tuple(right), (questions,) * len(right), **(fields | more))


def test_losses_are_paired_by_conversation() -> None:
    rng = np.random.default_rng(0)
    full = read("a", rng.integers(1, 5, 200).tolist())
    one_less = read("a", [right - 1 for right in full.right])
    assert quality.loss_interval([full], [full]) == (0, 0, 0)
    assert quality.loss_interval([one_less], [full]) == (-0.25, -0.25, -0.25)
    lost = rng.random(200) < 0.3
    some = read("a", (np.array(full.right) - lost).tolist())
    loss, low, high = quality.loss_interval([some], [full])
    spread = 1.96 * np.sqrt(lost.mean() * (1 - lost.mean()) / 200) / 4
    assert loss == pytest.approx(-lost.mean() / 4)
    assert (low, high) == (pytest.approx(loss - spread, abs=0.003), pytest.approx(loss + spread, abs=0.003))


def test_results_tell_what_is_lost_and_what_breaks(tmp_path: Path) -> None:
    def of(setting: Setting, rows: list[int], asked: list[int], **more: Any) -> Measured:
        return Measured(setting, 0, (read("rows", rows, **more), read("row, asked", asked, 1, **more)), 0.5)

    # 40 conversations of 4 questions; 40 questions
    full = of(FULL, [4] * 40, [1] * 40, bits=32.0, packed=0.0)
    broken = of(Setting("bad", "int2"), [2] * 40, [1] * 40, nll=6.0)
    nothing = of(Setting("short", "int4"), [4] * 40, [1] * 40, packed=0.0, bits=33.0)
    entries = quality.as_json([full, broken, nothing])
    found = {one["name"]: one for one in entries[1]["results"]}
    assert (
        found["later: difference"] | {"n": 160, "value": -0.5, "low": -0.5, "high": -0.5} == found["later: difference"]
    )
    assert found["asked: accuracy"]["value"] == 1 and found["asked: accuracy"]["n"] == 40
    assert found["later: perplexity"]["value"] == pytest.approx(np.exp(0.2))
    assert found["later: perplexity"]["ratio"] == pytest.approx(np.exp(0.1))
    table = quality.table(entries).splitlines()
    assert table[3] == "| `int2` | 8.0 | 100% | 16 of 40 | -50.0 [-50.0, -50.0] | +0.0 [+0.0, +0.0] | 1.105 | 5.0e-01 |"
    assert "| 0 of 40 | nothing quantised | nothing quantised |" in table[4]
    assert quality.what_breaks(entries).splitlines()[2:] == ["| bad | rows -50 |"]
    assert quality.picture(entries).startswith(b"\x89PNG")
    assert json.loads(json.dumps(entries)) == entries


def test_what_was_measured_is_not_measured_again(
    row_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = row_model
    tasks = {"rows": quality.batches(model, processor, LATER_TASK, "test")}
    arguments = (
        tmp_path,
        model,
        tasks,
        Setting("int4", "int4:group=8,residual=0"),
        quality.random_prompts(model, 1, 16),
    )
    first = quality.measure_once(*arguments, 0)
    monkeypatch.setattr(quality, "measure", lambda *_: pytest.fail("measured again"))
    assert quality.measure_once(*arguments, 0) == first
    with pytest.raises(pytest.fail.Exception):
        quality.measure_once(*arguments, 1)


def test_settings_have_names_of_their_own_and_can_be_read() -> None:
    assert len({setting.name for setting in quality.SETTINGS}) == len(quality.SETTINGS)
    for setting in quality.SETTINGS:
        assert not setting.kv or parse_kv(setting.kv)
        assert not setting.prune or parse_method(setting.prune)


def test_weights_are_measured_as_they_are_exported(
    row_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = row_model
    monkeypatch.setattr(weights_quality, "random_prompts", lambda model: quality.random_prompts(model, 2, 16))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    ways = (weights_quality.FULL, weights_quality.Weights("w8a8", "w8a8"))
    full, eight = measured = [weights_quality.measure(tmp_path, way, [LATER_TASK], "test") for way in ways]
    assert full.kl == 0 < eight.kl
    assert full.memory == sum(weight.nbytes for weight in model.parameters()) > 2 * eight.memory
    assert all(one.memory < one.disk < one.memory + 60_000 for one in measured)
    entries = weights_quality.as_json(measured)
    assert [entry["results"][4]["ratio"] for entry in entries] == [one.memory / full.memory for one in measured]
    assert weights_quality.table(entries).count("\n") == 3


@pytest.mark.parametrize(("setting", "most"), [("int8", 0.001), ("int4", 0.005), ("int2, residual 16", 0.03)])
def test_committed_results_lose_no_more_than_they_may(setting: str, most: float) -> None:
    settings = {one["setting"]: one for one in json.loads(COMMITTED.read_text())["settings"]}
    results = {one["name"]: one for one in settings[setting]["results"]}
    assert results["later: difference"]["n"] >= 1000
    assert all(results[f"{when}: difference"]["value"] >= -most for when in (LATER, ASKED))
    long = [cache for cache in settings[setting]["cache"].values() if cache["length"] > 60]
    assert len(long) >= 6 and all(cache["packed"] > 0.7 * cache["length"] for cache in long)
