"""What a source holds: documents, tokens, images and frames, counted by reading and encoding them."""

import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from torch.utils.data import DataLoader, Dataset

from ..vlm.processor import FoveateProcessor
from .document import Document, DocumentError, Image
from .encoding import Sample, encode
from .sources import Source

MEASURES = ("tokens", "loss tokens", "images", "frames")  # of a document
PERCENTILES = (1, 50, 90, 99)
FIRST_KEYS = 5  # of bad documents, by reason
BINS = 12  # of a histogram
T = TypeVar("T")


def spread(documents: int | None, sample: int | None) -> list[int]:
    """Which documents stand for all: `sample` of them, evenly spread from the first to the last.

    Args:
        documents: how many there are; None where the source is endless, of which the first `sample` are taken.
        sample: how many to take; None takes all.

    Raises:
        ValueError: all documents of an endless source, or a sample below 1.
    """
    if sample is not None and sample < 1:
        raise ValueError(f"sample is {sample}; accepted: 1 at least")
    if documents is None:
        if sample is None:
            raise ValueError("the source is endless; accepted: a sample of so many documents")
        return list(range(sample))
    if sample is None or sample >= documents:
        return list(range(documents))
    return np.linspace(0, documents - 1, sample).round().astype(np.int64).tolist()


class _Each(Dataset, Generic[T]):
    """By place: what `take` makes of a document, or why there is none."""

    def __init__(
        self,
        source: Source,
        processor: FoveateProcessor,
        indices: Sequence[int],
        take: Callable[[Document, Sample], T],
    ):
        self.source, self.processor, self.indices, self.take = source, processor, indices, take

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> T | DocumentError:
        try:
            document = self.source.document(self.indices[place])
            return self.take(document, encode(document, self.processor))
        except DocumentError as error:
            return error


def _as_it_is(item: T) -> T:
    return item


def read_each(
    source: Source,
    processor: FoveateProcessor,
    indices: Sequence[int],
    take: Callable[[Document, Sample], T],
    workers: int = 0,
) -> Iterator[T | DocumentError]:
    """Reads and encodes documents, in the order of `indices`.

    Args:
        take: what is wanted of a document and its sample; runs in the worker, so a small result is sent quickly.
        workers: processes that read; 0 reads in this one.

    Yields:
        For each index what `take` gave, or the error of a document that can't be used.
    """
    dataset = _Each(source, processor, indices, take)
    yield from DataLoader(dataset, batch_size=None, shuffle=False, num_workers=workers, collate_fn=_as_it_is)


def _measure(document: Document, sample: Sample) -> tuple[int, ...]:
    images = sum(isinstance(part, Image) for part in document.parts)
    return sample.tokens, sample.loss_tokens, images, len(sample.frames)


def _tokens(document: Document, sample: Sample) -> int:
    return sample.tokens


def mean_tokens(source: Source, processor: FoveateProcessor, sample: int = 64) -> float:
    """Mean tokens of a document, from `sample` evenly spread ones; those that can't be used are left out.

    Raises:
        ValueError: none of them can be used; the message names the first and why.
    """
    taken = list(read_each(source, processor, spread(source.documents, sample), _tokens))
    counts = [tokens for tokens in taken if isinstance(tokens, int)]
    if not counts:
        first = f"; the first: {taken[0]}" if taken else ""
        raise ValueError(f"mean tokens: none of {len(taken)} documents can be used{first}; accepted: one at least")
    return sum(counts) / len(counts)


@dataclass
class Statistics:
    """Counts of a source's documents.

    Args:
        documents: of the source; None where it is endless.
        sampled: whether `values` are of evenly spread documents instead of all: totals are then estimates.
        values: int64 [good documents, measures], in the order of `MEASURES`.
        bad: reason → how many of the documents read can't be used for it.
        bad_keys: reason → the keys of the first of them.
    """

    documents: int | None
    sampled: bool
    values: np.ndarray
    bad: Counter[str] = field(default_factory=Counter)
    bad_keys: dict[str, list[str]] = field(default_factory=dict)

    @property
    def read(self) -> int:
        """Documents that were read, bad ones included."""
        return len(self.values) + sum(self.bad.values())

    def total(self, measure: str) -> float | None:
        """Sum over all documents of the source, an estimate where only some were read; None where it is endless."""
        read = self.values[:, MEASURES.index(measure)].sum()
        if not self.sampled:
            return int(read)
        return None if self.documents is None else float(read * self.documents / max(self.read, 1))

    def summary(self) -> dict[str, Any]:
        """What JSON can hold: documents, bad ones by reason, and total, mean and percentiles of each measure."""
        measures = {}
        for measure, column in zip(MEASURES, self.values.T, strict=True):
            measures[measure] = {"total": self.total(measure)}
            if len(column):
                points = np.percentile(column, PERCENTILES, method="inverted_cdf").tolist()
                measures[measure] |= {"mean": float(column.mean()), "min": int(column.min())}
                measures[measure] |= {f"p{p}": int(x) for p, x in zip(PERCENTILES, points, strict=True)}
                measures[measure] |= {"max": int(column.max())}
        return {
            "documents": self.documents,
            "read": self.read,
            "estimated": self.sampled,
            "bad": {reason: {"documents": n, "first": self.bad_keys[reason]} for reason, n in self.bad.most_common()},
            "measures": measures,
        }


def measure(
    source: Source,
    processor: FoveateProcessor,
    sample: int | None = None,
    workers: int = 0,
    after_document: Callable[[int, int], None] | None = None,
) -> Statistics:
    """Reads and encodes documents and counts what they hold.

    Args:
        sample: read so many evenly spread documents; None reads all.
        workers: processes that read; 0 reads in this one.
        after_document: is told how many of how many documents are read.
    """
    indices = spread(source.documents, sample)
    statistics = Statistics(source.documents, len(indices) != source.documents, np.zeros((0, len(MEASURES)), np.int64))
    rows: list[tuple[int, ...]] = []
    for done, taken in enumerate(read_each(source, processor, indices, _measure, workers), 1):
        if isinstance(taken, DocumentError):
            statistics.bad[taken.reason] += 1
            keys = statistics.bad_keys.setdefault(taken.reason, [])
            if len(keys) < FIRST_KEYS:
                keys.append(taken.key)
        else:
            rows.append(taken)
        if after_document:
            after_document(done, len(indices))
    statistics.values = np.array(rows, dtype=np.int64).reshape(-1, len(MEASURES))
    return statistics


def histogram(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A histogram of counts: edges int64 [bins + 1], numbers int64 [bins]; edges[i] ≤ value < edges[i + 1].

    Edges are whole numbers, equally far apart, or by a factor where the largest value is over 20 times the smallest.
    """
    low, high = int(values.min()), int(values.max()) + 1
    if high - low <= BINS:
        edges = np.arange(low, high + 1)
    elif high > 20 * max(low, 1):
        edges = np.unique([low, *np.geomspace(max(low, 1), high, BINS + 1).round().astype(np.int64)])
    else:
        width = -(-(high - low) // BINS)  # the same for all: bars of unequal width would mislead
        edges = np.arange(low, high + width, width)
    return edges, np.bincount(np.searchsorted(edges, values, side="right") - 1, minlength=len(edges) - 1)


def print_statistics(statistics: Statistics, console: Console) -> None:
    """Tables and histograms on a terminal."""
    summary = statistics.summary()
    of = "" if statistics.documents is None else f" of {statistics.documents:,}"
    estimated = " (evenly spread; totals are estimates)" if statistics.sampled else ""
    bad = sum(statistics.bad.values())
    console.print(
        f"{statistics.read:,}{of} documents read{estimated}, {bad:,} of them can't be used",
        highlight=False,
        soft_wrap=True,
    )
    table = Table("", "total", "mean", "min", *(f"p{p}" for p in PERCENTILES), "max", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, facts in summary["measures"].items():
        if "mean" not in facts:
            continue
        total = "endless" if facts["total"] is None else f"{'≈ ' * statistics.sampled}{facts['total']:,.0f}"
        whole = [f"{facts[key]:,}" for key in ("min", *(f"p{p}" for p in PERCENTILES), "max")]
        table.add_row(name, total, f"{facts['mean']:,.1f}", *whole)
    if len(statistics.values):
        console.print(table)
    for name, column in zip(MEASURES, statistics.values.T, strict=True):
        if len(column) and column.max() > column.min():
            console.print(Group("", f"{name} a document", _bars(column)), highlight=False)
    if statistics.bad:
        reasons = Table("\ncan't be used", "\ndocuments", "\nfirst keys", box=None, pad_edge=False)
        for reason, n in statistics.bad.most_common():
            reasons.add_row(reason, f"{n:,}", Text(", ".join(statistics.bad_keys[reason])))  # no markup in keys
        console.print(reasons)


def _bars(values: np.ndarray) -> Table:
    edges, counts = histogram(values)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column()
    for low, high, n in zip(edges[:-1], edges[1:], counts, strict=True):
        label = f"{low:,}" if high == low + 1 else f"{low:,} – {high - 1:,}"
        table.add_row(label, f"{n:,}", "█" * round(40 * n / counts.max()) or ("▏" if n else ""))
    return table


def write_statistics(statistics: Statistics, source: str, out: Path) -> None:
    """Writes `statistics.json` and `statistics.png` to a folder."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "statistics.json").write_text(json.dumps({"source": source} | statistics.summary(), indent=1) + "\n")
    (out / "statistics.png").write_bytes(statistics_picture(statistics, source))


def statistics_picture(statistics: Statistics, title: str) -> bytes:
    """A PNG with a histogram of each measure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}: {statistics.read:,} documents", fontsize=11)
    for axes, name, column in zip(figure.subplots(2, 2).flat, MEASURES, statistics.values.T, strict=True):
        axes.set_title(f"{name} a document", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if not len(column) or not column.any():
            axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", color="0.5")
            axes.set_axis_off()
            continue
        axes.margins(y=0.12)
        width = max(1, -(-(int(column.max()) + 1 - int(column.min())) // 60))
        axes.hist(column, bins=np.arange(column.min(), column.max() + width + 1, width) - 0.5, color="#4477aa")
        for point, line, height in ((50, "-", -2), (99, "--", -13)):
            x = np.percentile(column, point, method="inverted_cdf")
            axes.axvline(x, color="#aa3377", linewidth=1, linestyle=line)
            label = axes.annotate(f"p{point} {x:,.0f}", (x, 1), xycoords=("data", "axes fraction"), fontsize=8)
            label.set(color="#aa3377", va="top", position=(3, height), anncoords="offset points")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
