"""`foveate bench decode`: decode steps of a whole model with each KV cache, against those of transformers.

Shapes are real; weights, keys and values are random, so no prompt is processed: each cache takes keys and values of
all its tokens at once, as after a prefill.
"""

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, Literal

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..eval.facts import result
from ..vlm.cache import KVCache, parse_kv
from ..vlm.decoder import attention_config, decoder_of
from ..vlm.pruning.costs import Decoder
from .bench import peak_memory
from .bench_caches import BASELINES, baseline, held_bytes, quantized_backend
from .bench_prefill import SHAPES, make_model
from .timing import Times, Turns, timed

NO_ATTENTION = "foveate_bench_no_attention"
STEP = "foveate_bench_step"
WARM_UP = 2  # steps of each turn


@dataclass(frozen=True)
class DecodeBench:
    """What `bench_decode` measures.

    Args:
        shape: of SHAPES.
        context: tokens of each sequence before the first step.
        batch: sequences.
        kv: caches, as `parse_kv` takes them.
        rounds: in each of which every cache has its turn: it is filled, and decodes.
        steps: of a turn that are timed.
        device: `cpu` or `cuda`; where there is one, cuda when None.
        dtype: float32 on a CPU and bfloat16 on a GPU when None.

    Raises:
        ValueError: a field is out of range.
    """

    shape: str = "0.5b"
    context: int = 32768
    batch: int = 1
    kv: tuple[str, ...] = ("int8", "int4", "int2")
    rounds: int = 5
    steps: int = 8
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"shape is {self.shape!r}; accepted: {', '.join(SHAPES)}")
        for name in ("context", "batch", "rounds", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: 1 or more")
        for text in self.kv:
            parse_kv(text)


def bench_decode(bench: DecodeBench, show: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
    """Measures decode steps and memory; results as of `eval.facts.result`.

    A cache for which there is too little memory on a GPU is left out.

    Args:
        show: is told what is going on.
    """
    device = torch.device(bench.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, bench.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    show(f"making the {bench.shape} model")
    model = make_model(bench.shape, device, dtype)
    room = 2 * (WARM_UP + bench.steps)  # on a GPU each step is taken twice
    makes: dict[str, Callable[[], Any]] = {name: partial(baseline, name, model.config, room) for name in BASELINES}
    if quantized_backend() is None:
        show("quantized: left out, optimum-quanto and hqq are not installed")
        del makes["quantized"]
    makes |= {text: partial(KVCache, model, text) for text in bench.kv}

    turns = Turns(device, "decode", "ms/step", 1e3, BASELINES)
    memory: dict[str, tuple[int, int]] = {}
    with torch.no_grad():
        for number in range(1, bench.rounds + 1):
            for way, make in list(makes.items()):
                show(f"round {number} of {bench.rounds}: {way}")
                try:
                    if way not in memory:
                        memory[way] = _memory(bench, model, make())
                    turns.add(way, _turn(bench, model, make()))
                except torch.OutOfMemoryError:
                    show(f"{way}: left out, it needs more memory than the device has")
                    del makes[way]
                gc.collect()
    results = [result("weights", sum(parameter.nbytes for parameter in model.parameters()), "bytes", 1)]
    for way in makes:
        results += turns.results(way)
        results += _memory_results(bench, model, way, memory)
    return results


def _turn(bench: DecodeBench, model: Any, cache: Any) -> list[Times]:
    """Fills a cache and decodes."""
    _fill(bench, model, cache)
    step = partial(_step, bench, model, cache)
    for _ in range(WARM_UP):
        step()
    return [timed(model.device, step) for _ in range(bench.steps)]


def _memory(bench: DecodeBench, model: Any, cache: Any) -> tuple[int, int]:
    """Bytes that a cache holds, and that a step takes besides, at most."""
    step = partial(_step, bench, model, cache)
    if model.device.type == "cuda":
        _fill(bench, model, cache)
        step()
        before = torch.cuda.memory_allocated(model.device)
        peak = peak_memory(model.device, step)
        if peak is None:
            raise torch.OutOfMemoryError
        besides = peak - before
    else:  # followed from the start, so that what a step frees is known
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            _fill(bench, model, cache)
            step()
            with torch.profiler.record_function(STEP):
                step()
        besides = _most_in_step(profile)
    return cache.nbytes if isinstance(cache, KVCache) else held_bytes(cache), besides


def _most_in_step(profile: Any) -> int:
    """Bytes by which what is allocated grows at most since the step began."""
    events = profile.profiler.kineto_results.events()
    began = next(event.start_ns() for event in events if event.name() == STEP)
    changes = [event for event in events if event.name() == "[memory]" and event.start_ns() >= began]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in changes))


def _fill(bench: DecodeBench, model: Any, cache: Any) -> None:
    """A prefill of random keys and values, whose attention is not computed."""
    decoder, sizes = decoder_of(model), Decoder.from_config(model.config)
    config = attention_config(decoder)
    ALL_ATTENTION_FUNCTIONS.register(NO_ATTENTION, _no_attention)
    options = {"device": model.device, "dtype": model.dtype}
    query = torch.randn(bench.batch, sizes.heads, 1, sizes.head_dim, **options).expand(-1, -1, bench.context, -1)
    own, config._attn_implementation = config._attn_implementation, NO_ATTENTION
    try:
        for number, layer in enumerate(decoder.layers):
            size = (2, bench.batch, sizes.kv_heads, bench.context, sizes.head_dim)
            keys, values = cache.update(*torch.randn(size, **options), number)
            if not isinstance(keys, torch.Tensor):  # ours evicts and packs after the attention
                attention = ALL_ATTENTION_FUNCTIONS[config._attn_implementation]
                attention(layer.self_attn, query, keys, values, None, scaling=sizes.head_dim**-0.5)
    finally:
        config._attn_implementation = own


def _no_attention(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    return query.transpose(1, 2), None


def _step(bench: DecodeBench, model: Any, cache: Any) -> None:
    place = cache.get_seq_length()
    ids = torch.full((bench.batch, 1), 10 + place % 1000, device=model.device)
    model(input_ids=ids, position_ids=torch.full_like(ids, place), past_key_values=cache, use_cache=True)


def _memory_results(
    bench: DecodeBench, model: Any, way: str, memory: dict[str, tuple[int, int]]
) -> list[dict[str, Any]]:
    """Bytes that are held, and for how many tokens the device has memory, all sequences together."""
    held, besides = memory[way]
    against: dict[str, Any] = {}
    if way != "dynamic" and "dynamic" in memory:
        against = {"baseline": "dynamic_kv", "ratio": held / memory["dynamic"][0]}
    if model.device.type == "cuda":
        device_bytes = torch.cuda.get_device_properties(model.device).total_memory
    else:
        device_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = device_bytes - sum(parameter.nbytes for parameter in model.parameters())
    tokens = bench.batch * bench.context
    return [
        result(f"{way}_kv", held, "bytes", 1, **against),
        result(f"{way}_step_memory", besides, "bytes", 1),
        result(f"{way}_largest", int(free * tokens / (held + besides)), "tokens in the device's memory", 1),
    ]
