"""A model's floating-point operations, vision included: for MFU, and to share work out evenly.

Counted are the matrix products that the model needs, 2·m·n·k each, of the documents' own tokens: no padding, no
recomputation, no elementwise work. Attention is counted within documents, over the pairs that its mask lets through
(n·(n + 1)/2 causal, a window's share where there is one, n² within each tile of the tower, or each image of tiling
`native`). The tower's layers after the one whose features are read, and its pooling head, are not needed; of projector
`resampler` the queries' own layer, once a call, is left out. MFU and HFU are PaLM's (arXiv 2204.02311, appendix B),
which counts full n² attention where this counts the causal half.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from ..vlm.config import FoveateConfig
from ..vlm.model import FoveateForConditionalGeneration
from ..vlm.resampler import Resampler

EVERYTHING = ("tower", "projector", "llm")

# Dense bf16 with fp32 accumulation, operations a second, from the makers' data sheets; the first name that fits.
PEAK_FLOPS = (
    ("B200", 2250e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("A40", 149.7e12),
    ("RTX 4090", 165.2e12),
)


def peak_flops(device: torch.device | str) -> float | None:
    """Operations a second that a device can do in bf16, or None where that is not known (a CPU, other GPUs)."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).replace("-", " ").split()
    for known, peak in PEAK_FLOPS:
        words = known.split()
        if any(name[i : i + len(words)] == words for i in range(len(name))):
            return peak
    return None


@dataclass(frozen=True)
class StepFlops:
    """Operations of a step."""

    forward: float
    backward: float
    recomputed: float  # the forward pass of checkpointed layers, a second time

    @property
    def model(self) -> float:
        """What the step needs, for MFU."""
        return self.forward + self.backward

    @property
    def hardware(self) -> float:
        """What is computed, for HFU."""
        return self.model + self.recomputed


@dataclass(frozen=True)
class ModelFlops:
    """Operations of a model's forward pass, from which those of training steps follow.

    Weights cost by the token, attention by the pair of tokens. `*_linear` are the layers' own weights, `*_lora` those
    of adapters on them.
    """

    patch_size: int
    patch_embedding: float  # a patch
    prefix_tokens: int  # CLS and registers, of a tile
    tower_linear: float
    tower_lora: float
    tower_pair: float
    downsample_factor: int
    keeps_prefix: bool  # the projector reads the tower's prefix tokens too
    queries: int  # of projector `resampler`, for each tile; 0 with the others
    projector_read: tuple[float, ...]  # its linear layers that run on every patch, in order: `resampler` alone
    projector_pair: float  # its attention, a pair of query and patch
    projector: tuple[float, ...]  # its linear layers that run on every token that it gives, in order
    projector_norm_first: bool
    llm_linear: float
    llm_lora: float
    llm_pair: float  # a layer
    windows: tuple[int | None, ...]  # of each layer's attention
    head: float

    @classmethod
    def from_config(cls, config: FoveateConfig) -> "ModelFlops":
        """Of a model without adapters; see `from_model`."""
        with torch.device("meta"):
            return cls.from_model(FoveateForConditionalGeneration(config))

    @classmethod
    def from_model(cls, model: FoveateForConditionalGeneration) -> "ModelFlops":
        """Reads the layers' sizes off the modules, so quantised and meta weights will do; ZeRO-3's partitioned not.

        Raises:
            ValueError: the model has weights or attention of which it can't be told what they compute, such as
                experts, state space layers or multi-head latent attention.
        """
        config: Any = model.config
        vision, text = config.vision_config, config.text_config
        tower_layers = transformer_layers(model.vision_tower, vision)
        needed = layers_read(config, len(tower_layers))
        tower = [_layer_flops(layer, f"vision_config {vision.model_type}") for layer in tower_layers]
        llm_layers = transformer_layers(model.language_model, text)
        llm = [_layer_flops(layer, f"text_config {text.model_type}") for layer in llm_layers]
        head: Any = model.get_output_embeddings()
        projector: Any = model.multi_modal_projector
        resamples = isinstance(projector, Resampler)
        read: list[Any] = []
        if resamples:
            read = [projector.from_vision, projector.to_key, projector.to_value]
            layers = [projector.attended, projector.out]
        else:
            layers = [module for module in projector.layers if isinstance(module, nn.Linear)]
        return cls(
            patch_size=vision.patch_size,
            patch_embedding=_patch_embedding(model.vision_tower, vision),
            prefix_tokens=_prefix_tokens(model.vision_tower),
            tower_linear=sum(own for own, _ in tower[:needed]),
            tower_lora=sum(lora for _, lora in tower[:needed]),
            tower_pair=4.0 * vision.hidden_size * needed,
            downsample_factor=config.downsample_factor,
            keeps_prefix=config.vision_feature_select_strategy == "full",
            queries=projector.queries.num_embeddings if resamples else 0,
            projector_read=tuple(2.0 * linear.in_features * linear.out_features for linear in read),
            projector_pair=4.0 * text.hidden_size if resamples else 0.0,
            projector=tuple(2.0 * linear.in_features * linear.out_features for linear in layers),
            projector_norm_first=not resamples and isinstance(projector.layers[0], nn.LayerNorm),
            llm_linear=sum(own for own, _ in llm),
            llm_lora=sum(lora for _, lora in llm),
            llm_pair=4.0 * _attention_width(text),
            windows=_windows(text, len(llm)),
            head=2.0 * head.in_features * head.out_features,
        )

    def document(
        self,
        tokens: int,
        tiles: Mapping[tuple[int, int], float] | None = None,
        trains: Collection[str] = EVERYTHING,
        predicted: int | None = None,
        blocks: Mapping[tuple[int, int], float] | None = None,
    ) -> float:
        """Operations that one document costs in training, as `step(…).model`."""
        return self.step([tokens], tiles, trains, predicted, blocks=blocks).model

    def step(
        self,
        lengths: Sequence[int],
        tiles: Mapping[tuple[int, int], float] | None = None,
        trains: Collection[str] = EVERYTHING,
        predicted: int | None = None,
        checkpointing: Collection[str] = (),
        blocks: Mapping[tuple[int, int], float] | None = None,
    ) -> StepFlops:
        """Operations of one optimiser step.

        A matrix product costs its forward pass, once more for its input's gradient where anything before it trains,
        once more for its weight's where that trains. As soon as anything in a part or before it trains, gradients are
        counted through all of the part's layers; where adapters alone train and nothing before them, that is too much
        by the first layer's q, k and v.

        Args:
            lengths: tokens of each document.
            tiles: number of tiles that the tower encodes (of images, all levels of them, and frames) by their (height,
                width) in pixels; with tiling `native` an image or frame is one tile.
            trains: the parts that train (`recipe.PARTS`); `lora` means the adapters that the model had.
            predicted: positions of which the head computes logits; all tokens when None. `token_loss` computes only
                those that predict something.
            checkpointing: parts whose layers' activations are recomputed, of `tower` and `llm`.
            blocks: likewise the tiles whose features, joined over the scales of S², reach the projector; None where
                that is every tile.
        """
        trains, tokens = set(trains), sum(lengths)
        patches = tower_tokens = tower_pairs = 0.0
        for size, count in (tiles or {}).items():
            in_tile = self.encoded_tokens(size)
            patches += count * self._patches(size)
            tower_tokens += count * in_tile
            tower_pairs += count * in_tile**2
        blocks = (tiles or {}) if blocks is None else blocks
        read = sum(count * self._patches(size) for size, count in blocks.items())
        projected = sum(count * self.projected_tokens(size) for size, count in blocks.items())
        pairs = sum(_pairs(n, window) for n in lengths for window in self.windows)
        predicted = tokens if predicted is None else predicted
        reached = bool(trains & {"tower", "tower_norms"} or ("lora" in trains and self.tower_lora))
        work = _Work()

        work.add(self.patch_embedding * patches, False, "tower" in trains)
        work.add(tower_linear := self.tower_linear * tower_tokens, reached, "tower" in trains)
        work.add(tower_lora := self.tower_lora * tower_tokens, reached, "lora" in trains)
        work.add(tower_attention := self.tower_pair * tower_pairs, reached, reached)
        if reached and "tower" in checkpointing:
            work.recomputed += tower_linear + tower_lora + tower_attention

        through = reached or ("projector" in trains and self.projector_norm_first)
        for linear in self.projector_read:
            work.add(linear * read, through, "projector" in trains)
            through = through or "projector" in trains
        work.add(self.projector_pair * self.queries * read, through, through)
        for linear in self.projector:
            work.add(linear * projected, through, "projector" in trains)
            through = reached or "projector" in trains

        reached = reached or bool(trains & {"projector", "llm", "llm_embeddings", "llm_norms"})
        reached = reached or ("lora" in trains and self.llm_lora > 0)
        work.add(llm_linear := self.llm_linear * tokens, reached, "llm" in trains)
        work.add(llm_lora := self.llm_lora * tokens, reached, "lora" in trains)
        work.add(llm_attention := self.llm_pair * pairs, reached, reached)
        if reached and "llm" in checkpointing:
            work.recomputed += llm_linear + llm_lora + llm_attention
        work.add(self.head * predicted, reached, bool(trains & {"llm", "llm_embeddings"}))
        return StepFlops(work.forward, work.backward, work.recomputed)

    def encoded_tokens(self, size: tuple[int, int]) -> int:
        """Tokens of the tower in a tile of (height, width) pixels."""
        return self._patches(size) + self.prefix_tokens

    def projected_tokens(self, size: tuple[int, int]) -> int:
        """Tokens that the projector gives of a tile of (height, width) pixels."""
        rows, columns = size[0] // self.patch_size, size[1] // self.patch_size
        if self.queries:
            return self.queries
        if self.downsample_factor > 1:
            return -(-rows // self.downsample_factor) * -(-columns // self.downsample_factor)
        return rows * columns + (self.prefix_tokens if self.keeps_prefix else 0)

    def _patches(self, size: tuple[int, int]) -> int:
        return (size[0] // self.patch_size) * (size[1] // self.patch_size)


class _Work:
    """Adds up a step's operations."""

    forward = backward = recomputed = 0.0

    def add(self, product: float, first: bool, second: bool) -> None:
        """A matrix product, and which of its factors (the input; the weight or other input) get a gradient."""
        self.forward += product
        self.backward += product * (first + second)


def _pairs(tokens: int, window: int | None) -> int:
    """Pairs of a token and one that it attends to: itself and those before, at most `window`."""
    near = tokens if window is None else min(tokens, window)
    return near * (near + 1) // 2 + (tokens - near) * near


def transformer_layers(module: nn.Module, config: Any) -> list[nn.Module]:
    """A tower's or an LLM's layers.

    Raises:
        ValueError: they are not as many as the configuration says.
    """
    layers: list[nn.Module] = [child for child in module.modules() if isinstance(child, GradientCheckpointingLayer)]
    said = getattr(config, "num_hidden_layers", None)
    if len(layers) != said:
        raise ValueError(
            f"{config.model_type} has {len(layers)} transformer layers where its num_hidden_layers is {said}; "
            "accepted: models whose operations are in those layers"
        )
    return layers


def layers_read(config: FoveateConfig, layers: int) -> int:
    """How many of the tower's layers come before the features that are read."""
    layer = config.vision_feature_layer
    return layers if layer is None else layer if layer >= 0 else layers + 1 + layer


def _layer_flops(layer: nn.Module, whose: str) -> tuple[float, float]:
    """Operations for a token of a layer's own weights, and of adapters on them."""
    own = lora = 0.0
    counted: set[str] = set()
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            size = module.in_features * module.out_features
        elif isinstance(module, Conv1D):
            size = module.nx * module.nf
        else:
            continue
        counted.update(f"{name}.{parameter}" for parameter, _ in module.named_parameters())
        if ".lora_" in name:
            lora += 2.0 * size
        else:
            own += 2.0 * size
    for name, parameter in layer.named_parameters():
        if parameter.ndim > 1 and name not in counted:
            raise ValueError(f"{whose}: it can't be told what its weight {name} computes; accepted: linear layers")
    return own, lora


def _patch_embedding(tower: nn.Module, vision: Any) -> float:
    """Operations for a patch."""
    flops = 0.0
    for name, module in tower.named_modules():
        if "patch_embed" not in name:
            continue
        if isinstance(module, nn.Conv2d):
            flops += 2.0 * module.in_channels * math.prod(module.kernel_size) * module.out_channels
        elif isinstance(module, nn.Linear):
            flops += 2.0 * module.in_features * module.out_features
    if not flops:
        raise ValueError(f"vision_config {vision.model_type} has no patch embedding; accepted: vision transformers")
    return flops


def _prefix_tokens(tower: nn.Module) -> int:
    """Tokens of a tile before its patches."""
    kinds = ("cls_token", "class_embedding", "register_tokens")
    found = [parameter for name, parameter in tower.named_parameters() if name.rpartition(".")[2] in kinds]
    return sum(parameter.shape[1] if parameter.ndim == 3 else 1 for parameter in found)


def _attention_width(text: Any) -> int:
    """Heads times their width."""
    if getattr(text, "kv_lora_rank", None):
        raise ValueError(f"text_config {text.model_type} has latent attention; accepted: grouped or multi-head")
    return text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _windows(text: Any, layers: int) -> tuple[int | None, ...]:
    window = getattr(text, "sliding_window", None)
    types = getattr(text, "layer_types", None)
    if types is None:
        return (window,) * layers
    accepted = {"full_attention": None, "sliding_attention": window}
    if unknown := sorted(set(types) - set(accepted)):
        raise ValueError(f"text_config {text.model_type} has layers {unknown}; accepted: {', '.join(accepted)}")
    return tuple(accepted[kind] for kind in types)
