"""Several sources as one, in given proportions, the same for the same seed."""

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ..vlm.processor import FoveateProcessor
from .document import Document
from .encoding import Sample, encode


class Source(Protocol):
    """Documents by number, from 0; the same number is always the same document."""

    def document(self, index: int) -> Document: ...


class Mixture:
    """Draws each document's source by weight; document `index` depends on (seed, index) alone, so it has no state.

    Args:
        sources: where documents come from.
        weights: how often each is drawn, in proportion, all positive.
        processor: encodes documents to samples.
        seed: of the draws.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], processor: FoveateProcessor, seed: int):
        if len(sources) != len(weights) or not sources or not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"weights are {list(weights)} for {len(sources)} sources; accepted: a positive one each")
        self.sources, self.processor, self.seed = list(sources), processor, seed
        self.edges = np.cumsum(weights) / np.sum(weights)

    def document(self, index: int) -> Document:
        draw = np.random.default_rng([self.seed, index]).random()
        source = min(int(np.searchsorted(self.edges, draw, side="right")), len(self.sources) - 1)
        return self.sources[source].document(index)

    def sample(self, index: int) -> Sample:
        return encode(self.document(index), self.processor)
