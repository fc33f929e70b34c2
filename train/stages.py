"""What a stage optimises, and the batches it does that on."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from ..data.document import Image, Text
from ..data.glyphs import GlyphSource
from ..data.mixture import Mixture
from ..data.packing import Batch, Packer, collate
from ..vlm.model import FoveateForConditionalGeneration
from ..vlm.processor import FoveateProcessor
from ..vlm.projector import space_to_depth
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


class RegionBatches:
    """Batches of images with a text for each of their regions, for `RegionText`.

    A document is an image and then its regions' texts in raster order; a batch holds `rows` · 16 documents.
    """

    def __init__(self, mixture: Mixture, documents: int, processor: FoveateProcessor):
        self.mixture, self.documents, self.processor = mixture, documents, processor
        self.next_index = 0

    def next(self) -> Batch:
        documents = [self.mixture.document(self.next_index + i) for i in range(self.documents)]
        self.next_index += self.documents
        images = [part.source for document in documents for part in document.parts if isinstance(part, Image)]
        texts = [part.text for document in documents for part in document.parts if isinstance(part, Text)]
        unique = sorted(set(texts))
        number = {text: i for i, text in enumerate(unique)}
        encoded = self.processor.tokenizer(unique, add_special_tokens=False, padding=True, return_tensors="pt")
        inputs = {
            "pixel_values": self.processor.pixel_values(images),
            "labels": torch.tensor([number[text] for text in texts]),  # [regions], the text that describes each
            "text_ids": encoded["input_ids"],  # [texts, tokens]
            "text_mask": encoded["attention_mask"],
        }
        keys = tuple(document.key for document in documents)
        return Batch(inputs | {"input_ids": encoded["input_ids"]}, keys, len(texts))

    def state_dict(self) -> dict:
        return {"next_index": self.next_index}

    def load_state_dict(self, state: dict) -> None:
        self.next_index = state["next_index"]


class RegionText(nn.Module):
    """Sigmoid contrast between image regions and texts that describe them, SigLIP's loss (arXiv 2303.15343, section
    3.2) on regions. It warms up a tower that starts from random weights, in the place of a pretrained tower, and is
    thrown away after its stage.

    Args:
        vision_dim: channels of the tower's features.
        vocabulary: of the text tokens.
        patches: side of a region in patches.
        dim: of the common space.
    """

    def __init__(self, vision_dim: int, vocabulary: int, patches: int, dim: int = 128):
        super().__init__()
        self.patches = patches
        self.region = nn.Linear(patches * patches * vision_dim, dim)
        self.words = nn.Embedding(vocabulary, dim)
        self.log_scale = nn.Parameter(torch.tensor(2.3))
        self.bias = nn.Parameter(torch.tensor(-6.0))

    def forward(self, features: torch.Tensor, grid: tuple[int, int], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss, a mean over regions of the sum over texts.

        Args:
            features: the tower's, [images, patches, C].
            grid: of the patches.
            inputs: a batch of `RegionBatches`.
        """
        regions = self.region(space_to_depth(features.unflatten(1, grid), self.patches)).flatten(0, 2)
        mask = inputs["text_mask"].unsqueeze(-1)
        texts = (self.words(inputs["text_ids"]) * mask).sum(1)  # [texts, dim]
        cosine = nn.functional.normalize(regions.float(), dim=-1) @ nn.functional.normalize(texts.float(), dim=-1).T
        logits = cosine * self.log_scale.exp() + self.bias  # [regions, texts]
        match = nn.functional.one_hot(inputs["labels"], len(texts)).to(logits.dtype)
        return nn.functional.binary_cross_entropy_with_logits(logits, match, reduction="sum") / len(regions)


def make_head(stage: StageRecipe, model: FoveateForConditionalGeneration, processor: FoveateProcessor) -> nn.Module | None:
    """The objective's own parameters, where it has any."""
    if stage.objective == "next_token":
        return None
    config = model.config
    return RegionText(config.vision_config.hidden_size, config.text_config.vocab_size, config.downsample_factor)


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
        return head(*model._tower_features(inputs["pixel_values"]), inputs)

    loss_of = next_token if stage.objective == "next_token" else region_text
    return [lambda batch=batch: loss_of(batch) for batch in batches]


