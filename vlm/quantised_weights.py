"""Weights of 4 and 8 bits for serving, in torchao's tensors: the forms that QServe compares (arXiv 2405.04532).

    w4a16  4-bit weights in groups (scale and offset each), activations as they are
    w4a8   4-bit weights in groups of 128, symmetric; each token's activations in fp8 (e4m3)
    w8a8   8-bit weights, a scale an output channel; each token's activations in int8

Rounded to nearest, without calibration. Quantised are the linear layers within the layers of the LLM, and of the tower;
embeddings, norms, biases, projector and the LLM's head stay as they are.

Saved models hold codes, scales and offsets as safetensors; `from_pretrained` makes torchao's tensors of them. 4-bit
ones are saved row by row, for any device; `use_kernels` lays them out for the one that they are on.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from packaging.version import Version
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

OLDEST_TORCHAO = "0.18"
GROUPS = (32, 64, 128, 256)
FP8_GROUP = 128  # what torchao's kernel for fp8 activations takes
INT8_MULTIPLE = 8  # sides of a matrix that the int8 matrix product takes on CUDA
FP8_MAX = 448.0  # of e4m3
# Of PyTorch's kernels for 4-bit weights: multiples that sides are padded to
CPU_ROWS = 16
TINYGEMM_ROWS, TINYGEMM_COLUMNS, TINYGEMM_TILES = 8, 1024, 8  # on CUDA


class QuantisationError(ValueError):
    """Weights that can't be quantised, or not be run. The message says what is accepted."""


@dataclass(frozen=True)
class Scheme:
    """How weights are kept.

    Attributes:
        name: one of `SCHEMES`.
        group: input channels that share a scale, of 4-bit weights.
    """

    name: str
    group: int = 128

    def __post_init__(self) -> None:
        if self.name not in SCHEMES:
            raise QuantisationError(f"scheme is {self.name!r}; accepted: {', '.join(SCHEMES)}")
        accepted = GROUPS if self.name == "w4a16" else (FP8_GROUP,)
        if self.group not in accepted:
            raise QuantisationError(f"{self.name}: group is {self.group}; accepted: {', '.join(map(str, accepted))}")

    @property
    def text(self) -> str:
        """What `parse_scheme` makes the scheme from."""
        return f"{self.name}:group={self.group}" if self.name == "w4a16" else self.name

    def config(self) -> Any:
        """torchao's configuration."""
        quantization = _torchao()
        if self.name == "w8a8":
            return quantization.Int8DynamicActivationInt8WeightConfig()
        if self.name == "w4a8":
            return quantization.Float8DynamicActivationInt4WeightConfig(int4_packing_format="plain")
        return quantization.Int4WeightOnlyConfig(group_size=self.group)


SCHEMES = ("w4a16", "w8a8", "w4a8")
TOWER_SCHEMES = ("w8a8",)


def parse_scheme(text: str, accepted: Iterable[str] = SCHEMES) -> Scheme:
    """A scheme from `w4a16`, `w4a16:group=64`, `w8a8` or `w4a8`.

    Args:
        accepted: names.

    Raises:
        QuantisationError: it is none, or torchao is missing; the message says what is accepted.
    """
    check_installed()
    name, _, field = text.strip().lower().partition(":")
    if name not in accepted:
        raise QuantisationError(f"scheme is {name!r}; accepted: {', '.join(accepted)}")
    if not field:
        return Scheme(name)
    group = re.fullmatch(r"group=(\d+)", field)
    if name != "w4a16" or group is None:
        raise QuantisationError(f"scheme is {text!r}; accepted: {name}{':group=N' if name == 'w4a16' else ''}")
    return Scheme(name, int(group[1]))


def quantise(model: PreTrainedModel, weights: Scheme | None, tower_weights: Scheme | None = None) -> None:
    """Quantises a model in place; `save_pretrained` then writes it as it is.

    4-bit weights can't be run before `use_kernels`, and not be saved after it.

    Args:
        model: one of ours, in floating point.
        weights: of the LLM's layers; None leaves them.
        tower_weights: of the tower's layers, one of `TOWER_SCHEMES`; None leaves them.

    Raises:
        QuantisationError: torchao is missing, the model is quantised already, a part has no such layers or does not
            take the scheme, or a layer's size does not. The model is then as it was.
    """
    check_installed()
    if getattr(model.config, "quantization_config", None) is not None:
        raise QuantisationError("the model's weights are quantised already; accepted: a model in floating point")
    if tower_weights is not None and tower_weights.name not in TOWER_SCHEMES:
        raise QuantisationError(f"tower_weights is {tower_weights.name}; accepted: {', '.join(TOWER_SCHEMES)}")
    chosen: dict[str, Scheme] = {}
    for part, scheme in (("language_model", weights), ("vision_tower", tower_weights)):
        if scheme is not None:
            chosen |= {f"{part}.{name}": scheme for name in _layer_linears(getattr(model, part), scheme)}
    for name, scheme in chosen.items():
        linear: Any = model.get_submodule(name)
        if scheme.name == "w8a8":
            _torchao().quantize_(linear, scheme.config(), filter_fn=lambda *_: True)
        else:
            linear.weight = nn.Parameter(_four_bits(linear.weight.detach(), scheme), requires_grad=False)
    _note(model, chosen)


def is_quantised(config: Any) -> bool:
    """Whether a model's weights are quantised, by its config, or the content of its `config.json`."""
    fields = config if isinstance(config, Mapping) else vars(config)
    return fields.get("quantization_config") is not None


def check_readable(config: Mapping[str, Any]) -> None:
    """Raises where a model of ours is quantised by what is not read here.

    Args:
        config: content of its `config.json`.

    Raises:
        QuantisationError: by another library than torchao, or torchao is missing.
    """
    method = (config.get("quantization_config") or {}).get("quant_method", "torchao")
    if method != "torchao":
        raise QuantisationError(f"quantization_config.quant_method is {method!r}; accepted: torchao")
    if is_quantised(config):
        check_installed()


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights and their scales, as they are kept in memory."""
    return sum(part.nbytes for weight in model.parameters() for part in _parts(weight))


def use_kernels(model: nn.Module) -> None:
    """Lays 4-bit weights out for the device that they are on; call it once the model is there. Others stay.

    With mslk on CUDA, models in bfloat16 run on torchao's kernels. Elsewhere it is PyTorch's own for 4-bit weights,
    whose activations are bfloat16 whatever the model's dtype is; those of w4a8 are rounded to fp8 before.

    Raises:
        QuantisationError: the device has no kernel.
    """
    for linear in model.modules():
        if not isinstance(linear, nn.Linear) or not _is_four_bits(linear.weight):
            continue
        weight: Any = linear.weight
        if weight.device.type == "cuda" and weight.dtype == torch.bfloat16 and _has_mslk():
            continue
        fp8 = weight.activation_dtype == torch.float8_e4m3fn
        linear.weight = nn.Parameter(_laid_out(weight), requires_grad=False)
        linear.forward = partial(_four_bit_linear, linear, fp8)  # type: ignore[method-assign]


def _four_bit_linear(linear: nn.Linear, fp8: bool, x: torch.Tensor) -> torch.Tensor:
    """A linear layer on [..., in] in any dtype, by a kernel whose activations are bfloat16."""
    if not fp8:
        return functional.linear(x.bfloat16(), linear.weight, linear.bias).to(x.dtype)
    steps = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / FP8_MAX
    read = (x / steps).to(torch.float8_e4m3fn).bfloat16()  # exact
    product = functional.linear(read, linear.weight).float() * steps
    return (product if linear.bias is None else product + linear.bias).to(x.dtype)


# What is quantised


def _layer_linears(part: PreTrainedModel, scheme: Scheme) -> list[str]:
    """Names of the linear layers within a part's layers; raises where the scheme takes one of them not."""
    layers = [name for name, module in part.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    linears = {
        f"{layer}.{name}": module
        for layer in layers
        for name, module in part.get_submodule(layer).named_modules()
        if type(module) is nn.Linear
    }
    kind = part.config.model_type
    if not linears:
        raise QuantisationError(f"{kind} has no nn.Linear within its layers; accepted: models whose layers have")
    for name, linear in linears.items():
        sides = f"{kind}: {name} is {linear.in_features} → {linear.out_features}"
        if scheme.name == "w8a8" and (linear.in_features % INT8_MULTIPLE or linear.out_features % INT8_MULTIPLE):
            raise QuantisationError(f"{sides}; accepted by w8a8: multiples of {INT8_MULTIPLE}")
        if scheme.name != "w8a8" and linear.in_features % scheme.group:
            fits = [str(group) for group in GROUPS if all(one.in_features % group == 0 for one in linears.values())]
            hint = f" (w4a16 takes this model with group={' or '.join(fits)})" if fits else ""
            raise QuantisationError(f"{sides}; accepted by {scheme.text}: inputs in multiples of {scheme.group}{hint}")
    return list(linears)


def _note(model: PreTrainedModel, chosen: Mapping[str, Scheme]) -> None:
    """Tells transformers how the weights are kept, for `save_pretrained` and the saved config."""
    from transformers import TorchAoConfig
    from transformers.quantizers import AutoHfQuantizer

    patterns = {_pattern(name): scheme for name, scheme in chosen.items()}
    config: Any = TorchAoConfig(_torchao().FqnToConfig({name: scheme.config() for name, scheme in patterns.items()}))
    model.config.quantization_config = config
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)


def _pattern(name: str) -> str:
    """A name within any layer, as torchao's `FqnToConfig` reads it."""
    return "re:" + re.sub(r"\\\.\d+\\\.", r"\\.[0-9]+\\.", re.escape(name))


# 4-bit weights: scale · code + offset, codes -8 … 7


def _four_bits(weight: torch.Tensor, scheme: Scheme) -> Any:
    """torchao's `Int4Tensor` of [out, in]: two codes a byte, the even column's in the low bits.

    Scale and offset are rounded to bfloat16 first, which kernels take, and the codes made with what that gave.
    """
    rows, columns = weight.shape
    grouped = weight.float().unflatten(1, (-1, scheme.group))  # [out, groups, group]
    if scheme.name == "w4a8":
        scale, zero = grouped.abs().amax(-1) / 7.5, grouped.new_zeros(grouped.shape[:2])
    else:
        low, high = grouped.aminmax(dim=-1)
        scale = (high - low) / 15
        zero = low + 8 * scale
    scale, zero = scale.clamp(min=1e-8).bfloat16(), zero.bfloat16()
    codes = ((grouped - zero.float()[..., None]) / scale.float()[..., None]).round().clamp(-8, 7)
    codes = codes.to(torch.int8).view(rows, columns)
    return _torchao().Int4Tensor(
        qdata=(codes[:, ::2] & 0xF) | (codes[:, 1::2] << 4),
        scale=scale.to(weight.dtype).t().contiguous(),  # [groups, out]
        zero_point=zero.to(weight.dtype).t().contiguous(),
        block_size=[1, scheme.group],
        shape=weight.shape,
        activation_dtype=torch.float8_e4m3fn if scheme.name == "w4a8" else torch.bfloat16,
    )


def _codes(weight: Any) -> torch.Tensor:
    """int8 [out, in], -8 … 7."""
    low, high = (weight.qdata << 4) >> 4, weight.qdata >> 4  # shifts of int8 keep the sign
    return torch.stack((low, high), -1).flatten(1)


def _laid_out(weight: Any) -> Any:
    """An `Int4Tensor` as PyTorch's kernel on its device takes it."""
    kernels = {"cpu": _for_cpu, "cuda": _for_tinygemm}
    if weight.device.type not in kernels:
        raise QuantisationError(f"4-bit weights are on {weight.device}; accepted: {' or '.join(kernels)}")
    return kernels[weight.device.type](weight)


def _for_cpu(weight: Any) -> Any:
    """The same weight for PyTorch's kernel on CPUs."""
    from torchao.prototype.quantization.int4 import Int4OpaqueTensor

    codes, scale_and_zero = _padded(weight, CPU_ROWS, 1)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return Int4OpaqueTensor(packed, scale_and_zero, weight.block_size, weight.shape)


def _for_tinygemm(weight: Any) -> Any:
    """The same weight for PyTorch's kernel on CUDA."""
    codes, scale_and_zero = _padded(weight, TINYGEMM_ROWS, TINYGEMM_COLUMNS)
    nibbles = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(nibbles, TINYGEMM_TILES)
    return _torchao().Int4TilePackedTo4dTensor(packed, scale_and_zero, weight.block_size, weight.shape)


def _padded(weight: Any, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes 0 … 15, int32 [out, in], scales and offsets [groups, out, 2]; zeros up to multiples of the sides."""
    below, right = -weight.shape[0] % rows, -weight.shape[1] % columns
    codes = functional.pad((_codes(weight) + 8).int(), (0, right, 0, below))
    scale_and_zero = torch.stack((weight.scale, weight.zero_point), -1).bfloat16()
    return codes, functional.pad(scale_and_zero, (0, 0, 0, below, 0, right // weight.block_size[1])).contiguous()


def _is_four_bits(weight: Any) -> bool:
    return type(weight).__name__ == "Int4Tensor"


def _parts(weight: Any) -> list[torch.Tensor]:
    """What a weight is kept as."""
    names = [*getattr(weight, "tensor_data_names", ()), *getattr(weight, "optional_tensor_data_names", ())]
    return [part for name in names if (part := getattr(weight, name)) is not None] or [weight]


def check_installed() -> None:
    """Raises QuantisationError where torchao is missing, or too old to save what is made here."""
    accepted = f"accepted: {OLDEST_TORCHAO} or newer, pip install 'foveate[quant]'"
    if find_spec("torchao") is None:
        raise QuantisationError(f"quantised weights need torchao, which is not installed; {accepted}")
    if Version(version("torchao")) < Version(OLDEST_TORCHAO):
        raise QuantisationError(f"quantised weights need a newer torchao than {version('torchao')}; {accepted}")


def _torchao() -> Any:
    """Its module of quantisation."""
    from torchao import quantization

    return quantization


def _has_mslk() -> bool:
    return find_spec("mslk") is not None
