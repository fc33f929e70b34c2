"""`foveate eval --task rows`: what it prints and writes is what was answered."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from foveate.eval.prune import row_items
from foveate.eval.rows import evaluate_rows
from foveate.vlm.pruning import parse_method


@pytest.mark.parametrize("keep", [0.25, 1.0])
def test_what_is_printed_and_written_is_what_was_answered(
    row_model: Any, keep: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = row_model
    truths = [item.question.answer.split() for item in row_items(4, "dev")]
    said = [
        " ".join(words[:right] + ["nothing"] * (8 - right)) for words, right in zip(truths, (8, 4, 8, 0), strict=True)
    ]
    batches = iter([said])

    def answers(model: Any, processor: Any, items: Any, max_new_tokens: int) -> list[str]:
        real(model, processor, items, max_new_tokens)  # so that tokens are dropped
        return next(batches)

    from foveate.eval import prune

    real = prune.answer
    monkeypatch.setattr(prune, "answer", answers)
    printed = io.StringIO()
    method = parse_method(f"fastv:layer=3,keep={keep}")
    measured = evaluate_rows(model, processor, tmp_path, 4, "dev", Console(file=printed, width=200), [method])
    assert measured.right == (8, 4, 8, 0)
    visual = (3 * 32 + keep * 32) / 4
    assert f"word_accuracy  {20 / 32:.3f}" in printed.getvalue()
    assert f"exact_match  {2 / 4:.3f}" in printed.getvalue()
    assert f"visual tokens {visual:.1f} of 32" in printed.getvalue()
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert [one["value"] for one in written["results"]] == [20 / 32, 0.5]
    assert written["visual_tokens"] == visual
    assert written["prune"] == [f"fastv:layer=3,keep={keep}"]
    assert "--prune fastv:layer=3" in written["command"]
    assert (written["recall"] == 1) == (keep == 1)


def test_models_that_read_other_numbers_of_tokens_are_refused(row_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = row_model
    monkeypatch.setattr(processor, "image_size", [64, 64])
    with pytest.raises(ValueError, match="reads 16 tokens of a scene of rows; accepted: 32"):
        evaluate_rows(model, processor, None, 4, "dev", Console(file=io.StringIO()))
