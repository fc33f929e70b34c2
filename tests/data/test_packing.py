import json
from collections import Counter
from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.data.document import Document, Text
from foveate.data.encoding import Sample, encode
from foveate.data.glyphs import GlyphSource
from foveate.data.mixture import Mixture
from foveate.data.packing import Packer, collate
from foveate.train.build import build_model
from foveate.train.recipe import Recipe
from foveate.vlm.model import FoveateForConditionalGeneration
from foveate.vlm.processor import FoveateProcessor

MAX_TOKENS, MAX_TILES = 40, 6
sizes = st.lists(st.tuples(st.integers(1, MAX_TOKENS), st.integers(0, MAX_TILES)), min_size=1, max_size=60)


class Sizes:
    """Samples of given (tokens, tiles), endlessly from the first again."""

    def __init__(self, sizes: list[tuple[int, int]]):
        self.sizes = sizes

    def sample(self, index: int) -> Sample:
        tokens, tiles = self.sizes[index % len(self.sizes)]
        ids = np.full(tokens, index, dtype=np.int64)
        pixels = np.full((tiles, 2, 2, 3), index % 256, dtype=np.uint8)
        return Sample(f"sample/{index}", ids, ids, pixels[: tiles // 2], pixels[tiles // 2 :])


def keys(row: list[Sample]) -> list[str]:
    return [sample.key for sample in row]


def same(first: list[Sample], second: list[Sample]) -> bool:
    names = [field.name for field in fields(Sample)]
    return len(first) == len(second) and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for a, b in zip(first, second, strict=True) for name in names
    )


@given(sizes, st.integers(1, 20), st.integers(1, 40))
def test_every_sample_comes_once_and_budgets_hold(sizes: list[tuple[int, int]], window: int, rows: int) -> None:
    source = Sizes(sizes)
    packer = Packer(source, MAX_TOKENS, MAX_TILES, window)
    seen: Counter[str] = Counter()
    for _ in range(rows):
        row = packer.row()
        assert len(row) >= 1
        assert sum(len(s.input_ids) for s in row) <= MAX_TOKENS
        assert sum(len(s.images) + len(s.frames) for s in row) <= MAX_TILES
        seen.update(keys(row))
    waiting = Counter(source.sample(index).key for index in packer.state_dict()["waiting"])
    assert seen + waiting == Counter(f"sample/{i}" for i in range(packer.state_dict()["next_index"]))


@given(sizes)
def test_no_sample_waits_longer_than_the_window(sizes: list[tuple[int, int]]) -> None:
    packer = Packer(Sizes(sizes), MAX_TOKENS, MAX_TILES, window=8)
    for done in range(30):
        for key in keys(packer.row()):
            assert int(key.split("/")[1]) >= done - 8 or done < 8
        assert min(packer.state_dict()["waiting"], default=done + 1) > done


def test_a_row_is_filled_with_what_fits() -> None:
    packer = Packer(Sizes([(10, 1), (25, 1), (31, 0), (20, 1), (5, 4), (4, 1), (1, 0)]), 40, 6, window=7)
    # the oldest, then always the longest that fits: 10 + 25 (31 does not) + 5
    assert keys(packer.row()) == ["sample/0", "sample/1", "sample/4"]


@pytest.mark.parametrize(("size", "message"), [((41, 1), "41 tokens.*40"), ((4, 7), "7 tiles.*6")])
def test_a_sample_over_a_budget_is_named(size: tuple[int, int], message: str) -> None:
    packer = Packer(Sizes([(3, 1), (4, 0), size]), MAX_TOKENS, MAX_TILES, window=8)
    with pytest.raises(ValueError, match=f"sample/2 has {message}"):
        for _ in range(3):
            packer.row()


@given(sizes, st.integers(1, 12), st.integers(0, 30))
def test_restored_packer_gives_the_same_rows(sizes: list[tuple[int, int]], window: int, cut: int) -> None:
    packer = Packer(Sizes(sizes), MAX_TOKENS, MAX_TILES, window)
    for _ in range(cut):
        packer.row()
    state = json.loads(json.dumps(packer.state_dict()))
    restored = Packer(Sizes(sizes), MAX_TOKENS, MAX_TILES, window)
    restored.row()  # what it held is forgotten
    restored.load_state_dict(state)
    for _ in range(12):
        assert same(packer.row(), restored.row())


def test_restored_packer_of_real_documents_gives_the_same_pixels(processor: FoveateProcessor) -> None:
    def packer() -> Packer:
        sources = [GlyphSource(kind, processor) for kind in ("scene_chat", "clip_chat", "interleaved")]
        return Packer(Mixture(sources, [1, 2, 1], processor, seed=3), 600, 64, window=8)

    ahead = packer()
    for _ in range(12):
        restored = packer()
        restored.load_state_dict(json.loads(json.dumps(ahead.state_dict())))
        assert same(ahead.row(), restored.row())


def test_state_does_not_grow_with_what_was_seen() -> None:
    packer = Packer(Sizes([(7, 1), (30, 2), (12, 0)]), MAX_TOKENS, MAX_TILES, window=16)
    lengths = []
    for _ in range(2000):
        packer.row()
        lengths.append(len(packer.state_dict()["waiting"]))
    assert max(lengths) < 16
    assert len(json.dumps(packer.state_dict())) < 16 * 8 + 50


def test_collated_rows_restart_positions_and_pad_with_a_document_of_its_own(processor: FoveateProcessor) -> None:
    source = Sizes([(3, 2), (2, 1), (4, 0)])
    batch = collate([[source.sample(1), source.sample(0)], [source.sample(2)]], processor)
    pad = processor.tokenizer.pad_token_id
    assert batch.inputs["input_ids"].tolist() == [[1, 1, 0, 0, 0], [2, 2, 2, 2, pad]]
    assert batch.inputs["labels"].tolist() == [[1, 1, 0, 0, 0], [2, 2, 2, 2, -100]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]]
    assert set(batch.inputs) == {"input_ids", "labels", "position_ids", "pixel_values", "pixel_values_videos"}
    assert batch.keys == ("sample/1", "sample/0", "sample/2")
    assert (batch.used_tokens, batch.positions, batch.loss_tokens) == (9, 10, 9)
    # sample 0 has an image and a frame, sample 1 one frame: (pixel / 255 - 0.5) / 0.5
    assert batch.inputs["pixel_values"].shape == (1, 3, 2, 2)
    assert batch.inputs["pixel_values_videos"][:, 0, 0, 0].tolist() == pytest.approx([2 / 255 - 1, -1], abs=1e-6)


def test_rows_without_media_have_no_pixels(processor: FoveateProcessor) -> None:
    assert set(collate([[Sizes([(3, 0)]).sample(0)]], processor).inputs) == {"input_ids", "labels", "position_ids"}


# Documents in a row do not see each other


@pytest.fixture(params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest, tiny_recipe: Callable[..., Recipe]) -> FoveateForConditionalGeneration:
    torch.manual_seed(0)
    recipe = tiny_recipe(f"model.attn_implementation={request.param}")
    return build_model(recipe.model)[0].eval()


@pytest.fixture
def samples(processor: FoveateProcessor) -> list[Sample]:
    """Still, text alone, video, several stills, conversation: 5 documents with loss on some tokens."""
    kinds = ("captions", "clip_chat", "interleaved", "scene_chat")
    documents = [GlyphSource(kind, processor, seed=5).document(0) for kind in kinds]
    documents.insert(1, Document("text", (Text("the red circle is"), Text("at b3 .", loss=True), Text("what"))))
    return [encode(document, processor) for document in documents]


def summed_loss(logits: torch.Tensor, sample: Sample) -> float:
    """-log p of each labelled token given the logits [tokens, vocabulary] before it, in float64."""
    log_p = logits.double().log_softmax(-1)
    labels = sample.labels.tolist()
    return -sum(float(log_p[i - 1, label]) for i, label in enumerate(labels) if label != -100)


@torch.inference_mode()
def logits_alone(model: FoveateForConditionalGeneration, sample: Sample, processor: FoveateProcessor) -> torch.Tensor:
    """Plain causal attention over one document: no packing, no position ids, an attention mask of ones."""
    inputs = collate([[sample]], processor).inputs
    del inputs["position_ids"], inputs["labels"]
    return model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"])).logits[0]


def test_packed_loss_is_the_token_weighted_mean_of_documents_alone(
    model: FoveateForConditionalGeneration, samples: list[Sample], processor: FoveateProcessor
) -> None:
    losses = [summed_loss(logits_alone(model, sample, processor), sample) for sample in samples]
    counts = [int((sample.labels != -100).sum()) for sample in samples]
    assert len(set(counts)) > 3  # unequal, so the weights matter
    expected = sum(losses) / sum(counts)
    assert abs(np.mean([loss / n for loss, n in zip(losses, counts, strict=True)]) - expected) > 1e-3
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        for rows in (
            [[samples[i] for i in order]],
            [[samples[i] for i in order[:3]], [samples[i] for i in order[3:]]],  # the shorter row is padded
        ):
            batch = collate(rows, processor)
            with torch.inference_mode():
                packed = model(**batch.inputs, use_cache=False).loss
            assert packed.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_no_document_changes_the_logits_of_another(
    model: FoveateForConditionalGeneration, samples: list[Sample], processor: FoveateProcessor
) -> None:
    vocabulary = len(processor.tokenizer)
    starts = np.cumsum([0, *[len(s.input_ids) for s in samples]])
    rng = np.random.default_rng(0)

    @torch.inference_mode()
    def logits(row: list[Sample]) -> torch.Tensor:
        inputs = collate([row], processor).inputs
        del inputs["labels"]
        return model(**inputs, use_cache=False).logits[0]

    before = logits(samples)
    for changed, sample in enumerate(samples):
        media = np.isin(sample.input_ids, [processor.image_token_id, processor.video_token_id])
        other = Sample(
            "other",
            np.where(media, sample.input_ids, rng.integers(0, vocabulary - 2, len(media))),
            sample.labels,
            255 - sample.images,
            255 - sample.frames,
        )
        after = logits([*samples[:changed], other, *samples[changed + 1 :]])
        for i in range(len(samples)):
            span = slice(starts[i], starts[i + 1])
            assert torch.equal(before[span], after[span]) == (i != changed), (changed, i)


def test_gradient_of_a_documents_loss_stays_in_the_document(
    model: FoveateForConditionalGeneration, samples: list[Sample], processor: FoveateProcessor
) -> None:
    inputs = collate([samples], processor).inputs
    own = torch.zeros_like(inputs["labels"], dtype=torch.bool)
    start = len(samples[0].input_ids) + len(samples[1].input_ids)
    own[0, start : start + len(samples[2].input_ids)] = True
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    labels = inputs["labels"].masked_fill(~own, -100)
    model(inputs_embeds=embeds, position_ids=inputs["position_ids"], labels=labels, use_cache=False).loss.backward()
    moved = embeds.grad.abs().sum(-1) > 0
    assert not moved[~own].any()
    assert moved[own].any()
