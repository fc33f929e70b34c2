"""Token-level cross-entropy without ever holding the logits of all positions.

At a vocabulary of 150k a row of 8k tokens has 5 GB of fp32 logits, more than the rest of a small model's activations.
On CUDA liger's fused linear cross-entropy (arXiv 2410.10989) is used, elsewhere the head runs on one chunk of positions
at a time, and again in the backward pass.
"""

import importlib.util
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..data.encoding import IGNORE


def token_loss(
    hidden: torch.Tensor, lm_head: nn.Module, labels: torch.Tensor, total: float, chunks: int = 8
) -> torch.Tensor:
    """`target_loss` of the tokens that follow.

    Args:
        hidden, lm_head, total, chunks: see `target_loss`.
        labels: [rows, tokens], at their own token (shifted here), -100 where no loss falls.
    """
    return target_loss(hidden, lm_head, nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE), total, chunks)


def target_loss(
    hidden: torch.Tensor, lm_head: nn.Module, targets: torch.Tensor, total: float, chunks: int = 8
) -> torch.Tensor:
    """Sum of the cross-entropies / `total`, a scalar in fp32 (fp64 where `hidden` is); 0 where nothing is predicted.

    Only positions that predict something reach the head. The head is called as a module (LoRA, fp8, `torch.compile`
    and ZeRO's hooks work), always `chunks` times in the forward and in the backward pass, whatever the labels: under
    ZeRO-3 each call is a collective, so all ranks must make the same number. liger reads the weight itself and is
    used only where that is all that a call of the head would do.

    Args:
        hidden: the decoder's output [rows, tokens, D].
        lm_head: maps D to the vocabulary.
        targets: [rows, tokens], what each position predicts, -100 where no loss falls.
        total: what the sum is divided by, the valid tokens of the whole step; above 0.
        chunks: pieces that the predicting positions are cut into; at most ⌈positions / chunks⌉ have logits at a time.

    Raises:
        ValueError: `total` or `chunks` is not above 0, or shapes don't fit.
    """
    if not total > 0:
        raise ValueError(f"total is {total}; accepted: the number of tokens that the step predicts, above 0")
    if chunks < 1:
        raise ValueError(f"chunks is {chunks}; accepted: 1 or more")
    if hidden.ndim != 3 or hidden.shape[:2] != targets.shape:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and labels {tuple(targets.shape)}; accepted: [rows, tokens, D] "
            "and [rows, tokens]"
        )
    targets = targets.flatten()  # [rows · tokens]
    predicting = (targets != IGNORE).nonzero().squeeze(1)  # [positions]
    hidden, targets = hidden.flatten(0, 1).index_select(0, predicting), targets[predicting]
    if liger_applies(hidden, lm_head):
        return _liger_loss()(lm_head.weight, hidden, targets, lm_head.bias) / total
    loss = torch.zeros((), dtype=_loss_dtype(hidden), device=hidden.device)
    for piece, wanted in zip(hidden.tensor_split(chunks), targets.tensor_split(chunks), strict=True):
        loss = loss + checkpoint(_chunk_loss, lm_head, piece, wanted, use_reentrant=False)
    return loss / total


def _chunk_loss(lm_head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of cross-entropies of [positions, D] against [positions]."""
    logits = lm_head(hidden)
    return nn.functional.cross_entropy(logits.to(_loss_dtype(logits)), targets, reduction="sum")


def _loss_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def liger_applies(hidden: torch.Tensor, lm_head: nn.Module) -> bool:
    """Whether liger's kernel can take the place of calling `lm_head` on `hidden` [positions, D].

    It must be a plain `nn.Linear` (no LoRA, quantised or fp8 layer) whose weight is whole (not ZeRO-3's or FSDP's) and
    that nothing hooks. liger finds gradients only where `hidden` needs one, divides by zero without positions, and
    sums in fp32.
    """
    return (
        hidden.is_cuda
        and len(hidden) > 0
        and (hidden.requires_grad or not any(p.requires_grad for p in lm_head.parameters()))
        and hidden.dtype != torch.float64
        and type(lm_head) is nn.Linear
        and type(lm_head.weight) is nn.Parameter
        and not hasattr(lm_head.weight, "ds_id")
        and not lm_head._forward_hooks
        and not lm_head._forward_pre_hooks
        and importlib.util.find_spec("liger_kernel") is not None
    )


def _liger_loss() -> nn.Module:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    # Without an fp32 accumulator the head's gradient would be summed over chunks in bf16.
    return LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE, reduction="sum", accum_dtype=torch.float32)


class _DecoderOutput(BaseModelOutputWithPast):
    """Stands for any decoder's output: what it doesn't have is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def fusion_obstacle(llm: PreTrainedModel) -> str | None:
    """Why `token_loss(decoder output, head, …)` would not be this LLM's own loss, or None where it is.

    Gemma-2 caps its logits, Granite and Cohere scale them, mixtures of experts may add a loss: such models are to be
    trained through their own `forward`. It is found out by running `forward` with the decoder and the head replaced
    by constants, so no weights are read and it costs nothing, whatever holds them.

    Args:
        llm: a causal LM with its head, whose decoder is `llm.base_model`.
    """
    kind = f"text_config {llm.config.model_type}"
    decoder, head = llm.base_model, llm.get_output_embeddings()
    if decoder is llm or head is None:
        return f"{kind}: its decoder and its head are not modules of their own"
    if getattr(llm.config, "output_router_logits", False):
        return f"{kind}: output_router_logits adds the routers' loss"
    weight, vocabulary = head.weight, llm.config.vocab_size
    width = getattr(head, "in_features", llm.config.hidden_size)
    options: dict[str, Any] = {"device": weight.device, "dtype": torch.float32}
    hidden = torch.linspace(-1, 1, 4 * width, **options).reshape(1, 4, width)
    logits = torch.linspace(-1e4, 1e4, vocabulary, **options).expand(1, 4, vocabulary)  # a cap or a factor shows
    labels = torch.arange(4, device=weight.device).unsqueeze(0)
    seen: list[torch.Tensor] = []

    def decode(*args: Any, **kwargs: Any) -> _DecoderOutput:
        return _DecoderOutput(last_hidden_state=hidden)

    def predict(states: torch.Tensor) -> torch.Tensor:
        seen.append(states)
        return logits

    own = [(module, module.__dict__.get("forward")) for module in (decoder, head)]
    decoder.forward, head.forward = decode, predict
    try:
        with torch.no_grad():
            output = llm(inputs_embeds=hidden, labels=labels, num_items_in_batch=torch.tensor(6.0), use_cache=False)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        return f"{kind}: its forward needs more than its decoder's output ({type(error).__name__}: {error})"
    finally:
        for module, forward in own:
            if forward is None:
                del module.forward
            else:
                module.forward = forward
    if len(seen) != 1 or not torch.equal(seen[0], hidden):
        return f"{kind}: its head reads something else than its decoder's output"
    if not torch.equal(output.logits, logits):
        return f"{kind}: it changes its head's logits (a cap or a factor)"
    wanted = nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum") / 6.0
    if not torch.allclose(output.loss, wanted):
        return f"{kind}: its loss is not the cross-entropy of its logits"
    return None
