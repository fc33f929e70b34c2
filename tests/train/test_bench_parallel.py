"""`foveate bench parallel`: what it counts equals the formulas, what it models can be checked by hand."""

import contextlib
import io
import json
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from foveate import cli
from foveate.train import bench_parallel as module
from foveate.train import parallel_costs as costs
from foveate.train.bench_ring import RingBench


def run(*options: str) -> dict[str, Any]:
    """What the command prints as JSON."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(module, "PACKS", 10)
        patch.setattr(sys, "argv", ["foveate", "bench", "parallel", *options, "--json"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 0
    return json.loads(out.getvalue())


@pytest.fixture(scope="module")
def printed() -> dict[str, Any]:
    """Of 4 processes and a few packs."""
    return run("--tokens", "320")


@pytest.fixture(scope="module")
def results(printed: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in printed["results"]}


def test_every_rank_sends_as_many_bytes_as_the_formula_says(results: dict[str, dict[str, Any]]) -> None:
    counted = [name for name in results if name.endswith("_equal_formula")]
    assert len(counted) == 3 * (2 + 2 + 2 + 2 + 4) + 2 * 5  # of attention by heads and grid, of visual tokens
    assert all(results[name]["value"] == 4 for name in counted)
    assert all(results[name.removesuffix("_equal_formula")]["value"] > 0 for name in counted)
    for grid in ("U2_R1", "U4_R1", "U2_R2"):
        assert results[f"bytes_{grid}_tokens"]["value"] < results[f"bytes_{grid}_all_reduce"]["value"] / 4


def test_a_ranks_memory_shrinks_with_the_ranks(results: dict[str, dict[str, Any]]) -> None:
    for grid, ranks in (("U2_R1", 2), ("U1_R2", 2), ("U4_R1", 4), ("U2_R2", 4), ("U1_R4", 4)):
        assert 1 / ranks < results[f"memory_{grid}"]["ratio"] < 1.35 / ranks


def test_work_is_balanced_where_simpler_ways_are_not(results: dict[str, dict[str, Any]]) -> None:
    for ring in module.RINGS:
        assert results[f"flops_document-zigzag_R{ring}_mixture"]["high"] <= 1.01
        assert results[f"flops_padding_R{ring}_mixture"]["value"] <= 0.01
        assert results[f"flops_contiguous_R{ring}_one_document"]["value"] == pytest.approx(2 - 1 / ring, rel=1e-4)
    assert results["flops_row-zigzag_R8_mixture"]["value"] > 1.5
    for ranks in (8, 32):
        assert results[f"tiles_by_cost_P{ranks}"]["high"] <= 1.1
        assert results[f"tiles_by_media_P{ranks}"]["low"] > 1.5


def test_steps_are_compared_with_two_dimensions(printed: dict[str, Any], results: dict[str, dict[str, Any]]) -> None:
    ring, ours = results["step_P256_S256K_ring_gqa"], results["step_P256_S256K_2d_gqa"]
    assert ring["ratio"] == ring["value"] / ours["value"] == results["ring_gqa_over_2d_gqa_P256_S256K_at_400T"]["value"]
    assert "step_P32_S64K_ulysses_gqa" in results
    assert "step_P64_S64K_ulysses_gqa" not in results  # 32 heads
    lines = list(module.cost_table(printed["results"]))
    (line,) = [line for line in lines if line.split()[:2] == ["256", "256K"]]
    assert line.split()[3] == f"{ring['ratio']:.2f}"
    assert len(lines) == 1 + len(module.RANKS) * len(module.TOKENS)


@pytest.mark.parametrize(("ulysses", "ring"), [(1, 4), (4, 1), (2, 2), (8, 3)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (16, 1)])
def test_bytes_are_those_of_states_that_change_their_rank(ulysses: int, ring: int, heads: int, kv_heads: int) -> None:
    """Of the first rank: heads of its tokens that are others', and what its row's heads send on round the ring."""
    tokens, head_dim = 2 * ulysses * ring * 3, 4
    row = range(tokens // ring)
    own = row[: len(row) // ulysses]
    sent = {"queries": 0, "keys": 0}
    repeated = ulysses if kv_heads < ulysses else kv_heads
    for kind, count in (("queries", heads), ("keys", repeated)):
        for head in range(count):
            sent[kind] += len(own) * (head // (count // ulysses) != 0)  # not this rank's own head
    around = (2 * sent["queries"] + 2 * sent["keys"]) * head_dim * 2
    passes, home = (ring - 1, ring) if ring > 1 else (0, 0)
    states = 2 * len(row) * repeated // ulysses * head_dim
    got = costs.attention_traffic(tokens, ulysses, ring, heads, kv_heads, head_dim)
    assert got == costs.Traffic(around, around, passes * states * 2, passes * states * 2 + home * states * 4)


@pytest.mark.parametrize("name", costs.LAYOUTS)
@pytest.mark.parametrize("ranks", [8, 32])
def test_without_communication_a_step_takes_its_products_alone(name: str, ranks: int) -> None:
    step = costs.LAYOUTS[name](65536, ranks, False, costs.Machine(1e12, 1e30, 1e30, 0, 0))
    assert step is not None
    weights = 8_030_261_248 - 128256 * 4096 - 65 * 4096  # of Llama-3-8B without input embeddings and norms
    assert step.linear == pytest.approx(6 * weights * 65536 / ranks / 1e12)
    assert step.attention == pytest.approx(3.5 * 2 * 65536**2 * 4096 * 32 / ranks / 1e12)  # causal: half of 4 · S² · D
    assert step.total == pytest.approx(step.linear + step.attention)


def test_a_ring_that_waits_takes_as_long_as_its_messages() -> None:
    """4 ranks on 4 nodes that compute nothing: 3 passes of keys, and with gradients 2 of both and what is left."""
    machine = costs.Machine(1e30, 1e30, 1e9, 0, 0, gpus=1)
    decoder = replace(costs.LLAMA_3_8B, layers=1)
    keys = 4096 // 4 * 2 * 8 * 128 * 2 / 1e9
    step = costs.ring_only(4096, 4, False, machine, decoder)
    assert step.waiting == pytest.approx(3 * keys + keys + 2 * 3 * keys + 2 * keys + 2 * keys)
    assert step.exchange == 0


def test_a_ring_that_computes_waits_for_its_last_gradients_alone() -> None:
    machine = costs.Machine(1e6, 1e30, 1e9, 0, 0, gpus=1)
    decoder = replace(costs.LLAMA_3_8B, layers=1)
    gradients = 4096 // 4 * 2 * 8 * 128 * 4 / 1e9
    assert costs.ring_only(4096, 4, False, machine, decoder).waiting == pytest.approx(gradients, rel=1e-3)


@pytest.mark.parametrize("ring", [2, 4])
def test_pairs_of_a_row_are_those_of_its_queries(ring: int) -> None:
    """By a dense mask over the pack, its queries owned by rows as each layout says."""
    lengths = [16 * ring, 2 * ring, 6 * ring]  # nothing to pad
    tokens = sum(lengths)
    document = np.repeat(np.arange(3), lengths)
    mask = (document[:, None] == document) & (np.arange(tokens)[:, None] >= np.arange(tokens))
    zigzag = np.concatenate([np.arange(ring), np.arange(ring)[::-1]])
    owner = {
        "contiguous": np.repeat(np.arange(ring), tokens // ring),
        "row-zigzag": np.repeat(zigzag, tokens // (2 * ring)),
        "document-zigzag": np.concatenate([np.repeat(zigzag, length // (2 * ring)) for length in lengths]),
    }
    for layout, owners in owner.items():
        wanted = [int(mask[owners == row].sum()) for row in range(ring)]
        assert costs.ring_pairs(lengths, ring, layout).tolist() == wanted
    assert costs.ring_pairs([2 * ring + 1], ring, "document-zigzag").sum() == 2 * ring * (
        4 * ring + 1
    )  # 4 · ring tokens
    with pytest.raises(ValueError, match="layout is 'stripes'"):
        costs.ring_pairs(lengths, ring, "stripes")


def test_tiles_go_to_ranks_by_cost_frames_or_media() -> None:
    media = [[1] * 6, [9], [3], [1, 1]]
    assert costs.patch_loads(media, 2, "media").tolist() == [15, 5]
    assert costs.patch_loads(media, 2, "frames").tolist() == [5, 15]
    assert costs.patch_loads(media, 2, "cost").max() == 14  # the best that is contiguous
    with pytest.raises(ValueError, match="split is 'size'"):
        costs.patch_loads(media, 2, "size")


def test_the_kernel_is_timed_against_sdpa() -> None:
    results = run("--kernel", "--tokens", "96", "--rounds", "1", "--device", "cpu")["results"]
    entries = {entry["name"]: entry for entry in results}
    assert len(entries) == len(results)
    for pack in ("one", "mixture"):
        for name in (f"{pack}_varlen_attention", f"{pack}_sdpa_attention", f"{pack}_varlen_over_{pack}_sdpa"):
            assert entries[name]["value"] > 0
        flops = entries[f"{pack}_varlen_flops_per_s"]["value"] * entries[f"{pack}_varlen_cpu_attention"]["value"] / 1e3
        lengths = [96] if pack == "one" else costs.mixture_pack(np.random.default_rng(0), 96)
        pairs = sum(length * (length + 1) // 2 for length in lengths)
        assert flops == pytest.approx(7 * 2 * 4 * 128 * pairs)  # 2 products forward, 5 backward, of 4 heads


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: module.ParallelBench(processes=3), "processes is 3; accepted: 1, 2, 4"),
        (lambda: module.ParallelBench(tokens=8), "tokens is 8; accepted: 64 or more"),
        (lambda: RingBench(heads=4, kv_heads=3), "heads is 4, kv_heads 3"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()
