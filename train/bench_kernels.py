"""`foveate bench kernels`: attention of a decode step by itself, over dense, packed and paged keys and values.

Keys and values are random. What a way moves are the bytes that it has to read: all that it holds of a layer, or the
pages that it chooses and the bounds of all of them. That is set against the time of copying so many bytes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, Literal

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..eval.facts import result
from ..kernels.packed_attention import packed_attention
from ..kernels.packing import CODES_PER_BYTE, PackedKeys, PackedStates, PackedValues, levels, pack_keys, pack_values
from ..kernels.page_attention import packed_page_attention, page_attention, page_scores
from ..vlm.pruning.costs import Decoder
from .bench_caches import BASELINES, baseline, held_bytes, quantized_backend
from .bench_prefill import SHAPES, make_model
from .timing import Times, Turns, timed

PAGE = 16  # tokens of a page of dense keys, as in Quest (2406.10774, §4.1)
COPIED_BYTES = 1 << 28  # at a time, to measure the copy bandwidth
AT_ONCE_BYTES = 1 << 31  # dense keys and values of all layers, which take turns: more than a processor's cache


@dataclass(frozen=True)
class KernelBench:
    """What `bench_kernels` measures.

    Args:
        shape: of SHAPES; its LLM's heads count.
        context: tokens of each sequence.
        batch: sequences.
        bits: of packed keys and values.
        group: tokens that share a scale of the keys.
        residual: last tokens, that are not packed.
        pages: fraction of the pages that Quest reads.
        rounds: in each of which every way has its turn, over all layers that fit.
        device, dtype: as of `PrefillBench`.

    Raises:
        ValueError: a field is out of range.
    """

    shape: str = "0.5b"
    context: int = 32768
    batch: int = 1
    bits: tuple[int, ...] = (8, 4, 2)
    group: int = 64
    residual: int = 128
    pages: float = 1 / 16
    rounds: int = 7
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"shape is {self.shape!r}; accepted: {', '.join(SHAPES)}")
        for name in ("batch", "group", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: 1 or more")
        if self.residual < 0 or self.context < self.residual + self.group:
            raise ValueError(f"context is {self.context}; accepted: residual and group together, or more")
        if unknown := set(self.bits) - {*CODES_PER_BYTE}:
            raise ValueError(f"bits are {sorted(unknown)}; accepted: {', '.join(map(str, CODES_PER_BYTE))}")
        if not 0 < self.pages <= 1:
            raise ValueError(f"pages is {self.pages}; accepted: a fraction above 0, up to 1")


class _Problem:
    """A decode step's attention in layers that have the same keys and values.

    Attributes:
        layers: how many there are.
        keys, values: [batch, kv_heads, context, head_dim].
        query: [batch, heads, 1, head_dim].
        new: key and value of the newest token, each [batch, kv_heads, 1, head_dim].
        scaling: of q·k.
    """

    def __init__(self, bench: KernelBench, device: torch.device, dtype: torch.dtype):
        self.bench, self.device, self.dtype = bench, device, dtype
        self.config = make_model(bench.shape, torch.device("meta"), dtype).config.get_text_config()
        decoder = Decoder.from_config(self.config)
        self.heads, self.kv_heads, self.head_dim = decoder.heads, decoder.kv_heads, decoder.head_dim
        self.scaling = self.head_dim**-0.5
        torch.manual_seed(0)
        self.keys, self.values = self._random(2, self.kv_heads, bench.context)
        self.query, self.new = self._random(1, self.heads, 1)[0], self._random(2, self.kv_heads, 1)
        self.layers = max(1, min(decoder.layers, AT_ONCE_BYTES // (2 * self.keys.nbytes)))

    def _random(self, count: int, heads: int, tokens: int) -> torch.Tensor:
        size = (count, self.bench.batch, heads, tokens, self.head_dim)
        return torch.randn(size, device=self.device, dtype=self.dtype)


@dataclass
class _Way:
    """A way of keeping keys and values, and attending to them.

    Attributes:
        attend: a decode step's attention in a layer of this number.
        nbytes: that it has to read in a layer.
    """

    name: str
    attend: Callable[[int], Any]
    nbytes: float


def bench_kernels(bench: KernelBench, show: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
    """Measures attention of decode steps; results as of `eval.facts.result`.

    Args:
        show: is told what is going on.
    """
    device = torch.device(bench.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, bench.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    turns = Turns(device, "attention", "us", 1e6, (*BASELINES, *LIBRARIES))
    with torch.no_grad():
        problem = _Problem(bench, device, dtype)
        ways = []
        for way in _ways(problem, show):
            show(f"{way.name}: {problem.layers} layers")
            ways.append(way)
        source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copied = _Way("copy", lambda _: target.copy_(source), 2 * COPIED_BYTES)
        for number in range(bench.rounds + 1):  # the first warms up
            show(f"round {number} of {bench.rounds}")
            for way in (*ways, copied):
                taken = timed(device, partial(_attend, way, problem.layers))
                if number:
                    turns.add(way.name, [Times(*(seconds / problem.layers for seconds in taken))])
    results = [result("copy_bandwidth", copied.nbytes / turns.seconds("copy"), "bytes/s", bench.rounds)]
    for way in ways:
        results += turns.results(way.name)
        results.append(result(f"{way.name}_bytes", way.nbytes, "bytes", 1, **_against(way, ways)))
        rates = [each.nbytes / turns.seconds(each.name, "busy") for each in (way, copied)]
        unit = "fraction of the copy bandwidth"
        results.append(result(f"{way.name}_bandwidth", rates[0] / rates[1], unit, bench.rounds))
    return results


def _attend(way: _Way, layers: int) -> None:
    for layer in range(layers):
        way.attend(layer)


def _against(way: _Way, ways: list[_Way]) -> dict[str, Any]:
    return {} if way is ways[0] else {"baseline": f"{ways[0].name}_bytes", "ratio": way.nbytes / ways[0].nbytes}


def _ways(problem: _Problem, show: Callable[[str], None]) -> Iterator[_Way]:
    bench = problem.bench
    for name in BASELINES:
        if name == "quantized" and quantized_backend() is None:
            show("quantized: left out, optimum-quanto and hqq are not installed")
        else:
            yield _baseline(problem, name)
    if problem.device.type == "cuda":
        for library, make in LIBRARIES.items():
            if find_spec(library) is None:
                show(f"{library}: left out, it is not installed")
            else:
                yield make(problem)
    yield _paged(problem)
    for bits in bench.bits:
        yield _packed(problem, bits)
        yield _packed_pages(problem, bits)


def _baseline(problem: _Problem, name: str) -> _Way:
    """A cache of transformers with its sdpa; the preallocated one is read in split columns on a GPU."""
    problem.config.num_hidden_layers = problem.layers
    cache = baseline(name, problem.config, room=2 * problem.bench.rounds + 2)  # on a GPU each round takes two steps
    for layer in range(problem.layers):
        cache.update(problem.keys, problem.values, layer)
    nbytes = held_bytes(cache) / problem.layers if name == "quantized" else 2 * problem.keys.nbytes
    module: Any = SimpleNamespace(
        num_key_value_groups=problem.heads // problem.kv_heads, is_causal=True, training=False
    )

    def attend(layer: int) -> Any:
        keys, values = cache.update(*problem.new, layer)
        return sdpa_attention_forward(module, problem.query, keys, values, None, scaling=problem.scaling)

    return _Way(name, attend, nbytes)


def _flash_attention(problem: _Problem) -> _Way:
    from flash_attn import flash_attn_with_kvcache

    query = problem.query.transpose(1, 2)
    held = [_token_major(problem) for _ in range(problem.layers)]

    def attend(layer: int) -> Any:
        return flash_attn_with_kvcache(query, *held[layer], cache_seqlens=problem.bench.context)

    return _Way("flash_attn", attend, 2 * problem.keys.nbytes)


def _flashinfer(problem: _Problem) -> _Way:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    batch, context, page = problem.bench.batch, problem.bench.context, PAGE
    pages = context // page  # of a sequence; its last tokens, less than a page, are left out
    held = [
        torch.stack(
            [states[:, : pages * page].reshape(-1, page, *states.shape[2:]) for states in _token_major(problem)], 1
        )
        for _ in range(problem.layers)
    ]  # each [pages, 2, page, kv_heads, head_dim]
    workspace = torch.empty(1 << 27, dtype=torch.uint8, device=problem.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
    numbers: dict[str, Any] = {"dtype": torch.int32, "device": problem.device}
    first = torch.arange(batch + 1, **numbers) * pages
    last = torch.full((batch,), page, **numbers)
    sizes = (problem.heads, problem.kv_heads, problem.head_dim, page)
    kinds = {"q_data_type": problem.dtype, "kv_data_type": problem.dtype}
    wrapper.plan(first, torch.arange(batch * pages, **numbers), last, *sizes, **kinds)
    query = problem.query[:, :, 0]
    return _Way("flashinfer", lambda layer: wrapper.run(query, held[layer]), held[0].nbytes)


def _token_major(problem: _Problem) -> list[torch.Tensor]:
    """Keys and values [batch, tokens, kv_heads, head_dim]."""
    return [states.transpose(1, 2).contiguous() for states in (problem.keys, problem.values)]


def _packed(problem: _Problem, bits: float) -> _Way:
    held = [_pack(problem, bits) for _ in range(problem.layers)]
    tail = _tail(problem)

    def attend(layer: int) -> Any:
        return packed_attention(problem.query, *held[layer], *tail, problem.scaling)

    return _Way(f"int{bits}", attend, sum(states.nbytes for states in tail) + sum(map(_nbytes, held[0])))


def _paged(problem: _Problem) -> _Way:
    """Quest over dense keys and values."""
    pages = problem.bench.context // PAGE
    held = []
    for _ in range(problem.layers):
        keys = problem.keys.clone()
        blocks = keys[:, :, : pages * PAGE].unflatten(2, (pages, PAGE))
        held.append((keys, problem.values.clone(), blocks.amin(3), blocks.amax(3)))
    count = max(1, round(problem.bench.pages * pages))

    def attend(layer: int) -> Any:
        keys, values, low, high = held[layer]
        chosen = page_scores(problem.query, low, high).topk(count).indices
        return page_attention(problem.query, keys, values, chosen, PAGE, pages * PAGE, problem.scaling)

    read = 2 * problem.keys[:, :, : count * PAGE].numel() * problem.keys.element_size()
    return _Way("quest", attend, read + 2 * held[0][2].nbytes)


def _packed_pages(problem: _Problem, bits: float) -> _Way:
    """Quest over packed keys and values: their blocks are the pages, whose bounds are the scales."""
    held = [_pack(problem, bits) for _ in range(problem.layers)]
    tail = _tail(problem)
    bounds = [(keys.zero, torch.add(keys.zero, keys.scale, alpha=levels(bits))) for keys, _ in held]
    pages = bounds[0][0].shape[2]
    count = max(1, round(problem.bench.pages * pages))

    def attend(layer: int) -> Any:
        chosen = page_scores(problem.query, *bounds[layer]).topk(count).indices
        return packed_page_attention(problem.query, *held[layer], *tail, chosen, problem.scaling)

    read = sum(map(_nbytes, held[0])) * count / pages + 2 * bounds[0][0].nbytes + sum(states.nbytes for states in tail)
    return _Way(f"quest_int{bits}", attend, read)


def _pack(problem: _Problem, bits: float) -> tuple[PackedKeys, PackedValues]:
    """All tokens but the residual ones, in whole groups."""
    bench = problem.bench
    packed = (bench.context - bench.residual) // bench.group * bench.group
    keys, values = (states[:, :, :packed] for states in (problem.keys, problem.values))
    return pack_keys(keys, bits, bench.group), pack_values(values, bits)


def _tail(problem: _Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """The others' keys and values."""
    bench = problem.bench
    packed = (bench.context - bench.residual) // bench.group * bench.group
    return problem.keys[:, :, packed:].contiguous(), problem.values[:, :, packed:].contiguous()


def _nbytes(states: PackedStates) -> int:
    return sum(tensor.nbytes for tensor in states.tensors)


LIBRARIES = {"flash_attn": _flash_attention, "flashinfer": _flashinfer}
