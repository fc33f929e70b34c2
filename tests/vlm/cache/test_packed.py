"""Packed stores: what they hold and read, against dense keys and values; what they take of the memory."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from foveate.kernels.packing import CODES_PER_BYTE
from foveate.vlm.cache import KVCache
from foveate.vlm.cache.akvq import AKVQConfig
from foveate.vlm.cache.base import Query, Seen
from foveate.vlm.cache.packed import Packed, PackedConfig
from foveate.vlm.cache.rotation import hadamard
from foveate.vlm.cache.vidkv import VidKVBank, VidKVConfig, hartley
from foveate.vlm.cache.zipvl import ZipVLConfig

BATCH, KV_HEADS, HEADS, HEAD_DIM = 2, 2, 4, 32
GROUP, RESIDUAL, SINK = 8, 10, 3
WINDOW: dict[str, int] = {"group": GROUP, "residual": RESIDUAL, "sink": SINK}
SCALING = 0.3

CONFIGS = {
    "int8": PackedConfig(keys=8, values=8, **WINDOW),
    "int4": PackedConfig(**WINDOW),
    "int2": PackedConfig(keys=2, values=2, **WINDOW),
    "mixed bits": PackedConfig(keys=4, values=1.58, **WINDOW),
    "rotated": PackedConfig(hadamard=True, **WINDOW),
    "keys per token": PackedConfig(keys_per="token", **WINDOW),
    "values per channel": PackedConfig(values_per="channel", **WINDOW),
    "zipvl": ZipVLConfig(tau=0.6, probes=8, **WINDOW),
    "akvq": AKVQConfig(probes=8, **WINDOW),
    "vidkv": VidKVConfig(probes=8, **WINDOW),
    "vidkv, none salient": VidKVConfig(salient=0, **WINDOW),
}
EACH = pytest.mark.parametrize("name", CONFIGS)


def states(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(BATCH, KV_HEADS, tokens, HEAD_DIM), torch.randn(BATCH, KV_HEADS, tokens, HEAD_DIM)


def brute(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention in float64."""
    keys, values = (part.double().repeat_interleave(HEADS // KV_HEADS, 1) for part in (keys, values))
    scores = query.double() @ keys.mT * SCALING
    if mask is not None:
        scores = scores.masked_fill(~mask.repeat_interleave(HEADS // mask.shape[1], 1), -torch.inf)
    return scores.softmax(-1) @ values


def query_of(tokens: int, mask: torch.Tensor | None = None) -> Query:
    asked = torch.randn(BATCH, HEADS, tokens, HEAD_DIM)
    return Query(asked, SCALING, mask, lambda keys, values: brute(asked, keys, values, mask).float())


def run(store: Packed, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A pass without its attention; gives the keys and values that it brought."""
    keys, values = states(tokens)
    store.append(keys, values)
    slots = torch.arange(store.columns).expand(BATCH, 1, -1)
    query = torch.randn(BATCH, HEADS, tokens, HEAD_DIM)
    visual = slots[:, 0] % 3 > 0
    store.settle(lambda: Seen(query, SCALING, tokens, store, slots, visual, None, 0))
    return keys, values


def filled(name: str = "int4", tokens: int = 61, **changed: Any) -> Packed:
    store = CONFIGS[name].make()
    run(store, tokens)
    return store


@EACH
@pytest.mark.parametrize("queries", [1, 5])
def test_attention_equals_that_over_what_the_codes_stand_for(name: str, queries: int) -> None:
    store = filled(name)
    for tokens in (1, 1, queries):
        run(store, tokens)
    assert 0 < store.packed < store.columns
    for heads, rows in ((None, 1), (1, 1), (KV_HEADS, queries)):
        mask = None if heads is None else torch.rand(BATCH, heads, rows, store.columns) > 0.3
        query = query_of(queries, mask)
        out = store.attend(query)
        torch.testing.assert_close(out.double(), brute(query.states, *store.dense(), mask), atol=1e-5, rtol=1e-5)


@EACH
def test_what_is_not_packed_is_exact_and_the_rest_is_near(name: str) -> None:
    store = CONFIGS[name].make(sinks=5)
    brought = [run(store, tokens) for tokens in (47, 1, 9, 1, 1)]
    keys, values = (torch.cat(parts, dim=2) for parts in zip(*brought, strict=True))
    assert store.columns == 59 and store.packed == (59 - 5 - RESIDUAL) // GROUP * GROUP == 40
    for held, given in zip(store.dense(), (keys, values), strict=True):
        exact = torch.ones(59, dtype=torch.bool)
        exact[5:45] = False
        torch.testing.assert_close(held[:, :, exact], given[:, :, exact])
        error = (held - given)[:, :, ~exact].square().mean() / given.square().mean()
        assert error < {"int8": 1e-4, "int4": 0.02, "rotated": 0.02}.get(name, 0.6)
    for start, stop in ((0, 59), (2, 4), (3, 20), (13, 14), (40, 59), (50, 58)):
        for part, whole in zip(store.dense(start, stop), store.dense(), strict=True):
            torch.testing.assert_close(part, whole[:, :, start:stop])


def test_the_tail_holds_the_residual_and_less_than_a_group_more() -> None:
    store = PackedConfig(**WINDOW).make()
    for tokens in range(1, 80):
        run(store, 1)
        assert store.columns == tokens
        tail = store.columns - store.packed - SINK
        assert store.packed % GROUP == 0 and (store.packed == 0 or RESIDUAL <= tail < RESIDUAL + GROUP)
    assert store.packed == 64


@EACH
def test_selected_columns_are_those_that_were_there(name: str) -> None:
    """Each head keeps columns of its own, some of the sinks and of the tail among them."""
    store = filled(name)
    before = store.dense()
    index = torch.stack([torch.randperm(61)[:40].sort().values for _ in range(BATCH * KV_HEADS)])
    index = index.view(BATCH, KV_HEADS, -1)
    store.select(index)
    assert store.columns == 40
    for held, was in zip(store.dense(), before, strict=True):
        expected = was.gather(2, index[..., None].expand(-1, -1, -1, HEAD_DIM))
        error = (held - expected).square().mean() / expected.square().mean()
        assert error < {"int8": 1e-4, "int4": 0.02, "rotated": 0.02}.get(name, 0.5)
    query = query_of(1)
    torch.testing.assert_close(store.attend(query).double(), brute(query.states, *store.dense()), atol=1e-5, rtol=1e-5)
    run(store, 3)
    assert store.columns == 43


@EACH
def test_groups_that_stay_whole_are_copied_exactly(name: str) -> None:
    store = filled(name)
    before = store.dense()
    index = torch.cat([torch.arange(SINK + GROUP, SINK + 2 * GROUP), torch.arange(SINK + 4 * GROUP, 61)])
    store.select(index.expand(BATCH, 1, -1), start=SINK)
    for held, was in zip(store.dense(), before, strict=True):
        expected = torch.cat([was[:, :, :SINK], was[:, :, index]], dim=2)
        if name in ("zipvl", "akvq", "vidkv"):  # whose groups are of salient tokens, or of others
            error = (held - expected).square().mean() / expected.square().mean()
            assert error < 0.5
        else:
            assert torch.equal(held, expected)


def test_groups_that_shift_are_packed_anew() -> None:
    store = filled("int8")
    before = store.dense()
    store.select(torch.arange(SINK + 3, 61).expand(BATCH, 1, -1), start=SINK)
    for held, was in zip(store.dense(), before, strict=True):
        torch.testing.assert_close(held, torch.cat([was[:, :, :SINK], was[:, :, SINK + 3 :]], dim=2), atol=0.02, rtol=0)


def test_values_per_token_stay_as_they_are_when_columns_go() -> None:
    store = filled("int2")
    _, before = store.dense()
    index = torch.arange(0, 61, 2).expand(BATCH, 1, -1)
    store.select(index)
    packed = slice(store.sinks, store.packed_end)
    assert torch.equal(store.dense()[1][:, :, packed], before[:, :, ::2][:, :, packed])


def test_a_prompt_is_selected_from_before_it_is_packed() -> None:
    store = PackedConfig(**WINDOW).make()
    keys, values = states(50)
    store.append(keys, values)
    index = torch.stack([torch.randperm(50)[:20].sort().values for _ in range(BATCH * KV_HEADS)])
    index = index.view(BATCH, KV_HEADS, -1)
    store.select(index)
    for held, given in zip(store.dense(), (keys, values), strict=True):
        assert torch.equal(held, given.gather(2, index[..., None].expand(-1, -1, -1, HEAD_DIM)))


@pytest.mark.parametrize("name", ["int4", "rotated"])
def test_sinks_and_the_tail_can_be_replaced_and_the_packed_cannot(name: str) -> None:
    store = filled(name)
    for start, stop in ((0, SINK), (1, 2), (55, 60)):
        keys, values = states(stop - start)
        store.replace(start, keys, values)
        torch.testing.assert_close(store.dense(start, stop), (keys, values))
    with pytest.raises(ValueError, match="columns 20 to 22 are to be replaced, but 3 to 51 are packed"):
        store.replace(20, *states(2))
    fresh = CONFIGS[name].make()
    keys, values = states(40)
    kept = keys.clone()
    fresh.append(keys, values)
    fresh.replace(4, *states(3))
    assert torch.equal(keys, kept)  # the model's own are not written into


def test_the_tail_can_be_cropped() -> None:
    store = filled()
    before = store.dense()
    assert store.croppable == 61 - store.packed - SINK == 10
    store.crop(4)
    assert store.columns == 57
    for held, was in zip(store.dense(), before, strict=True):
        assert torch.equal(held, was[:, :, :57])
    keys, _ = run(store, 2)
    assert torch.equal(store.dense()[0][:, :, 57:], keys)


@EACH
def test_rows_follow_beams(name: str) -> None:
    store = filled(name)
    before = store.dense()
    index = torch.tensor([1, 1, 0])
    store.rows(index)
    for held, was in zip(store.dense(), before, strict=True):
        assert torch.equal(held, was[index])


# What it is for.


def bytes_of_bank(store: Packed) -> int:
    """Bytes allocated for what is packed, from the storages themselves."""
    return sum(
        {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in store.bank.tensors}.values()
    )


@pytest.mark.parametrize(("bits", "ratio"), [(8, 1.85), (4, 3.6), (2, 6.5)])
def test_memory_is_a_fraction_of_bfloat16s(bits: int, ratio: float) -> None:
    """After the prompt, and all the while that tokens are added, the buffers' spare room counted."""
    store = PackedConfig(keys=bits, values=bits, residual=64).make()
    for tokens in (8192 + 64, *(64,) * 20):
        keys = torch.randn(1, 1, tokens, 128, dtype=torch.bfloat16)
        store.append(keys, keys)
        store.settle(lambda: pytest.fail("nothing is rated"))
        assert 2 * 2 * 128 * store.packed / bytes_of_bank(store) >= ratio
    assert store.packed == 8192 + 64 * 20
    tail = 2 * 2 * 128 * (64 + 64)
    assert store.nbytes == bytes_of_bank(store) + tail


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation allocates."""

    nbytes = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else (result,):
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in given:
                self.nbytes = max(self.nbytes, made.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize(
    "config",
    [PackedConfig(residual=64), PackedConfig(residual=64, hadamard=True), ZipVLConfig(residual=64), VidKVConfig()],
)
def test_decode_never_makes_a_dequantised_copy(config: Any) -> None:
    """A step's largest tensor is a block of it, or a buffer of codes that grows: keys or values alone take 4 MiB."""
    store = config.make()
    keys = torch.randn(1, 2, 8192 + 63, 128, dtype=torch.bfloat16)
    store.append(keys, keys)
    slots = torch.arange(store.columns)[None, None]
    prompt = torch.randn(1, 4, 64, 128, dtype=torch.bfloat16)
    store.settle(lambda: Seen(prompt, SCALING, 64, store, slots, None, None, 0))
    asked = torch.randn(1, 4, 1, 128, dtype=torch.bfloat16)
    with Largest() as largest:
        for _ in range(2):
            store.append(keys[:, :, :1], keys[:, :, :1])
            store.attend(Query(asked, SCALING, None, lambda *_: pytest.fail("the cache as it was")))
            store.settle(lambda: Seen(asked, SCALING, 1, store, slots, None, None, 0))
    assert 0 < largest.nbytes <= keys.nbytes / 1.9


def outlier_keys(tokens: int) -> torch.Tensor:
    """Keys with a few channels far from zero, as those of Qwen2.5 have them."""
    keys = torch.randn(BATCH, KV_HEADS, tokens, HEAD_DIM)
    keys[..., [3, 19]] += torch.tensor([60.0, -90.0])
    return keys


def error_of_attention(config: PackedConfig, keys: torch.Tensor, values: torch.Tensor, query: torch.Tensor) -> float:
    store = config.make()
    store.append(keys, values)
    store.settle(lambda: pytest.fail("nothing is rated"))
    out = store.attend(Query(query, SCALING, None, lambda *_: pytest.fail("nothing is packed")))
    expected = brute(query, keys, values)
    return float((out - expected).square().mean() / expected.square().mean())


@pytest.mark.parametrize(("bits", "factor"), [(4, 5), (2, 2)])
def test_keys_per_channel_beat_keys_per_token_on_outlier_keys(bits: int, factor: int) -> None:
    keys, values, query = outlier_keys(256), states(256)[1], torch.randn(BATCH, HEADS, 1, HEAD_DIM)
    per_channel = PackedConfig(keys=bits, values=8, group=64, residual=0)
    per_token = PackedConfig(keys=bits, values=8, group=64, residual=0, keys_per="token")
    channel, token = (error_of_attention(config, keys, values, query) for config in (per_channel, per_token))
    assert channel < token / factor
    plain = states(256)[0]  # without outliers the channels are alike, and so are the errors
    channel, token = (error_of_attention(config, plain, values, query) for config in (per_channel, per_token))
    assert token / 5 < channel < token * 5


def test_a_rotation_helps_keys_per_token_where_channels_have_outliers() -> None:
    keys, values = states(256)
    keys[..., [3, 19]] += torch.tensor([10.0, -15.0])
    error = {}
    for hadamard_rotation in (False, True):
        store = PackedConfig(residual=0, keys_per="token", hadamard=hadamard_rotation).make()
        store.append(keys, values)
        store.settle(lambda: pytest.fail("nothing is rated"))
        error[hadamard_rotation] = float((store.dense()[0] - keys).square().mean())
    assert error[True] < error[False] / 2


def test_the_rotation_is_a_hadamard_matrix() -> None:
    matrix = hadamard(64, torch.float64, torch.device("cpu"))
    assert (matrix.abs() == 64**-0.5).all()
    torch.testing.assert_close(matrix @ matrix, torch.eye(64, dtype=torch.float64))
    with pytest.raises(ValueError, match="head_dim is 48; accepted for a Hadamard rotation: a power of two"):
        hadamard(48, torch.float64, torch.device("cpu"))


# Quest's pages.


def test_pages_are_the_groups_of_packed_keys() -> None:
    store = filled()
    low, high = store.page_bounds()
    keys = store.dense(store.paged_from, store.packed_end)[0].unflatten(2, (-1, store.page))
    assert low.shape == (BATCH, KV_HEADS, store.packed // GROUP, HEAD_DIM)
    assert (low[:, :, :, None] <= keys + 2e-3).all() and (keys <= high[:, :, :, None] + 2e-3).all()
    mask = torch.rand(BATCH, 1, 1, store.columns) > 0.3
    query = query_of(1, mask)
    pages = torch.tensor([[[0, 3], [1, 5]], [[2, 4], [0, 1]]])
    read = torch.ones(BATCH, KV_HEADS, 1, store.columns, dtype=torch.bool)
    read[..., store.paged_from : store.packed_end] = False
    for row in range(BATCH):
        for head in range(KV_HEADS):
            for page in pages[row, head].tolist():
                start = store.paged_from + page * store.page
                read[row, head, 0, start : start + store.page] = True
    expected = brute(query.states, *store.dense(), mask & read)
    torch.testing.assert_close(store.attend_pages(query, pages).double(), expected, atol=1e-5, rtol=1e-5)
    empty = filled(tokens=12)
    assert empty.page_bounds()[0].shape == (BATCH, KV_HEADS, 0, HEAD_DIM)


# Mixed precision.


def errors(store: Packed, keys: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each packed column's keys, [batch, packed]."""
    return (store.dense()[0] - keys).square().mean((1, 3))[:, store.sinks : store.packed_end]


def test_zipvl_keeps_as_many_tokens_in_more_bits_as_hold_tau_of_the_attention() -> None:
    config = ZipVLConfig(high=8, low=2, tau=0.9, probes=4, **WINDOW)
    store = config.make()
    keys, values = states(61)
    keys[0, :, 7:13] *= 6  # which makes some of them salient
    query = torch.randn(BATCH, HEADS, 61, HEAD_DIM)
    store.append(keys, values)
    slots = torch.arange(61).expand(BATCH, 1, -1)
    seen = Seen(query, 1.0, 61, store, slots, None, None, 0)
    rating = config.rate(seen)
    for row in range(BATCH):
        received, seen_by = torch.zeros(61, dtype=torch.float64), torch.zeros(61)
        for head in range(HEADS):
            for probe in range(57, 61):
                scores = keys[row, head // 2, : probe + 1].double() @ query[row, head, probe].double()
                received[: probe + 1] += scores.softmax(0)
        for probe in range(57, 61):
            seen_by[: probe + 1] += 1
        count = 1
        while received.sort(descending=True).values[:count].sum() < 0.9 * received.sum():
            count += 1
        expected = (received / seen_by).argsort(descending=True)[:count].sort().values
        assert rating.salient[row, 0].nonzero()[:, 0].tolist() == expected.tolist()
        torch.testing.assert_close(rating.scores[row, 0].double(), received / seen_by / HEADS, atol=1e-6, rtol=1e-4)
    store.settle(lambda: seen)
    salient = rating.salient[:, 0, SINK : SINK + store.packed]
    error = errors(store, keys) / keys[:, :, SINK : SINK + store.packed].square().mean((1, 3))
    assert error[salient].max() < 1e-3 < error.median()
    assert (error < 1e-3).sum(1).tolist() == [-(-int(salient.sum(1).max()) // GROUP) * GROUP] * BATCH


def test_akvq_keeps_text_and_pivots_in_more_bits() -> None:
    config = AKVQConfig(high=8, low=2, pivots=0.05, probes=4, **WINDOW)
    store = config.make()
    visual = torch.zeros(BATCH, 61, dtype=torch.bool)
    visual[:, 9:43] = True
    keys, values = states(61)
    keys[:, :, 30] *= 8
    query = keys[:, :, 30:31].repeat_interleave(HEADS // KV_HEADS, 1).expand(-1, -1, 61, -1)  # all look at token 30
    store.append(keys, values)
    slots = torch.arange(61).expand(BATCH, 1, -1)
    seen = Seen(query, SCALING, 61, store, slots, visual, None, 0)
    rating = config.rate(seen)
    salient = rating.salient[:, 0]
    assert salient[:, 30].all() and salient[~visual].all() and int(salient[visual].sum()) <= 3 * BATCH
    assert config.needs_visual and config.hadamard
    with pytest.raises(ValueError, match="nobody told which tokens are visual, as akvq-vl must know"):
        config.rate(replace(seen, visual=None))
    store.settle(lambda: seen)
    error = errors(store, keys) / keys[:, :, SINK : SINK + store.packed].square().mean((1, 3))
    assert error[salient[:, SINK : SINK + store.packed]].max() < 1e-3 < error.median()


def test_what_stays_full_gets_more_bits_where_it_is_packed_by_a_selection() -> None:
    """Sinks that only some heads drop are packed with the rest, in a bank that had no tokens so far."""
    store = AKVQConfig(high=8, low=2, pivots=0, probes=4, **WINDOW).make()
    keys, values = states(61)
    slots, visual = torch.arange(61).expand(BATCH, 1, -1), torch.ones(BATCH, 61, dtype=torch.bool)
    store.append(keys, values)
    query = torch.randn(BATCH, HEADS, 61, HEAD_DIM)
    store.settle(lambda: Seen(query, SCALING, 61, store, slots, visual, None, 0))
    assert [bank.tokens for bank in store.bank.banks] == [0, store.packed]  # type: ignore[attr-defined]
    index = torch.arange(61).expand(BATCH, KV_HEADS, -1).clone()[:, :, 1:]
    index[0, 0] = torch.arange(60)
    store.select(index)
    assert [bank.tokens for bank in store.bank.banks] == [GROUP, store.packed - GROUP]  # type: ignore[attr-defined]
    held = store.dense()[0]
    for row, head, place, column in ((0, 0, 2, 2), (1, 1, 50, 51)):
        torch.testing.assert_close(held[row, head, place], keys[row, head, column], atol=0.05, rtol=0.05)


def test_generated_tokens_have_more_bits() -> None:
    store = ZipVLConfig(high=8, low=1, tau=0.2, probes=4, **WINDOW).make()
    brought = [run(store, tokens)[0] for tokens in (61, *(1,) * 30)]
    error = errors(store, torch.cat(brought, dim=2))
    assert store.packed == 72 and error[:, 58:].max() < 1e-3 < error[:, :48].median()


def test_vidkv_gives_anomalous_channels_two_bits_and_the_others_one_after_a_fourier_transform() -> None:
    store = VidKVConfig(salient=0, anomalous=0.25, group=GROUP, residual=0).make()
    keys, values = states(40)
    keys[:, 0, :, 4:12] *= 10
    keys[:, 1, :, 16:24] *= 10
    store.append(keys, values)
    store.settle(lambda: pytest.fail("nothing is rated"))
    assert isinstance(store.bank, VidKVBank) and store.bank.order is not None
    assert store.bank.order[0, 0, :8].sort().values.tolist() == list(range(4, 12))
    assert store.bank.order[1, 1, :8].sort().values.tolist() == list(range(16, 24))
    two, one, ternary = store.bank.parts
    assert [part.bits for part in (two, one, ternary)] == [2, 1, 1.58]
    assert [part.codes.shape[3] for part in (two, one, ternary)] == [8 // 4, 24 // 8, -(-32 // 5)]
    held = store.dense()[0]
    kept = (held - keys)[:, 0, :, 4:12].square().mean() / keys[:, 0, :, 4:12].square().mean()
    assert kept < 0.2
    size = 24
    fourier = torch.fft.fft(torch.eye(size, dtype=torch.float64), norm="ortho")
    matrix = hartley(size, torch.float64, torch.device("cpu"))
    torch.testing.assert_close(matrix, fourier.real - fourier.imag)
    torch.testing.assert_close(matrix @ matrix, torch.eye(size, dtype=torch.float64))


def test_vidkv_packs_values_of_salient_tokens_in_two_bits() -> None:
    store = filled("vidkv", tokens=200)
    bits = [[part.bits for part in bank.parts] for bank in store.bank.banks]  # type: ignore[attr-defined]
    assert bits == [[2, 1, 2], [2, 1, 1.58]]
    salient, others = (bank.tokens for bank in store.bank.banks)  # type: ignore[attr-defined]
    assert salient + others == store.packed and 0.1 < salient / store.packed < 0.3


# In a model.


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, eos_token_id=None,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("text", "most"),
    [
        ("int8", 1e-3), ("int4", 0.1), ("int8:hadamard=true", 1e-3), ("int2", 2.0), ("zipvl:high=8,low=8", 1e-3),
        ("zipvl:tau=0.5", 2.0), ("vidkv", 2.0), ("quest:keep=1+int8", 1e-3),
    ],
)  # fmt: skip
def test_a_model_reads_nearly_the_same_over_two_turns(model: PreTrainedModel, text: str, most: float) -> None:
    """The divergence of its next words from those with a DynamicCache, of rows of which one is padded."""
    store = text.rpartition("+")[2]
    ids = torch.randint(0, 50, (2, 70))
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    window = "group=8,residual=8"
    caches = (KVCache(model, text + ("," if ":" in store else ":") + window), DynamicCache(config=model.config))
    for start, stop in ((0, 40), *((place, place + 1) for place in range(40, 50)), (50, 70)):
        ours, theirs = (
            model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
            .logits[:, -1]
            .log_softmax(-1)
            for cache in caches
        )
        assert float((theirs.exp() * (theirs - ours)).sum(-1).max()) < most
    held = caches[0].layers[1].store
    assert held.columns == 70 and held.packed == 56


def test_beams_reorder_packed_tokens(model: PreTrainedModel) -> None:
    ids = torch.randint(0, 50, (2, 40))
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    made = [
        model.generate(ids, past_key_values=cache, **options)
        for cache in (KVCache(model, "int8:group=4,residual=0"), DynamicCache(config=model.config))
    ]
    assert torch.equal(made[0].sequences, made[1].sequences)
    torch.testing.assert_close(made[0].sequences_scores, made[1].sequences_scores, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: PackedConfig(keys=3), f"keys is 3; accepted: {', '.join(map(str, CODES_PER_BYTE))} bits"),
        (lambda: PackedConfig(group=0), "group is 0; accepted: at least 1"),
        (lambda: PackedConfig(residual=-1), "residual is -1; accepted: at least 0"),
        (lambda: PackedConfig(sink=-1), "sink is -1; accepted: at least 0"),
        (lambda: ZipVLConfig(tau=1.5), "tau is 1.5; accepted: a fraction from 0 to 1"),
        (lambda: ZipVLConfig(low=5), "low is 5; accepted: "),
        (lambda: AKVQConfig(pivots=-0.1), "pivots is -0.1; accepted: a fraction from 0 to 1"),
        (lambda: VidKVConfig(probes=0), "probes is 0; accepted: at least 1"),
        (lambda: VidKVConfig(anomalous=2), "anomalous is 2; accepted: a fraction from 0 to 1"),
    ],
)
def test_settings_out_of_range_say_what_is_accepted(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
