"""Recipes: what is trained, on what, in which stages. Typed, from YAML, validated whole before anything is loaded."""

import copy
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from ..data.glyphs import KIND_BUILDERS, REGION_KINDS, SPLITS, TOKENIZERS, check_ranges
from ..vlm.projector import downsample_factor
from ..vlm.tiling import TILINGS

PARTS = ("tower", "tower_norms", "projector", "llm", "llm_embeddings", "llm_norms", "lora")
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class RecipeError(ValueError):
    """A recipe can't work; the message names each field, its value and what would be accepted."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelRecipe(_Strict):
    """Where the model comes from: one checkpoint, two pretrained parts, or two configurations from scratch."""

    path: str | None = None  # a Foveate checkpoint
    vision: str | dict[str, Any] | None = None  # name or directory, or a configuration (random weights)
    text: str | dict[str, Any] | None = None
    tokenizer: Literal[tuple(TOKENIZERS)] | None = None  # type: ignore[valid-type]  # from scratch; None: glyphs
    embedding_scale: PositiveFloat = 1.0  # from scratch: the LLM's input embeddings start so many times larger
    tower_image_size: PositiveInt | None = None  # to which a named tower's positions are resized; None: its own
    projector: str = "downsample-2x2"  # see vlm/projector.py
    resampler_tokens: PositiveInt = 256  # the most tokens a tile, with projector resampler
    tiling: Literal[TILINGS] = "resize"  # type: ignore[valid-type]  # see vlm/tiling.py
    s2_scales: list[PositiveInt] | None = None  # pixels, of tilings s2 and dynamic-s2
    thumbnail: bool = True  # of tiling tiles
    video_pool: tuple[PositiveInt, PositiveInt, PositiveInt] = (1, 1, 1)  # frames, rows, columns averaged to a token
    vision_feature_layer: int | None = -2
    attn_implementation: str | None = None  # transformers' name; None is its default, sdpa
    processor: dict[str, Any] = {}  # arguments of FoveateProcessor that differ from the tower's own

    @property
    def config_fields(self) -> dict[str, Any]:
        """Those that are fields of `FoveateConfig` too."""
        names = ("projector", "resampler_tokens", "tiling", "s2_scales", "thumbnail", "video_pool")
        return {name: getattr(self, name) for name in (*names, "vision_feature_layer")}

    @field_validator("projector")
    @classmethod
    def _known_projector(cls, value: str) -> str:
        downsample_factor(value)
        return value

    @model_validator(mode="after")
    def _one_origin(self) -> "ModelRecipe":
        if self.path is not None and (self.vision is not None or self.text is not None):
            raise ValueError("path excludes vision and text; accepted: path alone, or vision and text")
        if self.path is None and (self.vision is None or self.text is None):
            raise ValueError("accepted: path alone, or vision and text")
        if isinstance(self.vision, dict) != isinstance(self.text, dict):
            raise ValueError("vision and text must both be names, or both be configurations for random weights")
        if self.tower_image_size is not None and not isinstance(self.vision, str):
            raise ValueError("tower_image_size resizes a pretrained tower; accepted: with vision a name or directory")
        if self.tokenizer is not None and not isinstance(self.text, dict):
            raise ValueError(f"tokenizer is {self.tokenizer!r}, but a pretrained LLM has its own; accepted: none")
        if self.embedding_scale != 1 and not isinstance(self.text, dict):
            raise ValueError(f"embedding_scale is {self.embedding_scale}, but pretrained weights are not scaled")
        return self


class GlyphData(_Strict):
    """Documents of the embedded data (see `data/glyphs.py`)."""

    source: Literal["glyphs"] = "glyphs"
    kind: Literal[tuple(KIND_BUILDERS)]  # type: ignore[valid-type]
    weight: PositiveFloat = 1.0
    split: Literal[SPLITS] = "train"  # type: ignore[valid-type]
    documents: PositiveInt | None = None  # None: endless
    objects: tuple[int, int] = (4, 16)
    turns: tuple[int, int] = (4, 12)
    frames: tuple[int, int] = (2, 8)
    images: tuple[int, int] = (2, 4)

    @model_validator(mode="after")
    def _ranges(self) -> "GlyphData":
        check_ranges(self.objects, self.turns, self.frames, self.images)
        return self


class SourceRecipe(_Strict):
    """Where documents lie (see `data/sources.py`); stages name it in their `data`."""

    path: str | list[str] | None = None  # shards, JSON, JSON lines or a dataset on disk; None: yet to be filled in
    format: Literal["auto", "interleaved", "caption", "chat", "text"] = "auto"
    media_root: str | None = None  # folder of the media that JSON records name
    subset: str | None = None  # subset index file
    max_images: PositiveInt = 6  # of an interleaved document
    min_similarity: float | None = None  # of an image and its sentence
    frames: PositiveInt | None = None  # of a video; None: the processor's own number
    about: str = ""


class SourceData(_Strict):
    """Documents of one of the recipe's `sources`."""

    source: str
    weight: PositiveFloat = 1.0  # with `epochs`: how many times it comes in one, a whole number
    mean_tokens: PositiveFloat | None = None  # for weights by tokens; None: measured on a sample of documents


def _data_kind(value: Any) -> str:
    fields = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    return "glyphs" if fields.get("source", "glyphs") == "glyphs" else "source"


StageData = Annotated[
    Annotated[GlyphData, Tag("glyphs")] | Annotated[SourceData, Tag("source")], Discriminator(_data_kind)
]


class BatchRecipe(_Strict):
    """A step's micro-batches of packed rows."""

    rows: PositiveInt = 4  # of a micro-batch
    tokens: PositiveInt = 512  # budget of a row
    tiles: PositiveInt = 256  # budget of a row: images and frames
    window: PositiveInt = 64  # samples that wait to be packed
    micro_batches: PositiveInt = 1  # of a step, over all processes; each accumulates its share of them
    reserve: PositiveInt = 4  # packed rows from which a step's are chosen, so that processes cost alike


class ParallelRecipe(_Strict):
    """Sequence parallelism: so many processes share each packed row, `ulysses` x `ring` (see `vlm/parallel`)."""

    ulysses: PositiveInt = 1  # neighbouring processes, best of one node, that share attention's heads
    ring: PositiveInt = 1  # rows of these, which pass keys and values on

    @property
    def degree(self) -> int:
        return self.ulysses * self.ring


class LoraRecipe(_Strict):
    """Low-rank adapters on the LLM (arXiv 2106.09685; DoRA: 2402.09353; QLoRA: 2305.14314), merged after the stage."""

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    dropout: Fraction = 0.0
    dora: bool = False
    targets: list[str] = Field(
        default=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], min_length=1
    )
    quantize: bool = False  # QLoRA: the LLM's linear layers in 4 bits while the stage lasts


class StageRecipe(_Strict):
    """One stage of training."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    objective: Literal["next_token", "region_text"] = "next_token"
    steps: PositiveInt | None = None
    epochs: PositiveInt | None = None  # in the place of steps: every document of every source, `weight` times an epoch
    learning_rates: dict[Literal[PARTS], PositiveFloat]  # type: ignore[valid-type]  # parts not named are frozen
    data: list[StageData] = Field(min_length=1)
    weights: Literal["documents", "tokens"] = "documents"  # what the data's weights are shares of
    shuffle: int = Field(default=2048, ge=0)  # documents of a source that are shuffled together
    batch: BatchRecipe = BatchRecipe()
    optimizer: Literal["adamw", "sgd"] = "adamw"
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    warmup_fraction: Fraction = 0.0
    final_fraction: Fraction = 0.0  # of the learning rate at the end of the cosine
    weight_decay: Decay = 0.0
    weight_decays: dict[Literal[PARTS], Decay] = {}  # type: ignore[valid-type]  # of parts for which it is another
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    momentum: Beta = 0.0  # of sgd
    max_grad_norm: PositiveFloat | None = 1.0  # None: not clipped
    activation_checkpointing: bool = False
    lora: LoraRecipe | None = None
    rope_theta: PositiveFloat | None = None  # of the LLM, from this stage on
    parallel: ParallelRecipe | None = None  # in the place of the recipe's own

    @field_validator("data", mode="before")
    @classmethod
    def _short_names(cls, value: Any) -> Any:
        """`coyo` and `coyo*2` for `{source: coyo, weight: 2}`."""
        if not isinstance(value, list):
            return value
        entries = []
        for entry in value:
            if isinstance(entry, str):
                name, star, times = (text.strip() for text in entry.partition("*"))
                try:
                    entry = {"source": name, "weight": float(times) if star else 1.0}
                except ValueError:
                    raise ValueError(f"{entry!r}; accepted: a source's name, or name*times") from None
            entries.append(entry)
        return entries

    @model_validator(mode="after")
    def _consistent(self) -> "StageRecipe":
        if not self.learning_rates:
            raise ValueError(f"learning_rates is empty, so nothing would train; accepted parts: {', '.join(PARTS)}")
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"steps is {self.steps} and epochs {self.epochs}; accepted: exactly one of them")
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps} of {self.steps} steps; accepted: fewer than steps")
        if self.warmup_steps and (self.warmup_fraction or self.epochs):
            raise ValueError("warmup_steps excludes warmup_fraction and epochs; accepted with them: warmup_fraction")
        if self.optimizer == "adamw" and self.momentum:
            raise ValueError("momentum has no effect on adamw; accepted: betas, or optimizer: sgd")
        if self.schedule == "constant" and self.final_fraction:
            raise ValueError("final_fraction has no effect on a constant schedule")
        self._check_parts()
        self._check_data()
        return self

    def _check_parts(self) -> None:
        rates = set(self.learning_rates)
        for whole, pieces in (("tower", {"tower_norms"}), ("llm", {"llm_embeddings", "llm_norms", "lora"})):
            if whole in rates and rates & pieces:
                raise ValueError(f"learning_rates names {whole} and {sorted(rates & pieces)}, which are parts of it")
        if ("lora" in rates) != (self.lora is not None):
            raise ValueError("learning_rates.lora and lora go together; accepted: both or neither")
        if unknown := sorted(set(self.weight_decays) - rates):
            raise ValueError(f"weight_decays names {unknown}, which have no learning rate; accepted: {sorted(rates)}")

    def _check_data(self) -> None:
        glyphs = [data for data in self.data if isinstance(data, GlyphData)]
        regions = [data.kind in REGION_KINDS for data in glyphs]
        if self.epochs is not None and any(data.documents is None for data in glyphs):
            raise ValueError("epochs needs finite data; accepted: glyphs with documents, or steps")
        if self.objective == "region_text":
            if not regions or not all(regions) or len(glyphs) < len(self.data):
                raise ValueError(f"objective region_text needs data of kinds {', '.join(REGION_KINDS)} alone")
            if not set(self.learning_rates) <= {"tower", "tower_norms", "projector"} or self.epochs:
                raise ValueError(
                    "objective region_text does not run the LLM; accepted learning_rates: tower, projector; steps"
                )
            plain = BatchRecipe(rows=self.batch.rows, micro_batches=self.batch.micro_batches)
            unused = [name for name, value in self.batch if value != getattr(plain, name)]
            if unused:
                raise ValueError(
                    f"batch.{unused[0]} has no effect on objective region_text, which contrasts a whole batch of "
                    "documents; accepted: rows, micro_batches"
                )
        elif any(regions):
            raise ValueError(f"data of kinds {', '.join(REGION_KINDS)} fits objective region_text alone")


class TrackingRecipe(_Strict):
    """Where metrics go, besides `metrics.jsonl`."""

    wandb: Literal["offline", "online", "disabled"] = "offline"
    project: str = "foveate"
    every_steps: PositiveInt = 10
    documents: bool = False  # log the keys of each step's documents to documents.jsonl
    peak_flops: PositiveFloat | None = None  # of a device, for MFU; None: known for common GPUs


class CheckpointRecipe(_Strict):
    every_steps: PositiveInt = 500
    keep: PositiveInt = 2  # the newest
    keep_best: bool = False  # and the one of lowest validation loss
    asynchronous: bool = True  # written while training goes on


class LoaderRecipe(_Strict):
    """How documents are read."""

    workers: int = Field(default=0, ge=0)  # processes of each rank
    max_bad_fraction: Fraction = 0.01  # of documents that may be unusable before the run stops
    max_pixels: PositiveInt = 64_000_000  # of an image or frame
    max_frames: PositiveInt = 2048  # of a video


class ValidationRecipe(_Strict):
    """Loss on documents that are kept out of training."""

    every_steps: PositiveInt = 200
    documents: PositiveInt = 256
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.01  # of each source's documents; of glyphs it is the dev split


class EvaluationRecipe(_Strict):
    """Tasks that are evaluated by generated answers during training."""

    task: Literal["glyphs"] = "glyphs"
    every_steps: PositiveInt = 500
    questions: PositiveInt = 50  # a task


class Recipe(_Strict):
    """A whole training run."""

    name: str
    seed: int = Field(default=0, ge=0)
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"  # auto: bf16 where the device computes in it
    threads: PositiveInt | None = None  # CPU threads; None leaves torch's own choice
    engine: str = "torch"  # or a DeepSpeed configuration: zero0 … zero3, zero2-offload, zero3-offload, a JSON file
    parallel: ParallelRecipe = ParallelRecipe()
    timeout_s: PositiveFloat = 1800.0  # that a process waits for the others before the run fails
    compile: bool = False  # torch.compile of each layer
    fp8: bool = False  # the LLM's linear layers compute in fp8 (Hopper and newer)
    model: ModelRecipe
    sources: dict[str, SourceRecipe] = {}
    loader: LoaderRecipe = LoaderRecipe()
    validation: ValidationRecipe | None = None
    evaluation: EvaluationRecipe | None = None
    tracking: TrackingRecipe = TrackingRecipe()
    checkpoint: CheckpointRecipe = CheckpointRecipe()
    stages: list[StageRecipe] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages are named {names}; accepted: names that differ")
        if "glyphs" in self.sources:
            raise ValueError("sources.glyphs: the name is that of the embedded data; accepted: another one")
        for stage in self.stages:
            for data in stage.data:
                if isinstance(data, SourceData) and data.source not in self.sources:
                    known = ", ".join(self.sources) or "none yet, sources is empty"
                    raise ValueError(f"stages.{stage.name}.data names source {data.source!r}; accepted: {known}")
        if self.checkpoint.keep_best and self.validation is None:
            raise ValueError("checkpoint.keep_best has no effect without validation")
        for stage in self.stages:
            self._check_parallel(stage)
        for stage in self.stages:
            if stage.lora and stage.lora.quantize:
                if self.fp8:
                    raise ValueError(f"fp8 and stages.{stage.name}.lora.quantize exclude each other")
                if self.engine != "torch":
                    raise ValueError(
                        f"engine is {self.engine!r}; with stages.{stage.name}.lora.quantize accepted: torch"
                    )
        return self

    def parallel_of(self, stage: StageRecipe) -> ParallelRecipe:
        """How a stage's rows are shared: as it says itself, or as the recipe does."""
        return stage.parallel or self.parallel

    def _check_parallel(self, stage: StageRecipe) -> None:
        parallel = self.parallel_of(stage)
        if parallel.degree == 1:
            return
        where = f"stages.{stage.name}.parallel" if stage.parallel else "parallel"
        if stage.objective == "region_text":
            raise ValueError(
                f"{where} is ulysses {parallel.ulysses}, ring {parallel.ring}, but objective region_text of stage "
                f"{stage.name} has no sequence to share; accepted: stages.{stage.name}.parallel={{ulysses: 1, ring: 1}}"
            )


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files(__package__) / "recipes"
    return sorted(Path(file.name).stem for file in folder.iterdir() if file.name.endswith(".yaml"))


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe by name (`quickstart`) or path and applies overrides.

    Args:
        recipe: name of a shipped recipe, or path of a YAML file.
        overrides: `key=value`, keys with dots (`stages.align.steps=10`, a stage by name or number); values in YAML.

    Raises:
        RecipeError: no such recipe, bad YAML, or fields that can't work, all named.
    """
    text = _read(recipe)
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{recipe}: not YAML: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{recipe}: holds a {type(content).__name__}; accepted: a mapping with name, model, stages")
    for override in overrides:
        _override(content, override)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{recipe}: {_readable(error)}") from error


def _read(recipe: str | Path) -> str:
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise RecipeError(
                f"{recipe}: no such file; accepted: a YAML file, or one of {', '.join(shipped_recipes())}"
            )
        return path.read_text()
    if str(recipe) not in shipped_recipes():
        raise RecipeError(
            f"{recipe}: no shipped recipe of that name; accepted: {', '.join(shipped_recipes())}, or a path that ends "
            "in .yaml"
        )
    return (resources.files(__package__) / "recipes" / f"{recipe}.yaml").read_text()


def _override(content: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {override!r}; accepted: key=value, for example stages.align.steps=10")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r}: the value is not YAML: {_one_line(error)}") from error
    node: Any = content
    path = key.split(".")
    for i, name in enumerate(path):
        step: str | int = name
        if isinstance(node, list):
            names = [item.get("name") if isinstance(item, dict) else None for item in node]
            if name in names:
                step = names.index(name)
            elif name.isdigit() and int(name) < len(node):
                step = int(name)
            else:
                known = ", ".join(filter(None, names)) or f"0 to {len(node) - 1}"
                raise RecipeError(f"override {override!r}: no entry {name!r}; accepted: {known}")
        elif not isinstance(node, dict):
            raise RecipeError(f"override {override!r}: {'.'.join(path[:i])} is a value, not a mapping")
        if i == len(path) - 1:
            node[step] = parsed
            return
        child = node.get(step, {}) if isinstance(node, dict) else node[step]
        node[step] = copy.copy(child)  # a YAML alias makes several places share one mapping
        node = node[step]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _readable(error: ValidationError) -> str:
    """Pydantic's errors in one line each: field, value, what is accepted."""
    lines = []
    for item in error.errors():
        field = ".".join(str(step) for step in item["loc"]) or "recipe"
        value = "" if isinstance(item["input"], dict | BaseModel) else f" is {item['input']!r}"
        lines.append(f"{field}{value}: {item['msg'].removeprefix('Value error, ')}")
    return "; ".join(lines)
