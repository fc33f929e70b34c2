"""What a stage can train: a model's parts by name, and low-rank adapters on its linear layers, by peft.

LoRA (arXiv 2106.09685), DoRA (2402.09353) and QLoRA (2305.14314). Adapters are put into the LLM (or the tower) in
place, so the model stays what it is: its classes, `generate` and checkpointing work, and parameters that are not
adapted keep their names. NVILA (2412.04468) tunes `tower_norms` + `lora`; LongVILA (2408.10188) extends the context by
`lora` of rank 8 on q, k, v, o + `llm_embeddings` + `llm_norms`.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..vlm.model import FoveateForConditionalGeneration
from .recipe import PARTS

if TYPE_CHECKING:  # slow to import
    from peft import PeftConfig
    from peft.tuners.lora import LoraModel

LLM_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTER = "default"  # peft's name for the only adapter; it is part of parameter names
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."  # of names in peft's files
QUANTISED_BLOCK = 64  # weights that share a scale
ADAPTED = {"llm": "language_model", "tower": "vision_tower"}
FOLDERS = {"llm": ".", "tower": "tower"}

# A stage that names both would train some parameters twice, or others not at all.
EXCLUSIVE = (("tower", "tower_norms"), ("llm", "llm_embeddings"), ("llm", "llm_norms"), ("llm", "lora"))


# Parts


def part_parameters(model: FoveateForConditionalGeneration, part: str) -> list[tuple[str, nn.Parameter]]:
    """Names in the model and parameters of a part, each once, in the model's order.

    tower, projector, llm: all that is no adapter. tower_norms, llm_norms: LayerNorms' and RMSNorms'. llm_embeddings:
    the input embedding's and, where it is not tied to it, the head's. lora: adapters', in LLM and tower.

    Raises:
        ValueError: there is no part of this name.
    """
    if part not in PARTS:
        raise ValueError(f"part is {part!r}; accepted: {', '.join(PARTS)}")
    named = list(model.named_parameters())
    adapters = {name for name, _ in named if _is_adapter(model, name)}
    if part == "lora":
        return [(name, p) for name, p in named if name in adapters]
    root = {"tower": "vision_tower", "projector": "multi_modal_projector", "llm": "language_model"}[part.split("_")[0]]
    chosen = [(name, p) for name, p in named if name.startswith(f"{root}.") and name not in adapters]
    if part.endswith("_norms"):
        norms = {
            id(p) for module in model.get_submodule(root).modules() if _is_norm(module) for p in module.parameters()
        }
        chosen = [(name, p) for name, p in chosen if id(p) in norms]
    elif part == "llm_embeddings":
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        embeddings = {id(p) for module in ends for p in module.parameters()}
        chosen = [(name, p) for name, p in chosen if id(p) in embeddings]
    return chosen


def trainable_parameters(
    model: FoveateForConditionalGeneration, parts: Sequence[str]
) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """`part_parameters` of the parts that a stage trains together.

    Raises:
        ValueError: two of the parts overlap, a part has no parameters, or is held in 4 bits.
    """
    chosen = {part: part_parameters(model, part) for part in parts}
    exclusive = list(EXCLUSIVE)
    if any(name.startswith("vision_tower.") for name, _ in chosen.get("lora", [])):
        exclusive.append(("tower", "lora"))
    for one, other in exclusive:
        if one in chosen and other in chosen:
            raise ValueError(f"{one} and {other} are trained in one stage; accepted: one of them, they overlap")
    for part, parameters in chosen.items():
        if not parameters:
            hint = "; add_adapters makes them" if part == "lora" else ""
            raise ValueError(f"{part} is trained but the model has no such parameters{hint}")
        for name, parameter in parameters:
            if not parameter.is_floating_point():
                raise ValueError(f"{part} is trained but {name} is held in 4 bits; accepted: lora in its place")
    return chosen


def _is_adapter(model: FoveateForConditionalGeneration, name: str) -> bool:
    root = getattr(model, name.partition(".")[0])
    return hasattr(root, "peft_config") and re.search(r"\.lora_\w+\.", name) is not None


def _is_norm(module: nn.Module) -> bool:
    """Transformers' norms are classes of their own, named LlamaRMSNorm, Qwen2RMSNorm and so on."""
    return isinstance(module, nn.LayerNorm | nn.RMSNorm) or type(module).__name__.endswith("Norm")


# Adapters


@dataclass(frozen=True)
class AdapterSettings:
    """Low-rank adapters.

    Args:
        rank: of the update.
        alpha: the update is scaled by alpha / rank.
        dropout: on the adapters' input.
        dora: DoRA: direction by the adapters, magnitude by a vector of its own.
        targets: last parts of the names of the linear layers that are adapted, or all but the head.
        parts: where they are put: `llm`, `tower`.

    Raises:
        ValueError: a field has a value that is not accepted.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    dora: bool = False
    targets: tuple[str, ...] | Literal["all-linear"] = LLM_TARGETS
    parts: tuple[str, ...] = ("llm",)

    def __post_init__(self) -> None:
        for name, right, accepted in (
            ("rank", self.rank >= 1, "1 or more"),
            ("alpha", self.alpha > 0, "above 0"),
            ("dropout", 0 <= self.dropout < 1, "0 to below 1"),
            ("targets", bool(self.targets), "names of linear layers, or 'all-linear'"),
            ("parts", bool(self.parts) and set(self.parts) <= set(ADAPTED), ", ".join(ADAPTED)),
        ):
            if not right:
                raise ValueError(f"adapters.{name} is {getattr(self, name)!r}; accepted: {accepted}")


@dataclass(frozen=True)
class Adapters:
    """The adapters in a model, by part; `merge_adapters` and `save_adapter` take it."""

    model: FoveateForConditionalGeneration
    tuners: dict[str, "LoraModel"] = field(repr=False)


def add_adapters(model: FoveateForConditionalGeneration, settings: AdapterSettings) -> Adapters:
    """Puts new adapters, which change nothing yet, into the model and freezes all else of the adapted parts.

    An adapted layer's own parameters get `base_layer` into their names. Adapters are kept in fp32 (fp64 in a model of
    fp64) whatever the model's dtype.

    Raises:
        ValueError: a part has adapters already, or no layer of a name in `targets`.
    """
    from peft import LoraConfig

    tuners = {}
    for part in settings.parts:
        module = getattr(model, ADAPTED[part])
        linear = [name for name, child in module.named_modules() if hasattr(child, "weight") and child.weight.ndim == 2]
        targets = settings.targets
        if targets != "all-linear" and not any(name.rpartition(".")[2] in targets for name in linear):
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise ValueError(
                f"adapters.targets {list(targets)} are in no layer of the {part} ({module.config.model_type}); "
                f"accepted: 'all-linear', or some of {', '.join(known)}"
            )
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft takes fractions too
            lora_dropout=settings.dropout,
            use_dora=settings.dora,
            target_modules=targets if isinstance(targets, str) else list(targets),
            task_type="CAUSAL_LM" if part == "llm" else None,
        )
        tuners[part] = _inject(module, config, part)
    return Adapters(model, tuners)


def merge_adapters(adapters: Adapters) -> None:
    """Adds the adapters to the weights that they adapt and takes them out: the model has its plain modules again.

    A quantised LLM is dequantised first, to its embedding's dtype: adding to 4-bit weights would round most of the
    update away. Parameters of the adapted parts are left trainable, as in a new model. Works on whole weights: not
    under ZeRO-3.

    Raises:
        ValueError: a merged weight is not finite.
    """
    for part, tuner in adapters.tuners.items():
        module = tuner.model
        if getattr(module, "is_loaded_in_4bit", False):
            weights, config = _adapter_weights(module), tuner.peft_config[ADAPTER]
            tuner.unload()
            dequantize_llm(adapters.model)
            tuner = _inject(module, config, part)
            _load_weights(module, weights, part)
        tuner.merge_and_unload(safe_merge=True)
        module.requires_grad_(True)


def save_adapter(
    adapters: Adapters, folder: str | PathLike[str], state: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Writes the adapters as peft does, safetensors beside `adapter_config.json`: the LLM's into `folder`, the
    tower's into `folder/tower`. `peft.PeftModel.from_pretrained(model.language_model, folder)` loads the former.

    Only adapters are written; what else was trained (`llm_norms`, …) is in the model's own checkpoint.

    Args:
        state: in the place of the model's own tensors, whole ones by the model's names (ZeRO-3).
    """
    for part, tuner in adapters.tuners.items():
        target = Path(folder) / FOLDERS[part]
        target.mkdir(parents=True, exist_ok=True)
        prefix = f"{ADAPTED[part]}."
        own = None if state is None else {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
        weights = _adapter_weights(tuner.model, own)
        config = copy.deepcopy(tuner.peft_config[ADAPTER])
        config.inference_mode = True
        config.save_pretrained(str(target))
        tensors = {PEFT_PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        save_file(tensors, target / WEIGHTS_FILE, metadata={"format": "pt"})


def load_adapter(model: FoveateForConditionalGeneration, folder: str | PathLike[str]) -> Adapters:
    """Puts the adapters that `save_adapter` (or peft, for the LLM alone) wrote into the model.

    Raises:
        ValueError: the folder has no adapter, one of another kind, or one that doesn't fit the model.
    """
    from peft import LoraConfig, PeftConfig

    tuners = {}
    for part, name in ADAPTED.items():
        source = Path(folder) / FOLDERS[part]
        if not (source / CONFIG_FILE).is_file():
            continue
        config = PeftConfig.from_pretrained(str(source))
        if not isinstance(config, LoraConfig):
            raise ValueError(f"{source / CONFIG_FILE} has peft_type {config.peft_type}; accepted: LORA")
        config.inference_mode = False
        module = getattr(model, name)
        tuners[part] = _inject(module, config, part)
        weights = load_file(source / WEIGHTS_FILE)
        _load_weights(module, {k.removeprefix(PEFT_PREFIX): t for k, t in weights.items()}, part)
    if not tuners:
        raise ValueError(f"{folder} holds no {CONFIG_FILE}; accepted: a folder that save_adapter or peft wrote")
    return Adapters(model, tuners)


def load_adapter_and_merge(model: FoveateForConditionalGeneration, folder: str | PathLike[str]) -> None:
    """`load_adapter`, then `merge_adapters`. An adapter trained on a quantised LLM fits best what it was trained on:
    call `quantize_llm` before."""
    merge_adapters(load_adapter(model, folder))


def _inject(module: Any, config: "PeftConfig", part: str) -> "LoraModel":
    from peft.tuners.lora import LoraModel

    if hasattr(module, "peft_config"):
        raise ValueError(f"the {part} has adapters already; accepted: one set, merged before the next")
    tuner = LoraModel(module, config, ADAPTER)
    module.train(module.training)  # new layers would drop out in evaluation too
    for name, parameter in module.named_parameters():
        if re.search(r"\.lora_\w+\.", name):
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return tuner


def _adapter_weights(module: Any, state: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The adapter's tensors by peft's names, without its prefix."""
    from peft import get_peft_model_state_dict

    state = module.state_dict() if state is None else state
    return get_peft_model_state_dict(module, state_dict=state, adapter_name=ADAPTER, save_embedding_layers=False)


def _load_weights(module: Any, weights: dict[str, torch.Tensor], part: str) -> None:
    from peft import set_peft_model_state_dict

    expected = {name: tensor.shape for name, tensor in _adapter_weights(module).items()}
    given = {name: tensor.shape for name, tensor in weights.items()}
    if wrong := sorted({name for name, _ in given.items() ^ expected.items()}):
        raise ValueError(f"the adapter doesn't fit the {part}: {', '.join(wrong[:3])} (of {len(wrong)})")
    set_peft_model_state_dict(module, weights, adapter_name=ADAPTER)


# QLoRA


def quantize_llm(
    model: FoveateForConditionalGeneration, compute_dtype: torch.dtype = torch.bfloat16
) -> FoveateForConditionalGeneration:
    """Holds the weights of the LLM's linear layers, the head's not, in 4 bits: NF4 in blocks of 64 whose scales are
    quantised too (QLoRA, section 3). They stay frozen; `add_adapters` puts adapters on them. Changes the model.

    Args:
        compute_dtype: what weights are dequantised to in the forward and backward pass.

    Raises:
        ValueError: the LLM is quantised or has adapters already, has no `nn.Linear`, or one whose rows don't divide
            into blocks.
    """
    import bitsandbytes as bnb

    llm: Any = model.language_model
    if getattr(llm, "is_loaded_in_4bit", False) or hasattr(llm, "peft_config"):
        raise ValueError("the LLM is quantised or has adapters already; accepted: plain weights")
    head = llm.get_output_embeddings()
    linear = [(name, m) for name, m in llm.named_modules() if type(m) is nn.Linear and m is not head]
    if not linear:
        raise ValueError(f"text_config {llm.config.model_type} has no nn.Linear to quantise but its head")
    for name, layer in linear:
        if layer.in_features % QUANTISED_BLOCK:  # bitsandbytes 0.50 gives wrong values for some on a CPU
            raise ValueError(
                f"{name} of the LLM has {layer.in_features} inputs; accepted for 4 bits: multiples of {QUANTISED_BLOCK}"
            )
    for name, layer in linear:
        options: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4"}
        quantised = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, compute_dtype, device="meta", **options
        )
        weight: Any = bnb.nn.Params4bit(layer.weight.detach().to(compute_dtype), module=quantised, **options)
        quantised.weight = weight.to(layer.weight.device)  # `to` is what quantises
        quantised.bias = layer.bias
        # On CPUs with AVX512-BF16 evaluation repacks the weight into a layout that has no backward pass.
        quantised.support_avx512bf16_for_cpu = False
        llm.set_submodule(name, quantised.train(layer.training))
    llm.is_loaded_in_4bit = True  # where peft looks
    return model


def dequantize_llm(model: FoveateForConditionalGeneration) -> None:
    """Undoes `quantize_llm` but for the rounding; weights get the dtype of the LLM's embedding."""
    import bitsandbytes as bnb

    llm: Any = model.language_model
    dtype = llm.get_input_embeddings().weight.dtype
    for name, layer in list(llm.named_modules()):
        if isinstance(layer, bnb.nn.Linear4bit):
            held: Any = layer.weight
            weight = bnb.functional.dequantize_4bit(held.data, held.quant_state).to(dtype)
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            plain.weight = nn.Parameter(weight)
            plain.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().to(dtype))
            llm.set_submodule(name, plain.train(layer.training))
    del llm.is_loaded_in_4bit


def quantised_tensors(model: FoveateForConditionalGeneration) -> dict[str, torch.Tensor]:
    """What besides the 4-bit weights themselves a checkpoint needs of a quantised LLM: scales and how to read them."""
    if not getattr(model.language_model, "is_loaded_in_4bit", False):
        return {}
    return {
        f"quantised/{name}/{key}": tensor.cpu()
        for name, parameter in model.named_parameters()
        if hasattr(parameter, "quant_state")
        for key, tensor in parameter.quant_state.as_dict(packed=True).items()
    }


def load_quantised(model: FoveateForConditionalGeneration, tensors: Mapping[str, torch.Tensor]) -> None:
    """Gives a quantised LLM, still without adapters, the 4-bit weights of a checkpoint of one with adapters."""
    import bitsandbytes as bnb

    for name, layer in model.named_modules():
        if not isinstance(layer, bnb.nn.Linear4bit):
            continue
        saved = next(n for n in (f"{name}.base_layer.weight", f"{name}.weight") if f"weight/model.{n}" in tensors)
        prefix = f"quantised/{saved}/"
        state = {key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)}
        layer.weight = bnb.nn.Params4bit.from_prequantized(
            tensors[f"weight/model.{saved}"], state, device=layer.weight.device, module=layer
        )
