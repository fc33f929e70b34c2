"""The optimiser and its schedule: learning rate and weight decay by part, warm-up and cosine."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..vlm.model import FoveateForConditionalGeneration
from .adapters import part_parameters
from .recipe import StageRecipe


def set_trainable(model: FoveateForConditionalGeneration, stage: StageRecipe) -> None:
    """Freezes everything that belongs to no part with a learning rate."""
    model.requires_grad_(False)
    for part in stage.learning_rates:
        for _, parameter in part_parameters(model, part):
            parameter.requires_grad_(True)


def make_optimizer(
    model: FoveateForConditionalGeneration, stage: StageRecipe, head: nn.Module | None = None
) -> torch.optim.Optimizer:
    """AdamW or SGD over the stage's parts; weight decay falls on matrices alone, not on norms, biases and scales.

    Args:
        model: its parts are frozen already as the stage says.
        stage: learning rates, betas, weight decay.
        head: an objective's own parameters, trained at the highest of the learning rates.

    Each group carries `part` and `peak_lr`.
    """
    parts = {part: [p for _, p in part_parameters(model, part)] for part in stage.learning_rates}
    rates: dict[str, float] = dict(stage.learning_rates)
    if head is not None:
        parts["head"], rates["head"] = list(head.parameters()), max(stage.learning_rates.values())
    groups: list[dict[str, Any]] = []
    for part, parameters in parts.items():
        decay = stage.weight_decays.get(part, stage.weight_decay)
        for weight_decay, chosen in (
            (decay, [p for p in parameters if p.ndim >= 2]),
            (0.0, [p for p in parameters if p.ndim < 2]),
        ):
            if chosen:
                rate = {"lr": rates[part], "peak_lr": rates[part]}
                groups.append({"params": chosen, "part": part, "weight_decay": weight_decay, **rate})
    if stage.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=stage.momentum)
    return torch.optim.AdamW(groups, betas=stage.betas, fused=True)


def learning_rate_scale(stage: StageRecipe, step: int, progress: float) -> float:
    """Fraction of the peak learning rate: linear warm-up, then cosine to `final_fraction`, or constant.

    Args:
        stage: its schedule.
        step: of the stage, from 0.
        progress: of the stage's data before this step, 0 to 1; what counts where the stage is measured in epochs.
    """
    if stage.steps is not None:
        warmup_steps = stage.warmup_steps or round(stage.warmup_fraction * stage.steps)
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, stage.steps - warmup_steps)
    elif progress < stage.warmup_fraction:
        return (progress + 1e-3) / (stage.warmup_fraction + 1e-3)  # the first step moves too
    else:
        progress = (progress - stage.warmup_fraction) / max(1e-9, 1 - stage.warmup_fraction)
    if stage.schedule == "constant":
        return 1.0
    return stage.final_fraction + (1 - stage.final_fraction) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rates(groups: Iterable[dict[str, Any]], scale: float) -> None:
    """Sets each group's rate to so much of its peak."""
    for group in groups:
        group["lr"] = group["peak_lr"] * scale
