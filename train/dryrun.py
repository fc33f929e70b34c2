"""A recipe checked up to its first batches: everything but the weights and the steps."""

from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from ..vlm.model import FoveateForConditionalGeneration
from .build import build_config
from .engine import deepspeed_config
from .optimizer import set_trainable
from .parallel import check_parallel
from .recipe import LoraRecipe, Recipe, RecipeError, StageRecipe
from .stages import check_sources, make_loader, make_mixture


@dataclass(frozen=True)
class StageCheck:
    """What a stage will do, from its first step."""

    name: str
    length: str
    documents: int | None  # None: endless
    trained: int  # parameters, adapters left out
    micro_batches: int  # of a process
    tokens: int  # of the first step
    loss_tokens: int
    tiles: int
    waste: float
    bad: int


def dry_run(recipe: Recipe, processes: int = 1) -> list[StageCheck]:
    """Opens every source, makes every stage's first step and checks that processes can share it.

    The model is made without weights, so nothing but its configuration and its tokenizer is read.

    Raises:
        RecipeError, SourceError, TooManyBadError, ValueError: as training would raise them.
    """
    check_sources(recipe)
    check_parallel(recipe, processes)
    if recipe.engine != "torch":
        deepspeed_config(recipe.engine)
    config, processor = build_config(recipe.model)
    with torch.device("meta"):
        model = FoveateForConditionalGeneration._from_config(config)
    checks = []
    for number, stage in enumerate(recipe.stages):
        set_trainable(model, stage.model_copy(update=_without_lora(stage)))
        loader = make_loader(recipe, number, config, processor)
        try:
            step = loader.next()
        finally:
            loader.close()
        if step is None:
            raise RecipeError(f"stages.{stage.name}: its data hold no document; accepted: one at least")
        if recipe.validation and stage.objective == "next_token":
            make_mixture(recipe, number, processor, "validation").document(0)
        checks.append(
            StageCheck(
                stage.name,
                f"{stage.steps} steps" if stage.steps else f"{stage.epochs} epochs",
                loader.mixture.documents,
                sum(p.numel() for p in model.parameters() if p.requires_grad),
                stage.batch.micro_batches // (processes // recipe.parallel_of(stage).degree),
                step.tokens,
                step.loss_tokens,
                sum(sum(batch.tiles) for batch in step.micro),
                1 - step.tokens / step.positions,
                sum(step.bad_counts.values()),
            )
        )
    return checks


def _without_lora(stage: StageRecipe) -> dict:
    """Changes of a stage that leave out its adapters, which a model without weights does not get."""
    rates = {part: rate for part, rate in stage.learning_rates.items() if part != "lora"}
    lora: LoraRecipe | None = None
    return {"learning_rates": rates, "lora": lora}


def print_checks(checks: list[StageCheck], console: Console) -> None:
    """A table of what `dry_run` found."""
    table = Table(box=None)
    table.add_column("stage", min_width=max(len(check.name) for check in checks))
    for name in ("length", "documents", "trained", "micro", "tokens", "loss", "tiles", "waste", "bad"):
        table.add_column(name, justify="right")
    for check in checks:
        table.add_row(
            check.name,
            check.length,
            "endless" if check.documents is None else f"{check.documents:,}",
            f"{check.trained / 1e6:,.1f} M",
            str(check.micro_batches),
            f"{check.tokens:,}",
            f"{check.loss_tokens:,}",
            f"{check.tiles:,}",
            f"{check.waste:.1%}",
            str(check.bad),
        )
    console.print(table)
