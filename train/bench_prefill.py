"""`foveate bench prefill`: prefill, decode and memory of models that drop visual tokens, against unpruned.

Shapes are real, weights random. The LLM gets embeddings of text and visual tokens that were made before, and methods
inside the LLM are compared; or prefill begins with pixels and the vision tower (`tower`), for methods before the LLM
too. Everything takes turns: unpruned and each method once in each round, a decode step with each KV cache after the
other.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    DynamicCache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from ..eval.facts import result
from ..vlm.config import FoveateConfig
from ..vlm.model import FoveateForConditionalGeneration
from ..vlm.pruning import Reduction, reduce
from ..vlm.pruning.base import Prefill, Pruner
from ..vlm.pruning.costs import Decoder, kv_bytes, summary
from ..vlm.pruning.parse import parse_method
from .bench import IMAGE_ID, now, peak_memory
from .bench import SHAPES as FOVEATE_SHAPES

SHAPES = ("tiny", "0.5b", "llava-1.5-7b", "nvila-8b", "qwen2.5-vl-7b")
METHODS = ("fastv:layer=2,keep=0.5", "fastv:layer=2,keep=0.25", "fastv:layer=2,keep=0.1")
BEFORE = 35  # text tokens before the visual ones, about LLaVA-1.5's system prompt; the others follow
WARM_UP = 3  # decode steps
TOKENS_PER_IMAGE = {"tiny": 4, "0.5b": 144, "llava-1.5-7b": 576, "nvila-8b": 121}  # where `tower` can be asked for


@dataclass(frozen=True)
class PrefillBench:
    """What `bench_prefill` measures.

    Args:
        shape: of SHAPES.
        visual: visual tokens of the prompt; each number is measured by itself.
        text: its text tokens.
        methods: as `parse_method` takes them; inside the LLM unless `tower`.
        tower: prefill begins with the pixels of images, each of TOKENS_PER_IMAGE visual tokens.
        rounds: in each of which everything has its turn.
        steps: of decoding, timed after WARM_UP others; 0: decoding is not measured.
        device: `cpu` or `cuda`; where there is one, cuda when None.
        dtype: float32 on a CPU and bfloat16 on a GPU when None.
        attention: of the LLM.

    Raises:
        ValueError: a field is out of range, or a method acts before the LLM and the tower does not run.
    """

    shape: str = "0.5b"
    visual: tuple[int, ...] = (2880,)
    text: int = 60
    methods: tuple[str, ...] = METHODS
    tower: bool = False
    rounds: int = 5
    steps: int = 32
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    attention: str = "sdpa"

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"shape is {self.shape!r}; accepted: {', '.join(SHAPES)}")
        if not self.visual or min(self.visual) < 1:
            raise ValueError(f"visual is {self.visual}; accepted: one or more numbers of at least 1")
        if self.text <= BEFORE:
            raise ValueError(f"text is {self.text}; accepted: more than {BEFORE}")
        for name in ("rounds", "steps"):
            if getattr(self, name) < (name == "rounds"):
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: {int(name == 'rounds')} or more")
        if self.tower:
            if self.shape not in TOKENS_PER_IMAGE:
                raise ValueError(f"tower with shape {self.shape!r}; accepted: {', '.join(TOKENS_PER_IMAGE)}")
            if any(count % TOKENS_PER_IMAGE[self.shape] for count in self.visual):
                raise ValueError(
                    f"visual is {self.visual}; accepted with tower: multiples of {TOKENS_PER_IMAGE[self.shape]}, the "
                    "visual tokens of an image"
                )
        for text in self.methods:
            method = parse_method(text)
            if not self.tower and not isinstance(method, Pruner):
                raise ValueError(
                    f"method {text!r} acts before the LLM, whose inputs are made beforehand; accepted: methods inside "
                    "the LLM, or tower too"
                )


@dataclass
class _Way:
    """Unpruned, or a method."""

    name: str
    reduction: Reduction | None = None
    times: list["_Times"] = field(default_factory=list)  # of prefills
    cache: Any = None  # KV cache of the last prefill

    def session(self) -> AbstractContextManager[Any]:
        return self.reduction or nullcontext()


class _Times(NamedTuple):
    """Seconds that something took: by the clock, and of the process on all its CPUs."""

    wall: float
    cpu: float


def bench_prefill(bench: PrefillBench, show: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
    """Measures prefill and decode; results as of `eval.facts.result`.

    On a CPU there are times of the clock and of the process's CPU seconds, which others on the machine don't disturb.

    Args:
        show: is told what is going on.
    """
    device = torch.device(bench.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, bench.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    show(f"making the {bench.shape} model")
    model = make_model(bench.shape, device, dtype, bench.attention, bench.tower)
    results = []
    with torch.no_grad():
        for visual in bench.visual:
            mask = None if bench.tower else _mask(bench, visual)
            ways = [_Way(text, reduce(model, parse_method(text), visual_mask=mask)) for text in bench.methods]
            ways = [_Way("unpruned"), *ways]
            prefix = f"{visual}_" if len(bench.visual) > 1 else ""
            results += _prefills(bench, model, visual, ways, prefix, show)
            results += _memory(bench, model, visual, ways, prefix, show)
            if bench.steps:
                show(f"decoding after {visual} visual tokens")
                results += _decoding(bench, model, visual, ways, prefix)
    return results


def make_model(
    shape: str, device: torch.device, dtype: torch.dtype, attention: str = "sdpa", tower: bool = False
) -> Any:
    """A model of a shape with random weights, in eval mode; without `tower` its vision tower is a tiny one."""
    torch.manual_seed(0)
    with torch.device(device):
        model = _build(shape, {"dtype": dtype, "attn_implementation": {"text_config": attention}}, tower)
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)


def _build(shape: str, options: dict[str, Any], tower: bool) -> Any:
    tiny: dict[str, Any] = FOVEATE_SHAPES["tiny"]["vision_config"]
    if shape == "llava-1.5-7b":  # the defaults of LlavaConfig
        vision = None if tower else tiny | {"model_type": "clip_vision_model"}
        llava = LlavaConfig(vision_config=vision, image_token_index=IMAGE_ID)
        return LlavaForConditionalGeneration._from_config(llava, **options)
    if shape == "qwen2.5-vl-7b":
        text = FOVEATE_SHAPES["8b"]["text_config"] | {
            "model_type": "qwen2_5_vl_text",
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        }
        vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 1}
        vision["out_hidden_size"] = text["hidden_size"]
        qwen = Qwen2_5_VLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_ID)
        return Qwen2_5_VLForConditionalGeneration._from_config(qwen, **options)
    fields = FOVEATE_SHAPES["8b" if shape == "nvila-8b" else shape]
    text = fields["text_config"] | ({"num_hidden_layers": 4} if shape == "tiny" else {})
    vision = fields["vision_config"] if tower else tiny
    config = FoveateConfig(vision, text, projector=fields["projector"], image_token_id=IMAGE_ID, video_token_id=2)
    return FoveateForConditionalGeneration._from_config(config, **options)


def _mask(bench: PrefillBench, visual: int) -> torch.Tensor:
    """Which tokens of the prompt are visual, bool [1, tokens]."""
    tokens = torch.arange(bench.text + visual)
    return ((tokens >= BEFORE) & (tokens < BEFORE + visual))[None]


def _prompt(bench: PrefillBench, model: Any, visual: int) -> dict[str, torch.Tensor]:
    embeddings = model.get_input_embeddings()
    size = (1, bench.text + visual)
    ids = torch.randint(10, embeddings.num_embeddings, size, device=model.device)
    mask = torch.ones(size, dtype=torch.long, device=model.device)
    if not bench.tower:
        return {"inputs_embeds": embeddings(ids), "attention_mask": mask}
    ids[_mask(bench, visual).to(ids.device)] = IMAGE_ID
    pixels = _pixels(model, visual // TOKENS_PER_IMAGE[bench.shape])
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def _pixels(model: Any, images: int) -> torch.Tensor:
    side = model.config.vision_config.image_size
    return torch.randn(images, 3, side, side, device=model.device, dtype=model.dtype)


def _tower_flops(model: Any) -> float:
    """Operations of an image's vision tower and projector, matrix products alone."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.get_image_features(pixel_values=_pixels(model, 1))
    return counter.get_total_flops()


def _prefill(model: Any, prompt: dict[str, torch.Tensor]) -> DynamicCache:
    cache = DynamicCache(config=model.config.get_text_config())
    model(**prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def _prefills(
    bench: PrefillBench, model: Any, visual: int, ways: list[_Way], prefix: str, show: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Time to the first token's logits, each round with another prompt."""
    for number in range(bench.rounds + 1):  # the first warms up
        show(f"{visual} visual tokens, round {number} of {bench.rounds}")
        prompt = _prompt(bench, model, visual)
        for way in ways:
            way.cache = None
            with way.session():
                times, way.cache = _timed(model.device, partial(_prefill, model, prompt))
            if number:
                way.times.append(times)
    before_llm = _tower_flops(model) * visual / TOKENS_PER_IMAGE[bench.shape] if bench.tower else 0.0
    results = []
    for clock in _clocks(model.device):
        plain = [getattr(times, clock) for times in ways[0].times]
        unit = "" if clock == "wall" else "cpu_"
        for way in ways:
            taken = [getattr(times, clock) for times in way.times]
            name, more = f"{prefix}{way.name}", {"low": min(taken), "high": max(taken)}
            if way.reduction is None:
                results.append(result(f"{name}_{unit}ttft", median(taken), "s", bench.rounds, **more))
                continue
            more |= {"baseline": f"{prefix}unpruned_{unit}ttft", "ratio": median(taken) / median(plain)}
            results.append(result(f"{name}_{unit}ttft", median(taken), "s", bench.rounds, **more))
            costs = summary(model.config, way.reduction.prefills[-1], way.reduction.methods, model.dtype)
            said = (before_llm + costs.full.flops) / (before_llm + costs.pruned.flops)
            if clock == "wall":
                results.append(result(f"{name}_flop_speed_up", said, "times", 1))
            faster = [before / after for before, after in zip(plain, taken, strict=True)]
            speed_up = median(plain) / median(taken)
            more = {"low": min(faster), "high": max(faster)}
            more |= {"baseline": f"{name}_flop_speed_up", "ratio": speed_up / said}
            results.append(result(f"{name}_{unit}speed_up", speed_up, "times", bench.rounds, **more))
    return results


def _memory(
    bench: PrefillBench, model: Any, visual: int, ways: list[_Way], prefix: str, show: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Bytes of the KV cache, as they are and as they were predicted, and at most held in a prefill."""
    results, full = [], Prefill((0,), (bench.text,), (visual,), ((visual,),) * len(model.get_decoder().layers), ())
    plain: dict[str, float] = {}
    decoder = Decoder.from_config(model.config)
    for way in ways:
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in way.cache.layers)
        prefill = full if way.reduction is None else way.reduction.prefills[-1]
        processed = sum(layer[0] for layer in prefill.visual) / len(prefill.visual)
        results.append(result(f"{prefix}{way.name}_visual_tokens", processed, "mean over layers", 1))
        predicted = f"{prefix}{way.name}_kv_predicted"
        results.append(result(predicted, kv_bytes(decoder, prefill, model.dtype), "bytes", 1))
        results.append(
            result(f"{prefix}{way.name}_kv", held, "bytes", 1, baseline=predicted, ratio=held / results[-1]["value"])
        )
    for way in ways:
        show(f"memory of {way.name}")
        prompt = _prompt(bench, model, visual)
        before = torch.cuda.memory_allocated(model.device) if model.device.type == "cuda" else 0
        with way.session():
            peak = peak_memory(model.device, partial(_prefill, model, prompt))
        if peak is None:
            continue
        plain.setdefault("peak", peak - before)
        against = {"baseline": f"{prefix}unpruned_peak", "ratio": (peak - before) / plain["peak"]}
        results.append(
            result(f"{prefix}{way.name}_peak", peak - before, "bytes", 1, **(against if way.reduction else {}))
        )
    return results


def _decoding(bench: PrefillBench, model: Any, visual: int, ways: list[_Way], prefix: str) -> list[dict[str, Any]]:
    """Seconds of decode steps; pruned also against plain caches of as many keys and values, without a session."""
    plain = {}
    for way in ways[1:]:
        plain[way.name] = DynamicCache(config=model.config.get_text_config())
        for index, layer in enumerate(way.cache.layers):
            plain[way.name].update(layer.keys.clone(), layer.values.clone(), index)
    taken: dict[str, list[_Times]] = {}
    tokens = torch.randint(10, 100, (WARM_UP + bench.steps, 1, 1), device=model.device)
    for number, token in enumerate(tokens):
        place = torch.tensor([[bench.text + visual + number]], device=model.device)
        inputs = {"input_ids": token, "position_ids": place, "use_cache": True}
        turns: list[tuple[str, AbstractContextManager[Any], Any]] = []
        for way in ways:
            turns.append((way.name, way.session(), way.cache))
            if way.reduction is not None:
                turns.append((f"{way.name}_plain", nullcontext(), plain[way.name]))
        for name, session, cache in turns if number % 2 else reversed(turns):
            with session:
                times, _ = _timed(model.device, partial(model, **inputs, past_key_values=cache))
            taken.setdefault(name, []).append(times)
    results = []
    for clock in _clocks(model.device):
        unit = "" if clock == "wall" else "cpu_"
        ms = {name: [1000 * getattr(t, clock) for t in times[WARM_UP:]] for name, times in taken.items()}
        for name in (turn for turn, *_ in turns):
            each = ms[name]
            more: dict[str, Any] = {"low": min(each), "high": max(each)}
            if f"{name}_plain" in ms:
                ratio = median(each) / median(ms[f"{name}_plain"])
                more |= {"baseline": f"{prefix}{name}_plain_{unit}decode", "ratio": ratio}
            results.append(result(f"{prefix}{name}_{unit}decode", median(each), "ms/token", bench.steps, **more))
    return results


def _clocks(device: torch.device) -> tuple[str, ...]:
    return ("wall", "cpu") if device.type == "cpu" else ("wall",)


def _timed(device: torch.device, work: Callable[[], Any]) -> tuple[_Times, Any]:
    wall, cpu = now(device), time.process_time()
    done = work()
    return _Times(now(device) - wall, time.process_time() - cpu), done
