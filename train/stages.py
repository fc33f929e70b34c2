"""What a stage optimises, and the batches it does that on."""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import nn

from ..data.document import Image, Text, Video
from ..data.glyphs import GlyphSource
from ..data.mixture import Mixture
from ..data.packing import Batch, Packer, collate
from ..vlm.media import Video as DecodedVideo
from ..vlm.media import load_image, load_video
from ..vlm.model import FoveateForConditionalGeneration
from ..vlm.processor import FoveateProcessor
from .recipe import StageRecipe


class Batches(Protocol):
    """Endless batches whose position can be saved and restored exactly."""

    def next(self) -> Batch: ...
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> None: ...


class PackedBatches:
    """Batches of packed rows."""

    def __init__(self, packer: Packer, rows: int, processor: FoveateProcessor):
        self.packer, self.rows, self.processor = packer, rows, processor

    def next(self) -> Batch:
        return collate([self.packer.row() for _ in range(self.rows)], self.processor)

    def state_dict(self) -> dict:
        return self.packer.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.packer.load_state_dict(state)


def _frames(video: Video) -> np.ndarray:
    """All frames of a video, [frames, height, width, 3]."""
    return (video.source if isinstance(video.source, DecodedVideo) else load_video(video.source)).frames


class RegionBatches:
    """Batches of images and frames with a text for each of their regions, for `RegionText`.

    A document is an image or a clip and then its regions' texts, in raster order and frame by frame. A batch holds so
    many documents; those with images come first.
    """

    def __init__(self, mixture: Mixture, documents: int, processor: FoveateProcessor):
        self.mixture, self.documents, self.processor = mixture, documents, processor
        self.next_index = 0

    def next(self) -> Batch:
        documents = [self.mixture.document(self.next_index + i) for i in range(self.documents)]
        self.next_index += self.documents
        documents.sort(key=lambda document: isinstance(document.parts[0], Video))
        media = [document.parts[0] for document in documents]
        images = [load_image(part.source) for part in media if isinstance(part, Image)]
        frames = [frame for part in media if isinstance(part, Video) for frame in _frames(part)]
        texts = [part.text for document in documents for part in document.parts if isinstance(part, Text)]
        unique = sorted(set(texts))
        number = {text: i for i, text in enumerate(unique)}
        encoded = self.processor.tokenizer(unique, add_special_tokens=False, padding=True, return_tensors="pt")
        inputs = {
            "labels": torch.tensor([number[text] for text in texts]),  # [regions], the text that describes each
            "text_ids": encoded["input_ids"],  # [texts, tokens]
            "text_mask": encoded["attention_mask"],
        }
        if images:
            inputs["pixel_values"] = self.processor.pixel_values(images)
        if frames:
            inputs["pixel_values_videos"] = self.processor.pixel_values(frames, video=True)
        keys = tuple(document.key for document in documents)
        return Batch(inputs | {"input_ids": encoded["input_ids"]}, keys, int(encoded["attention_mask"].sum()))

    def state_dict(self) -> dict:
        return {"next_index": self.next_index}

    def load_state_dict(self, state: dict) -> None:
        self.next_index = state["next_index"]


class RegionText(nn.Module):
    """Sigmoid contrast between image regions and texts that describe them: SigLIP's loss (arXiv 2303.15343, section
    3.2) with a region in the place of an image. A region is a projected token, a text the sum of its words' input
    embeddings. It warms up a tower and projector that start from random weights, in the place of a pretrained tower;
    its own two parameters are thrown away after the stage.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(2.3))
        self.bias = nn.Parameter(torch.tensor(-6.0))

    def forward(self, regions: torch.Tensor, texts: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss, a mean over regions of the sum over texts.

        Args:
            regions: [regions, D].
            texts: [texts, D].
            labels: number of the text that describes each region, [regions].

        Raises:
            ValueError: the numbers of regions and labels differ.
        """
        if len(regions) != len(labels):
            raise ValueError(
                f"the images have {len(regions)} tokens but {len(labels)} regions are described; both numbers must be "
                "equal: a token for each region"
            )
        cosine = nn.functional.normalize(regions.float(), dim=-1) @ nn.functional.normalize(texts.float(), dim=-1).T
        logits = cosine * self.log_scale.exp() + self.bias  # [regions, texts]
        match = nn.functional.one_hot(labels, len(texts)).to(logits.dtype)
        return nn.functional.binary_cross_entropy_with_logits(logits, match, reduction="sum") / len(regions)


def make_head(stage: StageRecipe) -> nn.Module | None:
    """The objective's own parameters, where it has any."""
    return RegionText() if stage.objective == "region_text" else None


def make_batches(stage: StageRecipe, processor: FoveateProcessor, seed: int) -> Batches:
    """The stage's mixture, packed."""
    sources = [
        GlyphSource(processor=processor, seed=seed, **data.model_dump(exclude={"source", "weight"}))
        for data in stage.data
    ]
    mixture = Mixture(sources, [data.weight for data in stage.data], processor, seed)
    batch = stage.batch
    if stage.objective == "region_text":
        return RegionBatches(mixture, batch.rows, processor)
    return PackedBatches(Packer(mixture, batch.tokens, batch.tiles, batch.window), batch.rows, processor)


def make_losses(
    stage: StageRecipe,
    model: FoveateForConditionalGeneration,
    head: nn.Module | None,
    batches: list[Batch],
    device: torch.device,
) -> list[Callable[[], torch.Tensor]]:
    """One call a micro-batch that gives its share of the step's loss.

    `next_token`: cross-entropy, summed and divided by the valid tokens of all micro-batches.
    """
    total = sum(batch.loss_tokens for batch in batches)

    def next_token(batch: Batch) -> torch.Tensor:
        inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
        return model(**inputs, use_cache=False, num_items_in_batch=torch.tensor(total, device=device)).loss

    def region_text(batch: Batch) -> torch.Tensor:
        inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
        assert head is not None
        regions = [
            model.get_image_features(inputs[name])["pooler_output"].flatten(0, 1)
            for name in ("pixel_values", "pixel_values_videos")
            if name in inputs
        ]
        words = model.get_input_embeddings()(inputs["text_ids"]) * inputs["text_mask"].unsqueeze(-1)
        return head(torch.cat(regions), words.sum(1), inputs["labels"])

    loss_of = next_token if stage.objective == "next_token" else region_text
    return [partial(loss_of, batch) for batch in batches]
