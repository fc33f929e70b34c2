"""The engine seam: how a loss becomes a parameter step. Here in plain torch on one device."""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import nn


class NonFiniteError(RuntimeError):
    """A loss or gradient is not finite; the optimiser has not stepped. The message names the documents."""


def resolve_precision(precision: Literal["auto", "bf16", "fp32"], device: torch.device) -> Literal["bf16", "fp32"]:
    """`auto` is bf16 on a GPU that has it and on a CPU whose matrix units compute in it, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.backends.cpu.get_cpu_capability() == "AMX" or torch.cpu._is_amx_tile_supported() else "fp32"


class PlainEngine:
    """One process, one device.

    Args:
        modules: what is trained; their parameters' gradients are clipped together.
        optimizer: over the modules' parameters.
        precision: `bf16` computes under autocast with fp32 weights.
        max_grad_norm: 2-norm that gradients are clipped to.
        device: where it runs.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        optimizer: torch.optim.Optimizer,
        precision: Literal["bf16", "fp32"],
        max_grad_norm: float,
        device: torch.device,
    ):
        self.optimizer, self.max_grad_norm, self.device, self.precision = optimizer, max_grad_norm, device, precision
        self.parameters = [p for module in modules for p in module.parameters() if p.requires_grad]

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def step(self, losses: Sequence[Callable[[], torch.Tensor]], keys: Sequence[Sequence[str]]) -> tuple[float, float]:
        """Adds up the micro-batches' losses, clips, checks, steps.

        Args:
            losses: one call a micro-batch that gives its share of the loss, already divided by the whole batch's
                valid tokens.
            keys: each micro-batch's documents, for the error.

        Returns:
            The loss and the gradients' norm before clipping.

        Raises:
            NonFiniteError: before the optimiser steps; a loss names its micro-batch's documents, a gradient all.
        """
        total = 0.0
        for loss_of, micro_keys in zip(losses, keys, strict=True):
            with self.autocast():
                loss = loss_of()
            self._check("loss", loss.item(), micro_keys)
            loss.backward()
            total += loss.item()
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm))
        self._check("gradient norm", norm, [key for micro_keys in keys for key in micro_keys])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, norm

    def _check(self, what: str, value: float, keys: Sequence[str]) -> None:
        if not math.isfinite(value):
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteError(f"{what} is {value}; stopped before the step on: {', '.join(keys)}")
