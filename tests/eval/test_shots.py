"""Few-shot questions, their forced choice and free generation, and `foveate eval --task shots`."""

import io
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from foveate.data.episodes import KEYS, NEW_CLASSES, NEW_NAMES
from foveate.eval import shots
from foveate.eval.shots import Answer, ShotBatch, ShotItem, answer_captions, answer_shots, evaluate_shots, shot_items
from foveate.train.build import build_model
from foveate.train.recipe import load_recipe
from foveate.vlm.pruning import parse_method


@pytest.fixture(scope="module")
def shot_model() -> Any:
    """The recipe in-context's model, with random weights, but smaller, and its processor."""
    torch.manual_seed(0)
    recipe = load_recipe("in-context", [
        "model.text.hidden_size=32", "model.text.intermediate_size=48", "model.text.num_attention_heads=2",
        "model.text.num_key_value_heads=2", "model.vision.hidden_size=24", "model.vision.intermediate_size=32",
        "model.vision.num_hidden_layers=1", "model.vision.num_attention_heads=2",
    ])  # fmt: skip
    model, processor = build_model(recipe.model)
    return model.eval(), processor


def names_of(item: ShotItem) -> list[str]:
    return [message["content"][0]["text"] for message in item.messages if message["role"] == "assistant"]


@pytest.fixture
def classes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], str]]:
    """The classes and the split of each item's pictures, from now on."""
    drawn: list[tuple[list[str], str]] = []
    real = shots.draw_classes

    def recording(some: Any, split: str, rng: Any) -> Any:
        drawn.append((list(some), split))
        return real(some, split, rng)

    monkeypatch.setattr(shots, "draw_classes", recording)
    return drawn


@pytest.mark.parametrize(("kind", "ways", "number"), [("images", 2, 4), ("classes", 4, 1), ("images", 3, 0)])
def test_every_class_is_shown_so_often_and_then_one_once_more(
    kind: str, ways: int, number: int, classes: list[tuple[list[str], str]]
) -> None:
    asked = Counter()
    for item in shot_items(60, number, ways, kind):
        (*examples, query), split = classes[-1]
        names = names_of(item)
        assert split == "test" and len(item.images) == ways * number + 1
        assert all(image.shape == (16, 16, 3) and image.dtype == np.uint8 for image in item.images)
        assert item.messages[-1] == {"role": "user", "content": [{"type": "image"}]}
        assert all(count == number for count in Counter(examples).values())
        assert len(set(item.choices)) == ways and item.answer in item.choices
        if number:
            assert dict(zip(examples, names, strict=True))[query] == item.answer
            assert set(names) == set(item.choices) and len(set(examples)) == ways
        if kind == "classes":
            assert {*examples, query} <= set(NEW_CLASSES) and set(item.choices) <= set(NEW_NAMES)
        else:
            assert not {*examples, query} & set(NEW_CLASSES) and not set(item.choices) & set(NEW_NAMES)
        asked[item.choices.index(item.answer)] += 1
    assert set(asked) == set(range(ways))  # the order of the choices tells nothing


def test_words_take_the_place_of_pictures() -> None:
    for item in shot_items(5, 1, 2, "words"):
        assert not item.images
        keys = [message["content"][0]["text"] for message in item.messages if message["role"] == "user"]
        assert set(keys) <= set(KEYS) and keys[-1] in keys[:-1]


def test_items_are_the_same_for_the_same_arguments_whatever_n() -> None:
    few, many = list(shot_items(3, 2)), list(shot_items(6, 2))
    for a, b in zip(few, many, strict=False):
        assert (a.messages, a.answer, a.choices) == (b.messages, b.answer, b.choices)
        assert all((x == y).all() for x, y in zip(a.images, b.images, strict=True))
    other = list(shot_items(3, 2, seed=1))
    assert [item.messages for item in few] != [item.messages for item in other]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "pictures"}, "kind is 'pictures'; accepted: images, classes, words"),
        ({"split": "all"}, "split is 'all'; accepted: train, dev, test"),
        ({"kind": "classes", "ways": 9}, "ways is 9; accepted: 2 to 8"),
        ({"ways": 1}, "ways is 1; accepted: 2 to 33"),
        ({"shots": -1}, "shots is -1; accepted: 0 or more"),
    ],
)
def test_what_can_not_be_asked_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(shot_items(**({"n": 1, "shots": 1} | options)))


def brute_force(model: Any, processor: Any, item: ShotItem, choice: str) -> float:
    """Log-likelihood of a choice's tokens from one pass over the whole document, without cache or batch."""
    text = processor.apply_chat_template(list(item.messages))
    prompt = processor(text=[text], images=list(item.images) or None, return_tensors="pt")
    ids = processor.tokenizer(choice, add_special_tokens=False)["input_ids"]
    whole = torch.cat([prompt["input_ids"], torch.tensor([ids])], dim=1)
    with torch.no_grad():
        logits = model(input_ids=whole, pixel_values=prompt.get("pixel_values"), use_cache=False).logits[0]
    chances = logits.double().log_softmax(-1)
    first = whole.shape[1] - len(ids)
    return sum(float(chances[first + k - 1, token]) for k, token in enumerate(ids))


def test_forced_choice_is_the_likeliest_by_brute_force_of_one_and_of_several_tokens(shot_model: Any) -> None:
    model, processor = shot_model
    items = [*shot_items(4, 1), *shot_items(2, 3, 3)]  # of unequal lengths, so padded
    base = items[0]
    items.append(ShotItem(base.messages, base.images, "kedak", ("bamep dutul", "kedak", "bamep fizin lorob", "bamep")))
    for item, answered in zip(items, answer_shots(model, processor, items), strict=True):
        expected = [brute_force(model, processor, item, choice) for choice in item.choices]
        assert answered.scores == pytest.approx(expected, abs=1e-4)
        assert answered.chosen == item.choices[int(np.argmax(expected))]
    words = list(shot_items(3, 2, 2, "words"))
    for item, answered in zip(words, answer_shots(model, processor, words), strict=True):
        assert answered.scores == pytest.approx(
            [brute_force(model, processor, item, c) for c in item.choices], abs=1e-4
        )


def test_what_is_said_is_generated_greedily_until_the_end_or_one_token_more_than_a_name(shot_model: Any) -> None:
    model, processor = shot_model
    items = list(shot_items(5, 1))
    for item, answered in zip(items, answer_shots(model, processor, items), strict=True):
        text = processor.apply_chat_template(list(item.messages))
        inputs = dict(processor(text=[text], images=list(item.images), return_tensors="pt"))
        ids, new = inputs.pop("input_ids"), []
        inputs.pop("attention_mask")
        for _ in range(2):
            with torch.no_grad():
                logits = model(input_ids=ids, **inputs, use_cache=False).logits
            new.append(int(logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([[new[-1]]])], dim=1)
            if new[-1] == processor.tokenizer.eos_token_id:
                break
        assert answered.said == processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_what_is_printed_and_written_is_what_was_answered(
    shot_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the questions chosen right, a quarter said right; among examples of one shot alone."""
    count = 0

    def answering(model: Any, processor: Any, batch: ShotBatch) -> list[Answer]:
        nonlocal count
        answers = []
        for item in batch.items:
            wrong = next(choice for choice in item.choices if choice != item.answer)
            right, count = len(item.images) == 3, count + 1
            chosen = item.answer if right and count % 2 else wrong
            answers.append(Answer((0.0, 0.0), chosen, item.answer if right and count % 4 == 0 else f"{item.answer} x"))
        return answers

    monkeypatch.setattr(shots, "answer_batch", answering)
    printed = io.StringIO()
    measured = evaluate_shots(*shot_model, tmp_path, 8, "dev", Console(file=printed, width=150), shots=(1, 2))
    assert [(m.kind, m.shots, sum(m.forced), sum(m.free)) for m in measured] == [
        ("images", 1, 4, 2), ("images", 2, 0, 0), ("classes", 1, 4, 2), ("classes", 2, 0, 0),
    ]  # fmt: skip
    assert "images  1 shots  forced_choice 0.500 [0.215, 0.785]  generated 0.250 [0.071, 0.591]  n=8  chance 0.50" in (
        printed.getvalue()
    )
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert [[one["value"] for one in point["results"]] for point in written["points"]] == [[0.5, 0.25], [0, 0]] * 2
    assert written["command"] == "foveate eval --task shots --shots 1 --shots 2 --ways 2 --n 8 --split dev"


def test_pruned_prompts_and_other_caches_are_asked_the_same_questions(shot_model: Any, tmp_path: Path) -> None:
    from foveate.vlm.cache.parse import parse_kv

    asked = {"out": None, "n": 12, "split": "test", "console": Console(file=io.StringIO()), "shots": (4,)}
    full = evaluate_shots(*shot_model, **asked)
    kept = evaluate_shots(*shot_model, **asked, methods=[parse_method("fastv:layer=1,keep=1.0")])
    stored = evaluate_shots(*shot_model, **asked, kv=parse_kv("dense"))
    assert full == kept == stored
    asked["out"] = tmp_path
    pruned = evaluate_shots(*shot_model, **asked, methods=[parse_method("fastv:layer=1,keep=0.25")])
    assert [len(one.forced) for one in pruned] == [12, 12] and pruned != full
    assert json.loads((tmp_path / "metrics.json").read_text())["prune"] == ["fastv:layer=1,keep=0.25"]


def test_captions_are_asked_of_held_out_pictures_of_known_classes(
    shot_model: Any, classes: list[tuple[list[str], str]]
) -> None:
    model, processor = shot_model
    said = answer_captions(model, processor, 6)
    [(shown, split)] = classes
    assert split == "test" and not set(shown) & set(NEW_CLASSES)
    assert [truth.split()[1] for _, truth in said] == shown
    rng = np.random.default_rng([17, 0, 2])
    rng.integers(33, size=6)
    pixels = shots.draw_classes(shown, "test", rng).pixels
    one = processor(text=[processor.image_token], images=[pixels[2]], return_tensors="pt")
    generated = model.generate(**one, max_new_tokens=4, do_sample=False)[0, 1:]
    assert said[2][0] == processor.tokenizer.decode(generated, skip_special_tokens=True).strip()


def test_scores_are_log_likelihoods(shot_model: Any) -> None:
    [item] = shot_items(1, 1)
    everything = ShotItem(item.messages, item.images, "bamep", tuple(shots.NAMES))
    [answered] = answer_shots(*shot_model, [everything])
    assert all(score < 0 for score in answered.scores)
    assert sum(math.exp(score) for score in answered.scores) < 1
