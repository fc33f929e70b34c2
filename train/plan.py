"""What a recipe will take, before anything is loaded: parameters, tokens, operations, memory, time.

The model is made on the meta device, of configurations alone. Documents are not read either: what a stage's documents
are like is assumed from its recipe, see `_kinds`. docs/plan.md has the formulas and what they were held against.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoProcessor

from ..data.encoding import encode
from ..data.glyphs import GlyphSource, glyph_tokenizer
from ..data.regions import encode_regions
from ..vlm.config import FoveateConfig
from ..vlm.media import Video
from ..vlm.model import FoveateForConditionalGeneration
from ..vlm.parallel.plan import split_by_cost
from ..vlm.parallel.topology import ParallelError, check_heads
from ..vlm.planning import BudgetError, MediaPlan
from ..vlm.processor import FoveateProcessor, model_fields, tile_size
from .adapters import trainable_parameters
from .build import add_stage_adapters, build_config
from .engine import deepspeed_config
from .flops import PEAK_FLOPS, ModelFlops, StepFlops, layers_read
from .memory import OPTIMIZER_SLOTS, ActivationShape, Counts, Memory, Mode, compute_mode, model_states
from .optimizer import set_trainable
from .parallel_costs import attention_traffic
from .recipe import GlyphData, ModelRecipe, ParallelRecipe, Recipe, RecipeError, SourceData, StageRecipe
from .shapes import known_llm, known_tower
from .stages import encoded_tiles

IMAGE_SIZES = ((1344, 1344), (768, 1024), (1080, 1920))  # (height, width) of the images that are told of
IMAGE_SIZE, FRAME_SIZE = (768, 1024), (720, 1280)  # of a document's images and frames
FRAMES_A_SECOND = 2.0
TEXT_TOKENS = 128  # of a document, for each of its images or its video
GLYPH_DOCUMENTS = 16  # of embedded data, that are looked at
NODE_GPUS = 8  # to which advice keeps the ranks that exchange heads
ZERO_STAGES = (0, 1, 2, 3)

# GiB of the devices of `PEAK_FLOPS`, where there are several the larger; from the makers' data sheets.
GPU_MEMORY_GIB = {
    "B200": 180, "H200 NVL": 141, "H200": 141, "GH200": 96, "H100 NVL": 94, "H100 PCIe": 80, "H100": 80, "H800": 80,
    "A100": 80, "A800": 80, "L40S": 48, "L4": 24, "A40": 48, "RTX 4090": 24,
}  # fmt: skip


@dataclass(frozen=True)
class MediumPlan:
    """What an image or a video of a size becomes."""

    height: int
    width: int
    frames: int  # 0: an image
    tiles: int  # that the tower encodes
    tokens: int  # that the LLM reads


@dataclass(frozen=True)
class StagePlan:
    """What a stage takes.

    Attributes:
        length: steps or epochs.
        trained: parameters, by part.
        documents: in a step, as assumed.
        tokens, tiles: of a step.
        flops: of a step, all GPUs together.
        checkpointing: whether the recipe recomputes activations.
        memory: bytes a GPU by ZeRO's stage, with the activations of the recipe's own setting.
        activations: the same without and with checkpointing, by ZeRO's stage.
        step_s: a step's seconds.
        total_s: the stage's seconds, where its steps are known.
        million_documents_s: seconds for a million documents.
        ulysses, ring: ranks that share a row, see `recipe.ParallelRecipe`.
        imbalance: the tower's work on the rank of them that has most, over the mean; of the kind where it is largest.
        sent: bytes that a GPU sends in a step for attention.
    """

    name: str
    length: str
    trained: dict[str, int]
    documents: float
    tokens: float
    tiles: float
    flops: StepFlops
    checkpointing: bool
    memory: dict[int, Memory]
    activations: dict[int, tuple[float, float]]
    step_s: float
    total_s: float | None
    million_documents_s: float
    ulysses: int
    ring: int
    imbalance: float
    sent: float


@dataclass(frozen=True)
class Plan:
    """What a recipe takes; parameters by part."""

    recipe: str
    gpus: int
    gpu: str
    gpu_memory: float  # bytes
    mfu: float
    engine: str
    parameters: dict[str, int]
    media: list[MediumPlan]
    stages: list[StagePlan]
    notes: list[str]


def plan(recipe: Recipe, gpus: int = 8, gpu: str = "H100", mfu: float = 0.4) -> Plan:
    """Plans a recipe.

    Args:
        gpus: how many train together.
        gpu: a name of `flops.PEAK_FLOPS`.
        mfu: the share of the GPUs' operations that a step is taken to use (PaLM, arXiv 2204.02311, appendix B).

    Raises:
        RecipeError: a part's configuration can't be found, or the GPU is not known.
        ValueError: the model has operations that can't be counted.
    """
    peaks = dict(PEAK_FLOPS)
    if gpu not in peaks:
        raise RecipeError(f"gpu is {gpu!r}; accepted: {', '.join(peaks)}")
    if gpus < 1 or not 0 < mfu <= 1:
        raise RecipeError(f"gpus is {gpus} and mfu {mfu}; accepted: 1 or more, and above 0 to 1")
    config, processor = _shape(recipe.model)
    model = _empty(config)
    notes = _Notes()
    media = [_medium(processor, size, 0) for size in IMAGE_SIZES]
    media += [_medium(processor, FRAME_SIZE, frames) for frames in _frame_counts(recipe, processor)]
    rate = gpus * peaks[gpu] * mfu
    memory = GPU_MEMORY_GIB[gpu] * 2.0**30
    degrees = {stage.name: recipe.parallel_of(stage).degree for stage in recipe.stages}
    if uneven := [name for name, degree in degrees.items() if gpus % degree]:
        notes.add(
            f"{gpus} GPUs are no multiple of those that share a row in stages {', '.join(uneven)}, as they must be"
        )
    sharing = [stage for stage in recipe.stages if stage.name not in uneven]
    if uneven := [stage.name for stage in sharing if stage.batch.micro_batches % (gpus // degrees[stage.name])]:
        notes.add(f"{gpus} GPUs can't share the micro_batches of stages {', '.join(uneven)} evenly, as they must")
    if "offload" in recipe.engine:
        notes.add(f"engine {recipe.engine} keeps on the CPU what is counted here as a GPU's optimiser and weights")
    stages = [_stage(recipe, stage, model, processor, gpus, rate, memory, notes) for stage in recipe.stages]
    parts = {"tower": model.vision_tower, "projector": model.multi_modal_projector, "llm": model.language_model}
    parameters = {part: _number(module) for part, module in parts.items()}
    return Plan(recipe.name, gpus, gpu, memory, mfu, recipe.engine, parameters, media, stages, notes.lines)


# The model, without weights


def _shape(recipe: ModelRecipe) -> tuple[FoveateConfig, FoveateProcessor]:
    """The configuration, and a processor that plans as the model's own: its tokenizer may be another."""
    if recipe.path is not None:
        return FoveateConfig.from_pretrained(recipe.path), AutoProcessor.from_pretrained(recipe.path)
    if not (isinstance(recipe.vision, str) and isinstance(recipe.text, str)):
        return build_config(recipe)
    vision, text = known_tower(recipe.vision), known_llm(recipe.text)
    if recipe.tower_image_size is not None:
        vision.image_size = recipe.tower_image_size
    config = FoveateConfig(vision_config=vision, text_config=text, **recipe.config_fields)
    fields = {"image_size": tile_size(config)} | model_fields(config)
    return config, FoveateProcessor(glyph_tokenizer(), **fields | recipe.processor)


def _empty(config: FoveateConfig) -> FoveateForConditionalGeneration:
    with torch.device("meta"):
        return FoveateForConditionalGeneration._from_config(config)


def _number(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _as_trained(
    model: FoveateForConditionalGeneration, stage: StageRecipe
) -> tuple[FoveateForConditionalGeneration, int]:
    """The model as a stage trains it, and how many of its weights are held in 4 bits."""
    quantised = 0
    if stage.lora is not None:
        model = _empty(model.config)  # adapters are merged after the stage
        if stage.lora.quantize:
            head = model.get_output_embeddings()
            linear = [m for m in model.language_model.modules() if type(m) is nn.Linear and m is not head]
            quantised = sum(module.weight.numel() for module in linear)
        plain = stage.lora.model_copy(update={"quantize": False})  # meta weights can't be quantised
        add_stage_adapters(model, stage.model_copy(update={"lora": plain}))
    set_trainable(model, stage)
    return model, quantised


# Media and documents


def _medium(processor: FoveateProcessor, size: tuple[int, int], frames: int) -> MediumPlan:
    planned = _media_plan(processor, [] if frames else [size], frames)
    tiles, _ = planned_tiles(processor, planned)
    return MediumPlan(*size, frames, sum(tiles.values()), planned.tokens)


def _media_plan(processor: FoveateProcessor, images: list[tuple[int, int]], frames: int) -> MediaPlan:
    videos: list[Video] = []
    if frames:
        empty = np.broadcast_to(np.uint8(0), (frames, *FRAME_SIZE, 3))  # one byte, whatever its shape
        videos.append(Video(empty, np.arange(frames) / FRAMES_A_SECOND, frames / FRAMES_A_SECOND, FRAMES_A_SECOND, 0))
    return processor.plan(images, videos)


def planned_tiles(processor: FoveateProcessor, media: MediaPlan) -> tuple[Counter, Counter]:
    """The tiles that the tower encodes and those that the projector reads, as `stages.encoded_tiles` has them."""
    tiles: Counter[tuple[int, int]] = Counter()
    blocks: Counter[tuple[int, int]] = Counter()
    native, scaled = processor.tiling == "native", processor.tiling in ("s2", "dynamic-s2")
    for image in media.images:
        if native:
            tiles[image.grid[0] * image.tile[0], image.grid[1] * image.tile[1]] += 1
        else:
            tiles[image.tile] += image.tiles
        blocks[image.tile] += image.grid[0] * image.grid[1]
    for video in media.videos:
        tiles[video.size] += video.frames
        blocks[video.size] += video.frames
    return tiles, blocks if scaled else tiles


def _frame_counts(recipe: Recipe, processor: FoveateProcessor) -> list[int]:
    named = {source.frames for source in recipe.sources.values() if source.frames}
    return sorted(named | {processor.num_frames})


@dataclass(frozen=True)
class _Kind:
    """What the documents of one source are like."""

    name: str
    weight: float
    tokens: int
    predicted: int
    tiles: Mapping[tuple[int, int], float]
    blocks: Mapping[tuple[int, int], float]
    units: tuple[float, ...] = ()  # what images and groups of frames cost the tower, none of which is shared

    @property
    def number_of_tiles(self) -> float:
        return sum(self.tiles.values())

    def imbalance(self, documents: float, ranks: int) -> float:
        """The largest share of the tower's work on some of these documents, over the mean of the ranks."""
        costs = self.units * max(1, round(documents))
        if ranks == 1 or not costs:
            return 1.0
        return max(sum(costs[part.start : part.stop]) for part in split_by_cost(costs, ranks)) * ranks / sum(costs)


def _kinds(recipe: Recipe, stage: StageRecipe, processor: FoveateProcessor) -> list[_Kind]:
    """Of each source of a stage, what its documents are taken to be like.

    A source with `frames` has one video of so many, of format `text` documents as long as a row, of format
    `interleaved` as many images as it may have, others one image; and `TEXT_TOKENS` with each, all of which are
    predicted, unless `mean_tokens` tells a document's tokens. Of the embedded data some documents are looked at.
    """
    return [
        _glyph_kind(recipe, stage, data, processor)
        if isinstance(data, GlyphData)
        else _source_kind(recipe, stage, data, processor)
        for data in stage.data
    ]


def _source_kind(recipe: Recipe, stage: StageRecipe, data: SourceData, processor: FoveateProcessor) -> _Kind:
    source = recipe.sources[data.source]
    if source.format == "text":
        length = round(data.mean_tokens or stage.batch.tokens)
        return _Kind(data.source, data.weight, length, length, {}, {})
    images = 0 if source.frames else source.max_images if source.format == "interleaved" else 1
    try:
        media = _media_plan(processor, [IMAGE_SIZE] * images, source.frames or 0)
    except BudgetError as error:
        raise RecipeError(f"sources.{data.source}: {error}") from error
    tiles, blocks = planned_tiles(processor, media)
    words = TEXT_TOKENS * max(1, images)
    groups = [video.tokens // video.tokens_per_group for video in media.videos]
    visual = media.tokens + sum(groups)  # with a token that separates them
    tokens = max(round(data.mean_tokens), visual + 1) if data.mean_tokens else visual + words
    return _Kind(data.source, data.weight, tokens, tokens - visual, tiles, blocks, _units(processor, media))


def _units(processor: FoveateProcessor, media: MediaPlan) -> tuple[float, ...]:
    """What each image, and each group of frames that is pooled, costs the tower: tiles, or patches with `native`."""
    native, together = processor.tiling == "native", processor.video_pool[0]
    images = [float(image.grid[0] * image.grid[1] if native else image.tiles) for image in media.images]
    groups: list[float] = []
    for video in media.videos:
        whole, rest = divmod(video.frames, together)
        groups += [float(together)] * whole + [float(rest)] * (rest > 0)
    return (*images, *groups)


def _glyph_kind(recipe: Recipe, stage: StageRecipe, data: GlyphData, processor: FoveateProcessor) -> _Kind:
    source = GlyphSource(processor=processor, seed=recipe.seed, **data.model_dump(exclude={"source", "weight"}))
    some = range(min(GLYPH_DOCUMENTS, data.documents or GLYPH_DOCUMENTS))
    read = encode_regions if stage.objective == "region_text" else encode
    samples: list[Any] = [read(source.document(i), processor) for i in some]
    tiles: Counter[tuple[int, int]] = Counter()
    blocks: Counter[tuple[int, int]] = Counter()
    for sample in samples:
        for total, of_sample in zip((tiles, blocks), encoded_tiles(processor.tiling, sample.media), strict=True):
            total.update(of_sample)
    means = [{size: count / len(samples) for size, count in total.items()} for total in (tiles, blocks)]
    units = (1.0,) * round(sum(means[0].values()))
    tokens, predicted = (round(np.mean([getattr(one, name) for one in samples])) for name in ("tokens", "loss_tokens"))
    return _Kind(data.kind, data.weight, tokens, predicted, means[0], means[1], units)


# A stage


class _Notes:
    """What the user should know, each once."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        if line not in self.lines:
            self.lines.append(line)


def _stage(
    recipe: Recipe,
    stage: StageRecipe,
    model: FoveateForConditionalGeneration,
    processor: FoveateProcessor,
    gpus: int,
    rate: float,
    gpu_memory: float,
    notes: _Notes,
) -> StagePlan:
    model, quantised = _as_trained(model, stage)
    config = model.config
    batch, runs_llm = stage.batch, stage.objective == "next_token"
    kinds = _fitting(stage, _kinds(recipe, stage, processor), notes)
    shares = _shares(stage, kinds)
    flops = ModelFlops.from_model(model)
    trains = tuple(stage.learning_rates)
    checkpointing = ("tower", "llm") if stage.activation_checkpointing else ()

    def cost(kind: _Kind) -> StepFlops:
        lengths = [kind.tokens] if runs_llm else []
        return flops.step(lengths, kind.tiles, trains, kind.predicted if runs_llm else 0, checkpointing, kind.blocks)

    rows = batch.rows * batch.micro_batches
    mean_tokens = sum(share * kind.tokens for share, kind in zip(shares, kinds, strict=True))
    documents = rows * batch.tokens / mean_tokens if runs_llm else float(rows)
    costs = [cost(kind) for kind in kinds]

    def of_step(values: list[float]) -> float:
        return documents * sum(share * value for share, value in zip(shares, values, strict=True))

    step = StepFlops(
        forward=of_step([one.forward for one in costs]),
        backward=of_step([one.backward for one in costs]),
        recomputed=of_step([one.recomputed for one in costs]),
    )
    parallel = recipe.parallel_of(stage)
    try:
        check_heads(config.text_config, parallel.ulysses)
    except ParallelError as error:
        raise RecipeError(f"stages.{stage.name}: parallel: {error}") from error
    shape = ActivationShape.of(model, layers_read(config, config.vision_config.num_hidden_layers))

    def held(zero: int, parallel: ParallelRecipe, checkpointing: bool) -> Memory:
        mode = compute_mode(zero, recipe.precision)
        activations = _activations(stage, kinds, flops, shape, mode, checkpointing, parallel)
        states = _memory(recipe, stage, model, quantised, zero, gpus, activations)
        visual = max(sum(flops.projected_tokens(size) * count for size, count in kind.blocks.items()) for kind in kinds)
        tokens = _local_tokens(stage, parallel)
        exchanged = shape.exchange_buffers(tokens, min(tokens, visual), mode, parallel.ulysses, parallel.ring)
        return replace(states, buffers=states.buffers + exchanged)

    activations = {
        zero: (held(zero, parallel, False).activations, held(zero, parallel, True).activations) for zero in ZERO_STAGES
    }
    memory = {zero: held(zero, parallel, stage.activation_checkpointing) for zero in ZERO_STAGES}
    own = 0 if recipe.engine == "torch" else deepspeed_config(recipe.engine)["zero_optimization"]["stage"]
    if memory[own].total > gpu_memory:
        fits = [f"zero{zero}" for zero in ZERO_STAGES if memory[zero].total <= gpu_memory]
        line = (
            f"stages.{stage.name}: engine {recipe.engine} takes {memory[own].total / 2**30:,.0f} GiB of a GPU that has "
            f"{gpu_memory / 2**30:,.0f}; those that fit: {', '.join(fits) or 'none, of ZeRO-0 to 3'}"
        )
        if not fits and runs_llm:
            of = partial(held, own, checkpointing=stage.activation_checkpointing)
            line += f"; parallel that fits: {_parallel_that_fits(stage, config, gpus, gpu_memory, of)}"
        notes.add(line)
    imbalances = [kind.imbalance(_documents_of_rows(stage, kind), parallel.degree) for kind in kinds]
    tower = [flops.step([], kind.tiles, trains, 0, (), kind.blocks).model for kind in kinds]
    waited = of_step([(worst - 1) * work for worst, work in zip(imbalances, tower, strict=True)])
    step_s = (step.model + waited) / rate
    return StagePlan(
        name=stage.name,
        length=f"{stage.steps} steps" if stage.steps else f"{stage.epochs} epoch{'s' if stage.epochs != 1 else ''}",
        trained={part: sum(p.numel() for _, p in named) for part, named in trainable_parameters(model, trains).items()},
        documents=documents,
        tokens=of_step([kind.tokens for kind in kinds]),
        tiles=of_step([kind.number_of_tiles for kind in kinds]),
        flops=step,
        checkpointing=stage.activation_checkpointing,
        memory=memory,
        activations=activations,
        step_s=step_s,
        total_s=stage.steps * step_s if stage.steps else None,
        million_documents_s=1e6 / documents * step_s,
        ulysses=parallel.ulysses,
        ring=parallel.ring,
        imbalance=max(imbalances),
        sent=_sent(recipe, stage, config.text_config, gpus, compute_mode(own, recipe.precision)) if runs_llm else 0.0,
    )


def _fitting(stage: StageRecipe, kinds: list[_Kind], notes: _Notes) -> list[_Kind]:
    """The kinds whose documents fit a row; what does not is refused in training."""
    if stage.objective != "next_token":
        return kinds
    fit = []
    for kind in kinds:
        over = kind.tokens > stage.batch.tokens or kind.number_of_tiles > stage.batch.tiles
        if over:
            notes.add(
                f"stages.{stage.name}: a document of {kind.name} as assumed has {kind.tokens:,.0f} tokens and "
                f"{kind.number_of_tiles:,.0f} tiles; a row accepts {stage.batch.tokens:,} and {stage.batch.tiles:,}"
            )
        else:
            fit.append(kind)
    return fit or kinds


def _shares(stage: StageRecipe, kinds: list[_Kind]) -> list[float]:
    """Of the documents."""
    weights = [kind.weight / (kind.tokens if stage.weights == "tokens" else 1) for kind in kinds]
    return [weight / sum(weights) for weight in weights]


def _documents_of_rows(stage: StageRecipe, kind: _Kind) -> float:
    """How many documents of a kind a micro-batch has."""
    if stage.objective != "next_token":
        return float(stage.batch.rows)
    documents: float = stage.batch.rows * max(1, stage.batch.tokens // kind.tokens)
    if kind.number_of_tiles:
        documents = min(documents, max(1, stage.batch.rows * stage.batch.tiles // kind.number_of_tiles))
    return documents


def _local_tokens(stage: StageRecipe, parallel: ParallelRecipe) -> int:
    """Tokens of a micro-batch that a rank holds, when its rows are full."""
    return -(-stage.batch.rows * stage.batch.tokens // parallel.degree)


def _activations(
    stage: StageRecipe,
    kinds: list[_Kind],
    flops: ModelFlops,
    shape: ActivationShape,
    mode: Mode,
    checkpointing: bool,
    parallel: ParallelRecipe,
) -> float:
    """Of a micro-batch whose rows are full of the kind of documents that takes most, on the rank with most of it."""
    largest = 0.0
    for kind in kinds:
        documents = _documents_of_rows(stage, kind)
        share = documents * kind.imbalance(documents, parallel.degree) / parallel.degree
        in_tower = sum(flops.encoded_tokens(size) * count for size, count in kind.tiles.items())
        projected = sum(flops.projected_tokens(size) * count for size, count in kind.blocks.items())
        pixels = sum(size[0] * size[1] * count for size, count in kind.tiles.items())
        largest = max(
            largest,
            shape.of_micro_batch(
                _local_tokens(stage, parallel),
                share * in_tower,
                share * projected,
                share * pixels,
                mode,
                stage.learning_rates,
                checkpointing,
                stage.objective == "next_token",
                parallel.ulysses,
            ),
        )
    return largest


def _sent(recipe: Recipe, stage: StageRecipe, text: Any, gpus: int, mode: Mode) -> float:
    """Bytes that a GPU sends for attention in a step; checkpointed layers send what the forward pass does twice."""
    parallel = recipe.parallel_of(stage)
    chunks = 2 * parallel.degree
    heads = text.num_attention_heads
    traffic = attention_traffic(
        -(-stage.batch.rows * stage.batch.tokens // chunks) * chunks,
        parallel.ulysses,
        parallel.ring,
        heads,
        getattr(text, "num_key_value_heads", None) or heads,
        getattr(text, "head_dim", None) or text.hidden_size // heads,
        4 if mode == "fp32" else 2,
    )
    forward = (traffic.heads + traffic.ring) * (2 if stage.activation_checkpointing else 1)
    micro_batches = stage.batch.micro_batches * parallel.degree / gpus
    return text.num_hidden_layers * micro_batches * (forward + traffic.heads_backward + traffic.ring_backward)


def _parallel_that_fits(
    stage: StageRecipe, config: FoveateConfig, gpus: int, gpu_memory: float, held: Callable[[ParallelRecipe], Memory]
) -> str:
    """The fewest ranks that a row can be shared by so that it fits, of them as many as possible in one node."""
    for degree in range(2, gpus + 1):
        if gpus % degree or stage.batch.micro_batches % (gpus // degree):
            continue
        for ulysses in range(min(NODE_GPUS, degree), 0, -1):
            if degree % ulysses:
                continue
            try:
                check_heads(config.text_config, ulysses)
            except ParallelError:
                continue
            parallel = ParallelRecipe(ulysses=ulysses, ring=degree // ulysses)
            if (total := held(parallel).total) <= gpu_memory:
                return f"{{ulysses: {ulysses}, ring: {parallel.ring}}}, {total / 2**30:,.0f} GiB"
    return f"none, of {gpus} GPUs"


def _memory(
    recipe: Recipe, stage: StageRecipe, model: nn.Module, quantised: int, zero: int, gpus: int, activations: float
) -> Memory:
    settings = _zero_settings(recipe, zero)
    counts = Counts.of(model, settings.get("stage3_param_persistence_threshold", 100_000), quantised)
    slots = OPTIMIZER_SLOTS[stage.optimizer] if stage.optimizer == "adamw" or stage.momentum else 0
    mode = compute_mode(zero, recipe.precision)
    return model_states(zero, mode, counts, gpus, slots, settings, activations)


def _zero_settings(recipe: Recipe, zero: int) -> dict[str, Any]:
    """The recipe's own DeepSpeed configuration, of another stage than its own the shipped one."""
    if recipe.engine != "torch":
        own = deepspeed_config(recipe.engine)["zero_optimization"]
        if own["stage"] == zero:
            return own
    return deepspeed_config(f"zero{zero}")["zero_optimization"]


# Printing


def print_plan(made: Plan, console: Console) -> None:
    """A plan as tables."""
    total = sum(made.parameters.values())
    parts = ", ".join(f"{part} {_count(number)}" for part, number in made.parameters.items())
    console.print(f"{made.recipe}: {_count(total)} parameters ({parts})")
    table = _table("media", "tiles", "tokens")
    for medium in made.media:
        name = f"image {medium.height}×{medium.width}" if not medium.frames else f"video of {medium.frames} frames"
        table.add_row(name, f"{medium.tiles:,}", f"{medium.tokens:,}")
    console.print(table)
    columns = ["length", "trained", "documents", "tokens", "tiles", "FLOPs", "step", "stage, or per 1M documents"]
    shares = any(stage.ulysses * stage.ring > 1 for stage in made.stages)
    table = _table("stage", *columns, *(["ulysses × ring", "GB sent a GPU"] if shares else []))
    for stage in made.stages:
        whole = _time(stage.total_s) if stage.total_s is not None else f"{_time(stage.million_documents_s)} / 1M"
        cells = [_count(sum(stage.trained.values())), f"{stage.documents:,.0f}", f"{stage.tokens:,.0f}"]
        cells += [f"{stage.tiles:,.0f}", f"{stage.flops.model:.2e}", _time(stage.step_s), whole]
        if shares:
            cells += [f"{stage.ulysses} × {stage.ring}", f"{stage.sent / 1e9:,.1f}"]
        table.add_row(stage.name, stage.length, *cells)
    console.print(f"\nOf a step of all {made.gpus} × {made.gpu}, at {made.mfu:.0%} of their operations:")
    console.print(table)
    largest = max(memory.total for stage in made.stages for memory in stage.memory.values())
    unit, size = ("GiB", 2**30) if largest >= 2**30 else ("MiB", 2**20)
    console.print(f"\n{unit} a GPU, of {made.gpu_memory / size:,.0f} (engine: {made.engine}):")
    table = _table(
        "stage", "ZeRO", "weights", "gradients", "optimiser", "buffers", "activations", "checkpointed", "total"
    )
    for stage in made.stages:
        for zero, memory in stage.memory.items():
            held = (memory.weights, memory.gradients, memory.optimizer, memory.buffers, *stage.activations[zero])
            mark = "" if memory.total <= made.gpu_memory else " !"
            cells = [f"{value / size:,.1f}" for value in held]
            table.add_row("" if zero else stage.name, str(zero), *cells, f"{memory.total / size:,.1f}{mark}")
    console.print(table)
    for note in made.notes:
        console.print(f"- {note}", soft_wrap=True, highlight=False)


def _table(first: str, *others: str) -> Table:
    table = Table(box=None)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _count(number: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:,.2f} {letter}"
    return f"{number:,.0f}"


def _time(seconds: float) -> str:
    for size, unit in ((86400 * 2, "days"), (3600 * 2, "h"), (120, "min")):
        if seconds >= size:
            return f"{seconds / {'days': 86400, 'h': 3600, 'min': 60}[unit]:,.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
