from collections import Counter

import numpy as np
import pytest

from foveate.data.document import Document, Text
from foveate.data.mixture import Mixture
from foveate.vlm.processor import FoveateProcessor


class Named:
    def __init__(self, name: str):
        self.name = name

    def document(self, index: int) -> Document:
        return Document(f"{self.name}/{index}", (Text("red"),))


def test_sources_are_drawn_by_weight(processor: FoveateProcessor) -> None:
    mixture = Mixture([Named("a"), Named("b"), Named("c")], [3, 6, 1], processor, seed=0)
    n = 4000
    counts = Counter(mixture.document(i).key[0] for i in range(n))
    for name, p in (("a", 0.3), ("b", 0.6), ("c", 0.1)):
        assert abs(counts[name] - n * p) < 4 * np.sqrt(n * p * (1 - p))


def test_document_depends_on_seed_and_index_alone(processor: FoveateProcessor) -> None:
    def draws(seed: int, order: range) -> dict[int, str]:
        mixture = Mixture([Named("a"), Named("b")], [1, 1], processor, seed)
        return {i: mixture.document(i).key for i in order}

    assert draws(1, range(50)) == draws(1, range(49, -1, -1))
    assert draws(1, range(50)) != draws(2, range(50))
    assert all(key.endswith(f"/{i}") for i, key in draws(1, range(50)).items())


def test_samples_are_the_documents_encoded(processor: FoveateProcessor) -> None:
    sample = Mixture([Named("a")], [1], processor, seed=0).sample(7)
    assert sample.key == "a/7"
    assert sample.input_ids.tolist() == processor.tokenizer.encode("red")


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, -1], [1, float("nan")], [1, float("inf")]])
def test_weights_must_be_positive_and_one_a_source(processor: FoveateProcessor, weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights are"):
        Mixture([Named("a"), Named("b")], weights, processor, seed=0)


def test_no_sources_are_refused(processor: FoveateProcessor) -> None:
    with pytest.raises(ValueError, match="accepted"):
        Mixture([], [], processor, seed=0)
