"""Whether a recipe's sequence parallelism can work, told before anything is loaded; and each stage's topology."""

from datetime import timedelta
from typing import Any

from rich.console import Console

from ..vlm.parallel.topology import ParallelError, Topology, check_heads, make_topology
from .build import build_config
from .distributed import World
from .recipe import ParallelRecipe, Recipe, RecipeError, StageRecipe

PROCESS_ROPES = ("dynamic", "longrope")  # whose frequencies follow the longest position that a process sees


def check_parallel(recipe: Recipe, processes: int) -> None:
    """Checks that so many processes can share each stage's micro-batches, and the tokens of each of these.

    Raises:
        RecipeError: the message names the stage's field.
    """
    parallel = [recipe.parallel_of(stage) for stage in recipe.stages]
    text: Any = None
    if any(one.degree > 1 for one in parallel):
        text = build_config(recipe.model)[0].text_config
    for stage, one in zip(recipe.stages, parallel, strict=True):
        where = f"stages.{stage.name}.parallel" if stage.parallel else "parallel"
        try:
            groups = Topology(one.ulysses, one.ring, 0, processes).data_size
            if one.degree > 1:
                check_heads(text, one.ulysses)
                _check_text_model(text)
        except ParallelError as error:
            raise RecipeError(f"{where}: {error}") from error
        if stage.batch.micro_batches % groups:
            who = "processes" if one.degree == 1 else f"groups of {one.degree} processes"
            raise RecipeError(
                f"stages.{stage.name}.batch.micro_batches: {stage.batch.micro_batches} micro-batches a step can't be "
                f"shared by {groups} {who}; accepted: a multiple of {groups}"
            )


def _check_text_model(config: Any) -> None:
    """Raises ParallelError for what the shared attention, position ids or loss don't have."""
    kinds = sorted(set(getattr(config, "layer_types", None) or ()))
    ropes: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    types = {rope.get("rope_type") for rope in (ropes, *ropes.values()) if isinstance(rope, dict)}
    for name, value, accepted in (
        ("attention_dropout", getattr(config, "attention_dropout", 0), "0"),
        ("layer_types", [kind for kind in kinds if kind != "full_attention"], "full_attention alone"),
        ("sliding_window", None if kinds else getattr(config, "sliding_window", None), "none"),
        ("attn_logit_softcapping", getattr(config, "attn_logit_softcapping", None), "none"),
        ("final_logit_softcapping", getattr(config, "final_logit_softcapping", None), "none"),
        ("output_router_logits", getattr(config, "output_router_logits", False), "false"),
        ("rope_type", [rope for rope in PROCESS_ROPES if rope in types], "one of constant frequencies: default, yarn"),
    ):
        if value:
            raise ParallelError(
                f"the text model's {name} is {value}; accepted where processes share a sequence: {accepted}"
            )


class Topologies:
    """The topologies of a run's stages, each made once. Stages ask in one order on all ranks."""

    def __init__(self, world: World, timeout_s: float, console: Console):
        self.world, self.timeout_s, self.console = world, timeout_s, console
        self.made: dict[ParallelRecipe, Topology] = {}

    def __call__(self, recipe: Recipe, stage: StageRecipe) -> Topology:
        parallel = recipe.parallel_of(stage)
        if parallel not in self.made:
            timeout = timedelta(seconds=self.timeout_s)
            self.made[parallel] = make_topology(parallel.ulysses, parallel.ring, timeout)
            self._warn(parallel.ulysses)
        return self.made[parallel]

    def _warn(self, ulysses: int) -> None:
        """Of rows that cross machines: their exchange is of all heads, the ring's of keys and values alone."""
        hosts = self.world.hosts
        rows = [sorted(set(hosts[i : i + ulysses])) for i in range(0, len(hosts), ulysses)]
        crossing = [", ".join(of_row) for of_row in rows if len(of_row) > 1]
        if self.world.rank == 0 and crossing:
            self.console.print(
                f"warning: parallel.ulysses {ulysses} exchanges heads between machines ({crossing[0]}), which is slow "
                "without NVLink; best is a divisor of the processes of one, and parallel.ring between them",
                highlight=False,
                soft_wrap=True,
            )
