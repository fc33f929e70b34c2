"""`foveate eval --task needles`: what is asked, through which KV cache, and what is printed and written of it."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from foveate.eval.needle import Found, ask, evaluate_needles, find, prepare
from foveate.train.duo import DuoSettings, needle_clips
from foveate.vlm.cache.parse import parse_kv


def test_two_questions_are_about_frames_that_show_their_answers() -> None:
    asked = list(ask(12, 20, "dev"))
    for one in asked:
        assert one.frames.shape == (20, 16, 16, 3)
        assert one.places[0] != one.places[1] and one.answers[0] != one.answers[1]
        for question, answer in zip(one.questions, one.answers, strict=True):
            assert question == f"which digit is {answer.split()[0]} ?"
    assert [one.questions for one in ask(12, 20, "dev")] == [one.questions for one in asked]
    assert [one.questions for one in ask(12, 20, "test")] != [one.questions for one in asked]
    with pytest.raises(ValueError, match="split is 'none'; accepted: train, dev, test"):
        next(ask(1, 20, "none"))


def test_prompts_hold_a_token_a_frame_and_the_first_true_answer(needle_model: Any) -> None:
    model, processor = needle_model
    asked = list(ask(3, 20))
    [batch] = prepare(model, processor, asked)
    assert batch.features.shape == (60, 32)
    for row, (first, later, one) in enumerate(zip(batch.first, batch.later, asked, strict=True)):
        assert int((first == processor.video_token_id).sum()) == 20
        assert torch.equal(later[: len(first)], first)
        said = processor.tokenizer.decode(later[len(first) :])
        assert said.split() == [
            *one.answers[0].split(),
            "<|end|>",
            "<|user|>",
            *one.questions[1].split(),
            "<|assistant|>",
        ]
        alone = model.generate(
            **processor(
                text=processor.tokenizer.decode(first).replace(processor.video_token, "", 19),
                videos=[one.frames], add_special_tokens=False, return_tensors="pt",
            ),
            max_new_tokens=3,
        )  # fmt: skip
        together = model.generate(input_ids=batch.first, video_features=batch.features, max_new_tokens=3)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("kv", [None, "dense", "streaming:sink=1,window=6"])
def test_second_questions_meet_the_cache_of_the_first(
    needle_model: Any, kv: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing is evicted a second turn's answer is that of the whole conversation."""
    model, processor = needle_model
    [batch] = prepare(model, processor, list(ask(3, 20)))
    whole = model.generate(input_ids=batch.later, video_features=batch.features, max_new_tokens=3)
    calls: list[tuple[int, int]] = []
    said: list[torch.Tensor] = []

    def watch(module: Any, args: Any, kwargs: Any) -> None:
        calls.append((kwargs["inputs_embeds"].shape[1], kwargs["past_key_values"].get_seq_length()))

    def decode(tokens: torch.Tensor, **options: Any) -> list[str]:
        said.append(tokens)
        return ["nothing", *(one.answers[1] for one in batch.asked[1:])]

    monkeypatch.setattr(processor, "batch_decode", decode)
    hook = model.get_decoder().register_forward_pre_hook(watch, with_kwargs=True)
    found = find(model, processor, [batch], kv=kv, later=True)
    hook.remove()
    first, later = batch.first.shape[1], batch.later.shape[1]
    assert calls[:2] == [(first, 0), (later - first, first)]
    assert torch.equal(said[0], whole[:, later:]) or kv == "streaming:sink=1,window=6"
    assert found.right == (False, True, True)
    assert found.depths == tuple(one.places[1] / 20 for one in batch.asked)


def test_accuracy_by_depth_counts_quarters() -> None:
    found = Found((True, False, True, True), (0.0, 0.24, 0.26, 0.99), 1.0)
    assert found.accuracy == 0.75
    assert found.by_depth() == {"first": 0.5, "second": 1.0, "third": None, "last": 1.0}


def test_what_is_printed_and_written_is_what_was_found(
    needle_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = needle_model
    truths = iter([[one.answers[0] for one in ask(4, 12, "dev")]])

    def decode(*args: Any, **options: Any) -> list[str]:
        _, *others = next(truths)
        return ["nothing", *others]

    monkeypatch.setattr(processor, "batch_decode", decode)
    printed = io.StringIO()
    kv = parse_kv("streaming:sink=2,window=8")
    found = evaluate_needles(model, processor, tmp_path, 4, "dev", Console(file=printed, width=200), kv=kv, frames=12)
    assert found.right == (False, True, True, True)
    assert "needle_12  0.750  [0.301, 0.954]  n=4" in printed.getvalue()
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert [(one["name"], one["value"], one["n"]) for one in written["results"]] == [("needle_12", 0.75, 4)]
    assert "--task needles --frames 12 --n 4 --split dev --kv streaming:" in written["command"]
    assert written["kv_bytes"] == found.kv_bytes > 0


def test_clips_for_gates_mark_what_is_looked_up(needle_model: Any) -> None:
    model, processor = needle_model
    recall = next(needle_clips(model, processor, DuoSettings(lengths=(10, 10), passkeys=3)))
    assert recall.inputs["inputs_embeds"].shape == (1, 10 + 3 * 10, 32)
    assert recall.recalled.nonzero()[:, 1].tolist() == [
        10 + 10 * turn + place for turn in range(3) for place in (6, 7, 8)
    ]
