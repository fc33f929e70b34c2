"""Scale, then compress, at the smallest size: thin digits read at more and fewer visual tokens (docs/compress.md)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from ..data.fine_glyphs import SCENE
from ..eval.compress import Measured, as_json, clips, from_json, score_clips, score_scenes
from ..vlm.chat import load_model
from .build import build_config, build_model
from .loop import FINISHED, train
from .recipe import ModelRecipe, Recipe, load_recipe

TEXT_TOKENS = 99  # of a scene's questions and answers: with the visual tokens a row, so that each has one scene
FRAMES = (4, 8, 16, 32)  # of a clip, that are evaluated
MEASURED = "measured.json"  # in a variant's folder, written last
POOLS = (1, 2, 4, 8)  # frames that are averaged to one


@dataclass(frozen=True)
class Variant:
    """One row of the table: overrides of the recipe `compress`, and whether the stage `tower` tunes the tower."""

    name: str
    overrides: tuple[str, ...]
    tower: bool = False


LOW = ("model.tiling=resize", "model.s2_scales=null", "model.projector=mlp2x")
VARIANTS = (
    Variant("low", LOW),
    Variant("low + tower stage", LOW, tower=True),
    Variant("scaled", ("model.projector=mlp2x",)),
    Variant("scaled + 2x2", ("model.projector=downsample-2x2",)),
    Variant("scaled + 3x3", ()),
    Variant("scaled + 3x3 + tower stage", (), tower=True),
    Variant("scaled + 6x6", ("model.projector=downsample-6x6",)),
    Variant("scaled + 6x6 + tower stage", ("model.projector=downsample-6x6",), tower=True),
)


def train_from(
    recipe: Recipe, start: Path | None, out: Path, console: Console, projector: bool = False
) -> tuple[Path, float]:
    """Trains a recipe in the folder `out`, unless that is done; gives the model's folder and the seconds it took.

    Args:
        recipe: describes the model from scratch.
        start, projector: see `start_variant`; with start None it does begin from scratch.
    """
    if not (out / FINISHED).exists():
        begun = recipe if start is None else start_variant(recipe, start, out / "start", projector)
        train(begun, out, resume="auto", console=console)
    return out / "model", sum(stage["seconds"] for stage in json.loads((out / FINISHED).read_text()))


def start_variant(recipe: Recipe, start: Path, out: Path, projector: bool = False) -> Recipe:
    """Writes the model that a variant begins with to `out` and gives the recipe that trains it.

    Args:
        recipe: describes the model from scratch.
        start: the model whose tower and LLM it gets.
        projector: it gets the projector too; otherwise that is new, drawn with the recipe's seed.
    """
    torch.manual_seed(recipe.seed)
    model, processor = build_model(recipe.model)
    shared, _ = load_model(start, device="cpu")
    for part in ("vision_tower", "language_model", *(["multi_modal_projector"] if projector else [])):
        getattr(model, part).load_state_dict(getattr(shared, part).float().state_dict())
    model.save_pretrained(out)
    processor.save_pretrained(out)
    loaded = ModelRecipe(path=str(out), attn_implementation=recipe.model.attn_implementation)
    return recipe.model_copy(update={"model": loaded})


def variant_recipe(variant: Variant, seed: int, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a variant; where the stage `tower` does not tune the tower, it goes on with the projector."""
    changes = [*variant.overrides, f"seed={seed}"]
    changes += [] if variant.tower else ["stages.tower.learning_rates={projector: 1.0e-3}"]
    tokens = visual_tokens(load_recipe("compress", changes))
    return load_recipe("compress", [*changes, f"stages.instruct.batch.tokens={tokens + TEXT_TOKENS}", *overrides])


def run_variant(
    variant: Variant, start: Path, out: Path, console: Console, seed: int, questions: int, overrides: Sequence[str] = ()
) -> Measured:
    """Trains a variant in the folder `out` and asks it about so many test scenes, unless that is done."""
    if done := _measured(out, questions):
        return done[0]
    recipe = variant_recipe(variant, seed, overrides)
    model, seconds = train_from(recipe, start, out, console)
    scores = score_scenes(*load_model(model, device="cpu"), questions)
    measured = Measured(variant.name, seed, visual_tokens(recipe), scores, seconds)
    (out / MEASURED).write_text(json.dumps(as_json([measured]), indent=1))
    return measured


def _measured(out: Path, questions: int) -> list[Measured]:
    """What a finished run in the folder has written, if it asked so many questions."""
    done = from_json(json.loads((out / MEASURED).read_text())) if (out / MEASURED).exists() else []
    return done if all(score.n == questions for one in done for score in one.scores.values()) else []


def visual_tokens(recipe: Recipe) -> int:
    """Tokens that the recipe's model reads of a scene."""
    _, processor = build_config(recipe.model)
    return processor.plan_image((SCENE, SCENE)).tokens


def run_video(
    pool: int, start: Path, out: Path, console: Console, seed: int, questions: int, overrides: Sequence[str] = ()
) -> list[Measured]:
    """Goes on from a model of every frame with `pool` frames averaged; asks about clips with each number of frames."""
    if done := _measured(out, questions):
        return done
    recipe = load_recipe("compress-video", [f"model.video_pool=[{pool}, 1, 1]", f"seed={seed}", *overrides])
    folder, seconds = train_from(recipe, start, out, console, projector=True)
    model, processor = load_model(folder, device="cpu")
    made = clips(questions, processor.video_size[0])
    measured = []
    for frames in FRAMES:
        score = score_clips(model, processor, made, frames)
        tokens = -(-frames // pool) * processor.tokens_per_frame()
        measured.append(Measured(f"video, {frames} frames, pool {pool}", seed, tokens, {"colour": score}, seconds))
    (out / MEASURED).write_text(json.dumps(as_json(measured), indent=1))
    return measured


def run_experiment(
    out: Path, console: Console, seeds: Sequence[int], questions: int, pools: Sequence[int] = POOLS
) -> list[Measured]:
    """Runs all variants with each seed, and video with the first; what is finished in `out` is not run again."""
    start, _ = train_from(load_recipe("compress-start"), None, out / "start", console)
    measured = []
    for seed in seeds:
        for variant in VARIANTS:
            console.rule(f"{variant.name}, seed {seed}")
            folder = out / f"{variant.name.replace(' + ', '-').replace(' ', '-')}-{seed}"
            measured.append(run_variant(variant, start, folder, console, seed, questions))
            console.print(measured[-1].line(), soft_wrap=True, highlight=False)
    console.rule("video")
    start, _ = train_from(load_recipe("compress-video-start"), start, out / "video-start", console)
    for pool in pools:
        console.rule(f"video, pool {pool}")
        measured += run_video(pool, start, out / f"video-{pool}", console, seeds[0], questions)
        for one in measured[-len(FRAMES) :]:
            console.print(one.line(), soft_wrap=True, highlight=False)
    return measured
