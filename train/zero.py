"""DeepSpeed's ZeRO as an engine, driven directly (arXiv 1910.02054, stages; 2101.06840, offload)."""

import contextlib
import copy
import gc
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero import parameter_offload
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn

from .distributed import World
from .engine import Engine, EngineConfigError, Precision, StateError, cpu_copy, make_slots

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # on a CPU it would be compiled at the first start
deepspeed.utils.logger.setLevel(logging.ERROR)  # it warns of every optimiser but Adam
warnings.filterwarnings("ignore", r"`torch.distributed.\w+` is deprecated", FutureWarning)  # which DeepSpeed calls


class DeepSpeedEngine(Engine):
    """ZeRO in stages 0 to 3, with and without offload.

    `bf16` is DeepSpeed's own: weights and gradients in bf16; sums of gradients over micro-batches, the weights that the
    optimiser steps and its state in fp32 partitions. These start from the module's fp32 weights, and states hold frozen
    weights unrounded. Stage 0 has no partitions: there bf16 is autocast with fp32 weights, as in `TorchEngine`.

    Args:
        module, optimizer, max_grad_norm, world: see `Engine`. The module is best on the CPU; it is moved.
        precision: fp32 or bf16.
        config: see `deepspeed_config`.
        micro_batches_per_rank: in a step.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        max_grad_norm: float | None,
        world: World,
        config: Mapping[str, Any],
        micro_batches_per_rank: int,
    ):
        if precision == "fp64":
            raise EngineConfigError("precision is fp64, which DeepSpeed does not have; accepted: fp32, bf16")
        super().__init__(module, optimizer, precision, max_grad_norm, world)
        if scalars := [name for name, shape in self.shapes.items() if not shape]:
            have = f"{', '.join(scalars)} have no dimension"
            raise EngineConfigError(f"parameters {have}, which DeepSpeed can't broadcast; accepted: shape [1]")
        self.stage: int = config["zero_optimization"]["stage"]
        self.lowers = precision == "bf16" and self.stage > 0
        self.given_dtypes = {name: p.dtype for name, p in self.parameters.items()}
        self.rounded: set[str] = set()  # frozen parameters that are not what they were in fp32
        self.exact: dict[str, torch.Tensor] = {}  # what these were, on the owner
        masters = {}
        if self.lowers:
            for name, p in self.parameters.items():
                if p not in self.trained:
                    self._keep_exact(name, p.detach())
                elif _is_rounded(p):
                    masters[name] = p.data
        if not dist.is_initialized():
            backend = "nccl" if world.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", str(world.device.index or 0))  # to DeepSpeed the number of the device
        self.attributes = {id(owner): set(vars(owner)) for owner in self._owners_of_marks()}
        self.linear = nn.functional.linear  # ZeRO-3 puts its own in this place, for all modules
        autocasts = precision == "bf16" and self.stage == 0
        with contextlib.redirect_stdout(io.StringIO()):  # its bf16 optimiser prints how much memory is used
            self.engine, *_ = deepspeed.initialize(
                model=_Autocast(module, world.device.type) if autocasts else module,
                optimizer=optimizer,
                config=_complete(config, self.lowers, max_grad_norm, world.size, micro_batches_per_rank),
                dist_init_required=False,
            )
        self.zero = self.engine.optimizer
        self.flats = self._flats()
        self.flat_of = {p: flat for group, flat in zip(self._partitioned(), self.flats, strict=True) for p in group}
        self.steps: dict[torch.Tensor, float] = {}  # of each partition, when a state is loaded
        self._release()
        with torch.no_grad():
            for name, value in masters.items():
                self._set_weight(name, value)

    def load_state_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().load_state_tensors(tensors)
        if self.stage in (1, 2):
            self.zero.update_lp_params()

    def close(self) -> None:
        """The module is on the CPU then, in the types that it had."""
        with torch.no_grad():
            whole = {name: cpu_copy(self._weight(name)) for name in self.parameters}
        self.engine.destroy()
        self.engine.module_forward_pre_hook.remove()
        self.engine.module_forward_post_hook.remove()
        nn.functional.linear = self.linear
        if self.stage == 3:
            parameter_offload.FWD_MODULE_STACK.remove(self.module)
            for module in self.module.modules():
                module._parameters = dict(module._parameters)
        for owner in self._owners_of_marks():
            for mark in set(vars(owner)) - self.attributes[id(owner)]:
                delattr(owner, mark)
        for name, parameter in self.parameters.items():
            parameter.data = whole[name].to(self.given_dtypes[name])
            parameter.grad = None
        self.module.cpu()
        del self.engine, self.zero, self.flats, self.flat_of
        gc.collect()

    def _forward(self, inputs: dict[str, Any], total: float) -> torch.Tensor:
        return self.engine.module(inputs, total)

    def _forward_backward(self, inputs: dict[str, Any], total: float, last: bool) -> torch.Tensor:
        self.engine.set_gradient_accumulation_boundary(last)
        loss = self.engine(inputs, total)
        # It divides by the number of ranks; and, by its hook on the output, what is given to `backward` as it came.
        self.engine.backward(loss * self.world.size, scale_wrt_gas=False)
        return loss

    def _update(self, norm: float) -> None:
        self.engine.step()
        if not self.engine.was_step_applied():
            raise RuntimeError(f"DeepSpeed left out a step whose gradient has norm {norm}")

    def _gradients(self) -> Iterator[tuple[str, list[torch.Tensor]]]:
        if self.stage == 0:
            yield from super()._gradients()
            return
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()  # offload copies meanwhile
        if self.stage == 3:
            for number, gradients in self.zero.get_fp32_grad_partitions().items():
                yield self.parts[self.zero.sub_group_to_group_id[number]], list(gradients.values())
            return
        for number, part in enumerate(self.parts):
            if isinstance(self.zero, BF16_Optimizer):
                yield part, [self.zero.fp32_groups_gradient_flat_partition[number]]
            elif self.zero.cpu_offload:
                gradient: Any = self.flats[number].grad
                yield part, [gradient]
            else:
                yield part, list(self.zero.averaged_gradients[number])

    def _flats(self) -> list[torch.Tensor]:
        """What the optimiser steps: this rank's partitions of the fp32 weights; the parameters in stage 0."""
        if self.stage == 0:
            return list(self.trained)
        if self.stage == 3:
            return self.zero.fp32_partitioned_groups_flat
        if isinstance(self.zero, BF16_Optimizer):
            return self.zero.fp32_groups_flat_partition
        return self.zero.single_partition_of_fp32_groups

    def _partitioned(self) -> list[list[nn.Parameter]]:
        """The parameters of each of `_flats`."""
        if self.stage == 0:
            return [[p] for p in self.trained]
        if self.stage == 3:
            return self.zero.fp16_groups
        return self.zero.bf16_groups if isinstance(self.zero, BF16_Optimizer) else self.zero.bit16_groups

    def _weight(self, name: str) -> torch.Tensor:
        parameter = self.parameters[name]
        if name in self.rounded:
            value = torch.empty(self.shapes[name], device=self.world.device)
            if name in self.exact:
                value.copy_(self.exact[name])
            if self.world.size > 1:
                dist.broadcast(value, self.owners[name])
            return value
        if self.stage > 0 and parameter in self.trained:
            return safe_get_full_fp32_param(parameter)
        with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
            return parameter.detach().to(self.given_dtypes[name], copy=True)

    def _weight_dtype(self, name: str) -> torch.dtype:
        return torch.float32 if self._has_master(name) else self.given_dtypes[name]

    def _has_master(self, name: str) -> bool:
        return self.stage > 0 and self.parameters[name] in self.trained

    def _slots(self, parameter: nn.Parameter) -> list[str]:
        return list(self.optimizer.state.get(self.flat_of[parameter], {})) if parameter in self.flat_of else []

    def _slot(self, parameter: nn.Parameter, slot: str) -> torch.Tensor:
        if self.stage == 0 or slot == "step":
            return self.optimizer.state[self.flat_of[parameter]][slot]
        self._link(parameter)
        return safe_get_full_optimizer_state(parameter, slot)

    def _make_slots(self, slots: Mapping[str, Sequence[str]]) -> None:
        for name, of_parameter in slots.items():
            parameter = self.parameters[name]
            make_slots(self.optimizer, self.flat_of[parameter], self.trained[parameter], of_parameter)
        self.steps = {}
        self._release()

    def _set_weight(self, name: str, value: torch.Tensor) -> None:
        parameter: Any = self.parameters[name]
        if self.stage == 3:
            part = self._part(parameter, value)
            if self._has_master(name):
                safe_set_local_fp32_param(parameter, part)
            parameter.ds_tensor.copy_(part)
        elif not self._has_master(name):
            parameter.copy_(value)
        elif parameter._hp_mapping is not None:  # this rank has a part of it
            safe_set_full_fp32_param(parameter, value)
        if self.lowers and not self._has_master(name):
            self._keep_exact(name, value)

    def _set_slot(self, parameter: Any, slot: str, value: torch.Tensor) -> None:
        flat = self.flat_of[parameter]
        if slot == "step":  # a partition has one
            self.optimizer.state[flat][slot].copy_(value)
            if self.steps.setdefault(flat, value.item()) != value.item():
                counts = f"{self.steps[flat]:.0f} and {value.item():.0f}"
                raise StateError(f"the optimiser's step is {counts} in one group of parameters; ZeRO has one for each")
        elif self.stage == 0:
            self.optimizer.state[flat][slot].copy_(value)
        elif self.stage == 3:
            safe_set_local_optimizer_state(parameter, self._part(parameter, value), slot)
        elif parameter._hp_mapping is not None:
            self._link(parameter)
            safe_set_full_optimizer_state(parameter, value, slot)

    def _link(self, parameter: Any) -> None:
        """Lets DeepSpeed find a parameter's part in the optimiser's state; it looks but once, after the first group."""
        if self.stage < 3 and parameter._hp_mapping is not None:
            flat = self.flat_of[parameter]
            parameter._hp_mapping.set_optim_state_fragment(flat, self.optimizer.state[flat])

    def _part(self, parameter: Any, value: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole tensor in stage 3, with zeros at the end of the last."""
        size = parameter.partition_numel()
        padded = value.new_zeros(size * self.world.size)
        padded[: value.numel()] = value.flatten()
        return padded.narrow(0, size * self.world.rank, size)

    def _release(self) -> None:
        """Stage 3: no parameter is whole, so that parts can be set."""
        if self.stage == 3:
            self.zero.parameter_offload.partition_all_parameters()

    def _keep_exact(self, name: str, value: torch.Tensor) -> None:
        """Keeps a frozen weight that bf16 rounds."""
        self.rounded.discard(name)
        self.exact.pop(name, None)
        if _is_rounded(value):
            self.rounded.add(name)
            if self.owners[name] == self.world.rank:
                self.exact[name] = value.cpu()

    def _owners_of_marks(self) -> list[Any]:
        return [*self.module.modules(), *self.parameters.values()]


class _Autocast(nn.Module):
    """Computes a module in bf16; DeepSpeed switches off an autocast that it is called in."""

    def __init__(self, module: nn.Module, device_type: str):
        super().__init__()
        self.module, self.device_type = module, device_type

    def forward(self, *args: Any) -> torch.Tensor:
        with torch.autocast(self.device_type, torch.bfloat16):
            return self.module(*args)


def _is_rounded(value: torch.Tensor) -> bool:
    """Whether bf16 can't hold a tensor's values."""
    return value.dtype == torch.float32 and not value.bfloat16().float().equal(value)


def _complete(
    config: Mapping[str, Any], lowers: bool, max_grad_norm: float | None, ranks: int, micro_batches_per_rank: int
) -> dict[str, Any]:
    """The configuration with what the recipe decides."""
    complete = copy.deepcopy(dict(config)) | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches_per_rank,
        "train_batch_size": micro_batches_per_rank * ranks,
        "gradient_clipping": max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": lowers},
    }
    return complete | ({"data_types": {"grad_accum_dtype": "fp32"}} if lowers else {})
