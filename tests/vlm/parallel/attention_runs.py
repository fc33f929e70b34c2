"""Attention, heads and tokens exchanged by several processes, in fp64: what each rank got, saved in a folder.

python attention_runs.py FOLDER [RANKS BACKEND]
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

import processes

from foveate.vlm.parallel.attention import SharedSequence
from foveate.vlm.parallel.exchange import count_traffic, exchange_tokens, gather_heads, scatter_heads
from foveate.vlm.parallel.plan import SequencePlan, route
from foveate.vlm.parallel.topology import Topology, make_topology

RANKS = 4
GRIDS = ((1, 2), (2, 1), (2, 2), (4, 1), (1, 4))
HEADS = ((8, 8), (8, 2), (4, 1))
PACKS = ((37,), (5, 1, 19, 8, 3))
HEAD_DIM, WIDTH = 8, 5
SCALING = 0.4


def states(heads: int, kv_heads: int, tokens: int) -> list[torch.Tensor]:
    """Query, key, value and the gradient of the output, [heads, tokens, head_dim], the same on every rank."""
    generator = torch.Generator("cpu").manual_seed(heads * 100 + kv_heads * 10 + tokens)
    shapes = ((heads, tokens), (kv_heads, tokens), (kv_heads, tokens), (heads, tokens))
    drawn = (torch.randn(*shape, HEAD_DIM, generator=generator, dtype=torch.float64, device="cpu") for shape in shapes)
    return [tensor.to(torch.get_default_device()) for tensor in drawn]


def local(plan: SequencePlan, rank: int, whole: torch.Tensor) -> torch.Tensor:
    """[heads, tokens, head_dim] to [1, heads, local tokens, head_dim]; padding is nothing that may be seen."""
    return plan.shard(whole.transpose(1, 2), rank, 1e3).transpose(1, 2)[None]


def attend(topology: Topology, plan: SequencePlan, tensors: list[torch.Tensor]) -> dict[str, Any]:
    """This rank's output and gradients, and what it sent."""
    rank = topology.sequence_rank
    query, key, value, gradient = (local(plan, rank, tensor) for tensor in tensors)
    for tensor in (query, key, value):
        tensor.requires_grad_()
    # No loss falls on padding.
    padding = torch.from_numpy(plan.places(rank) < 0).to(gradient.device)
    gradient = gradient.masked_fill(padding[None, None, :, None], 0)
    with count_traffic() as traffic:
        out = SharedSequence(plan, topology, query.device).attend(None, query, key, value, SCALING).transpose(1, 2)
        out.backward(gradient)
    grads = {name: tensor.grad for name, tensor in (("query", query), ("key", key), ("value", value))}
    return {"out": out.detach(), **grads, "traffic": dict(traffic)}


def exchange(topology: Topology, plan: SequencePlan) -> dict[str, Any]:
    """Visual tokens of three uneven shares, none of the last rank's, to their places."""
    rank, degree = topology.sequence_rank, topology.degree
    places = np.array([i for i in range(plan.tokens) if i % 7 not in (0, 3)])
    counts = [0] * degree
    for number in range(len(places)):
        counts[min(number // 4, max(0, degree - 2))] += 1
    start = sum(counts[:rank])
    features = (torch.arange(len(places) * WIDTH, dtype=torch.float64) + 1).view(-1, WIDTH)
    own = features[start : start + counts[rank]].clone().requires_grad_()
    with count_traffic() as traffic:
        got = exchange_tokens(own, route(plan, places, counts, rank), topology.group)
        (got**2).sum().backward()
    return {"got": got.detach(), "own": own.detach(), "grad": own.grad, "traffic": dict(traffic)}


def adjoint(topology: Topology) -> dict[str, list[float]]:
    """Of each exchange f, this rank's shares of <f(x), y> and of <x, gradient of <f(x), y>>, at random x and y."""
    plan, rank, degree = SequencePlan((23, 9), topology.ulysses, topology.ring), topology.sequence_rank, topology.degree
    places = np.arange(2, 30)
    counts = [len(places) - 3 * (degree - 1), *[3] * (degree - 1)]
    generator = torch.Generator("cpu").manual_seed(7 + rank)

    def drawn(*shape: int) -> torch.Tensor:
        tensor = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
        return tensor.to(torch.get_default_device())

    of_route, row, found = route(plan, places, counts, rank), topology.ulysses_group, {}
    for name, given, exchanged in (
        ("tokens", drawn(counts[rank], WIDTH), lambda x: exchange_tokens(x, of_route, topology.group)),
        ("scatter heads", drawn(6, topology.ulysses, 2, HEAD_DIM), lambda x: scatter_heads(x, row)),
        ("gather heads", drawn(6 * topology.ulysses, 2, HEAD_DIM), lambda x: gather_heads(x, row)),
    ):
        out = exchanged(given.requires_grad_())
        other = drawn(*out.shape)
        [gradient] = torch.autograd.grad(out, given, other)
        found[name] = [float((out * other).sum()), float((given * gradient).sum())]
    return found


def perturbed(topology: Topology) -> dict[str, torch.Tensor]:
    """Outputs with and without another key and value at token 20 of a pack, which is in its second document."""
    plan = SequencePlan((9, 17, 6), topology.ulysses, topology.ring)
    tensors = states(8, 2, plan.tokens)
    before = attend(topology, plan, tensors)["out"]
    for tensor in tensors[1:3]:
        tensor[:, 20] += 3.0
    return {"before": before, "after": attend(topology, plan, tensors)["out"]}


def cases() -> dict[str, Any]:
    results: dict[str, Any] = {}
    for ulysses, ring in GRIDS:
        if dist.get_world_size() % (ulysses * ring):
            continue
        topology = make_topology(ulysses, ring)
        for lengths in PACKS:
            plan = SequencePlan(lengths, ulysses, ring)
            for heads, kv_heads in HEADS:
                name = f"{ulysses} {ring} {heads} {kv_heads} {len(lengths)}"
                results[name] = attend(topology, plan, states(heads, kv_heads, plan.tokens))
            results[f"exchange {ulysses} {ring} {len(lengths)}"] = exchange(topology, plan)
        results[f"perturbed {ulysses} {ring}"] = perturbed(topology)
        results[f"adjoint {ulysses} {ring}"] = adjoint(topology)
    return results


if __name__ == "__main__":
    ranks, backend = sys.argv[2:] or (RANKS, "gloo")
    processes.run_all(cases, int(ranks), Path(sys.argv[1]), backend)
