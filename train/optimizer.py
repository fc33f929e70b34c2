"""The optimiser and its schedule: AdamW with a learning rate for each part, warm-up and cosine."""

import math

import torch
from torch import nn

from ..vlm.model import FoveateForConditionalGeneration
from .recipe import StageRecipe


def part_modules(model: FoveateForConditionalGeneration) -> dict[str, nn.Module]:
    """The parts that a recipe's learning rates name."""
    return {"tower": model.vision_tower, "projector": model.multi_modal_projector, "llm": model.language_model}


def set_trainable(model: FoveateForConditionalGeneration, stage: StageRecipe) -> None:
    """Freezes every part that the stage gives no learning rate."""
    for part, module in part_modules(model).items():
        module.requires_grad_(part in stage.learning_rates)


def make_optimizer(
    model: FoveateForConditionalGeneration, stage: StageRecipe, head: nn.Module | None = None
) -> torch.optim.AdamW:
    """AdamW over the stage's parts; weight decay falls on matrices alone, not on norms, biases and scales.

    Args:
        model: its parts are frozen already as the stage says.
        stage: learning rates, betas, weight decay.
        head: an objective's own parameters, trained at the highest of the learning rates.

    Each group carries `part` and `peak_lr`.
    """
    modules = {part: part_modules(model)[part] for part in stage.learning_rates}
    rates = dict(stage.learning_rates)
    if head is not None:
        modules["head"], rates["head"] = head, max(stage.learning_rates.values())
    groups = []
    for part, module in modules.items():
        parameters = [p for p in module.parameters() if p.requires_grad]
        for decay, chosen in (
            (stage.weight_decay, [p for p in parameters if p.ndim >= 2]),
            (0.0, [p for p in parameters if p.ndim < 2]),
        ):
            if chosen:
                rate = rates[part]
                groups.append({"params": chosen, "part": part, "lr": rate, "peak_lr": rate, "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=stage.betas, fused=True)


def learning_rate_scale(step: int, stage: StageRecipe) -> float:
    """Fraction of the peak learning rate at a step (from 0): linear warm-up, then cosine to `final_fraction`."""
    if step < stage.warmup_steps:
        return (step + 1) / stage.warmup_steps
    progress = (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps)
    return stage.final_fraction + (1 - stage.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int, stage: StageRecipe) -> None:
    scale = learning_rate_scale(step, stage)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * scale
