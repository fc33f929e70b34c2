"""Attention and exchanges of 4 processes against one that holds everything, in fp64."""

from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foveate.vlm.parallel.attention import SharedSequence, sequence_attention
from foveate.vlm.parallel.plan import SequencePlan
from foveate.vlm.parallel.topology import ParallelError, Topology

from . import attention_runs as runs
from .processes import collect

GRIDS = [f"{ulysses} {ring}" for ulysses, ring in runs.GRIDS]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank of attention_runs.py got."""
    return collect(Path(runs.__file__), tmp_path_factory.mktemp("attention"), runs.RANKS)


def plan_of(grid: str, lengths: tuple[int, ...]) -> SequencePlan:
    return SequencePlan(lengths, *map(int, grid.split()))


def whole(plan: SequencePlan, parts: list[torch.Tensor]) -> torch.Tensor:
    """[1, heads, local tokens, head_dim] of each rank to [heads, tokens, head_dim]."""
    return plan.unshard([part[0].transpose(1, 2) for part in parts]).transpose(1, 2)


def dense(lengths: tuple[int, ...], heads: int, kv_heads: int) -> dict[str, torch.Tensor]:
    """Attention with a mask of causality and documents, and its gradients."""
    query, key, value, gradient = runs.states(heads, kv_heads, sum(lengths))
    for tensor in (query, key, value):
        tensor.requires_grad_()
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    seen = (documents[:, None] == documents) & torch.ones(len(documents), len(documents), dtype=torch.bool).tril()
    keys, values = (states.repeat_interleave(heads // kv_heads, dim=0) for states in (key, value))
    scores = (query @ keys.transpose(1, 2) * runs.SCALING).masked_fill(~seen, -torch.inf)
    out = scores.softmax(-1) @ values
    out.backward(gradient)
    return {"out": out.detach(), "query": query.grad, "key": key.grad, "value": value.grad}


@pytest.mark.parametrize("lengths", runs.PACKS, ids=len)
@pytest.mark.parametrize(("heads", "kv_heads"), runs.HEADS)
@pytest.mark.parametrize("grid", GRIDS)
def test_attention_and_its_gradients_equal_those_of_one_process(
    ranks: list[dict[str, Any]], grid: str, heads: int, kv_heads: int, lengths: tuple[int, ...]
) -> None:
    plan, wanted = plan_of(grid, lengths), dense(lengths, heads, kv_heads)
    name = f"{grid} {heads} {kv_heads} {len(lengths)}"
    for first in range(0, runs.RANKS, plan.degree):  # each sequence group
        for what, expected in wanted.items():
            got = whole(plan, [rank[name][what] for rank in ranks[first : first + plan.degree]])
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_attend_as_one_process(tmp_path: Path) -> None:
    ranks = collect(Path(runs.__file__), tmp_path, 2, "2", "nccl")
    for grid in ("1 2", "2 1"):
        for heads, kv_heads in runs.HEADS:
            plan, wanted = plan_of(grid, runs.PACKS[1]), dense(runs.PACKS[1], heads, kv_heads)
            for what, expected in wanted.items():
                got = whole(plan, [rank[f"{grid} {heads} {kv_heads} {len(plan.lengths)}"][what] for rank in ranks])
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(37,), (5, 1, 19, 8, 3), (700, 1, 300)], ids=len)
def test_bf16_on_a_gpu_is_near_fp64_on_a_cpu(lengths: tuple[int, ...]) -> None:
    plan, device = SequencePlan(lengths, 1, 1), torch.device("cuda")
    tensors = [tensor.repeat(1, 1, 8).bfloat16() for tensor in runs.states(8, 2, plan.tokens)]  # head_dim 64
    results = []
    for where, dtype in ((torch.device("cpu"), torch.float64), (device, torch.bfloat16)):
        query, key, value, gradient = (runs.local(plan, 0, tensor).to(where, dtype) for tensor in tensors)
        for tensor in (query, key, value):
            tensor.requires_grad_()
        out = SharedSequence(plan, Topology(), where).attend(torch.nn.Identity(), query, key, value, 0.1)
        out.backward(gradient.transpose(1, 2))
        results.append([one.detach().double().cpu() for one in (out, query.grad, key.grad, value.grad)])
    for exact, rounded in zip(*results, strict=True):
        assert (exact - rounded).norm() / exact.norm() < 0.02


@pytest.mark.parametrize("lengths", runs.PACKS, ids=len)
@pytest.mark.parametrize(("heads", "kv_heads"), runs.HEADS)
@pytest.mark.parametrize("grid", GRIDS)
def test_bytes_of_attention_are_those_of_the_formula(
    ranks: list[dict[str, Any]], grid: str, heads: int, kv_heads: int, lengths: tuple[int, ...]
) -> None:
    plan = plan_of(grid, lengths)
    each = kv_heads if kv_heads % plan.ulysses == 0 else plan.ulysses
    unit = plan.padded_tokens * runs.HEAD_DIM * 8  # bytes of a head
    of_heads = (plan.ulysses - 1) / plan.ulysses * (2 * heads + 2 * each) / plan.degree * unit
    of_ring = (plan.ring - 1) / plan.ring * 2 * each / plan.ulysses * unit
    home = 2 * each / plan.ulysses * unit if plan.ring > 1 else 0
    wanted = {"heads": of_heads, "heads backward": of_heads, "ring": of_ring, "ring backward": of_ring + home}
    for rank in ranks:
        sent = rank[f"{grid} {heads} {kv_heads} {len(lengths)}"]["traffic"]
        assert sent == {what: bytes_sent for what, bytes_sent in wanted.items() if bytes_sent}


@pytest.mark.parametrize("lengths", runs.PACKS, ids=len)
@pytest.mark.parametrize("grid", GRIDS)
def test_visual_tokens_come_to_their_placeholders_and_gradients_go_back(
    ranks: list[dict[str, Any]], grid: str, lengths: tuple[int, ...]
) -> None:
    plan = plan_of(grid, lengths)
    places = [i for i in range(plan.tokens) if i % 7 not in (0, 3)]
    numbers = {place: number for number, place in enumerate(places)}
    for rank in range(runs.RANKS):
        result = ranks[rank][f"exchange {grid} {len(lengths)}"]
        held = [numbers[place] for place in plan.places(rank % plan.degree).tolist() if place in numbers]
        wanted = torch.tensor(held)[:, None] * runs.WIDTH + torch.arange(runs.WIDTH) + 1 if held else torch.empty(0, 5)
        assert torch.equal(result["got"], wanted.double())
        assert torch.equal(result["grad"], 2 * result["own"])  # of the sum of squares
        # Only what another rank holds was sent, and only its gradient came back.
        elsewhere = int((plan.owners[places] != rank % plan.degree)[_own(ranks, rank, plan, lengths)].sum())
        assert result["traffic"]["tokens"] == elsewhere * runs.WIDTH * 8


@pytest.mark.parametrize("what", ["tokens", "scatter heads", "gather heads"])
@pytest.mark.parametrize("grid", GRIDS)
def test_gradients_of_an_exchange_are_its_adjoint(ranks: list[dict[str, Any]], grid: str, what: str) -> None:
    # All that can be wrong with the gradient of a linear map: <f(x), y> = <x, f'(y)>, over all ranks together.
    forward, backward = np.array([rank[f"adjoint {grid}"][what] for rank in ranks]).sum(0)
    assert abs(forward) > 1e-3 and abs(forward - backward) < 1e-11


def _own(ranks: list[dict[str, Any]], rank: int, plan: SequencePlan, lengths: tuple[int, ...]) -> slice:
    """Which of the visual tokens a rank has encoded."""
    first = rank - rank % plan.degree
    name = f"exchange {plan.ulysses} {plan.ring} {len(lengths)}"
    counts = [len(ranks[other][name]["own"]) for other in range(first, first + plan.degree)]
    ends = list(accumulate(counts, initial=0))
    return slice(ends[rank - first], ends[rank - first + 1])


@pytest.mark.parametrize("grid", GRIDS)
def test_a_token_is_seen_by_later_ones_of_its_document_alone(ranks: list[dict[str, Any]], grid: str) -> None:
    plan = plan_of(grid, (9, 17, 6))
    both = [
        whole(plan, [rank[f"perturbed {grid}"][name] for rank in ranks[: plan.degree]]) for name in ("before", "after")
    ]
    changed = (both[0] != both[1]).any(2).all(0)  # [tokens]
    assert changed.nonzero().squeeze(1).tolist() == list(range(20, 26))


@pytest.mark.parametrize("lengths", runs.PACKS, ids=len)
def test_one_rank_attends_without_any_group(lengths: tuple[int, ...]) -> None:
    plan = SequencePlan(lengths, 1, 1)
    *states, _ = runs.states(8, 2, plan.tokens)
    query, key, value = (runs.local(plan, 0, tensor) for tensor in states)
    out = SharedSequence(plan, Topology(), torch.device("cpu")).attend(
        torch.nn.Identity(), query, key, value, runs.SCALING
    )
    got = whole(plan, [out.transpose(1, 2)])
    torch.testing.assert_close(got, dense(lengths, 8, 2)["out"], rtol=0, atol=1e-12)


def decoder(**fields: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=20, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, **fields,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def test_a_decoder_attends_as_sequence_says_and_has_its_own_attention_back_after() -> None:
    torch.manual_seed(0)
    model = decoder().double().eval()
    plan = SequencePlan((7, 12), 1, 1)
    ids = torch.randint(20, (1, plan.tokens))
    positions = torch.from_numpy(plan.positions(0))[None]
    sequence = SharedSequence(plan, Topology(), torch.device("cpu"))
    own = model.config._attn_implementation
    restarting = torch.cat([torch.arange(7), torch.arange(12)])[None]  # which packs, without a cache
    wanted = model.model(ids, position_ids=restarting, use_cache=False).last_hidden_state
    padded = plan.shard(ids, 0, 0)
    with sequence_attention(model):
        got = model.model(padded, position_ids=positions, sequence=sequence, use_cache=False).last_hidden_state
        with pytest.raises(ParallelError, match="without sequence="):
            model.model(padded, position_ids=positions, use_cache=False)
        mask = torch.zeros(1, 1, padded.shape[1], padded.shape[1], dtype=torch.float64)
        with pytest.raises(ParallelError, match="attention_mask"):
            model.model(padded, position_ids=positions, sequence=sequence, use_cache=False, attention_mask=mask)
    back = plan.unshard([got.transpose(1, 2)]).transpose(1, 2)
    torch.testing.assert_close(back, wanted, rtol=0, atol=1e-12)
    assert model.config._attn_implementation == own


def test_autocast_holds_for_attention() -> None:
    plan, model = SequencePlan((9,), 1, 1), decoder()
    seen = []

    class Watching(SharedSequence):
        def attend(self, module: Any, *states: Any) -> torch.Tensor:
            seen.extend(tensor.dtype for tensor in states[:3])
            return super().attend(module, *states)

    sequence = Watching(plan, Topology(), torch.device("cpu"))
    with sequence_attention(model), torch.autocast("cpu", torch.bfloat16):
        model.model(torch.ones(1, plan.local_tokens, dtype=torch.long), sequence=sequence, use_cache=False)
    assert set(seen) == {torch.bfloat16}


def test_dropout_and_heads_that_do_not_fit_are_refused() -> None:
    plan = SequencePlan((8,), 1, 1)
    model = decoder(attention_dropout=0.1).train()
    sequence = SharedSequence(plan, Topology(), torch.device("cpu"))
    with sequence_attention(model), pytest.raises(ParallelError, match="dropout"):
        model.model(torch.ones(1, 8, dtype=torch.long), sequence=sequence, use_cache=False)
    with pytest.raises(ParallelError, match=r"ulysses is 3, but .* 8 attention heads and 2 .*accepted: 1, 2, 4, 8"):
        sequence_attention(model, ulysses=3).__enter__()


@pytest.mark.parametrize(("world", "grid"), [(3, (2, 1)), (2, (2, 2)), (4, (0, 1))])
def test_grids_that_the_processes_do_not_fill_are_refused(world: int, grid: tuple[int, int]) -> None:
    with pytest.raises(ParallelError, match="accepted"):
        Topology(*grid, rank=0, size=world)


def test_ranks_of_a_row_are_consecutive() -> None:
    places = [
        (t.data_rank, t.ring_rank, t.ulysses_rank, t.sequence_rank)
        for t in (Topology(2, 3, rank, 12) for rank in range(12))
    ]
    assert places == [(d, r, u, 2 * r + u) for d in range(2) for r in range(3) for u in range(2)]
    assert np.array_equal([Topology(2, 3, rank, 12).first for rank in (0, 5, 6, 11)], [0, 0, 6, 6])
