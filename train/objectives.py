"""What a stage optimises: modules whose forward gives a micro-batch's share of the step's loss.

A module runs the tower in every forward, on an empty frame where a micro-batch has no media: ranks that compute
different data so call the same modules and have gradients for the same parameters, as DDP and ZeRO-3 need.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..data.sequence import Kind, SequenceBatch
from ..vlm.model import FoveateForConditionalGeneration
from ..vlm.parallel.attention import SharedSequence
from ..vlm.parallel.exchange import exchange_tokens
from ..vlm.parallel.topology import ParallelError, Topology
from ..vlm.processor import FoveateProcessor
from ..vlm.tiling import normalise_tensor
from .loss import fusion_obstacle, target_loss, token_loss

KINDS: dict[str, Kind] = {"pixel_values": "image", "pixel_values_videos": "video"}
PIXELS = tuple(KINDS)


class NextToken(nn.Module):
    """Next-token cross-entropy on the tokens that carry loss.

    Args:
        model: what is trained.
        processor: tells the pixels' normalisation, and the size of an empty frame.
        chunks: parts in which the logits are computed, so that they are never held whole.
        same_calls: whether the tower is to be called once for images and once for frames in each forward, whatever the
            micro-batch holds, because the ranks share the tower's weights (ZeRO-3).
    """

    def __init__(
        self, model: FoveateForConditionalGeneration, processor: FoveateProcessor, chunks: int, same_calls: bool
    ):
        super().__init__()
        self.model, self.chunks, self.same_calls = model, chunks, same_calls
        self.encode = _Encoder(model, processor)
        self.fused = fusion_obstacle(model.language_model) is None

    def forward(self, inputs: Mapping[str, torch.Tensor], total: float) -> torch.Tensor:
        """The sum of the tokens' losses divided by `total`, the step's tokens that carry loss; inputs as of `Batch`."""
        given = {name: self.encode(name, inputs) for name in PIXELS if name in inputs}
        empty = [self.encode.blank(inputs["input_ids"].device) for _ in range(self._missing(len(given)))]
        ids, positions, labels = (inputs[name] for name in ("input_ids", "position_ids", "labels"))
        embeds = self.model.get_inputs_embeds(
            input_ids=ids,
            image_features=given.get("pixel_values"),
            video_features=given.get("pixel_values_videos"),
        )
        for unused in empty:
            embeds = embeds + 0 * unused.sum().to(embeds.dtype)
        if "flash" in str(self.model.language_model.config._attn_implementation):
            # Its varlen kernels see restarting position ids in a single row alone.
            embeds, positions, labels = embeds.flatten(0, 1)[None], positions.flatten()[None], labels.flatten()[None]
        if not self.fused:
            count = torch.tensor(total, device=labels.device)
            return self.model.language_model(
                inputs_embeds=embeds, position_ids=positions, labels=labels, use_cache=False, num_items_in_batch=count
            ).loss
        decoded = self.model.get_decoder()(inputs_embeds=embeds, position_ids=positions, use_cache=False)
        head = self.model.get_output_embeddings()
        return token_loss(decoded.last_hidden_state, head, labels, total, self.chunks)

    def _missing(self, given: int) -> int:
        """How often the tower runs on an empty frame."""
        return len(PIXELS) - given if self.same_calls else int(not given)


class SequenceNextToken(nn.Module):
    """`NextToken` on packs that the ranks of a sequence group share (LongVILA, arXiv 2408.10188, section 3.3): each
    encodes its images and frames, gets the visual tokens of its part of the sequence, and runs the LLM on that part.

    It is called, and its gradients are computed, within `sequence_attention`. The gradients of all ranks add up to
    those of the whole pack.

    Args:
        model, processor, chunks: see `NextToken`; chunks of this rank's part.
        same_calls: see `NextToken`. Ranks of one group call the tower equally often in any case.
        topology: this rank among those that share its packs.

    Raises:
        ParallelError: the LLM's loss is more than the cross-entropy of its head.
    """

    def __init__(
        self,
        model: FoveateForConditionalGeneration,
        processor: FoveateProcessor,
        chunks: int,
        same_calls: bool,
        topology: Topology,
    ):
        super().__init__()
        self.model, self.chunks, self.same_calls, self.topology = model, chunks, same_calls, topology
        self.encode = _Encoder(model, processor)
        if obstacle := fusion_obstacle(model.language_model):
            raise ParallelError(f"{obstacle}; accepted under sequence parallelism: an LLM without")

    def forward(self, inputs: Mapping[str, Any], total: float) -> torch.Tensor:
        """This rank's part of the loss; inputs as `SequenceCollate` gives them, `total` as of `NextToken`."""
        sequence: SequenceBatch = inputs["sequence"]
        ids = inputs["input_ids"]
        features: dict[Kind, torch.Tensor | None] = {}
        unused: list[torch.Tensor] = []
        without = not any(sequence.routes.values())
        for name, kind in KINDS.items():  # in one order on all ranks: the exchanges, and in the backward pass too
            features[kind] = None
            if route := sequence.routes[kind]:
                own = self._own(name, inputs, sequence) if name in inputs else self.encode.blank(ids.device)[:0]
                assert self.topology.group is not None
                features[kind] = exchange_tokens(own, route, self.topology.group)
            elif self.same_calls or (without and not unused):
                unused.append(self.encode.blank(ids.device))
        embeds = self.model.get_inputs_embeds(
            input_ids=ids, image_features=features["image"], video_features=features["video"]
        )
        for blank in unused:
            embeds = embeds + 0 * blank.sum().to(embeds.dtype)
        decoded = self.model.get_decoder()(
            inputs_embeds=embeds,
            position_ids=inputs["position_ids"],
            use_cache=False,
            sequence=SharedSequence(sequence.plan, self.topology, ids.device),
        )
        head = self.model.get_output_embeddings()
        return target_loss(decoded.last_hidden_state, head, inputs["targets"], total, self.chunks)

    def _own(self, name: str, inputs: Mapping[str, Any], sequence: SequenceBatch) -> torch.Tensor:
        """What this rank has encoded of the pack, [tokens, D]."""
        media = self.encode.media(name, inputs)
        if KINDS[name] == "video":
            media = [tokens[:count] for tokens, count in zip(media, sequence.video_tokens, strict=True)]
        return torch.cat(media)


class _Encoder:
    """What the LLM reads of a batch's images or frames; their pixels may be raw, uint8 tiles."""

    def __init__(self, model: FoveateForConditionalGeneration, processor: FoveateProcessor):
        self.model, self.processor = model, processor

    def __call__(self, name: str, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Features [tokens, D] of `pixel_values` or `pixel_values_videos`."""
        return torch.cat(self.media(name, inputs))

    def media(self, name: str, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """The same of each image or video."""
        pixels, kind = inputs[name], KINDS[name]
        if pixels.dtype == torch.uint8:
            pixels = normalise_tensor(pixels, self.processor.image_mean, self.processor.image_std)
        grids, queries = inputs.get(f"{kind}_grids"), inputs.get(f"{kind}_queries")
        vision = replace(self.model.vision, tower_batch=None)  # one call, in validation too, as ranks under ZeRO-3 need
        if kind == "image":
            return vision.encode_images(pixels, grids, inputs.get("image_sizes"), queries)
        return vision.encode_videos(pixels, grids, queries)

    def blank(self, device: torch.device) -> torch.Tensor:
        """Features of an empty frame, the least that runs tower and projector once."""
        height, width = self.processor.video_size
        frames, rows, columns = 1, 1, 1
        if self.processor.tiling == "native":  # one token's patches
            height = width = self.processor.patch_size
            frames, rows, columns = 1, self.processor.downsample_factor, self.processor.downsample_factor
        pixels = torch.zeros(rows * columns, height, width, 3, dtype=torch.uint8, device=device)
        grids = torch.tensor([[frames, rows, columns]])
        return self("pixel_values_videos", {"pixel_values_videos": pixels, "video_grids": grids})


class RegionText(nn.Module):
    """Sigmoid contrast between image regions and texts that describe them: SigLIP's loss (arXiv 2303.15343, section
    3.2) with a region in the place of an image. A region is a projected token, a text the sum of its words' input
    embeddings. It warms up a tower and projector that start from random weights, in the place of a pretrained tower;
    its own two parameters are thrown away after the stage.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([2.3]))
        self.bias = nn.Parameter(torch.tensor([-6.0]))

    def forward(self, regions: torch.Tensor, texts: torch.Tensor, labels: torch.Tensor, total: float) -> torch.Tensor:
        """The loss: summed over regions and texts, divided by `total`.

        Args:
            regions: [regions, D].
            texts: [texts, D].
            labels: number of the text that describes each region, [regions].
            total: regions of the whole step.

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
        return nn.functional.binary_cross_entropy_with_logits(logits, match, reduction="sum") / total


class RegionContrast(nn.Module):
    """`RegionText` on a model's tokens and word embeddings."""

    def __init__(self, model: FoveateForConditionalGeneration, processor: FoveateProcessor):
        super().__init__()
        self.model, self.head, self.encode = model, RegionText(), _Encoder(model, processor)

    def forward(self, inputs: Mapping[str, torch.Tensor], total: float) -> torch.Tensor:
        """Inputs as of `regions.collate_regions`."""
        regions = [self.encode(name, inputs) for name in PIXELS if name in inputs]
        words = self.model.get_input_embeddings()(inputs["text_ids"]) * inputs["text_mask"].unsqueeze(-1)
        return self.head(torch.cat(regions), words.sum(1), inputs["labels"], total)
