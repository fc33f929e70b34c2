"""Samples to packed rows: several documents a row, under a token budget and a tile budget, never seeing each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from ..vlm.processor import FoveateProcessor
from ..vlm.tiling import normalise
from .encoding import IGNORE, Sample


class SampleSource(Protocol):
    """Samples by number, from 0, endless; the same number is always the same sample."""

    def sample(self, index: int) -> Sample: ...


class Packer:
    """Fills rows from a window of waiting samples: the oldest first, then always the longest that still fits.

    Its state is the numbers of the waiting samples and the next number: O(window), whatever was seen before.

    Args:
        source: where samples come from.
        max_tokens: budget of a row in tokens.
        max_tiles: budget of a row in tiles (images and frames).
        window: samples that wait to be placed.
    """

    def __init__(self, source: SampleSource, max_tokens: int, max_tiles: int, window: int = 64):
        self.source, self.max_tokens, self.max_tiles, self.window = source, max_tokens, max_tiles, window
        self.next_index = 0
        self.waiting: dict[int, Sample] = {}

    def state_dict(self) -> dict:
        return {"next_index": self.next_index, "waiting": list(self.waiting)}

    def load_state_dict(self, state: dict) -> None:
        self.next_index = state["next_index"]
        self.waiting = {index: self.source.sample(index) for index in state["waiting"]}

    def row(self) -> list[Sample]:
        """The next row's samples.

        Raises:
            ValueError: a sample alone is over a budget; the message names it.
        """
        while len(self.waiting) < self.window:
            sample = self.source.sample(self.next_index)
            for unit, size, budget in (
                ("tokens", len(sample.input_ids), self.max_tokens),
                ("tiles", sample.tiles, self.max_tiles),
            ):
                if size > budget:
                    raise ValueError(f"{sample.key} has {size} {unit}; a row accepts at most {budget}")
            self.waiting[self.next_index] = sample
            self.next_index += 1
        oldest = next(iter(self.waiting))
        row = [self.waiting.pop(oldest)]
        tokens, tiles = len(row[0].input_ids), row[0].tiles
        for index in sorted(self.waiting, key=lambda i: (-len(self.waiting[i].input_ids), i)):
            sample = self.waiting[index]
            if tokens + len(sample.input_ids) <= self.max_tokens and tiles + sample.tiles <= self.max_tiles:
                row.append(self.waiting.pop(index))
                tokens += len(sample.input_ids)
                tiles += sample.tiles
        return row


@dataclass(frozen=True)
class Batch:
    """Packed rows as tensors.

    `inputs` holds what the model's `forward` takes: `input_ids`, `position_ids` and `labels` [rows, tokens],
    `pixel_values` and `pixel_values_videos` where there are media. Position ids restart at every document, and no
    attention mask is given: that is how transformers' masks and flash-attention's varlen kernels are told that
    documents don't see each other.
    """

    inputs: dict[str, torch.Tensor]
    keys: tuple[str, ...]
    used_tokens: int

    @property
    def loss_tokens(self) -> int:
        """How many tokens are predicted."""
        return int((self.inputs["labels"] != IGNORE).sum())

    @property
    def positions(self) -> int:
        """Positions computed, padding included."""
        return self.inputs["input_ids"].numel()


def collate(rows: Sequence[Sequence[Sample]], processor: FoveateProcessor) -> Batch:
    """Lays rows of samples out as a batch; rows are padded to the longest with a document of padding."""
    length = max(sum(len(s.input_ids) for s in row) for row in rows)
    input_ids = np.full((len(rows), length), processor.tokenizer.pad_token_id or 0, dtype=np.int64)
    labels = np.full((len(rows), length), IGNORE, dtype=np.int64)
    position_ids = np.empty((len(rows), length), dtype=np.int64)
    for r, row in enumerate(rows):
        at = 0
        for sample in row:
            n = len(sample.input_ids)
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
    for name, tiles in (
        ("pixel_values", [s.images for s in samples if len(s.images)]),
        ("pixel_values_videos", [s.frames for s in samples if len(s.frames)]),
    ):
        if tiles:
            inputs[name] = normalise(np.concatenate(tiles), processor.image_mean, processor.image_std)
    return Batch(inputs, tuple(s.key for s in samples), sum(len(s.input_ids) for s in samples))
