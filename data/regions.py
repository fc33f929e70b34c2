"""Documents of regions: an image or a clip, then a text for each of its regions, for a contrastive tower warm-up."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..vlm.media import MediaLimits
from ..vlm.planning import MediaTiles
from ..vlm.processor import FoveateProcessor
from .document import Document, Text
from .encoding import Sample, encode
from .packing import Batch


@dataclass(frozen=True)
class RegionSample:
    """A document's tiles and its regions' texts, in raster order and frame by frame."""

    key: str
    media: MediaTiles
    texts: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """One for each region."""
        return len(self.texts)

    @property
    def loss_tokens(self) -> int:
        return len(self.texts)

    @property
    def tiles(self) -> int:
        return len(self.media.images) + len(self.media.frames)


def encode_regions(document: Document, processor: FoveateProcessor, limits: MediaLimits | None = None) -> RegionSample:
    """As `encode`, with the texts apart."""
    medium, *texts = document.parts
    sample: Sample = encode(Document(document.key, (medium,)), processor, limits)
    described = tuple(part.text for part in texts if isinstance(part, Text))
    return RegionSample(document.key, sample.media, described)


def collate_regions(
    rows: Sequence[Sequence[RegionSample]], processor: FoveateProcessor, raw_pixels: bool = False
) -> Batch:
    """Documents as one batch, those with images first.

    `inputs`: `pixel_values` and `pixel_values_videos`; `text_ids` and `text_mask` [texts, tokens], the texts that
    differ; `labels` [regions], the number of the text that describes each.
    """
    samples = sorted((sample for row in rows for sample in row), key=lambda sample: len(sample.media.frames) > 0)
    texts = [text for sample in samples for text in sample.texts]
    unique = sorted(set(texts))
    number = {text: i for i, text in enumerate(unique)}
    encoded = processor.tokenizer(unique, add_special_tokens=False, padding=True, return_tensors="pt")
    inputs = {
        "labels": torch.tensor([number[text] for text in texts]),
        "text_ids": encoded["input_ids"],
        "text_mask": encoded["attention_mask"],
        "input_ids": encoded["input_ids"],
    }
    return Batch(
        inputs | processor.media_inputs([sample.media for sample in samples], raw_pixels),
        tuple(sample.key for sample in samples),
        tuple(sample.tokens for sample in samples),
        tuple(sample.tiles for sample in samples),
        len(texts),
    )
