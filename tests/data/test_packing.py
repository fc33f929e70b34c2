from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.data.document import Document, Text
from foveate.data.encoding import Sample, encode
from foveate.data.glyphs import GlyphSource
from foveate.data.packing import Packer, RowFacts, Waiting, choose_rows, collate
from foveate.train.build import build_model
from foveate.train.recipe import Recipe
from foveate.vlm.model import FoveateForConditionalGeneration
from foveate.vlm.planning import MediaTiles
from foveate.vlm.processor import FoveateProcessor
from foveate.vlm.tiling import normalise, normalise_tensor

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
        images, frames = pixels[: tiles // 2], pixels[tiles // 2 :]
        grids = np.array([(len(frames), 1, 1)] if tiles else [], np.int64).reshape(-1, 3)
        return Sample(f"sample/{index}", ids, ids, MediaTiles(images, frames, video_grids=grids))


def keys(row: list[Sample]) -> list[str]:
    return [sample.key for sample in row]


class Fed:
    """A packer whose window is filled from a source before each row."""

    def __init__(self, source: Sizes, window: int):
        self.source, self.packer, self.next = source, Packer(MAX_TOKENS, MAX_TILES, window), 0

    def row(self) -> list[Sample]:
        while self.packer.wants_more:
            self.packer.add(Waiting(self.next, self.source.sample(self.next)))
            self.next += 1
        return [waiting.sample for waiting in self.packer.row()]


@given(sizes, st.integers(1, 20), st.integers(1, 40))
def test_every_sample_comes_once_and_budgets_hold(sizes: list[tuple[int, int]], window: int, rows: int) -> None:
    fed = Fed(Sizes(sizes), window)
    seen: Counter[str] = Counter()
    for _ in range(rows):
        row = fed.row()
        assert len(row) >= 1
        assert sum(len(s.input_ids) for s in row) <= MAX_TOKENS
        assert sum(len(s.images) + len(s.frames) for s in row) <= MAX_TILES
        seen.update(keys(row))
    assert len(fed.packer.waiting) < window
    waiting = Counter(waiting.sample.key for waiting in fed.packer.waiting)
    assert seen + waiting == Counter(f"sample/{i}" for i in range(fed.next))


@given(sizes)
def test_no_sample_waits_longer_than_the_window(sizes: list[tuple[int, int]]) -> None:
    fed = Fed(Sizes(sizes), window=8)
    for done in range(30):
        for key in keys(fed.row()):
            assert int(key.split("/")[1]) >= done - 8 or done < 8
        assert min((waiting.position for waiting in fed.packer.waiting), default=done + 1) > done


def test_a_row_is_filled_with_what_fits() -> None:
    fed = Fed(Sizes([(10, 1), (25, 1), (31, 0), (20, 1), (5, 4), (4, 1), (1, 0)]), window=7)
    # the oldest, then always the longest that fits: 10 + 25 (31 does not) + 5
    assert keys(fed.row()) == ["sample/0", "sample/1", "sample/4"]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((41, 1), "has 41 tokens; a row accepts at most 40"),
        ((4, 7), "has 7 tiles; a row accepts at most 6"),
        ((40, 6), None),
    ],
)
def test_a_sample_over_a_budget_is_told(size: tuple[int, int], message: str | None) -> None:
    assert Packer(MAX_TOKENS, MAX_TILES, window=8).misfit(Sizes([size]).sample(0)) == message


def test_skewed_lengths_waste_little() -> None:
    """Less than 3 % at a budget of 8k tokens, of captions, conversations and some long documents."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(np.rint(rng.lognormal(6.2, 1.1, 4000)).astype(int) + 200, 8192)
    packer = Packer(8192, 10**6, window=128)
    used = rows = 0
    position = 0
    while position < len(lengths):
        while packer.wants_more and position < len(lengths):
            ids = np.zeros(lengths[position], dtype=np.int64)
            nothing = np.zeros((0, 2, 2, 3), dtype=np.uint8)
            packer.add(Waiting(position, Sample(str(position), ids, ids, MediaTiles(nothing, nothing))))
            position += 1
        used += sum(waiting.sample.tokens for waiting in packer.row())
        rows += 1
    assert np.percentile(lengths, 99) > 8 * np.median(lengths)
    assert 1 - used / (rows * 8192) < 0.03


# The choice of a step's rows


def facts(cost: float, since: int) -> RowFacts:
    return RowFacts(cost, since, tokens=1, loss_tokens=1, documents=1)


def test_groups_choose_rows_that_cost_like_the_oldest_anywhere() -> None:
    pools = [
        [facts(5, since=4), facts(90, since=6), facts(7, since=7)],
        [facts(100, since=3), facts(6, since=5)],  # the oldest of all, and costly
        [facts(8, since=4), facts(80, since=5), facts(95, since=7)],
        [],
    ]
    assert choose_rows(pools, rows=1, step=8, patience=50) == [[1], [0], [2], []]
    assert choose_rows(pools, rows=2, step=8, patience=50) == [[1, 2], [0, 1], [1, 2], []]


def test_a_row_out_of_patience_goes_whatever_it_costs() -> None:
    pools = [[facts(5, since=4), facts(90, since=6)], [facts(100, since=3), facts(6, since=5)]]
    assert choose_rows(pools, rows=1, step=8, patience=4) == [[0], [0]]
    assert choose_rows(pools, rows=1, step=8, patience=5) == [[1], [0]]


def test_collated_rows_restart_positions_and_pad_with_a_document_of_its_own(processor: FoveateProcessor) -> None:
    source = Sizes([(3, 2), (2, 1), (4, 0)])
    batch = collate([[source.sample(1), source.sample(0)], [source.sample(2)]], processor)
    pad = processor.tokenizer.pad_token_id
    assert batch.inputs["input_ids"].tolist() == [[1, 1, 0, 0, 0], [2, 2, 2, 2, pad]]
    assert batch.inputs["labels"].tolist() == [[1, 1, 0, 0, 0], [2, 2, 2, 2, -100]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]]
    names = {"input_ids", "labels", "position_ids", "pixel_values", "pixel_values_videos", "video_grids"}
    assert set(batch.inputs) == names
    assert batch.keys == ("sample/1", "sample/0", "sample/2")
    assert (batch.tokens, batch.positions, batch.loss_tokens) == (9, 10, 9)
    assert (batch.lengths, batch.tiles) == ((2, 3, 4), (1, 2, 0))
    # sample 0 has an image and a frame, sample 1 one frame: (pixel / 255 - 0.5) / 0.5
    assert batch.inputs["pixel_values"].shape == (1, 3, 2, 2)
    assert batch.inputs["pixel_values_videos"][:, 0, 0, 0].tolist() == pytest.approx([2 / 255 - 1, -1], abs=1e-6)
    assert batch.inputs["video_grids"].tolist() == [[1, 1, 1], [1, 1, 1]]


def test_raw_pixels_are_normalised_later_to_the_same_bits(processor: FoveateProcessor) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    ids = np.zeros(2, dtype=np.int64)
    rows = [[Sample("a", ids, ids, MediaTiles(pixels, pixels[:2, :32, :32]))]]
    raw, whole = collate(rows, processor, raw_pixels=True), collate(rows, processor)
    for name in ("pixel_values", "pixel_values_videos"):
        assert raw.inputs[name].dtype == torch.uint8
        mean, std = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
        later = normalise_tensor(raw.inputs[name], mean, std)
        assert later.equal(normalise(raw.inputs[name].numpy(), mean, std)) and later.is_contiguous()
        assert whole.inputs[name].equal(normalise_tensor(raw.inputs[name], processor.image_mean, processor.image_std))


def test_no_samples_are_one_position_of_padding(processor: FoveateProcessor) -> None:
    batch = collate([], processor)
    assert batch.inputs["input_ids"].tolist() == [[processor.tokenizer.pad_token_id]]
    assert batch.inputs["labels"].tolist() == [[-100]] and batch.keys == () and batch.loss_tokens == 0


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
            replace(sample.media, images=255 - sample.images, frames=255 - sample.frames),
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
