"""`foveate bench train`: a training step of real shapes with random weights, packed against padded, and where it goes.

Documents are made up, so neither weights nor data are needed, nor any library but torch and transformers.
"""

import gc
import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from statistics import mean
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ..data.document import Document
from ..data.encoding import IGNORE, Sample
from ..data.loader import Loader, Packing, Prefetched, Step
from ..data.mixture import Mixture
from ..data.packing import Batch, collate
from ..eval.facts import result
from ..vlm.config import FoveateConfig
from ..vlm.model import FoveateForConditionalGeneration
from ..vlm.planning import MediaTiles
from ..vlm.processor import FoveateProcessor
from .acceleration import compile_model, enable_checkpointing
from .distributed import init_world
from .engine import Engine, Micro, make_engine, resolve_precision, shares_weights
from .flops import EVERYTHING, ModelFlops, peak_flops
from .objectives import NextToken

LOGITS_TOKENS = 1024  # positions whose logits are held at a time, as in training
FIRST_WORD = 3  # ids below are those of padding and media
WARM_UP = 2  # steps, packed and padded
SPLIT_STEPS = 5  # that are waited for part by part
MODULES = {"tower": "vision_tower", "projector": "multi_modal_projector", "llm": "language_model"}

SO400M = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
    "num_attention_heads": 16, "image_size": 448, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip


def _qwen2(width: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, tied: bool) -> dict:
    return {
        "model_type": "qwen2", "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary,
        "tie_word_embeddings": tied, "max_position_embeddings": 32768, "bos_token_id": None, "eos_token_id": None,
        "pad_token_id": 0,
    }  # fmt: skip


# Towers, projectors and LLMs by the size of the whole. LLMs are those of Qwen2 (arXiv 2407.10671, table 1), towers of
# SigLIP: base at 384 pixels and so400m at 448 as NVILA-Lite has it, with its 3×3 projector.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 56, "patch_size": 14, "vision_use_head": False,
        },
        "text_config": _qwen2(64, 128, 2, 4, 2, 8192, True),
        "projector": "downsample-2x2",
    },
    "0.5b": {
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 768, "intermediate_size": 3072,
            "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 384, "patch_size": 16,
            "vision_use_head": False,
        },
        "text_config": _qwen2(896, 4864, 24, 14, 2, 151936, True),
        "projector": "downsample-2x2",
    },
    "2b": {
        "vision_config": SO400M,
        "text_config": _qwen2(1536, 8960, 28, 12, 2, 151936, True),
        "projector": "downsample-3x3",
    },
    "8b": {
        "vision_config": SO400M,
        "text_config": _qwen2(3584, 18944, 28, 28, 4, 152064, False),
        "projector": "downsample-3x3",
    },
}  # fmt: skip


@dataclass(frozen=True)
class TrainBench:
    """What `bench_train` measures.

    Args:
        model: one of `SHAPES`.
        tokens: of a packed row, and at most of a padded micro-batch.
        steps: that are timed; as many are compared with padded ones.
        micro_batches: packed rows of a step, one a micro-batch.
        engine: see `engine.make_engine`.
        attention: of the LLM; `auto` is flash_attention_2 where flash-attn is installed and there is a GPU, else sdpa.
        trains: parts that train; the others are frozen.
        checkpointing: of `tower` and `llm`, whose activations are computed again.
        compile: `torch.compile` of each layer.
        workers: processes that make the documents.
        device: a GPU where there is one.
    """

    model: str = "tiny"
    tokens: int = 8192
    steps: int = 10
    micro_batches: int = 1
    engine: str = "torch"
    attention: Literal["auto", "flash_attention_2", "flex_attention", "sdpa", "eager"] = "auto"
    trains: tuple[str, ...] = EVERYTHING
    checkpointing: tuple[str, ...] = ()
    compile: bool = False
    workers: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        if self.model not in SHAPES:
            raise ValueError(f"model is {self.model!r}; accepted: {', '.join(SHAPES)}")
        for name in ("tokens", "steps", "micro_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: 1 or more")
        if unknown := set(self.trains) - set(MODULES):
            raise ValueError(f"trains names {sorted(unknown)}; accepted: {', '.join(MODULES)}")


# Documents


@dataclass(frozen=True)
class MadeUp:
    """An endless source of made-up documents: number i is always the same.

    Lengths are log-normal with a long tail, as of captions, conversations and some long documents together; four in
    five have images, which take a tenth to six tenths of their tokens.

    Args:
        budget: longest document in tokens; lengths scale with it.
        vocabulary: ids are drawn from below it.
        image_tokens, image_side: of an image; without images where image_tokens is 0.
    """

    budget: int
    vocabulary: int
    image_tokens: int = 0
    image_side: int = 0
    documents: None = None
    runs: tuple[int, ...] = ()

    def key(self, index: int) -> str:
        return f"made-up/{index}"

    def document(self, index: int) -> Document:
        return Document(self.key(index), ())

    def encode(self, document: Document) -> Sample:
        """The sample of a document of this source; the loader calls it in its workers."""
        rng = np.random.default_rng(int(document.key.partition("/")[2]))
        length = min(8192, round(rng.lognormal(6.2, 1.1)) + 200) * self.budget // 8192
        images = 0
        if self.image_tokens and rng.random() < 0.8:
            most = max(0, length - 2) // self.image_tokens
            images = min(most, max(1, round(rng.uniform(0.1, 0.6) * length / self.image_tokens)))
        ids = rng.integers(FIRST_WORD, self.vocabulary, max(2, length))
        ids[1 : 1 + images * self.image_tokens] = IMAGE_ID
        labels = np.where(ids == IMAGE_ID, IGNORE, ids)
        labels[0] = IGNORE
        size = (images, self.image_side, self.image_side, 3)
        pixels = rng.integers(0, 256, size, dtype=np.uint8)
        return Sample(document.key, ids, labels, MediaTiles(pixels, pixels[:0]))


IMAGE_ID = 1


def made_up_processor(config: FoveateConfig) -> FoveateProcessor:
    """What `collate` and the objective need to know of images; its tokenizer knows padding and media alone."""
    words = models.WordLevel({"<pad>": 0, "<image>": 1, "<video>": 2, "<unk>": 3}, unk_token="<unk>")
    vision = config.vision_config
    return FoveateProcessor(
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="<pad>", unk_token="<unk>"),
        image_size=(vision.image_size, vision.image_size),
        patch_size=vision.patch_size,
        downsample_factor=config.downsample_factor,
    )


def padded_batches(samples: Sequence[Sample], tokens: int, processor: FoveateProcessor) -> list[Batch]:
    """The same documents as is usual without packing: one a row, in the order in which they come, padded on the right
    to the longest of their micro-batch, with as many rows as make at most `tokens` positions.

    Causal attention keeps padding on the right out of the documents without any mask, which is the fastest there is.
    """
    groups: list[list[Sample]] = []
    for sample in samples:
        longest = max([sample.tokens, *(other.tokens for other in groups[-1])]) if groups else 0
        if not groups or (len(groups[-1]) + 1) * longest > tokens:
            groups.append([])
        groups[-1].append(sample)
    batches = [collate([[sample] for sample in group], processor) for group in groups]
    for batch in batches:  # collate lays padding out as a document of its own, which takes a mask
        rows, length = batch.inputs["input_ids"].shape
        batch.inputs["position_ids"] = torch.arange(length).expand(rows, length).contiguous()
    return batches


# Measuring


@dataclass
class Stopwatch:
    """Seconds that a step's parts take; every part is waited for, so the whole is a little slower than without."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: {"forward": 0.0, "optimizer": 0.0})
    since: float = 0.0

    def start(self, *_: object) -> None:
        self.since = now(self.device)

    def stop(self, part: str, *_: object) -> None:
        self.seconds[part] += now(self.device) - self.since


def now(device: torch.device) -> float:
    """The time, in seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(device: torch.device, work: Callable[[], object]) -> int | None:
    """Bytes of tensors held at most during `work`, with those that were there before on a GPU, without on a CPU.

    None where the device has too little memory for it.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        try:
            work()
        except torch.OutOfMemoryError:
            return None
        return torch.cuda.max_memory_allocated(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in changes))


@dataclass
class _Subject:
    """What is measured."""

    bench: TrainBench
    source: MadeUp
    processor: FoveateProcessor
    loader: Loader
    objective: NextToken
    engine: Engine
    optimizer: torch.optim.Optimizer
    device: torch.device
    parameters: int

    def step(self, batches: Sequence[Batch], total: float) -> None:
        self.engine.step([Micro(batch.inputs, batch.keys) for batch in batches], total)

    def padded(self, step: Step) -> list[Batch]:
        """A step's documents, one a row."""
        keys = [key for batch in step.micro for key in batch.keys]
        samples = [self.source.encode(Document(key, ())) for key in keys]
        return padded_batches(samples, self.bench.tokens, self.processor)


def bench_train(bench: TrainBench, show: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
    """Measures training steps; results as of `eval.facts.result`.

    Args:
        bench: what to measure.
        show: is told what is going on.
    """
    with init_world(bench.device) as world:
        show(f"making the {bench.model} model")
        subject = _subject(bench, world)
        try:
            show("warming up")
            prefetched = Prefetched(subject.loader, None) if bench.workers else subject.loader
            for _ in range(WARM_UP):
                step = _next(prefetched)
                for batches in (step.micro, subject.padded(step)):
                    subject.step(batches, step.loss_tokens)
            show(f"{bench.steps} packed steps")
            kept, results = _live_steps(subject, prefetched)
            prefetched.close()
            show("packed against padded")
            results += _against_padded(subject, kept)
            show("parts of a step")
            results += _split(subject, kept[:SPLIT_STEPS])
            show("peak memory with and without the fused loss")
            results += _loss_memory(subject, kept[0], show)
        finally:
            subject.loader.close()
            subject.engine.close()
    return [result("parameters", subject.parameters, "weights", 1), *results]


def _subject(bench: TrainBench, world: Any) -> _Subject:
    config = FoveateConfig(**SHAPES[bench.model], image_token_id=IMAGE_ID, video_token_id=2)
    attention: str = bench.attention
    if attention == "auto":
        flash = world.device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
        attention = "flash_attention_2" if flash else "sdpa"
    tower_attention = "sdpa" if attention == "flex_attention" else attention
    torch.manual_seed(0)
    with torch.device(world.device):
        model = FoveateForConditionalGeneration._from_config(
            config, attn_implementation={"vision_config": tower_attention, "text_config": attention}
        )
    model.train()
    model.requires_grad_(False)
    for part in bench.trains:
        getattr(model, MODULES[part]).requires_grad_(True)
    flops = ModelFlops.from_model(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if bench.checkpointing:
        enable_checkpointing(model, bench.checkpointing)
    if bench.compile:
        compile_model(model)
    processor = made_up_processor(config)
    chunks = -(-bench.tokens // LOGITS_TOKENS)
    objective = NextToken(model, processor, chunks, shares_weights(bench.engine)).to(world.device)
    groups = [
        {"params": list(getattr(model, MODULES[part]).parameters()), "part": part, "lr": 1e-5} for part in bench.trains
    ]
    optimizer = torch.optim.AdamW(groups, fused=True)
    precision = resolve_precision("auto", world.device)
    engine = make_engine(bench.engine, objective, optimizer, precision, 1.0, world, bench.micro_batches)
    side, vocabulary = config.vision_config.image_size, config.text_config.vocab_size
    source = MadeUp(bench.tokens, vocabulary, processor.tokens_per_image(), side)

    def cost(sample: Sample) -> float:
        tiles = {(side, side): len(sample.images)} if len(sample.images) else {}
        return flops.document(sample.tokens, tiles, bench.trains, sample.loss_tokens)

    loader: Loader[Any] = Loader(
        Mixture([source], [1.0], seed=0, shuffle=0),
        Packing(rows=1, groups=bench.micro_batches, tokens=bench.tokens, tiles=2**20),
        source.encode,
        partial(collate, processor=processor),
        cost,
        workers=bench.workers,
    )
    return _Subject(bench, source, processor, loader, objective, engine, optimizer, world.device, parameters)


def _next(loader: Loader | Prefetched) -> Step:
    step = loader.next()
    assert step is not None  # the source has no end
    return step


def _live_steps(subject: _Subject, loader: Loader | Prefetched) -> tuple[list[Step], list[dict[str, Any]]]:
    """Steps as in training, the wait for their documents counted."""
    device, count = subject.device, subject.bench.steps
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    steps, waited = [], 0.0
    began = now(device)
    for _ in range(count):
        before = time.perf_counter()
        steps.append(_next(loader))
        waited += time.perf_counter() - before
        subject.step(steps[-1].micro, steps[-1].loss_tokens)
    seconds = now(device) - began
    tokens, flops = sum(step.tokens for step in steps), sum(sum(step.costs) for step in steps)
    tiles = sum(sum(batch.tiles) for step in steps for batch in step.micro)
    results = [
        result("train_tokens_per_s", tokens / seconds, "tokens/s", count),
        result("train_images_per_s", tiles / seconds, "images/s", count),
        result("train_step_s", seconds / count, "s", count),
        result("train_data_wait", waited / seconds, "fraction of the time", count),
        result("train_flops_per_s", flops / seconds, "FLOP/s", count),
    ]
    if peak := peak_flops(device):
        results.append(result("train_mfu", flops / seconds / peak, "fraction of the device's peak", count))
    if device.type == "cuda":
        results.append(result("train_peak_memory", torch.cuda.max_memory_allocated(device), "bytes", count))
    return steps, results


def _against_padded(subject: _Subject, steps: Sequence[Step]) -> list[dict[str, Any]]:
    """The same documents packed and padded, in turn, from batches that lie ready."""
    device = subject.device
    seconds: dict[str, list[float]] = {"packed": [], "padded": []}
    positions = 0
    for step in steps:
        padded = subject.padded(step)
        positions += sum(batch.positions for batch in padded)
        for name, batches in (("packed", step.micro), ("padded", padded)):
            began = now(device)
            subject.step(batches, step.loss_tokens)
            seconds[name].append(now(device) - began)
    tokens, n = sum(step.tokens for step in steps), len(steps)
    packed, padded_rate = (tokens / sum(seconds[name]) for name in ("packed", "padded"))
    ratios = [slow / fast for fast, slow in zip(seconds["packed"], seconds["padded"], strict=True)]
    return [
        result("padded_tokens_per_s", padded_rate, "tokens/s", n),
        result(
            "packed_tokens_per_s", packed, "tokens/s", n, baseline="padded_tokens_per_s", ratio=packed / padded_rate
        ),
        result("packed_over_padded_step", mean(ratios), "times", n, low=min(ratios), high=max(ratios)),
        result("padded_padding", 1 - tokens / positions, "fraction of positions", n),
    ]


def _split(subject: _Subject, steps: Sequence[Step]) -> list[dict[str, Any]]:
    """Seconds of a step's parts; backward is what is left, with the gradient's norm and clipping."""
    watch = Stopwatch(subject.device)
    hooks = [
        subject.objective.register_forward_pre_hook(watch.start),
        subject.objective.register_forward_hook(partial(watch.stop, "forward")),
        subject.optimizer.register_step_pre_hook(watch.start),
        subject.optimizer.register_step_post_hook(partial(watch.stop, "optimizer")),
    ]
    began = now(subject.device)
    for step in steps:
        subject.step(step.micro, step.loss_tokens)
    whole = now(subject.device) - began
    for hook in hooks:
        hook.remove()
    parts = watch.seconds | {"backward": whole - sum(watch.seconds.values())}
    return [result(f"step_{part}_s", seconds / len(steps), "s", len(steps)) for part, seconds in parts.items()]


def _loss_memory(subject: _Subject, step: Step, show: Callable[[str], None]) -> list[dict[str, Any]]:
    """Peak memory of a step whose logits are never whole, and of one through the LLM's own loss."""

    def peak(fused: bool) -> int | None:
        subject.objective.fused = fused
        gc.collect()
        return peak_memory(subject.device, lambda: subject.step(step.micro, step.loss_tokens))

    before = subject.objective.fused
    fused, whole = peak(True), peak(False)
    subject.objective.fused = before
    results = []
    if whole is None:
        show("a step with whole logits takes more memory than the device has")
    else:
        results.append(result("step_memory_full_logits", whole, "bytes", 1))
    if fused is not None:
        against = {"baseline": "step_memory_full_logits", "ratio": fused / whole} if whole else {}
        results.append(result("step_memory_fused_loss", fused, "bytes", 1, **against))
    return results
