"""What training holds on one GPU, in bytes. docs/plan.md derives the formulas; tests count the engines' own tensors.

Weights, gradients and optimiser's state follow ZeRO (arXiv 1910.02054, section 3) as the engines keep them: what
differs from the paper is said where it stands. Activations follow arXiv 2205.05198, section 4, with flash attention (no
n² scores), grouped heads, a gated MLP and no dropout in the place of GPT's layer. Where ranks share a row, tokens are
those of one of them, and attention keeps what `vlm/parallel` exchanges.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ..vlm.model import FoveateForConditionalGeneration
from .parallel_costs import sent_kv_heads

# How a module computes: bf16 weights (ZeRO-1 to 3), fp32 weights under autocast (torch, ZeRO-0), or fp32 throughout.
Mode = Literal["bf16", "autocast", "fp32"]

OPTIMIZER_SLOTS = {"adamw": 2, "sgd": 1}  # fp32 numbers a trained parameter has; sgd's is its momentum
LOGITS_TOKENS = 1024  # positions whose logits are held at a time, `stages.LOGITS_TOKENS`
NF4_BITS = 4.127  # of a weight with its doubly quantised scale (arXiv 2305.14314, section 3)


@dataclass(frozen=True)
class Memory:
    """Bytes on a GPU."""

    weights: float
    gradients: float
    optimizer: float  # with the fp32 copies of the weights that it steps
    buffers: float  # of communication, and weights gathered for a while
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.buffers + self.activations


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters of a stage's model."""

    every: int
    trained: int
    small: int = 0  # in tensors that ZeRO-3 keeps whole on every GPU
    quantised: int = 0  # held in 4 bits

    @classmethod
    def of(cls, model: nn.Module, threshold: int, quantised: int = 0) -> "Counts":
        """Of a model whose frozen parameters are marked so.

        Args:
            threshold: elements up to which ZeRO-3 keeps a tensor whole, `stage3_param_persistence_threshold`.
        """
        sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
        return cls(
            sum(n for n, _ in sizes),
            sum(n for n, trained in sizes if trained),
            sum(n for n, _ in sizes if n <= threshold),
            quantised,
        )


def compute_mode(stage: int, precision: str) -> Mode:
    """How the engine of a ZeRO stage (0 is `torch` too) computes."""
    if precision == "fp32":
        return "fp32"
    return "bf16" if stage else "autocast"


def model_states(
    stage: int, mode: Mode, counts: Counts, gpus: int, slots: int, zero: Mapping[str, Any], activations: float = 0.0
) -> Memory:
    """What each of `gpus` holds while the optimiser steps.

    Args:
        stage: of ZeRO; 0 is plain data parallelism, as the engine `torch` has it.
        slots: see `OPTIMIZER_SLOTS`.
        zero: DeepSpeed's `zero_optimization` of that stage, for sizes of buffers; its defaults where they are not set.
        activations: passed on.
    """
    n, t = counts.every - counts.quantised, counts.trained
    weight = 2.0 if mode == "bf16" else 4.0
    held = counts.quantised * NF4_BITS / 8
    if stage == 0:
        return Memory(held + weight * n, 4.0 * t, 4.0 * slots * t, 0.0, activations)
    master = (4.0 + 4.0 * slots) * t / gpus
    bucket = weight * zero.get("reduce_bucket_size", 5e8)
    if stage == 1 and mode == "bf16":  # DeepSpeed sums whole gradients in fp32 and keeps the bf16 ones beside them
        return Memory(held + weight * n, 4.0 * t + weight * t, master, 0.0, activations)
    if stage < 3:
        buckets = min(bucket, weight * t) * (2 if zero.get("overlap_comm") else 1)
        return Memory(held + weight * n, 4.0 * t / gpus, master, buckets, activations)
    gathered = weight * (counts.small if gpus > 1 else 0)
    live = weight * min(n - counts.small, zero.get("stage3_max_live_parameters", 1e9)) if gpus > 1 else 0.0
    return Memory(held + weight * n / gpus + gathered, 4.0 * t / gpus, master, bucket + live, activations)


@dataclass(frozen=True)
class LayerShape:
    """A part's transformer layers."""

    layers: int
    hidden: int
    attention: int  # heads × their width
    key_value: int  # key heads × their width
    heads: int
    intermediate: int
    gated: bool  # three matrices in the MLP (SwiGLU), not two
    rms: bool  # RMSNorm as transformers computes it, in fp32 of its own, not LayerNorm
    matrices: int  # weights of all layers' matrices

    @classmethod
    def of(cls, module: Any, layers: list[nn.Module]) -> "LayerShape":
        """Of a tower or an LLM of transformers.

        Args:
            layers: its transformer layers, those after the features that are read left out.
        """
        config = module.config
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        names = [name for name, _ in layers[0].named_modules()] if layers else []
        return cls(
            len(layers),
            config.hidden_size,
            heads * head_dim,
            (getattr(config, "num_key_value_heads", None) or heads) * head_dim,
            heads,
            getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size,
            any(name.endswith("gate_proj") for name in names),
            any(type(child).__name__.endswith("RMSNorm") for layer in layers[:1] for child in layer.modules()),
            sum(p.numel() for layer in layers for p in layer.parameters() if p.ndim > 1),
        )

    def sent_key_value(self, ulysses: int) -> int:
        """Width of the keys after they are repeated for a row of so many ranks, where that is needed."""
        head_dim = self.attention // self.heads
        return sent_kv_heads(self.key_value // head_dim, ulysses) * head_dim

    def bytes_a_token(self, mode: Mode, trains: bool, ulysses: int = 1) -> float:
        """What one layer keeps of a token for its backward pass.

        Args:
            trains: its matrices have gradients, for which their inputs are kept; else gradients only pass through.
            ulysses: ranks that share its heads. Then q, k, v and attention's output are kept as they were exchanged,
                k and v as often as they were repeated, and the output once more where the matrix behind it trains.
        """
        e = 4 if mode == "fp32" else 2
        stream = 2 if mode == "bf16" else 4
        h, f = self.hidden, self.intermediate
        if self.rms:
            norms = 2 * (4 * h + 4) + (2 * stream * h if trains else 0)  # in fp32, its inverse root; normalised
        else:
            norms = 2 * (stream * h + 2 * stream)  # its input, mean and deviation
        readers = 5 - (not self.gated) if mode == "autocast" else 2  # autocast casts for each matrix anew
        inputs = readers * e * h if trains else 0
        attention = 2 * e * (self.attention + self.sent_key_value(ulysses))  # q, k, v, output
        attention += 4 * self.heads  # log-sum of exponents
        if ulysses > 1 and trains:
            attention += e * self.attention
        mlp = (3 if self.gated else 1) * e * f + (e * f if trains else 0)
        return norms + inputs + attention + mlp

    def activations(self, tokens: float, mode: Mode, trains: bool, checkpointing: bool, ulysses: int = 1) -> float:
        """What all layers keep of so many tokens; checkpointed ones their inputs, and one of them everything."""
        of_layer = self.bytes_a_token(mode, trains, ulysses)
        copies = 2.0 * self.matrices if mode == "autocast" else 0.0  # bf16 copies of the weights
        if not checkpointing:
            return tokens * self.layers * of_layer + copies
        stream = 2 if mode == "bf16" else 4
        return tokens * (self.layers * stream * self.hidden + of_layer) + copies


@dataclass(frozen=True)
class ActivationShape:
    """What a model's activations follow from."""

    tower: LayerShape
    llm: LayerShape
    projector_widths: int  # inputs and outputs of the projector's matrices, added up
    vocabulary: int

    @classmethod
    def of(cls, model: FoveateForConditionalGeneration, tower_layers: int) -> "ActivationShape":
        """Args:
        tower_layers: how many of the tower's layers come before the features that are read.
        """
        from .flops import transformer_layers

        tower: Any = model.vision_tower
        linear = [m for m in model.multi_modal_projector.modules() if isinstance(m, nn.Linear)]
        text: Any = model.config.text_config
        return cls(
            LayerShape.of(tower, transformer_layers(tower, tower.config)[:tower_layers]),
            LayerShape.of(model.language_model, transformer_layers(model.language_model, text)),
            sum(layer.in_features + layer.out_features for layer in linear),
            text.vocab_size,
        )

    def of_micro_batch(
        self,
        tokens: float,
        tower_tokens: float,
        projected: float,
        pixels: float,
        mode: Mode,
        trains: Collection[str],
        checkpointing: bool,
        runs_llm: bool = True,
        ulysses: int = 1,
    ) -> float:
        """Bytes that a micro-batch's backward pass needs. Where ranks share its rows, all numbers are of one rank.

        Args:
            tokens: of the LLM, padding included.
            tower_tokens: of all tiles, prefix tokens included.
            projected: tokens that the projector gives.
            pixels: of all tiles, three numbers each.
            trains: the parts that train.
            runs_llm: the objective reads the LLM.
            ulysses: ranks that share its heads.
        """
        e, parts = 4 if mode == "fp32" else 2, set(trains)
        total = 3 * pixels * (1 + 4 + (e if mode != "fp32" else 0))  # as bytes, normalised, and cast
        if parts & {"tower", "tower_norms"}:
            total += self.tower.activations(tower_tokens, mode, "tower" in parts, checkpointing)
        if parts & {"tower", "tower_norms", "projector"}:
            total += e * projected * self.projector_widths
        if runs_llm:
            total += self.llm.activations(tokens, mode, bool(parts & {"llm", "lora"}), checkpointing, ulysses)
            total += min(tokens, LOGITS_TOKENS) * self.vocabulary * (e + 8)  # logits, in fp32, and their gradient
        return total

    def exchange_buffers(self, tokens: float, visual: float, mode: Mode, ulysses: int, ring: int) -> float:
        """Bytes that are sent and received while ranks that share a row attend, in one layer at a time, at most.

        Heads: queries, keys and values as they leave and as they come. Ring: keys and values of two rows, their
        gradients in fp32 likewise, and the queries' gradient in fp32. Before all layers: visual tokens, likewise twice.

        Args:
            tokens: of a rank.
            visual: tokens of images and videos among them.
        """
        e = 4 if mode == "fp32" else 2
        a, k = self.llm.attention, self.llm.sent_key_value(ulysses)
        heads = 2 * e * (a + 2 * k) if ulysses > 1 else 0
        heads += 2 * e * k if k > self.llm.key_value else 0  # repeated
        around = 2 * (e + 4) * 2 * k + 4 * a if ring > 1 else 0
        before = 2 * e * self.llm.hidden if ulysses * ring > 1 else 0
        return max(tokens * (heads + around), visual * before)
