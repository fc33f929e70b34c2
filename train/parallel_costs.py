"""What sequence parallelism sends, computes and waits for, by formula: bytes, balance, an alpha-beta model of a step.

U ranks of a row exchange heads (Ulysses, arXiv 2309.14509), R rows pass keys and values on (Ring Attention, arXiv
2310.01889); P = U · R share S tokens. A message of n bytes takes alpha + n / beta. The balance of a ring is that of
causal attention: pairs of a query and a key that it sees, within documents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from ..vlm.parallel.plan import SequencePlan, split_by_cost

# What the model of a step takes for granted, for whoever reads its numbers.
ASSUMPTIONS = (
    "one document of S tokens and the forward and backward pass alone: the optimiser, and weights and gradients on "
    "their way between ranks (DDP, ZeRO), are left out, and so is whether memory suffices",
    "products run at the given FLOP/s whatever their size; norms, rotary embeddings and other elementwise work are "
    "free",
    "backward costs 2 × forward in linear layers, 2.5 × in attention (FlashAttention-2 computes scores again); "
    "nothing else is computed again",
    "activations, keys and values are bf16; gradients of keys and values go round the ring in fp32, as this package "
    "sums them",
    "every ring is zigzag, so blocks are equal; keys travel while the block before is computed, gradients while the "
    "next one is",
    "all-to-all, all-gather and reduce-scatter are not overlapped with anything",
    "each GPU has its own network card; a ring over all ranks crosses from node to node through one and goes at that "
    "pace",
    "Ulysses over nodes: bytes within the node and between nodes travel at the same time; there are at most as many "
    "ranks as heads",
    "Megatron: tensor parallelism with sequence-parallel norms inside the node (arXiv 2205.05198: 4 all-gathers or "
    "reduce-scatters a layer forward and 4 backward; 2 more backward are hidden), a zigzag ring across nodes",
    "repeated: keys and values are repeated to all heads before they are sent, as where GQA is not known; else only as "
    "far as a row has more ranks than there are heads of them",
)


@dataclass(frozen=True)
class Machine:
    """Devices and what connects them; by default what may be reached of H100s with NVLink 4 and a 400 Gb/s card each.

    Attributes:
        flops: operations a second that a GPU reaches.
        node_bandwidth, network_bandwidth: bytes a second that a GPU sends within its node and to others.
        node_latency_s, network_latency_s: of a message there.
        gpus: of a node.
    """

    flops: float = 400e12
    node_bandwidth: float = 300e9
    network_bandwidth: float = 40e9
    node_latency_s: float = 5e-6
    network_latency_s: float = 15e-6
    gpus: int = 8

    def node_s(self, sent: float) -> float:
        """Seconds of a message within a node."""
        return self.node_latency_s + sent / self.node_bandwidth

    def network_s(self, sent: float) -> float:
        """Seconds of a message between nodes."""
        return self.network_latency_s + sent / self.network_bandwidth

    def link_s(self, ranks: int) -> Callable[[float], float]:
        """Seconds of a message to the next of consecutive ranks, at the pace of the slowest of them."""
        return self.node_s if ranks <= self.gpus else self.network_s


H100S = Machine()


@dataclass(frozen=True)
class Decoder:
    """An LLM's shape."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int

    @property
    def layer_flops(self) -> float:
        """Of a token in the linear layers of one layer, forward, with a gated MLP."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return 2.0 * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_flops(self) -> float:
        """Of a token in the output embeddings, forward."""
        return 2.0 * self.hidden * self.vocabulary


LLAMA_3_8B = Decoder(32, 4096, 32, 8, 128, 14336, 128256)  # arXiv 2407.21783, table 3
BF16, FP32 = 2, 4  # bytes


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends to others for one layer's attention, as `exchange.count_traffic` names them."""

    heads: int
    heads_backward: int
    ring: int
    ring_backward: int

    def as_counted(self) -> dict[str, int]:
        """What was sent, by its name there; what was not sent is left out."""
        named = {
            "heads": self.heads,
            "heads backward": self.heads_backward,
            "ring": self.ring,
            "ring backward": self.ring_backward,
        }
        return {name: sent for name, sent in named.items() if sent}


def attention_traffic(
    tokens: int,
    ulysses: int,
    ring: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    itemsize: int = BF16,
    gradient_itemsize: int = FP32,
) -> Traffic:
    """What each rank sends for one layer's attention, forward and backward.

    With K' heads of keys and values after repetition, in numbers over S · head_dim: all-to-all (U - 1) / U · (2H + 2K')
    / P in each pass; ring (R - 1) / R · 2K' / U forward, and backward that again with 2K' / U of gradients, which make
    the whole round.

    Args:
        tokens: S, of the pack with its padding; a multiple of the ranks.
        heads, kv_heads: of the model; kv_heads are repeated to `ulysses` where that is not a divisor of them.
        itemsize: bytes of a number.
        gradient_itemsize: bytes of a number of the keys' and values' gradients.
    """
    sent_heads = sent_kv_heads(kv_heads, ulysses)
    row = tokens // ring  # tokens that a row holds; each of its ranks has all of them for some heads
    around = (ulysses - 1) * (row // ulysses) * (2 * heads + 2 * sent_heads) // ulysses * head_dim * itemsize
    states = row * 2 * sent_heads // ulysses * head_dim  # numbers of a row's keys and values
    forward = (ring - 1) * states * itemsize
    gradients = ring * states * gradient_itemsize if ring > 1 else 0
    return Traffic(around, around, forward, forward + gradients)


def sent_kv_heads(kv_heads: int, ulysses: int) -> int:
    """Heads of keys and values after they are repeated for a row of ranks, if they are."""
    return kv_heads if kv_heads % ulysses == 0 else ulysses


@dataclass(frozen=True)
class StepTime:
    """Seconds of a training step's forward and backward pass, on every rank.

    Attributes:
        linear: in linear layers.
        attention: in attention's products.
        exchange: in all-to-all, all-gather and reduce-scatter.
        waiting: for keys, values and their gradients that are still under way round the ring.
    """

    linear: float
    attention: float
    exchange: float
    waiting: float

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.exchange + self.waiting


def grid(ranks: int, machine: Machine, heads: int) -> tuple[int, int]:
    """(ulysses, ring) of two-dimensional attention: rows are nodes."""
    ulysses = min(ranks, machine.gpus, heads)
    return ulysses, ranks // ulysses


def two_dimensional(
    tokens: int, ranks: int, repeated: bool = False, machine: Machine = H100S, decoder: Decoder = LLAMA_3_8B
) -> StepTime:
    """A step with Ulysses inside nodes and a ring across them, this package's layout."""
    return _step(tokens, *grid(ranks, machine, decoder.heads), repeated, machine, decoder)


def ring_only(
    tokens: int, ranks: int, repeated: bool = False, machine: Machine = H100S, decoder: Decoder = LLAMA_3_8B
) -> StepTime:
    """A step with one ring over all ranks."""
    return _step(tokens, 1, ranks, repeated, machine, decoder)


def ulysses_only(
    tokens: int, ranks: int, repeated: bool = False, machine: Machine = H100S, decoder: Decoder = LLAMA_3_8B
) -> StepTime | None:
    """A step in which all ranks exchange heads; None where there are more ranks than heads."""
    return None if decoder.heads % ranks else _step(tokens, ranks, 1, repeated, machine, decoder)


def megatron(
    tokens: int, ranks: int, repeated: bool = False, machine: Machine = H100S, decoder: Decoder = LLAMA_3_8B
) -> StepTime:
    """A step with tensor parallelism inside nodes and context parallelism, a ring, across them."""
    tensor, context = grid(ranks, machine, decoder.heads)
    kv_heads = decoder.heads if repeated else sent_kv_heads(decoder.kv_heads, tensor)
    hidden = tokens // context * decoder.hidden * BF16 * (tensor - 1) / tensor
    exchange = 8 * machine.node_s(hidden) if tensor > 1 else 0.0
    attention, waiting = _ring(tokens, tensor, context, kv_heads, machine, decoder)
    return _layers(tokens, ranks, attention, exchange, waiting, machine, decoder)


LAYOUTS: dict[str, Callable[..., StepTime | None]] = {
    "2d": two_dimensional,
    "ring": ring_only,
    "ulysses": ulysses_only,
    "megatron": megatron,
}


def _step(tokens: int, ulysses: int, ring: int, repeated: bool, machine: Machine, decoder: Decoder) -> StepTime:
    kv_heads = decoder.heads if repeated else sent_kv_heads(decoder.kv_heads, ulysses)
    ranks = ulysses * ring
    exchange = 0.0
    if ulysses > 1:
        for heads in (decoder.heads + 2 * kv_heads, decoder.heads):  # queries, keys and values; the output
            each = tokens // ranks * heads // ulysses * decoder.head_dim * BF16  # to one other rank
            near = machine.node_s(each * (min(ulysses, machine.gpus) - 1))
            far = machine.network_s(each * (ulysses - machine.gpus)) if ulysses > machine.gpus else 0.0
            exchange += 2 * max(near, far)  # and its gradients
    attention, waiting = _ring(tokens, ulysses, ring, kv_heads, machine, decoder)
    return _layers(tokens, ranks, attention, exchange, waiting, machine, decoder)


def _ring(
    tokens: int, ulysses: int, ring: int, kv_heads: int, machine: Machine, decoder: Decoder
) -> tuple[float, float]:
    """Seconds of a layer's attention, and those that it waits for keys, values and gradients; both passes."""
    row = tokens // ring
    flops = 2.0 * row * row * decoder.heads / ulysses * decoder.head_dim  # of a block: 4 a pair, half of the pairs
    forward, backward = flops / machine.flops, 2.5 * flops / machine.flops
    attention = ring * (forward + backward)
    if ring == 1:
        return attention, 0.0
    states = row * 2 * kv_heads // ulysses * decoder.head_dim
    link = machine.link_s(ulysses * ring)
    keys, gradients, both = link(states * BF16), link(states * FP32), link(states * (BF16 + FP32))
    took_forward = (ring - 1) * max(forward, keys) + forward
    took_backward = max(backward, keys) + (ring - 2) * max(backward, both) + max(backward, gradients) + gradients
    return attention, took_forward + took_backward - attention


def _layers(
    tokens: int, ranks: int, attention: float, exchange: float, waiting: float, machine: Machine, decoder: Decoder
) -> StepTime:
    linear = 3 * tokens / ranks * (decoder.layers * decoder.layer_flops + decoder.head_flops) / machine.flops
    return StepTime(linear, decoder.layers * attention, decoder.layers * exchange, decoder.layers * waiting)


def ring_pairs(lengths: Sequence[int], ring: int, layout: str) -> np.ndarray:
    """Pairs of causal attention that each row of a ring computes for a pack of documents, int64 [ring].

    Args:
        lengths: tokens of each document.
        layout: `contiguous` cuts the pack in as many pieces as there are rows; `row-zigzag` in twice as many, of which
            row g has numbers g and 2 · ring - 1 - g; `document-zigzag` does so with each document, padded for it
            (`SequencePlan`), and what padding computes counts.

    Raises:
        ValueError: there is no such layout.
    """
    if layout == "document-zigzag":
        plan = SequencePlan(tuple(lengths), 1, ring)
        return np.array([(plan.positions(rank) + 1).sum() for rank in range(ring)])
    seen = np.concatenate([np.arange(length) + 1 for length in lengths])  # keys that each query sees
    if layout == "contiguous":
        return np.array([piece.sum() for piece in np.array_split(seen, ring)])
    if layout == "row-zigzag":
        pieces = np.array([piece.sum() for piece in np.array_split(seen, 2 * ring)])
        return pieces[:ring] + pieces[: -ring - 1 : -1]
    raise ValueError(f"layout is {layout!r}; accepted: contiguous, row-zigzag, document-zigzag")


def imbalance(loads: Sequence[float] | np.ndarray) -> float:
    """The largest load over the mean."""
    return float(np.max(loads) / np.mean(loads))


def split_by_count(items: int, parts: int) -> list[range]:
    """Contiguous ranges of as many items each as possible."""
    ends = [items * part // parts for part in range(parts + 1)]
    return [range(start, stop) for start, stop in pairwise(ends)]


def patch_loads(media: Sequence[Sequence[int]], ranks: int, split: str) -> np.ndarray:
    """Tiles that each rank encodes of a pack, int64 [ranks].

    Args:
        media: of each image and video in order, the tiles of its units: one of an image, those of frames of a video.
        split: `cost` as this package does, contiguous with the least possible largest sum; `frames` by the number of
            images and frames (LongVILA's code), `media` by that of images and videos.

    Raises:
        ValueError: there is no such split.
    """
    units = [tiles for one in media for tiles in one]
    if split == "cost":
        parts = split_by_cost(units, ranks)
    elif split == "frames":
        parts = split_by_count(len(units), ranks)
    elif split == "media":
        first = [0, *accumulate(len(one) for one in media)]
        parts = [range(first[part.start], first[part.stop]) for part in split_by_count(len(media), ranks)]
    else:
        raise ValueError(f"split is {split!r}; accepted: cost, frames, media")
    return np.array([sum(units[part.start : part.stop]) for part in parts])


def mixture_pack(generator: np.random.Generator, tokens: int) -> list[int]:
    """Lengths of documents that fill a pack: log-normal with a long tail, as of captions, chats and long videos."""
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(left, max(16, int(generator.lognormal(7.0, 1.6)))))
    return lengths


def mixture_media(generator: np.random.Generator, media: int) -> list[list[int]]:
    """Tiles of the units of a pack's media: three videos in ten, of a log-normal number of frames of a tile each, and
    images of 1 to 12 tiles with a thumbnail where there are several.
    """
    units: list[list[int]] = []
    for _ in range(media):
        if generator.random() < 0.3:
            units.append([1] * int(np.clip(generator.lognormal(4.5, 1.2), 8, 1024)))
        else:
            tiles = int(generator.integers(1, 13))
            units.append([tiles + (tiles > 1)])
    return units
