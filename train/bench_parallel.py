"""`foveate bench parallel`: sequence parallelism's bytes, balance and memory, a model of its step, its kernel's speed.

Bytes and memory are measured in gloo processes on this machine, which say nothing about time; balance is counted; time
comes from `parallel_costs`. How fast the ring's kernel is on a device, `bench_ring` measures.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.nn.functional import cross_entropy

from ..eval.facts import result
from ..vlm.config import FoveateConfig
from ..vlm.model import FoveateForConditionalGeneration
from ..vlm.parallel.attention import SharedSequence, sequence_attention
from ..vlm.parallel.exchange import count_traffic, exchange_tokens
from ..vlm.parallel.plan import IGNORE, SequencePlan, route, shift_labels, split_by_cost
from ..vlm.parallel.topology import Topology, make_topology
from . import parallel_costs as costs
from . import quiet
from .bench import SHAPES, peak_memory

TIMEOUT_S = 120  # of a process that waits for the others
GRIDS = {1: ((1, 1),), 2: ((2, 1), (1, 2)), 4: ((4, 1), (2, 2), (1, 4))}  # (ulysses, ring) by ranks of a sequence
HEADS = ((8, 8), (8, 2), (4, 1))  # of queries, of keys and values: K >= U, K < U, one
HEAD_DIM = 16
RINGS = (2, 4, 8, 32)
RANKS = (8, 16, 32, 64, 128, 256)
TOKENS = tuple(2**power for power in range(16, 22))  # 64K to 2M
RATES = (200e12, 320e12, 400e12, 600e12)  # FLOP/s, to see what hangs on them
UNITS = {
    "flops": "FLOP/s", "node_bandwidth": "bytes/s", "network_bandwidth": "bytes/s", "node_latency_s": "s",
    "network_latency_s": "s", "gpus": "a node",
}  # fmt: skip
PACKS = 100  # of a mixture
PACK_TOKENS = 65536
MEDIA = 60  # images and videos of a pack
IMAGE_ID = 1
FRAME_TOKENS = 4  # of the tiny model
VOCABULARY = 512  # small, so that logits don't hide what attention and layers hold


@dataclass(frozen=True)
class ParallelBench:
    """What `bench_parallel` measures.

    Args:
        processes: of gloo: 1, 2 or 4.
        tokens: of the pack whose training step's memory is measured.

    Raises:
        ValueError: a field is out of range.
    """

    processes: int = 4
    tokens: int = 8192

    def __post_init__(self) -> None:
        if self.processes not in GRIDS:
            raise ValueError(f"processes is {self.processes}; accepted: {', '.join(map(str, GRIDS))}")
        if self.tokens < 64:
            raise ValueError(f"tokens is {self.tokens}; accepted: 64 or more")


def bench_parallel(bench: ParallelBench, show: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
    """Bytes, memory, balance and the modelled step; results as of `eval.facts.result`."""
    show(f"{bench.processes} processes: bytes and memory")
    results = _measured(bench)
    show("balance")
    return [*results, *ring_balance(), *patch_balance(), *modelled()]


def modelled(
    machine: costs.Machine = costs.H100S, ranks: Sequence[int] = RANKS, tokens: Sequence[int] = TOKENS
) -> list[dict[str, Any]]:
    """Seconds of a step by the cost model: each layout over the two-dimensional one with keys sent as they are."""
    results = [result(f"assumed_{name}", value, UNITS[name], 1) for name, value in asdict(machine).items()]
    for count in ranks:
        for length in tokens:
            place = f"P{count}_S{length // 1024}K"
            base = costs.two_dimensional(length, count, False, machine).total
            for name, repeated, seconds in _steps(length, count, machine):
                against = {} if (name, repeated) == ("2d", False) else {"baseline": f"step_{place}_2d_gqa"}
                more: dict[str, Any] = against | ({"ratio": seconds / base} if against else {})
                results.append(
                    result(f"step_{place}_{name}_{'repeated' if repeated else 'gqa'}", seconds, "s", 1, **more)
                )
    for rate in RATES:
        other = replace(machine, flops=rate)
        for name, repeated, count, length in (
            ("ring", False, 256, 2**18),
            ("ring", True, 256, 2**18),
            ("megatron", False, 32, 2**15),
            ("megatron", False, 32, 2**16),
            ("megatron", False, 32, 2**18),
        ):
            step = costs.LAYOUTS[name](length, count, repeated, other)
            assert step is not None
            over = step.total / costs.two_dimensional(length, count, False, other).total
            kind = "repeated" if repeated else "gqa"
            place = f"P{count}_S{length // 1024}K_at_{rate / 1e12:.0f}T"
            results.append(result(f"{name}_{kind}_over_2d_gqa_{place}", over, "times its time", 1))
    return results


def _steps(tokens: int, ranks: int, machine: costs.Machine) -> Iterator[tuple[str, bool, float]]:
    """(layout, whether keys are repeated, seconds); what can't be done is left out."""
    for repeated in (False, True):
        for name, layout in costs.LAYOUTS.items():
            step = layout(tokens, ranks, repeated, machine)
            if step is not None:
                yield name, repeated, step.total


def ring_balance() -> list[dict[str, Any]]:
    """Work of a ring's busiest row over the mean: one long document, and packs of a mixture (mean, least and most)."""
    generator = np.random.default_rng(0)
    packs = [costs.mixture_pack(generator, PACK_TOKENS) for _ in range(PACKS)]
    needed = sum(length * (length + 1) // 2 for pack in packs for length in pack)
    results = [result("mixture_documents", float(np.mean([len(pack) for pack in packs])), "documents a pack", PACKS)]
    for ring in RINGS:
        for layout in ("contiguous", "row-zigzag", "document-zigzag"):
            one = costs.imbalance(costs.ring_pairs([PACK_TOKENS], ring, layout))
            results.append(result(f"flops_{layout}_R{ring}_one_document", one, "max/mean", 1))
            pairs = [costs.ring_pairs(pack, ring, layout) for pack in packs]
            results.append(_spread(f"flops_{layout}_R{ring}_mixture", [costs.imbalance(loads) for loads in pairs]))
        padding = sum(int(loads.sum()) for loads in pairs) / needed - 1  # of the last layout, the one that pads
        results.append(result(f"flops_padding_R{ring}_mixture", padding, "of the pairs needed", PACKS))
        tokens = sum(SequencePlan(tuple(pack), 1, ring).padded_tokens for pack in packs) / (PACKS * PACK_TOKENS) - 1
        results.append(result(f"tokens_padding_R{ring}_mixture", tokens, "of the tokens", PACKS))
    return results


def patch_balance() -> list[dict[str, Any]]:
    """Tiles of the busiest rank over the mean, of packs with few long videos and many images."""
    generator = np.random.default_rng(0)
    packs = [costs.mixture_media(generator, MEDIA) for _ in range(PACKS)]
    tiles = float(np.mean([sum(map(sum, pack)) for pack in packs]))
    results = [result("mixture_tiles", tiles, "tiles a pack", PACKS)]
    for ranks in (4, 8, 32):
        for split in ("media", "frames", "cost"):
            loads = [costs.imbalance(costs.patch_loads(pack, ranks, split)) for pack in packs]
            results.append(_spread(f"tiles_by_{split}_P{ranks}", loads))
    return results


def _spread(name: str, values: Sequence[float]) -> dict[str, Any]:
    return result(name, float(np.mean(values)), "max/mean", len(values), low=min(values), high=max(values))


# Processes


def _measured(bench: ParallelBench) -> list[dict[str, Any]]:
    """What the processes counted and measured, the busiest rank of each."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("forkserver")  # clean of this process's threads, with one import
        context.set_forkserver_preload([quiet.__name__, __name__])
        multiprocessing.start_processes(
            _process, (bench, folder), bench.processes, daemon=True, start_method="forkserver"
        )
        by_rank = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank*.json"))]
    results = []
    for name, of_first in by_rank[0].items():
        entries = [of_rank[name] for of_rank in by_rank]
        most = max(entries, key=lambda entry: entry["value"])
        results.append(result(name, most["value"], of_first["unit"], bench.processes))
        if "formula" in of_first:
            equal = sum(entry["value"] == entry["formula"] for entry in entries)
            results.append(result(f"{name}_equal_formula", equal, "ranks", bench.processes))
    whole = {entry["name"]: entry["value"] for entry in results}["memory_U1_R1"]
    for entry in results:
        if entry["name"].startswith("memory_") and entry["name"] != "memory_U1_R1":
            entry |= {"baseline": "memory_U1_R1", "ratio": entry["value"] / whole}
    return results


def _process(rank: int, bench: ParallelBench, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", bench.processes)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=bench.processes, timeout=timedelta(seconds=TIMEOUT_S)
    )
    found: dict[str, dict[str, Any]] = {}
    for degree in (degree for degree in GRIDS if degree <= bench.processes):
        for ulysses, ring in GRIDS[degree]:
            topology = make_topology(ulysses, ring)
            found |= _attention_bytes(topology) | _step_memory(topology, bench.tokens)
    Path(folder, f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _attention_bytes(topology: Topology) -> dict[str, dict[str, Any]]:
    """Bytes that this rank sends for attention over a pack, counted and by formula."""
    found = {}
    plan = SequencePlan((37, 5, 120, 1), topology.ulysses, topology.ring)
    sequence = SharedSequence(plan, topology, torch.device("cpu"))
    for heads, kv_heads in HEADS if topology.degree > 1 else ():
        query, key, value = (
            torch.randn(1, count, plan.local_tokens, HEAD_DIM, requires_grad=True)
            for count in (heads, kv_heads, kv_heads)
        )
        with count_traffic() as sent:
            sequence.attend(nn.Identity(), query, key, value, HEAD_DIM**-0.5).sum().backward()
        said = costs.attention_traffic(
            plan.padded_tokens, topology.ulysses, topology.ring, heads, kv_heads, HEAD_DIM, costs.FP32
        ).as_counted()
        for what in said | sent:
            name = f"bytes_U{topology.ulysses}_R{topology.ring}_H{heads}_K{kv_heads}_{what.replace(' ', '_')}"
            found[name] = {"value": sent[what], "formula": said.get(what, 0), "unit": "bytes"}
    return found


def _step_memory(topology: Topology, tokens: int) -> dict[str, dict[str, Any]]:
    """Peak memory of a training step's forward and backward on this rank, and bytes of its visual tokens.

    Three quarters of the pack are one video, the rest short documents of text. Weights and their gradients, which are
    the same on every rank, were there before and don't count.
    """
    shape = SHAPES["tiny"]
    text = shape["text_config"] | {"vocab_size": VOCABULARY, "num_hidden_layers": 4}
    torch.manual_seed(0)
    model = FoveateForConditionalGeneration._from_config(
        FoveateConfig(shape["vision_config"], text, projector=shape["projector"], image_token_id=IMAGE_ID)
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    frames = tokens * 3 // 4 // (FRAME_TOKENS + 1)
    lengths = (frames * (FRAME_TOKENS + 1), *[64] * ((tokens - frames * (FRAME_TOKENS + 1)) // 64))
    plan = SequencePlan(lengths, topology.ulysses, topology.ring)
    ids = torch.randint(3, VOCABULARY, (plan.tokens,))
    ids[: lengths[0]].view(frames, -1)[:, :FRAME_TOKENS] = IMAGE_ID
    rank = topology.sequence_rank
    owned = split_by_cost([1] * frames, topology.degree)
    counts = [len(part) * FRAME_TOKENS for part in owned]
    way = route(plan, (ids == IMAGE_ID).nonzero()[:, 0].numpy(), counts, rank)
    local = {
        "input_ids": plan.shard(ids, rank, 0)[None],
        "position_ids": torch.from_numpy(plan.positions(rank))[None],
        "targets": plan.shard(shift_labels(ids.masked_fill(ids == IMAGE_ID, IGNORE), lengths), rank, IGNORE),
    }
    side = shape["vision_config"]["image_size"]
    pixels = torch.randn(len(owned[rank]), 3, side, side)
    sequence = SharedSequence(plan, topology, torch.device("cpu"))

    def step() -> None:
        features = torch.cat(model.encode_images(pixels))
        if topology.group is not None:
            features = exchange_tokens(features, way, topology.group)
        embeds = model.get_inputs_embeds(local["input_ids"], image_features=features)
        decoded = model.get_decoder()(
            inputs_embeds=embeds, position_ids=local["position_ids"], use_cache=False, sequence=sequence
        ).last_hidden_state[0]
        logits = model.get_output_embeddings()(decoded)
        cross_entropy(logits, local["targets"], ignore_index=IGNORE, reduction="sum").backward()

    with sequence_attention(model, topology.ulysses):
        step()  # what is made once
        with count_traffic() as sent:
            peak = peak_memory(torch.device("cpu"), step)
    grid = f"U{topology.ulysses}_R{topology.ring}"
    found: dict[str, dict[str, Any]] = {f"memory_{grid}": {"value": peak, "unit": "bytes a rank"}}
    if topology.degree > 1:
        encoder, holder = np.repeat(np.arange(topology.degree), counts), plan.owners[(ids == IMAGE_ID).numpy()]
        row = text["hidden_size"] * costs.FP32
        for what, sender in (("tokens", encoder), ("tokens backward", holder)):
            said = int(((encoder != holder) & (sender == rank)).sum()) * row
            name = f"bytes_{grid}_{what.replace(' ', '_')}"
            found[name] = {"value": sent[what], "formula": said, "unit": "bytes"}
        whole = 2 * (topology.degree - 1) * plan.tokens * row // topology.degree  # a ring's all-reduce
        found[f"bytes_{grid}_all_reduce"] = {"value": whole, "unit": "bytes, not sent: by formula"}
    return found


def cost_table(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Lines of the modelled steps: seconds of the two-dimensional layout, and how many times those others take."""
    seconds = {entry["name"]: entry["value"] for entry in results}
    kinds = [(name, kind) for kind in ("gqa", "repeated") for name in costs.LAYOUTS if (name, kind) != ("2d", "gqa")]
    yield f"{'ranks':>5} {'tokens':>6} {'2d, s':>9}" + "".join(f"{f'{name} {kind}':>18}" for name, kind in kinds)
    for ranks in RANKS:
        for tokens in TOKENS:
            place = f"step_P{ranks}_S{tokens // 1024}K"
            base = seconds[f"{place}_2d_gqa"]
            found = (seconds.get(f"{place}_{name}_{kind}") for name, kind in kinds)
            cells = "".join(f"{'-' if other is None else format(other / base, '.2f'):>18}" for other in found)
            yield f"{ranks:>5} {tokens // 1024:>5}K {base:>9.4g}{cells}"
