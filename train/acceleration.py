"""Switches that make a training step cheaper and change none of its names: fp8, `torch.compile`, checkpointing."""

import warnings
from collections.abc import Collection

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..vlm.model import FoveateForConditionalGeneration

FP8_CAPABILITY = (8, 9)  # Ada; Hopper is (9, 0)
FP8_MULTIPLE = 16  # sides of a matrix that the fp8 matrix product takes
LAYERED = {"tower": "vision_tower", "llm": "language_model"}


def convert_to_fp8(
    model: FoveateForConditionalGeneration, emulate: bool = False, device: torch.device | None = None
) -> list[str]:
    """Lets the LLM's linear layers compute in fp8 (torchao's dynamic scaling by tensor): e4m3 forward, e5m2 gradients.

    Weights stay as they are and keep their names; they are cast in every pass. Embeddings, the head, adapters and
    layers with a side that is no multiple of 16 stay in their precision. Faster only under `compile_model`, and where
    the LLM trains: the weights' gradients are computed even for frozen layers.

    Args:
        emulate: round as fp8 would, without hardware for it: for tests.
        device: where the model will run; where it is, when None.

    Returns:
        Names of the layers in the model.

    Raises:
        ValueError: the device has no fp8, or the LLM no such layer.
    """
    if not emulate:
        _check_fp8(model.device if device is None else device)
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    llm, converted = model.language_model, []
    head = llm.get_output_embeddings()

    def wanted(module: nn.Module, name: str) -> bool:
        fits = (
            type(module) is nn.Linear
            and module is not head
            and ".lora_" not in name
            and module.in_features % FP8_MULTIPLE == 0
            and module.out_features % FP8_MULTIPLE == 0
        )
        if fits:
            converted.append(f"language_model.{name}")
        return fits

    # The weights' gradient sums over tokens, whose number need not be a multiple of 16: padded.
    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    convert_to_float8_training(llm, module_filter_fn=wanted, config=config)
    if not converted:
        raise ValueError(
            f"text_config {llm.config.model_type} has no linear layer that can be fp8; accepted: nn.Linear whose sides "
            f"are multiples of {FP8_MULTIPLE}"
        )
    return converted


def _check_fp8(device: torch.device) -> None:
    accepted = "accepted: a CUDA device of compute capability 8.9 or more (Ada, Hopper, Blackwell), or emulation"
    if device.type != "cuda":
        raise ValueError(f"fp8 is asked for on {device}; {accepted}")
    capability = torch.cuda.get_device_capability(device)
    if capability < FP8_CAPABILITY:
        name, found = torch.cuda.get_device_name(device), ".".join(map(str, capability))
        raise ValueError(f"fp8 is asked for on {name}, of compute capability {found}; {accepted}")


def compile_model(model: FoveateForConditionalGeneration, backend: str = "inductor") -> None:
    """Compiles each layer of tower and LLM in place: they are alike, so one compilation serves all of a part.

    A layer is one graph, checkpointed or not, with LoRA in it too; DoRA cuts it into pieces. So do transformers' hooks
    in a tower whose features are a hidden state (`vision_feature_layer`). A layer in pieces that is also checkpointed
    runs as if it were not compiled.

    Args:
        backend: of `torch.compile`.

    Raises:
        ValueError: a part has no layers that transformers marks as such.
    """
    for part, name in LAYERED.items():
        module = getattr(model, name)
        layers = [child for child in module.modules() if isinstance(child, GradientCheckpointingLayer)]
        if not layers:
            raise ValueError(f"the {part} ({module.config.model_type}) has no layers to compile")
        for layer in layers:
            layer.compile(backend=backend)


def enable_checkpointing(model: FoveateForConditionalGeneration, parts: Collection[str] = ("tower", "llm")) -> None:
    """Keeps each layer's input alone and computes the rest again in the backward pass, while training.

    Args:
        parts: of `tower` and `llm`.

    Raises:
        ValueError: there is no such part, or it can't be checkpointed.
    """
    for part in parts:
        if part not in LAYERED:
            raise ValueError(f"checkpointing is asked for of {part!r}; accepted: {', '.join(LAYERED)}")
        module = getattr(model, LAYERED[part])
        with warnings.catch_warnings():
            # Newer transformers have another name for it, which older ones don't know.
            warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated", FutureWarning)
            module.gradient_checkpointing_enable({"use_reentrant": False})
            # Only the reentrant form needs inputs with gradients; here they would cost a backward pass of their own.
            module.disable_input_require_grads()


def disable_checkpointing(model: FoveateForConditionalGeneration) -> None:
    """Undoes `enable_checkpointing`."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False  # type: ignore[assignment]
