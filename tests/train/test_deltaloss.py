import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from foveate.data.document import Document, DocumentError, Text
from foveate.data.encoding import encode
from foveate.data.glyphs import CELLS, COLOURS, DIGITS, GlyphSource
from foveate.data.packing import collate
from foveate.data.sources import open_source
from foveate.train.build import build_model
from foveate.train.deltaloss import document_losses, prune, scores, select
from foveate.train.recipe import Recipe
from foveate.vlm.model import FoveateForConditionalGeneration
from foveate.vlm.processor import FoveateProcessor

Model = tuple[FoveateForConditionalGeneration, FoveateProcessor]


@pytest.fixture
def build(tiny_recipe: Callable[..., Recipe], same_threads: None) -> Callable[..., Model]:
    """A tiny model, with dropout in its attention."""
    torch.set_num_threads(1)

    def of(attention: str = "sdpa") -> Model:
        torch.manual_seed(0)
        return build_model(tiny_recipe(f"model.attn_implementation={attention}").model)

    return of


class Documents:
    """A source of given documents; in the place of some an error."""

    def __init__(self, documents: Sequence[Document | DocumentError]):
        self.all, self.documents, self.runs = documents, len(documents), (len(documents),)

    def document(self, index: int) -> Document:
        if isinstance(found := self.all[index], DocumentError):
            raise found
        return found

    def key(self, index: int) -> str:
        return self.all[index].key


def alone(model: FoveateForConditionalGeneration, processor: FoveateProcessor, document: Document) -> tuple[float, int]:
    """A document's loss as transformers computes it, and its tokens with loss."""
    sample = encode(document, processor)
    if not sample.loss_tokens:
        return 0.0, 0
    with torch.no_grad():
        mean = model.eval()(**collate([[sample]], processor).inputs, use_cache=False).loss
    return float(mean) * sample.loss_tokens, sample.loss_tokens


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("batch_tokens", [1, 150, 100_000])
def test_losses_in_packed_rows_are_those_of_each_document_alone(
    build: Callable[..., Model], attention: str, batch_tokens: int
) -> None:
    model, processor = build(attention)
    kinds = ("captions", "clip_chat", "interleaved", "scene_chat")
    documents: list[Document | DocumentError] = [
        GlyphSource(kind, processor, seed=3).document(index) for index in range(3) for kind in kinds
    ]
    documents[4] = DocumentError("bad", "missing_media", "no image")
    documents[7] = Document("no loss", (Text("a scene"),))
    indices = [5, 4, 0, 7, 11, 1, 2, 6]
    model.train()
    found = document_losses(model, processor, Documents(documents), indices, batch_tokens, "cpu")
    assert model.training
    assert found.shape == (8, 2) and np.isnan(found[1, 0]) and found[1, 1] == 0
    for place, index in enumerate(indices):
        if isinstance(document := documents[index], Document):
            loss, tokens = alone(model, processor, document)
            assert found[place, 1] == tokens
            assert found[place, 0] == pytest.approx(loss, rel=1e-5)


def test_workers_give_the_same_losses(build: Callable[..., Model]) -> None:
    model, processor = build()
    source = GlyphSource("captions", processor, documents=12)
    told: list[int] = []
    one, several = (
        document_losses(model, processor, source, range(12), 200, "cpu", workers, told.append) for workers in (0, 2)
    )
    np.testing.assert_array_equal(one, several)
    assert told[-1] == 12 and told == sorted(told[: len(told) // 2]) * 2


# Choosing


def test_score_is_the_log_ratio_of_probabilities_a_token() -> None:
    """p of an answer of two tokens: small 0.1 · 0.5, large 0.8 · 0.5."""
    small = np.array([[-np.log(0.1 * 0.5), 2]])
    large = np.array([[-np.log(0.8 * 0.5), 2]])
    assert scores(small, large) == pytest.approx([np.log(8) / 2])


def test_highest_scores_are_kept() -> None:
    small = np.array([[4.0, 2], [1.0, 1], [9.0, 3], [1.0, 10], [np.nan, 0], [0.0, 0]])
    large = np.array([[2.0, 2], [3.0, 1], [0.0, 3], [1.0, 10], [np.nan, 0], [0.0, 0]])
    np.testing.assert_allclose(scores(small, large), [1, -2, 3, 0, np.nan, np.nan])
    assert select(small, large, 1 / 6).tolist() == [2]
    assert select(small, large, 0.5).tolist() == [0, 2, 3]
    assert select(small, large, 1.0).tolist() == [0, 1, 2, 3]  # never one that can't be used
    same = np.ones((6, 2))
    assert select(same, same, 0.5).tolist() == [0, 1, 2]
    for fraction in (0.0, 1.5):
        with pytest.raises(ValueError, match="keep_fraction is"):
            select(small, large, fraction)
    with pytest.raises(ValueError, match="of the same documents"):
        select(small, large[:3], 0.5)


def record(question: str, answer: str) -> dict:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def lesson() -> tuple[list[dict], list[dict], list[dict]]:
    """Questions whose answers both models know, questions that only the large one knows, and scrambled answers."""
    rng = np.random.default_rng(0)
    digits, colours, others = (rng.choice(list(names), len(CELLS)) for names in (DIGITS, COLOURS, DIGITS))
    easy = [record(f"what is at {cell} ?", digit) for cell, digit in zip(CELLS, digits, strict=True)]
    useful = [record(f"what colour is at {cell} ?", colour) for cell, colour in zip(CELLS, colours, strict=True)]
    true = [record(f"which digit at {cell} ?", digit) for cell, digit in zip(CELLS, others, strict=True)]
    return easy, useful, true


def scrambled(records: list[dict]) -> list[dict]:
    """Each answer made another one."""
    said = [entry["conversations"][1]["value"] for entry in records]
    wrong = [str((int(digit) + 1 + n % 8) % 10) for n, digit in enumerate(said)]
    return [record(entry["conversations"][0]["value"], digit) for entry, digit in zip(records, wrong, strict=True)]


def taught(model: Model, records: list[dict], folder: Path) -> str:
    """Trains a model on records until it knows them, and saves it."""
    net, processor = model
    (folder.parent / "lesson.json").write_text(json.dumps(records))
    source = open_source(folder.parent / "lesson.json", processor)
    batch = collate([[encode(source.document(i), processor) for i in range(len(records))]], processor).inputs
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    net.eval()
    for _ in range(300):
        loss = net(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.02:
            break
    assert loss < 0.05
    net.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_prune_keeps_what_only_the_large_model_knows(build: Callable[..., Model], tmp_path: Path) -> None:
    easy, useful, true = lesson()
    small = taught(build(), easy, tmp_path / "small")
    large = taught(build(), easy + useful + true, tmp_path / "large")
    records = [entry for three in zip(easy, useful, scrambled(true), strict=True) for entry in three]
    bad = [{"caption": "x", "image": "missing.png"}]
    (tmp_path / "data.json").write_text(json.dumps(records + bad))
    out = tmp_path / "new" / "kept.json"
    told: list[tuple[str, int, int]] = []
    about = prune(
        str(tmp_path / "data.json"), out, small, large, 16 / 49, batch_tokens=60, device="cpu",
        after_document=lambda *progress: told.append(progress),
    )  # fmt: skip
    kept = json.loads(out.read_text())
    assert kept["format"] == "foveate-subset-1" and kept["of"] == 49
    assert kept["indices"] == list(range(1, 48, 3))
    rows = json.loads((tmp_path / "new" / "kept.scores.json").read_text())["documents"]
    assert [row["index"] for row in rows] == list(range(49))
    score = [row["score"] for row in rows]
    assert score[48] is None and rows[48]["key"] == "data.json/48"
    assert min(score[1:48:3]) > 1  # useful
    assert max(abs(s) for s in score[0:48:3]) < 0.2  # too easy
    assert np.mean(score[2:48:3]) < -0.5  # wrong
    assert score[1] == pytest.approx(rows[1]["small"] - rows[1]["large"])
    assert about == kept["about"] and (about["documents"], about["kept"], about["unusable"]) == (49, 16, 1)
    assert told[-1] == (large, 49, 49) and (small, 49, 49) in told
    _, processor = build()
    subset = open_source(tmp_path / "data.json", processor, subset=out)
    assert subset.documents == 16 and subset.key(0) == "data.json/1"


def test_prune_says_what_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep_fraction is 0"):
        prune("x", tmp_path / "a.json", "s", "l", 0.0)
    with pytest.raises(ValueError, match=r"accepted: the name of one|no \.json"):
        prune("x", tmp_path / "a.txt", "s", "l", 0.5)
