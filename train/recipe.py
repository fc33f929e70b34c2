"""Recipes: what is trained, on what, in which stages. Typed, from YAML, validated whole before anything is loaded."""

import copy
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from ..data.glyphs import KIND_BUILDERS, SPLITS, check_ranges
from ..vlm.projector import PROJECTORS

PARTS = ("tower", "projector", "llm")
Fraction = Annotated[float, Field(ge=0, le=1)]
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
    embedding_scale: PositiveFloat = 1.0  # from scratch: the LLM's input embeddings start so many times larger
    projector: Literal[tuple(PROJECTORS)] = "downsample-2x2"  # type: ignore[valid-type]
    vision_feature_layer: int | None = -2
    attn_implementation: str | None = None  # transformers' name; None is its default, sdpa
    processor: dict[str, Any] = {}  # arguments of FoveateProcessor that differ from the tower's own

    @model_validator(mode="after")
    def _one_origin(self) -> "ModelRecipe":
        if self.path is not None and (self.vision is not None or self.text is not None):
            raise ValueError("path excludes vision and text; accepted: path alone, or vision and text")
        if self.path is None and (self.vision is None or self.text is None):
            raise ValueError("accepted: path alone, or vision and text")
        if isinstance(self.vision, dict) != isinstance(self.text, dict):
            raise ValueError("vision and text must both be names, or both be configurations for random weights")
        if self.embedding_scale != 1 and not isinstance(self.text, dict):
            raise ValueError(f"embedding_scale is {self.embedding_scale}, but pretrained weights are not scaled")
        return self


class GlyphData(_Strict):
    """Documents of the embedded data (see `data/glyphs.py`)."""

    source: Literal["glyphs"] = "glyphs"
    kind: Literal[tuple(KIND_BUILDERS)]  # type: ignore[valid-type]
    weight: PositiveFloat = 1.0
    split: Literal[SPLITS] = "train"  # type: ignore[valid-type]
    objects: tuple[int, int] = (4, 16)
    turns: tuple[int, int] = (4, 12)
    frames: tuple[int, int] = (2, 8)
    images: tuple[int, int] = (2, 4)

    @model_validator(mode="after")
    def _ranges(self) -> "GlyphData":
        check_ranges(self.objects, self.turns, self.frames, self.images)
        return self


class BatchRecipe(_Strict):
    """A batch of packed rows."""

    rows: PositiveInt = 4
    tokens: PositiveInt = 512  # budget of a row
    tiles: PositiveInt = 256  # budget of a row: images and frames
    window: PositiveInt = 64  # samples that wait to be packed
    accumulation: PositiveInt = 1  # micro-batches a step


class StageRecipe(_Strict):
    """One stage of training."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    objective: Literal["next_token", "region_text"] = "next_token"
    steps: PositiveInt
    learning_rates: dict[Literal[PARTS], PositiveFloat]  # type: ignore[valid-type]  # parts not named are frozen
    data: list[GlyphData] = Field(min_length=1)
    batch: BatchRecipe = BatchRecipe()
    warmup_steps: int = Field(default=0, ge=0)
    final_fraction: Fraction = 0.0  # of the learning rate at the end of the cosine
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    max_grad_norm: PositiveFloat = 1.0
    rope_theta: PositiveFloat | None = None  # of the LLM, from this stage on

    @model_validator(mode="after")
    def _consistent(self) -> "StageRecipe":
        if not self.learning_rates:
            raise ValueError(f"learning_rates is empty, so nothing would train; accepted parts: {', '.join(PARTS)}")
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps} of {self.steps} steps; accepted: fewer than steps")
        regions = [data.kind in ("regions", "frame_regions") for data in self.data]
        if self.objective == "region_text":
            if not all(regions):
                raise ValueError("objective region_text needs data of kinds regions and frame_regions alone")
            if "llm" in self.learning_rates:
                raise ValueError(
                    "objective region_text does not run the LLM; accepted learning_rates: tower, projector"
                )
            unused = sorted(self.batch.model_fields_set - {"rows"})
            if unused:
                raise ValueError(
                    f"batch.{unused[0]} has no effect on objective region_text, which contrasts a whole batch of "
                    "documents; accepted: rows alone"
                )
        elif any(regions):
            raise ValueError("data of kinds regions and frame_regions fits objective region_text alone")
        return self


class TrackingRecipe(_Strict):
    """Where metrics go, besides `metrics.jsonl`."""

    wandb: Literal["offline", "online", "disabled"] = "offline"
    project: str = "foveate"
    every_steps: PositiveInt = 10


class CheckpointRecipe(_Strict):
    every_steps: PositiveInt = 500
    keep: PositiveInt = 2


class Recipe(_Strict):
    """A whole training run."""

    name: str
    seed: int = Field(default=0, ge=0)
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the device computes in it
    threads: PositiveInt | None = None  # CPU threads; None leaves torch's own choice
    model: ModelRecipe
    tracking: TrackingRecipe = TrackingRecipe()
    checkpoint: CheckpointRecipe = CheckpointRecipe()
    stages: list[StageRecipe] = Field(min_length=1)

    @model_validator(mode="after")
    def _unique_names(self) -> "Recipe":
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages are named {names}; accepted: names that differ")
        return self


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
