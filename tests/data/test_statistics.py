import io
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage
from rich.console import Console

from foveate.data.document import Document, DocumentError, Image, Text, Video
from foveate.data.statistics import (
    Statistics,
    histogram,
    mean_tokens,
    measure,
    print_statistics,
    spread,
    write_statistics,
)
from foveate.vlm.processor import FoveateProcessor

PICTURE = np.zeros((64, 64, 3), np.uint8)


class Documents:
    """A source of given documents, which counts how often each is read; in the place of some an error."""

    def __init__(self, documents: Sequence[Document | DocumentError], endless: bool = False):
        self.all, self.endless = documents, endless
        self.read: list[int] = []
        self.runs = () if endless else (len(documents),)

    @property
    def documents(self) -> int | None:
        return None if self.endless else len(self.all)

    def document(self, index: int) -> Document:
        self.read.append(index)
        found = self.all[index % len(self.all)]
        if isinstance(found, DocumentError):
            raise found
        return found

    def key(self, index: int) -> str:
        return self.all[index].key


def words(number: int, loss: int = 0) -> Document:
    """A document of so many tokens, the last `loss` of them with loss."""
    return Document(f"d{number}", (Text("a " * (number - loss)), Text("scene " * loss, loss=True)))


BAD = DocumentError("bad/1", "missing_media", "no image")


def test_documents_are_counted(processor: FoveateProcessor) -> None:
    clip = np.zeros((5, 32, 32, 3), np.uint8)
    source = Documents(
        [
            words(10, 4),
            Document("a", (Image(PICTURE), Text("a scene", loss=True), Image(PICTURE))),
            BAD,
            Document("b", (Video(clip), Text("a", loss=True))),
            DocumentError("bad/2", "missing_media", "no image"),
            Document("c", (Image(b"not one"), Text("a"))),
        ]
    )
    found = measure(source, processor)
    # 16 tokens an image; 4 a frame and a separator
    assert found.values.tolist() == [[10, 4, 0, 0], [34, 2, 2, 0], [26, 1, 0, 5]]
    assert found.bad == {"missing_media": 2, "unreadable_media": 1}
    assert found.bad_keys == {"missing_media": ["bad/1", "bad/2"], "unreadable_media": ["c"]}
    summary = found.summary()
    assert (summary["documents"], summary["read"], summary["estimated"]) == (6, 6, False)
    assert summary["measures"]["tokens"] == {
        "total": 70, "mean": pytest.approx(70 / 3), "min": 10, "p1": 10, "p50": 26, "p90": 34, "p99": 34, "max": 34,
    }  # fmt: skip
    assert [summary["measures"][name]["total"] for name in ("loss tokens", "images", "frames")] == [7, 2, 5]


def test_workers_count_the_same(processor: FoveateProcessor) -> None:
    source = Documents([BAD if n % 5 == 4 else words(n + 1, n // 2) for n in range(23)])
    alone, together = measure(source, processor), measure(source, processor, workers=2)
    np.testing.assert_array_equal(alone.values, together.values)
    assert (alone.bad, alone.bad_keys) == (together.bad, together.bad_keys)


def test_sample_is_evenly_spread_and_totals_are_estimates(processor: FoveateProcessor) -> None:
    source = Documents([words(1 + n % 3) for n in range(101)])
    told: list[tuple[int, int]] = []
    found = measure(source, processor, sample=11, after_document=lambda *progress: told.append(progress))
    assert source.read == list(range(0, 101, 10)) and told[-1] == (11, 11)
    tokens = [1 + n % 3 for n in range(0, 101, 10)]
    summary = found.summary()
    assert summary["estimated"] is True and summary["read"] == 11
    assert summary["measures"]["tokens"]["total"] == pytest.approx(sum(tokens) / 11 * 101)
    assert measure(source, processor, sample=101).summary()["estimated"] is False


def test_bad_documents_count_in_an_estimate(processor: FoveateProcessor) -> None:
    """Of 100 documents half are bad: the total is of the other half."""
    source = Documents([words(10) if n % 2 else BAD for n in range(100)])
    found = measure(source, processor, sample=10)
    good = len(found.values)
    assert found.summary()["measures"]["tokens"]["total"] == pytest.approx(good * 10 * 100 / 10)


def test_endless_source_needs_a_sample(processor: FoveateProcessor) -> None:
    source = Documents([words(3), words(5)], endless=True)
    with pytest.raises(ValueError, match="endless; accepted: a sample"):
        measure(source, processor)
    summary = measure(source, processor, sample=4).summary()
    assert (summary["documents"], summary["read"]) == (None, 4)
    assert summary["measures"]["tokens"]["total"] is None and summary["measures"]["tokens"]["mean"] == 4


def test_source_without_good_documents(processor: FoveateProcessor, tmp_path: Path) -> None:
    found = measure(Documents([BAD, BAD]), processor)
    assert found.summary()["measures"]["tokens"] == {"total": 0}
    text = printed(found)
    assert "2 of 2 documents read, 2 of them can't be used" in text and "missing_media" in text
    write_statistics(found, "x", tmp_path)


@given(st.integers(1, 5000), st.integers(1, 300))
def test_spread_reaches_from_first_to_last(documents: int, sample: int) -> None:
    taken = spread(documents, sample)
    assert len(taken) == min(documents, sample)
    assert all(a < b for a, b in pairwise(taken))
    assert taken[0] == 0 and (sample == 1 or taken[-1] == documents - 1)
    gaps = {b - a for a, b in pairwise(taken)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_mean_tokens_is_of_evenly_spread_good_documents(processor: FoveateProcessor) -> None:
    source = Documents([BAD if n == 50 else words(1 + n) for n in range(101)])
    assert mean_tokens(source, processor, sample=5) == pytest.approx(np.mean([1, 26, 76, 101]))
    assert source.read == [0, 25, 50, 75, 100]
    assert mean_tokens(Documents([words(4), words(8)]), processor) == 6
    with pytest.raises(ValueError, match="none of 2 documents can be used; the first: bad/1: no image"):
        mean_tokens(Documents([BAD, BAD]), processor)
    with pytest.raises(ValueError, match="sample is 0"):
        mean_tokens(source, processor, sample=0)


# Output


def printed(found: Statistics) -> str:
    console = Console(file=io.StringIO(), width=100)
    print_statistics(found, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_tables_show_totals_and_bad_documents() -> None:
    values = np.array([[n, n // 2, 1, 0] for n in range(1, 1001)])
    found = Statistics(5000, True, values)
    found.bad["bad_json"] += 3
    found.bad_keys["bad_json"] = ["a[bold]/1"]
    text = printed(found)
    assert "1,003 of 5,000 documents read (evenly spread; totals are estimates), 3 of them can't be used" in text
    row = next(line.split() for line in text.splitlines() if line.startswith("tokens "))
    total = round(500_500 * 5000 / 1003)
    assert row == ["tokens", "≈", f"{total:,}", "500.5", "1", "10", "500", "900", "990", "1,000"]
    assert "bad_json" in text and "a[bold]/1" in text
    assert "images a document" not in text  # all the same: the table has said it


def test_files_hold_the_same_numbers(tmp_path: Path) -> None:
    found = Statistics(3, False, np.array([[5, 1, 0, 2], [7, 2, 0, 2], [900, 3, 0, 2]]))
    write_statistics(found, "data/x", tmp_path / "new")
    content = json.loads((tmp_path / "new" / "statistics.json").read_text())
    assert content == {"source": "data/x"} | json.loads(json.dumps(found.summary()))
    with PILImage.open(tmp_path / "new" / "statistics.png") as image:
        assert image.format == "PNG" and image.width > 500


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=200))
def test_histogram_counts_every_value_once(values: list[int]) -> None:
    edges, counts = histogram(np.array(values))
    assert (np.diff(edges) > 0).all() and len(counts) == len(edges) - 1 <= 13
    expected = [sum(low <= value < high for value in values) for low, high in pairwise(edges)]
    assert counts.tolist() == expected and sum(expected) == len(values)
    if edges[-1] <= 20 * max(edges[0], 1):
        assert len(set(np.diff(edges).tolist())) == 1
