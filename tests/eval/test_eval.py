import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from rich.console import Console

from foveate.data import drawing
from foveate.data.glyphs import COLOURS, DIGITS, Question
from foveate.eval import glyphs
from foveate.eval.glyphs import TASKS, Item, answer, evaluate, task_items
from foveate.eval.report import evaluate_and_report
from foveate.train.build import build_model
from foveate.train.recipe import Recipe
from foveate.vlm.model import FoveateForConditionalGeneration
from foveate.vlm.processor import FoveateProcessor

# Items


def pixels_of(item: Item) -> list[np.ndarray]:
    if isinstance(item.media, np.ndarray):
        return [item.media]
    with av.open(io.BytesIO(item.media)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize("task", TASKS)
def test_items_are_the_same_for_the_same_seed_and_split(task: str) -> None:
    first, again = list(task_items(task, 4)), list(task_items(task, 4))
    for a, b in zip(first, again, strict=True):
        assert a.question == b.question and a.frames == b.frames
        assert np.array_equal(a.media, b.media) if isinstance(a.media, np.ndarray) else a.media == b.media
    assert [item.question for item in task_items(task, 2)] == [item.question for item in first[:2]]
    others = [list(task_items(task, 4, "dev")), list(task_items(task, 4, seed=1))]
    shown = [[pixel.tobytes() for item in items for pixel in pixels_of(item)] for items in (first, *others)]
    assert shown[0] != shown[1] and shown[0] != shown[2] and shown[1] != shown[2]


@pytest.mark.parametrize("split", ["dev", "test"])
@pytest.mark.parametrize("task", TASKS)
def test_items_show_digits_of_their_split_alone(task: str, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were every digit of the split blank, the others' would still show; none does."""
    real, drawn = drawing.digit_masks, []

    def recorded(of: str) -> dict[str, np.ndarray]:
        drawn.append(of)
        return real(of)

    monkeypatch.setattr(drawing, "digit_masks", recorded)
    list(task_items(task, 6, split))
    assert set(drawn) == {split}


def brightest_colour(cell: np.ndarray) -> str:
    pixels = cell.reshape(-1, 3).astype(float)
    bright = pixels[np.argsort(pixels.max(axis=1))[-20:]].mean(axis=0)
    return max(COLOURS, key=lambda name: np.dot(COLOURS[name], bright) / np.linalg.norm(COLOURS[name]))


def test_truth_of_a_colour_question_is_seen_in_the_picture() -> None:
    for item in task_items("colour_at", 40):
        name = item.question.text.split()[4]
        x, y = "abcd".index(name[0]) * 16, (int(name[1]) - 1) * 16
        assert brightest_colour(item.media[y : y + 16, x : x + 16]) == item.question.fact


@pytest.mark.parametrize(("task", "frames", "answers"), [("clip_colour_8", 8, COLOURS), ("needle_64", 64, DIGITS),
                                                         ("needle_128", 128, DIGITS)])  # fmt: skip
def test_video_tasks_ask_about_real_files(task: str, frames: int, answers: Sequence[str]) -> None:
    for item in task_items(task, 3):
        assert item.media[4:8] == b"ftyp"
        assert len(pixels_of(item)) == item.frames == frames
        assert item.question.fact in answers


def test_unknown_task_and_split_are_named() -> None:
    with pytest.raises(ValueError, match="task is 'poems'; accepted: what_at"):
        next(task_items("poems", 1))
    with pytest.raises(ValueError, match="split is 'all'; accepted: train, dev, test"):
        next(task_items("what_at", 1, "all"))


# Answers


@pytest.fixture
def model_and_processor(
    tiny_recipe: Callable[..., Recipe],
) -> tuple[FoveateForConditionalGeneration, FoveateProcessor]:
    torch.manual_seed(0)
    model, processor = build_model(tiny_recipe().model)
    return model.eval(), processor


class Scripted:
    """In the model's place: takes note of its inputs and says what it is told."""

    device = torch.device("cpu")

    def __init__(self, says: list[str], processor: FoveateProcessor):
        tokenizer = processor.tokenizer
        self.said = tokenizer(says, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
        self.inputs: dict[str, torch.Tensor] = {}

    def generate(self, input_ids: torch.Tensor, **options: object) -> torch.Tensor:
        self.inputs = {"input_ids": input_ids} | options
        return torch.cat([input_ids, self.said], dim=1)


def test_answers_are_what_is_generated_after_the_prompt(
    model_and_processor: tuple[FoveateForConditionalGeneration, FoveateProcessor],
) -> None:
    _, processor = model_and_processor
    items = [*task_items("what_at", 1), *task_items("row_column", 1)]
    scripted = Scripted(["red circle<|end|>", "b3<|end|>"], processor)
    assert answer(scripted, processor, items) == ["red circle", "b3"]
    for ids, mask, item in zip(scripted.inputs["input_ids"], scripted.inputs["attention_mask"], items, strict=True):
        prompt = processor.tokenizer.decode(ids[mask.bool()])
        assert prompt.replace(" ", "") == (
            "<|user|>" + "<image>" * 16 + item.question.text.replace(" ", "") + "<|assistant|>"
        )
        assert mask.tolist() == sorted(mask.tolist())  # padding stands on the left
    assert scripted.inputs["pixel_values"].shape == (2, 3, 64, 64)
    assert scripted.inputs["do_sample"] is False


def test_batched_answers_equal_single_ones(
    model_and_processor: tuple[FoveateForConditionalGeneration, FoveateProcessor],
) -> None:
    model, processor = model_and_processor
    items = [*task_items("where_is", 2), *task_items("row_column", 2), *task_items("what_at", 2)]
    assert answer(model, processor, items) == [answer(model, processor, [item])[0] for item in items]
    clips = list(task_items("clip_colour_8", 2))
    assert answer(model, processor, clips) == [answer(model, processor, [item])[0] for item in clips]


# Counting


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """`evaluate` over 10 made-up questions of which 7 are answered rightly."""
    truths = ["red", "red", "red", "red", "blue", "blue", "blue", "cyan", "cyan", "red"]
    says = ["red", "red", "red", "blue", "blue", "blue", "", "cyan", "cyan blue", "red"]
    image = np.zeros((64, 64, 3), np.uint8)
    items = [
        Item(Question(task="t", text=f"number {i} ?", subject="", fact=truth), image) for i, truth in enumerate(truths)
    ]
    seen = SimpleNamespace(truths=truths, says=says, batches=[])

    def answered(_: object, __: object, batch: Sequence[Item]) -> list[str]:
        seen.batches.append(len(batch))
        return [says[int(item.question.text.split()[1])] for item in batch]

    monkeypatch.setattr(glyphs, "task_items", lambda task, n, split, seed, topology: iter(items[:n]))
    monkeypatch.setattr(glyphs, "answer", answered)
    yield seen


def test_evaluate_counts_answers_that_equal_the_truth(
    counted: SimpleNamespace, model_and_processor: tuple[FoveateForConditionalGeneration, FoveateProcessor]
) -> None:
    done: list[int] = []
    # 32 tokens an item: 16 of the image and 16 of text
    result = evaluate(*model_and_processor, "what_at", n=10, batch_tokens=128, after_batch=done.append)
    assert counted.batches == [4, 4, 2]
    assert done == [4, 8, 10]
    assert (result.accuracy, result.n) == (0.7, 10)
    assert (result.low, result.high) == pytest.approx((0.3968, 0.8922), abs=1e-4)
    assert (result.chance, result.majority) == (1 / 3, 0.5)
    assert [(a["truth"], a["answer"]) for a in result.answers] == list(zip(counted.truths, counted.says, strict=True))
    assert result.summary() == {
        "accuracy": 0.7, "n": 10, "low": result.low, "high": result.high, "chance": 1 / 3, "majority": 0.5,
    }  # fmt: skip


def test_one_item_over_the_batch_size_is_still_asked(
    counted: SimpleNamespace, model_and_processor: tuple[FoveateForConditionalGeneration, FoveateProcessor]
) -> None:
    assert evaluate(*model_and_processor, "what_at", n=3, batch_tokens=1).accuracy == 1.0
    assert counted.batches == [1, 1, 1]


def test_report_is_written(
    model_and_processor: tuple[FoveateForConditionalGeneration, FoveateProcessor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = {task: TASKS[task] for task in ("what_at", "clip_colour_8")}
    monkeypatch.setattr("foveate.eval.report.TASKS", few)
    output = io.StringIO()
    results = evaluate_and_report(*model_and_processor, tmp_path / "out", 3, "dev", Console(file=output, width=120))
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {task: values["accuracy"] for task, values in metrics["tasks"].items()} == {
        task: result.accuracy for task, result in results.items()
    }
    assert all(values["n"] == 3 and not math.isnan(values["chance"]) for values in metrics["tasks"].values())
    assert {"command", "commit", "date", "device", "versions"} < set(metrics)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "what_at" in page and "data:image/png;base64," in page and "--split dev" in page
    for task in few:
        assert any(task in line and "n=3" in line for line in output.getvalue().splitlines())
