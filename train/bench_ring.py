"""`foveate bench parallel --kernel`: what a ring computes its blocks with, against sdpa, a call a document.

Causal attention within packed documents, forward and backward, of random queries, keys and values.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from ..eval.facts import result
from ..kernels.varlen_attention import Segments, varlen_attention, varlen_attention_backward
from .parallel_costs import mixture_pack
from .timing import Turns, timed


@dataclass(frozen=True)
class RingBench:
    """What `bench_ring` measures.

    Args:
        tokens: of a pack.
        heads, kv_heads, head_dim: of the model, after the exchange of heads.
        rounds: in each of which every way has its turn.
        device: a GPU where there is one.
        dtype: bfloat16 on a GPU, else float32.

    Raises:
        ValueError: a field is out of range.
    """

    tokens: int = 65536
    heads: int = 4
    kv_heads: int = 1
    head_dim: int = 128
    rounds: int = 7
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.rounds < 1:
            raise ValueError(f"tokens is {self.tokens}, rounds {self.rounds}; accepted: 1 or more")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads is {self.heads}, kv_heads {self.kv_heads}; accepted: a multiple of it")


def bench_ring(bench: RingBench, show: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
    """Measures one long document, and a mixture of documents; results as of `eval.facts.result`."""
    device = torch.device(bench.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, bench.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    packs = {"one": [bench.tokens], "mixture": mixture_pack(np.random.default_rng(0), bench.tokens)}
    results = []
    for name, lengths in packs.items():
        torch.manual_seed(0)
        sizes = (bench.heads, bench.kv_heads, bench.kv_heads, bench.heads)
        query, key, value, grad_out = (
            torch.randn(bench.tokens, count, bench.head_dim, device=device, dtype=dtype) for count in sizes
        )
        turns = Turns(device, "attention", "ms", 1e3, (f"{name}_sdpa",))
        ways = {
            f"{name}_sdpa": partial(_sdpa_by_document, lengths, query, key, value, grad_out),
            f"{name}_varlen": partial(_varlen, lengths, query, key, value, grad_out),
        }
        for number in range(bench.rounds + 1):  # the first warms up
            show(f"{name}, round {number} of {bench.rounds}")
            for way, work in ways.items():
                taken = timed(device, work)
                if number:
                    turns.add(way, [taken])
        flops = 7 * 2.0 * bench.head_dim * bench.heads * sum(length * (length + 1) / 2 for length in lengths)
        for way in ways:
            results += turns.results(way)
            rate = flops / turns.seconds(way, "busy")
            results.append(result(f"{way}_flops_per_s", rate, "FLOP/s", bench.rounds))
    return [result("documents", len(packs["mixture"]), "documents of the mixture", 1), *results]


def _varlen(
    lengths: Sequence[int], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grad_out: torch.Tensor
) -> None:
    segments = Segments((0, *accumulate(lengths)))
    arguments = (segments, segments, True, query.shape[2] ** -0.5)
    out, lse = varlen_attention(query, key, value, *arguments)
    varlen_attention_backward(grad_out, query, key, value, out, lse, *arguments)


def _sdpa_by_document(
    lengths: Sequence[int], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grad_out: torch.Tensor
) -> None:
    for start, stop in pairwise([0, *accumulate(lengths)]):
        q, k, v = (x[start:stop].transpose(0, 1)[None].detach().requires_grad_() for x in (query, key, value))
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.autograd.grad(out, (q, k, v), grad_out[start:stop].transpose(0, 1)[None])
