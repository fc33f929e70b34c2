"""The engine seam: how a step's micro-batches become a parameter step. Plain torch and DDP, or DeepSpeed's ZeRO.

Gradients are summed over micro-batches and ranks, never averaged. A state is named tensors, whole and without a trace
of the engine or of the number of ranks that wrote it: any engine loads any other's.
"""

import contextlib
import gc
import json
import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .distributed import World

Precision = Literal["bf16", "fp32", "fp64"]

_CONFIGS = resources.files(__package__) / "deepspeed"
SHIPPED = tuple(sorted(file.name.removesuffix(".json") for file in _CONFIGS.iterdir()))

# Of DeepSpeed's keys, those that the recipe decides.
OWNED = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "managed_gradient_accumulation", "gradient_allreduce_op", "optimizer", "scheduler", "fp16", "bf16", "amp",
    "torch_autocast", "data_types", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
)  # fmt: skip
# Those that change where weights or gradients are, in ways that a state is not read from.
UNSUPPORTED = (
    "tensor_parallel", "sequence_parallel_size", "expert_parallel", "pipeline", "compression_training", "elasticity",
    "zero_optimization.zenflow", "zero_optimization.round_robin_gradients", "zero_optimization.zero_hpz_partition_size",
    "zero_optimization.zero_quantized_weights", "zero_optimization.zero_quantized_gradients",
    "zero_optimization.zero_quantized_nontrainable_weights", "zero_optimization.cpu_offload",
)  # fmt: skip


class NonFiniteError(RuntimeError):
    """A loss or gradient is not finite; the optimiser has not stepped. The message names the documents."""


class EngineConfigError(ValueError):
    """No such engine, or a DeepSpeed file that can't be used; the message names the key."""


class StateError(ValueError):
    """A state does not fit the engine's module; the message names the tensors."""


@dataclass(frozen=True)
class Micro:
    """A micro-batch.

    Attributes:
        inputs: what the module's forward takes: tensors on the CPU, which are moved, and what is none.
        keys: its documents, for errors.
    """

    inputs: dict[str, Any]
    keys: tuple[str, ...]


@dataclass(frozen=True)
class StepResult:
    """A step, the same on every rank.

    Attributes:
        loss: summed over micro-batches and ranks.
        grad_norm: 2-norm of the gradient, before clipping.
        part_norms: the same of each part's parameters.
    """

    loss: float
    grad_norm: float
    part_norms: dict[str, float]


def resolve_precision(precision: Literal["auto", "bf16", "fp32", "fp64"], device: torch.device) -> Precision:
    """`auto` is bf16 on a GPU that has it and on a CPU whose matrix units compute in it, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.backends.cpu.get_cpu_capability() == "AMX" or torch.cpu._is_amx_tile_supported() else "fp32"


class Engine(ABC):
    """What the engines share: the order of a step, and states by name.

    Args:
        module: forward(inputs, total) gives a micro-batch's share of the step's loss, a scalar that is already divided
            by `total`. Every rank's forward calls the same submodules in the same order.
        optimizer: over the parameters that are trained; each group carries its `part`. A trained parameter that the
            loss does not reach has a gradient of zero.
        precision: see the engines.
        max_grad_norm: 2-norm that the gradient is clipped to; None leaves it.
        world: the ranks.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        max_grad_norm: float | None,
        world: World,
    ):
        self.module, self.optimizer, self.precision = module, optimizer, precision
        self.max_grad_norm, self.world = max_grad_norm, world
        self.parts: list[str] = [group["part"] for group in optimizer.param_groups]
        self.trained = {p: group for group in optimizer.param_groups for p in group["params"]}
        self.parameters = dict(module.named_parameters())
        self.shapes = {name: p.shape for name, p in self.parameters.items()}
        persistent = module.state_dict(keep_vars=True).keys()
        self.buffers = {name: buffer for name, buffer in module.named_buffers() if name in persistent}
        # The rank that reads and writes a parameter.
        self.owners = {name: number % world.size for number, name in enumerate(self.parameters)}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimiser's groups, whose `lr` may be set before a step."""
        return self.optimizer.param_groups

    def step(self, micro: Sequence[Micro], total: float) -> StepResult:
        """Adds up the micro-batches' gradients, checks, clips, steps. Collective.

        Args:
            micro: this rank's, as many as every other rank's.
            total: what the losses are divided by: the valid tokens of all micro-batches of all ranks.

        Raises:
            NonFiniteError: on every rank, before the optimiser steps. A loss names the documents of its micro-batch, a
                gradient those of all. The engine can't be used any more.
        """
        losses = torch.stack([
            self._forward_backward(self._on_device(batch), total, last=number + 1 == len(micro)).detach()
            for number, batch in enumerate(micro)
        ])  # fmt: skip
        squares = {part: torch.zeros((), device=self.world.device) for part in sorted(set(self.parts))}
        for part, gradients in self._gradients():
            if gradients:
                squares[part] = squares[part] + nn.utils.get_total_norm(gradients).square().to(self.world.device)
        bad = ~losses.isfinite()
        loss, bad_losses, *of_parts = self._summed(losses.sum(), bad.sum(), *squares.values())
        norm = math.sqrt(sum(of_parts))
        if bad_losses or not math.isfinite(norm):
            raise self._non_finite(micro, losses.tolist(), norm)
        self._update(norm)
        return StepResult(loss, norm, {part: math.sqrt(s) for part, s in zip(squares, of_parts, strict=True)})

    @torch.no_grad()
    def evaluate(self, micro: Sequence[Micro], total: float) -> float:
        """The loss as `step` has it, in evaluation mode and without a gradient. Collective."""
        training = self.module.training
        self.module.eval()
        try:
            losses = torch.stack([self._forward(self._on_device(batch), total) for batch in micro])
        finally:
            self.module.train(training)
        return self._summed(losses.sum())[0]

    @torch.no_grad()
    def state_tensors(self) -> dict[str, torch.Tensor]:
        """This rank's share of the state, on the CPU; all ranks' shares together hold everything once. Collective.

        Parameter i of the module belongs to rank i modulo their number. Names: `weight/<parameter>` (fp32 where the
        module computes in lower precision; frozen ones too), `optimizer/<parameter>/<exp_avg, step, …>`, and
        `buffer/<buffer>` on rank 0.
        """
        share = {}
        for name, parameter in self.parameters.items():
            mine = self.owners[name] == self.world.rank
            weight = self._weight(name)
            if mine:
                share[f"weight/{name}"] = cpu_copy(weight)
            for slot in self._slots(parameter):
                value = self._slot(parameter, slot)
                if mine:
                    share[f"optimizer/{name}/{slot}"] = cpu_copy(value)
        if self.world.rank == 0:
            share |= {f"buffer/{name}": cpu_copy(buffer) for name, buffer in self.buffers.items()}
        return share

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Sets the weights, and the optimiser's state where there is one. Collective.

        Args:
            tensors: what `state_tensors` gave on all ranks of any engine. It may read a tensor when asked for it: one
                rank asks for each. An optimiser that has not stepped starts afresh where there is no state for it.

        Raises:
            StateError: on every rank: names or shapes are not the module's.
        """
        stored = set(tensors)
        optimizer_keys = sorted(key for key in stored if key.startswith("optimizer/"))
        own = {f"weight/{name}" for name in self.parameters} | {f"buffer/{name}" for name in self.buffers}
        if odd := sorted(own ^ stored.difference(optimizer_keys)):
            raise StateError(f"the state's tensors are not this module's; only in one of both: {', '.join(odd[:5])}")
        slots: dict[str, list[str]] = {}  # of each trained parameter
        for key in optimizer_keys:
            name, _, slot = key.removeprefix("optimizer/").rpartition("/")
            if self.parameters.get(name) in self.trained:
                slots.setdefault(name, []).append(slot)
        errors: list[str] = []

        def read(key: str, shape: torch.Size, dtype: torch.dtype, reader: int) -> torch.Tensor:
            """Read by one rank; on every rank's device."""
            value = torch.zeros(shape, dtype=dtype, device=self.world.device)
            if self.world.rank == reader:
                tensor = tensors[key]
                if tensor.shape == shape:
                    value.copy_(tensor)
                else:
                    errors.append(f"{key} has shape {tuple(tensor.shape)}; this module's has {tuple(shape)}")
            if self.world.size > 1:
                dist.broadcast(value, reader)
            return value

        self._make_slots(slots)
        for name, parameter in self.parameters.items():
            shape, dtype, reader = self.shapes[name], self._weight_dtype(name), self.owners[name]
            self._set_weight(name, read(f"weight/{name}", shape, dtype, reader))
            for slot in slots.get(name, []):
                slot_shape = torch.Size() if slot == "step" else shape
                self._set_slot(parameter, slot, read(f"optimizer/{name}/{slot}", slot_shape, dtype, reader))
        for name, buffer in self.buffers.items():
            buffer.copy_(read(f"buffer/{name}", buffer.shape, buffer.dtype, 0))
        errors = [error for of_rank in self.world.gather(errors) for error in of_rank]
        if errors:
            raise StateError("; ".join(errors[:5]))

    @torch.no_grad()
    def full_weights(self) -> dict[str, torch.Tensor]:
        """All weights and persistent buffers on rank 0's CPU, floats in fp32; empty on the others. Collective."""
        whole = {}
        for name in self.parameters:
            weight = self._weight(name)
            if self.world.rank == 0:
                whole[name] = cpu_copy(weight.float() if weight.is_floating_point() else weight)
        if self.world.rank == 0:
            whole |= {name: cpu_copy(buffer) for name, buffer in self.buffers.items()}
        return whole

    @abstractmethod
    def close(self) -> None:
        """Gives the module back with the weights that it has, whole and without hooks. Collective."""

    @abstractmethod
    def _forward(self, inputs: dict[str, Any], total: float) -> torch.Tensor: ...

    @abstractmethod
    def _forward_backward(self, inputs: dict[str, Any], total: float, last: bool) -> torch.Tensor:
        """Adds a micro-batch's gradient, after the last one summed over ranks. Returns the loss."""

    @abstractmethod
    def _update(self, norm: float) -> None:
        """Clips by the gradient's norm, and steps."""

    # Where the weights, gradients and optimiser's state are: these are right where every rank has all of them.

    def _gradients(self) -> Iterator[tuple[str, list[torch.Tensor]]]:
        """Parts and gradients, summed over ranks; the ranks together give each element once."""
        for parameter in self.trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.world.rank == 0:
            for part, group in zip(self.parts, self.param_groups, strict=True):
                yield part, [parameter.grad for parameter in group["params"]]

    def _weight(self, name: str) -> torch.Tensor:
        """The whole weight. Collective."""
        return self.parameters[name]

    def _weight_dtype(self, name: str) -> torch.dtype:
        return self.parameters[name].dtype

    def _slots(self, parameter: nn.Parameter) -> list[str]:
        """What the optimiser keeps of a parameter."""
        return list(self.optimizer.state.get(parameter, {}))

    def _slot(self, parameter: nn.Parameter, slot: str) -> torch.Tensor:
        """One of these, whole. Collective."""
        return self.optimizer.state[parameter][slot]

    def _make_slots(self, slots: Mapping[str, Sequence[str]]) -> None:
        """Makes what the optimiser would make in its first step."""
        for name, of_parameter in slots.items():
            parameter = self.parameters[name]
            make_slots(self.optimizer, parameter, self.trained[parameter], of_parameter)

    def _set_weight(self, name: str, value: torch.Tensor) -> None:
        self.parameters[name].copy_(value)

    def _set_slot(self, parameter: nn.Parameter, slot: str, value: torch.Tensor) -> None:
        self.optimizer.state[parameter][slot].copy_(value)

    def _on_device(self, batch: Micro) -> dict[str, Any]:
        return {
            name: value.to(self.world.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in batch.inputs.items()
        }

    def _summed(self, *values: torch.Tensor) -> list[float]:
        """Scalars, summed over ranks."""
        device = self.world.device if self.world.device.type == "cuda" else torch.device("cpu")
        report = torch.stack([value.to(device, torch.float64) for value in values])
        if self.world.size > 1:
            dist.all_reduce(report)
        return report.tolist()

    def _non_finite(self, micro: Sequence[Micro], losses: Sequence[float], norm: float) -> NonFiniteError:
        """The error, the same on every rank."""
        bad = [(loss, batch.keys) for loss, batch in zip(losses, micro, strict=True) if not math.isfinite(loss)]
        all_bad = [pair for of_rank in self.world.gather(bad) for pair in of_rank]
        what = f"loss is {all_bad[0][0]}" if all_bad else f"gradient norm is {norm}"
        blamed = [keys for _, keys in all_bad] if all_bad else self._all_keys(micro)
        self.optimizer.zero_grad(set_to_none=True)
        return NonFiniteError(f"{what}; stopped before the step on: {', '.join(key for ks in blamed for key in ks)}")

    def _all_keys(self, micro: Sequence[Micro]) -> list[tuple[str, ...]]:
        return [keys for of_rank in self.world.gather([batch.keys for batch in micro]) for keys in of_rank]


class TorchEngine(Engine):
    """Plain torch on one rank, DDP on several.

    `bf16` computes under autocast with fp32 weights; `fp64` is for checks.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        max_grad_norm: float | None,
        world: World,
    ):
        module.to(world.device)
        if precision == "fp64":
            module.double()
        super().__init__(module, optimizer, precision, max_grad_norm, world)
        self.ddp: DistributedDataParallel | None = None
        if world.size > 1:
            # torch 2.11 has no other name for it
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
            # Told that there are no unused parameters, DDP orders its buckets anew after its first step: sums over
            # three or more ranks then differ in their last bits between a resumed run and one that was not stopped.
            self.ddp = DistributedDataParallel(
                _WithSpare(module).to(world.device),
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                find_unused_parameters=True,
            )

    def close(self) -> None:
        """The module stays on its device."""
        self.optimizer.zero_grad(set_to_none=True)
        self.ddp = None
        gc.collect()  # DDP's hooks go with it

    def _autocast(self) -> contextlib.AbstractContextManager:
        enabled = self.precision == "bf16"
        return torch.autocast(self.world.device.type, torch.bfloat16) if enabled else contextlib.nullcontext()

    def _forward(self, inputs: dict[str, Any], total: float) -> torch.Tensor:
        with self._autocast():
            return self.module(inputs, total)

    def _forward_backward(self, inputs: dict[str, Any], total: float, last: bool) -> torch.Tensor:
        if self.ddp is None:
            loss = self._forward(inputs, total)
            loss.backward()
            return loss
        with contextlib.nullcontext() if last else self.ddp.no_sync():
            with self._autocast():
                loss = self.ddp(inputs, total)
            (loss * self.world.size).backward()  # DDP divides by it
        return loss

    def _update(self, norm: float) -> None:
        if self.max_grad_norm is not None:
            dtype = next(iter(self.trained)).dtype
            nn.utils.clip_grads_with_norm_(self.trained, self.max_grad_norm, torch.tensor(norm, dtype=dtype))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class _WithSpare(nn.Module):
    """A module beside a parameter that nothing uses: DDP, told to look for such, warns where it finds none."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.spare = nn.Parameter(torch.zeros(1))

    def forward(self, inputs: dict[str, Any], total: float) -> torch.Tensor:
        return self.module(inputs, total)


def deepspeed_config(name: str) -> dict[str, Any]:
    """The DeepSpeed configuration of an engine's name: one that is shipped, or a JSON file.

    Raises:
        EngineConfigError: there is no such file, or it has a key that the recipe decides or that is not supported.
    """
    if name in SHIPPED:
        return json.loads((_CONFIGS / f"{name}.json").read_text())
    if not name.endswith(".json"):
        accepted = f"torch, {', '.join(SHIPPED)}, or the path of a DeepSpeed .json file"
        raise EngineConfigError(f"engine is {name!r}; accepted: {accepted}")
    try:
        config = json.loads(Path(name).read_text())
    except (OSError, ValueError) as error:
        raise EngineConfigError(f"{name}: can't be read as JSON: {error}") from error
    keys = _dotted(config) if isinstance(config, dict) else {}
    for key, value in keys.items():
        if key.split(".")[0] in OWNED:
            raise EngineConfigError(
                f"{name}: {key} is set; the recipe decides it: accepted without {key.split('.')[0]}"
            )
        if any(key == unsupported or key.startswith(f"{unsupported}.") for unsupported in UNSUPPORTED):
            raise EngineConfigError(f"{name}: {key} is set, which is not supported; accepted without it")
        if value in ("auto", "nvme"):
            raise EngineConfigError(f"{name}: {key} is {value!r}, which is not supported; accepted: a value, cpu, none")
    stage = keys.get("zero_optimization.stage")
    if stage not in (0, 1, 2, 3):
        raise EngineConfigError(f"{name}: zero_optimization.stage is {stage!r}; accepted: 0, 1, 2, 3")
    for key, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        if stage < lowest and any(other.startswith(f"zero_optimization.{key}.") for other in keys):
            raise EngineConfigError(
                f"{name}: zero_optimization.{key} has no effect in stage {stage}; accepted without it"
            )
    return config


def shares_weights(name: str) -> bool:
    """Whether ranks hold parts of the weights alone (ZeRO-3), so that all must call the same modules together."""
    return name != "torch" and deepspeed_config(name)["zero_optimization"]["stage"] == 3


def make_engine(
    name: str,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    max_grad_norm: float | None,
    world: World,
    micro_batches_per_rank: int,
) -> Engine:
    """The engine of a name: `torch`, one of `SHIPPED`, or the path of a DeepSpeed JSON file. See `Engine`.

    Raises:
        EngineConfigError: see `deepspeed_config`; or the precision is fp64, which DeepSpeed does not have.
    """
    if name == "torch":
        return TorchEngine(module, optimizer, precision, max_grad_norm, world)
    config = deepspeed_config(name)
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    from .zero import DeepSpeedEngine  # here: DeepSpeed looks for an accelerator when it is imported

    return DeepSpeedEngine(module, optimizer, precision, max_grad_norm, world, config, micro_batches_per_rank)


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree's leaves by their paths."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= _dotted(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def make_slots(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, group: Mapping[str, Any], slots: Sequence[str]
) -> None:
    """Makes a parameter's slots of the optimiser's state as its first step would, of zeros."""
    on_device = group.get("fused") or group.get("capturable")
    for slot in slots:
        if slot not in optimizer.state[parameter]:
            step = torch.zeros((), device=parameter.device if on_device else "cpu")
            optimizer.state[parameter][slot] = step if slot == "step" else torch.zeros_like(parameter).detach()


def cpu_copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
