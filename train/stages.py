"""A stage's data, objective and trained parameters, put together from its recipe."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
from torch import nn

from ..data.encoding import PlannedSample, Sample, encode, plan_document
from ..data.glyphs import GlyphSource
from ..data.loader import Loader, Packing, Share
from ..data.mixture import Mixture
from ..data.packing import collate
from ..data.regions import RegionSample, collate_regions, encode_regions
from ..data.sequence import SequenceCollate
from ..data.sources import Source, open_source, split
from ..data.statistics import mean_tokens
from ..vlm.config import FoveateConfig
from ..vlm.media import MediaLimits
from ..vlm.model import FoveateForConditionalGeneration
from ..vlm.parallel.topology import Topology
from ..vlm.planning import MediaTiles
from ..vlm.processor import FoveateProcessor
from .flops import ModelFlops
from .objectives import NextToken, RegionContrast, SequenceNextToken
from .recipe import GlyphData, Recipe, RecipeError, SourceData, StageRecipe

LOGITS_TOKENS = 1024  # positions whose logits are held at a time
Split = Literal["train", "validation"]


def check_sources(recipe: Recipe) -> None:
    """Raises RecipeError where a source that a stage names has no path yet."""
    for stage in recipe.stages:
        for data in stage.data:
            if isinstance(data, SourceData) and recipe.sources[data.source].path is None:
                about = recipe.sources[data.source].about
                raise RecipeError(
                    f"sources.{data.source}.path is not filled in{f' ({about})' if about else ''}; accepted: shards, "
                    f"JSON, JSON lines or a dataset on disk, for example sources.{data.source}.path=/data/{data.source}"
                )


def open_data(recipe: Recipe, data: GlyphData | SourceData, processor: FoveateProcessor, part: Split) -> Source:
    """One entry of a stage's data.

    Raises:
        RecipeError: the validation fraction leaves nothing.
        SourceError: nothing that can be read lies at the path.
    """
    if isinstance(data, GlyphData):
        fields = data.model_dump(exclude={"source", "weight"})
        if part == "validation":
            fields |= {"split": "dev", "documents": None}
        return GlyphSource(processor=processor, seed=recipe.seed, **fields)
    found = recipe.sources[data.source]
    assert found.path is not None, "check_sources comes first"
    source = open_source(processor=processor, **found.model_dump(exclude={"about"}))
    if recipe.validation is None:
        return source
    chosen = split(source, recipe.validation.fraction, recipe.seed, part)
    if not chosen.documents:
        raise RecipeError(
            f"validation.fraction {recipe.validation.fraction} leaves source {data.source} of {source.documents} "
            f"documents none for {part}; accepted: one that leaves both some"
        )
    return chosen


def make_mixture(recipe: Recipe, number: int, processor: FoveateProcessor, part: Split = "train") -> Mixture:
    """A stage's documents in its proportions; the validation part is endless, the loader takes as many as it needs."""
    stage = recipe.stages[number]
    sources = [open_data(recipe, data, processor, part) for data in stage.data]
    weights = [data.weight for data in stage.data]
    if stage.weights == "tokens":
        for i, (data, source) in enumerate(zip(stage.data, sources, strict=True)):
            weights[i] /= getattr(data, "mean_tokens", None) or mean_tokens(source, processor)
    epochs = stage.epochs if part == "train" else None
    return Mixture(sources, weights, recipe.seed + number, epochs, stage.shuffle)


def make_loader(
    recipe: Recipe,
    number: int,
    config: FoveateConfig,
    processor: FoveateProcessor,
    share: Share | None = None,
    part: Split = "train",
    flag: Callable[[], bool] = lambda: False,
    topology: Topology | None = None,
) -> Loader:
    """A stage's loader; of the part `validation`, as many documents as the recipe asks for, once.

    Args:
        topology: this rank among those that share its packs, which `share` counts as one; None: it is alone.
    """
    stage, batch = recipe.stages[number], recipe.stages[number].batch
    limits = MediaLimits(max_pixels=recipe.loader.max_pixels, max_frames=recipe.loader.max_frames)
    mixture = make_mixture(recipe, number, processor, part)
    training = part == "train"
    options: dict[str, Any] = {
        "share": share,
        "workers": recipe.loader.workers if training else 0,
        "max_bad_fraction": recipe.loader.max_bad_fraction,
        "log_keys": training and recipe.tracking.documents,
        "flag": flag,
        "limit": None if training or recipe.validation is None else recipe.validation.documents,
    }
    if stage.objective == "region_text":
        return Loader(
            mixture,
            Packing(batch.rows, batch.micro_batches, tokens=2**31, tiles=2**31, window=1, reserve=1),
            partial(encode_regions, processor=processor, limits=limits),
            partial(collate_regions, processor=processor, raw_pixels=True),
            _tiles,
            **options,
        )
    encoding: Callable[..., Any] = encode
    collation: Callable[..., Any] = partial(collate, processor=processor, raw_pixels=True)
    if topology is not None and topology.degree > 1:
        encoding = plan_document
        collation = SequenceCollate(processor, topology, limits, threads=max(1, recipe.loader.workers))
    return Loader(
        mixture,
        Packing(batch.rows, batch.micro_batches, batch.tokens, batch.tiles, batch.window, batch.reserve),
        partial(encoding, processor=processor, limits=limits),
        collation,
        SampleCost(config, stage),
        **options,
    )


class SampleCost:
    """Operations that training on a sample takes, tower and attention included; what step costs are summed from.

    Of a model whose operations can't be counted (experts, latent attention) it is the number of tokens, `exact` is
    False, and there is no MFU.
    """

    def __init__(self, config: FoveateConfig, stage: StageRecipe):
        self.trains, self.tiling = tuple(stage.learning_rates), config.tiling
        try:
            self.flops: ModelFlops | None = ModelFlops.from_config(config)
        except ValueError:
            self.flops = None

    @property
    def exact(self) -> bool:
        return self.flops is not None

    def __call__(self, sample: Sample | PlannedSample) -> float:
        if self.flops is None:
            return float(sample.tokens)
        tiles, blocks = encoded_tiles(self.tiling, sample.media)
        return self.flops.document(sample.tokens, tiles, self.trains, sample.loss_tokens, blocks)


def encoded_tiles(tiling: str, media: MediaTiles) -> tuple[Counter[tuple[int, int]], Counter[tuple[int, int]]]:
    """The tiles that the tower encodes, and those whose features, joined over scales, the projector reads, by their
    (height, width) in pixels. With tiling `native` an image or frame is one.
    """
    tiles: Counter[tuple[int, int]] = Counter()
    blocks: Counter[tuple[int, int]] = Counter()
    of_frames = np.repeat(media.video_grids[:, 1:], media.video_grids[:, 0], axis=0)
    for pixels, grids in ((media.images, media.image_grids), (media.frames, of_frames)):
        height, width = pixels.shape[1:3]
        if tiling == "native":  # what is a tile elsewhere is a patch here
            tiles.update((rows * height, columns * width) for rows, columns in grids.tolist())
        elif len(pixels):
            tiles[height, width] += len(pixels)
            blocks[height, width] += int(grids.prod(1).sum())
    return tiles, blocks if tiling in ("s2", "dynamic-s2") else tiles


def _tiles(sample: RegionSample) -> float:
    """What a document costs where the LLM does not run."""
    return float(sample.tiles)


def make_objective(
    stage: StageRecipe,
    model: FoveateForConditionalGeneration,
    processor: FoveateProcessor,
    same_calls: bool,
    topology: Topology | None = None,
) -> nn.Module:
    """The module that a stage's engine trains; see `objectives`, and `make_loader` for the topology."""
    if stage.objective == "region_text":
        return RegionContrast(model, processor)
    degree = topology.degree if topology else 1
    chunks = -(-stage.batch.rows * stage.batch.tokens // (LOGITS_TOKENS * degree))
    if topology is not None and degree > 1:
        return SequenceNextToken(model, processor, chunks, same_calls, topology)
    return NextToken(model, processor, chunks, same_calls)
