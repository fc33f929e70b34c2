"""Samples to packed rows: several documents a row, under a token budget and a tile budget, never seeing each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..vlm.processor import FoveateProcessor
from .encoding import IGNORE, Sample


@dataclass(frozen=True)
class Waiting:
    """A sample, maybe only planned, and its position in the mixture."""

    position: int
    sample: Any


class Packer:
    """Fills rows from a window of waiting samples: the oldest first, then always the longest that still fits.

    Args:
        max_tokens: budget of a row in tokens.
        max_tiles: budget of a row in tiles (images and frames).
        window: samples that wait to be placed.
    """

    def __init__(self, max_tokens: int, max_tiles: int, window: int = 64):
        self.max_tokens, self.max_tiles, self.window = max_tokens, max_tiles, window
        self.waiting: list[Waiting] = []  # oldest first

    @property
    def wants_more(self) -> bool:
        return len(self.waiting) < self.window

    def misfit(self, sample: Sample) -> str | None:
        """Why a sample alone is over a budget; None where it fits."""
        for unit, size, budget in (
            ("tokens", sample.tokens, self.max_tokens),
            ("tiles", sample.tiles, self.max_tiles),
        ):
            if size > budget:
                return f"has {size} {unit}; a row accepts at most {budget}"
        return None

    def add(self, waiting: Waiting) -> None:
        """Takes a sample that fits."""
        self.waiting.append(waiting)

    def row(self) -> list[Waiting]:
        """The next row; the window must not be empty."""
        oldest, *others = self.waiting
        row, taken = [oldest], {oldest.position}
        tokens, tiles = oldest.sample.tokens, oldest.sample.tiles
        for waiting in sorted(others, key=lambda w: (-w.sample.tokens, w.position)):
            sample = waiting.sample
            if tokens + sample.tokens <= self.max_tokens and tiles + sample.tiles <= self.max_tiles:
                row.append(waiting)
                taken.add(waiting.position)
                tokens += sample.tokens
                tiles += sample.tiles
        self.waiting = [waiting for waiting in self.waiting if waiting.position not in taken]
        return row


@dataclass(frozen=True)
class RowFacts:
    """What the choice of a step's rows needs to know of a packed row: cost in FLOPs, and since which step it waits."""

    cost: float
    since: int
    tokens: int
    loss_tokens: int
    documents: int


def choose_rows(pools: Sequence[Sequence[RowFacts]], rows: int, step: int, patience: int) -> list[list[int]]:
    """Picks the rows of one step so that micro-batches cost about the same, attention's square included.

    All groups look for rows like the one that has waited longest anywhere: costly rows (a long video) are so computed
    by all ranks in the same step, instead of by one while the others wait.

    Args:
        pools: the packed rows that each group has in reserve, oldest first.
        rows: how many each group gives (fewer where it has fewer).
        step: number of the step.
        patience: steps after which a group's oldest row goes whatever it costs.

    Returns:
        For each group, the numbers of its rows.
    """
    waiting = [(row.since, group, row.cost) for group, pool in enumerate(pools) for row in pool]
    if not waiting:
        return [[] for _ in pools]
    target = min(waiting)[2]
    chosen = []
    for pool in pools:
        overdue = [i for i, row in enumerate(pool) if step - row.since >= patience]
        alike = sorted(range(len(pool)), key=lambda i: (i not in overdue, abs(pool[i].cost - target), i))
        chosen.append(sorted(alike[:rows]))
    return chosen


@dataclass(frozen=True)
class Batch:
    """Packed rows as tensors, or one rank's share of them (see `sequence.py`).

    `inputs` holds what the model's `forward` takes: `input_ids`, `position_ids` and `labels` [rows, tokens],
    and where there are media what `FoveateProcessor.media_inputs` gives. Position ids restart at every document, and no
    attention mask is given: that is how transformers' masks and flash-attention's varlen kernels are told that
    documents don't see each other.
    """

    inputs: dict[str, Any]
    keys: tuple[str, ...]
    lengths: tuple[int, ...]  # tokens of each document
    tiles: tuple[int, ...]  # of each document
    loss_tokens: int  # how many are predicted

    @property
    def tokens(self) -> int:
        """Tokens of documents, padding left out."""
        return sum(self.lengths)

    @property
    def positions(self) -> int:
        """Positions computed, padding included."""
        return self.inputs["input_ids"].numel()


def collate(rows: Sequence[Sequence[Sample]], processor: FoveateProcessor, raw_pixels: bool = False) -> Batch:
    """Lays rows of samples out as a batch; rows are padded to the longest with a document of padding.

    `raw_pixels` leaves pixels as uint8 [tiles, height, width, 3], which an objective normalises on its device.

    Without any sample the batch is one position of padding: what a rank computes when its data has ended before
    others' has.
    """
    length = max([sum(s.tokens for s in row) for row in rows], default=1)
    rows = rows or [[]]
    input_ids = np.full((len(rows), length), processor.tokenizer.pad_token_id or 0, dtype=np.int64)
    labels = np.full((len(rows), length), IGNORE, dtype=np.int64)
    position_ids = np.empty((len(rows), length), dtype=np.int64)
    for r, row in enumerate(rows):
        at = 0
        for sample in row:
            n = sample.tokens
            input_ids[r, at : at + n] = sample.input_ids
            labels[r, at : at + n] = sample.labels
            position_ids[r, at : at + n] = np.arange(n)
            at += n
        position_ids[r, at:] = np.arange(length - at)
    samples = [sample for row in rows for sample in row]
    inputs = {
        "input_ids": torch.from_numpy(input_ids),
        "position_ids": torch.from_numpy(position_ids),
        "labels": torch.from_numpy(labels),
    }
    inputs |= processor.media_inputs([sample.media for sample in samples], raw_pixels)
    return Batch(
        inputs,
        tuple(s.key for s in samples),
        tuple(s.tokens for s in samples),
        tuple(s.tiles for s in samples),
        sum(s.loss_tokens for s in samples),
    )
