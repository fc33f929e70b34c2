"""The command `foveate bench`: what media, towers, prefill, decoding, loading, training and sharing sequences cost."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Measure media, towers, prefill, decoding, loading, training and shared sequences, each against its baseline.",
    rich_markup_mode=None,
)


class Model(StrEnum):
    tiny = "tiny"
    small = "0.5b"
    medium = "2b"
    large = "8b"


class Tower(StrEnum):
    tiny = "tiny"
    base = "base"
    so400m = "so400m"


class Shape(StrEnum):
    tiny = "tiny"
    small = "0.5b"
    llava = "llava-1.5-7b"
    nvila = "nvila-8b"
    qwen = "qwen2.5-vl-7b"


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Attention(StrEnum):
    auto = "auto"
    flash = "flash_attention_2"
    flex = "flex_attention"
    sdpa = "sdpa"
    eager = "eager"


QUANTIZERS = ("optimum-quanto", "hqq")  # of transformers' QuantizedCache

JsonOption = Annotated[bool, typer.Option("--json", help="Print a results file instead of lines.")]


@app.command()
def data(
    shards: Annotated[
        str | None,
        typer.Argument(help="A folder of .tar shards, or a pattern. Default: some are made.", metavar="[SHARDS]"),
    ] = None,
    documents: Annotated[int, typer.Option(min=1, help="How many are made where there are no SHARDS.")] = 1000,
    workers: Annotated[int, typer.Option(min=0, help="Processes of each of the two loaders.")] = 2,
    seconds: Annotated[float, typer.Option(min=0.01, help="For which each is measured, in 5 rounds.")] = 10.0,
    restore: Annotated[
        bool, typer.Option("--restore", help="Also measure restoring at 1 % and at 90 % of an epoch.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Documents a second against bare webdataset on the same shards; packing waste and balance."""
    from .bench_data import DataBench, bench_data

    results = bench_data(DataBench(shards, documents, workers, seconds, restore), _show)
    _report(results, as_json, ("torch", "transformers", "webdataset", "pillow"))


@app.command()
def train(
    model: Annotated[Model, typer.Option(help="Shapes, with random weights; tiny is for a CPU.")] = Model.tiny,
    tokens: Annotated[
        int | None, typer.Option(min=64, help="Of a packed row. Default: 8192; 2048 for the tiny model.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="That are timed.")] = 10,
    micro_batches: Annotated[int, typer.Option(min=1, help="Packed rows of a step.")] = 1,
    engine: Annotated[str, typer.Option(help="torch, zero0 … zero3, or a DeepSpeed JSON file.")] = "torch",
    attention: Annotated[
        Attention, typer.Option(help="Of the LLM; auto is flash_attention_2 where it is installed, else sdpa.")
    ] = Attention.auto,
    trains: Annotated[str, typer.Option(help="Parts that train, the others are frozen.")] = "tower,projector,llm",
    checkpointing: Annotated[
        str, typer.Option(help="Parts whose activations are computed again: tower, llm, or both with a comma.")
    ] = "",
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile of each layer.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="Processes that make the documents.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """A training step's speed and memory: packed against padded rows, fused against whole logits, and its parts."""
    from .bench import TrainBench, bench_train

    settings = TrainBench(
        model.value,
        tokens or (2048 if model == Model.tiny else 8192),
        steps,
        micro_batches,
        engine,
        attention.value,
        tuple(filter(None, trains.split(","))),
        tuple(filter(None, checkpointing.split(","))),
        compile,
        workers,
        device,
    )
    _report(bench_train(settings, _show), as_json, ("torch", "transformers", "deepspeed"))


@app.command()
def media(
    video: Annotated[Path | None, typer.Option(help="A file. Default: a 720p clip is made.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Of the clip that is made.")] = 30.0,
    gop: Annotated[int, typer.Option(min=1, help="Frames between its keyframes, at most.")] = 250,
    b_frames: Annotated[int, typer.Option(min=0, max=16, help="Of its B-frames, at most so many in a row.")] = 3,
    frames: Annotated[int, typer.Option(min=1, max=2048, help="That are taken, from the first to the last.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="In each of which everything has its turn.")] = 7,
    memory: Annotated[
        bool, typer.Option("--memory", help="Measure instead the peak memory of 256 and of 2,048 frames.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Frames a second from a video file to the tower's input, against bare PyAV and decord; or peak memory."""
    from .bench_media import MediaBench, bench_media, bench_memory

    if memory:
        results = bench_memory(video, show=_show)
    else:
        results = bench_media(MediaBench(video, seconds, gop, b_frames, frames, rounds), _show)
    _report(results, as_json, ("torch", "av", "decord", "numpy", "pillow"))


@app.command()
def encode(
    shape: Annotated[Tower, typer.Option(help="SigLIP's, with random weights; tiny is for a CPU.")] = Tower.tiny,
    images: Annotated[int, typer.Option(min=1, help="Images, or frames of a video, at a time.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="In each of which every way has its turn.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.001, help="Of a turn, at least.")] = 0.5,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Images, frames and tokens a second of tower and projector, by tiling and projector, against one tile an image."""
    from .bench_encode import EncodeBench, bench_encode

    _report(bench_encode(EncodeBench(shape.value, images, rounds, seconds, device), _show), as_json, ("torch",))


@app.command()
def prefill(
    shape: Annotated[Shape, typer.Option(help="Of the LLM, with random weights; the last three are for a GPU.")] = (
        Shape.small
    ),
    visual: Annotated[str, typer.Option(help="Visual tokens of the prompt; several numbers with commas.")] = "2880",
    text: Annotated[int, typer.Option(min=36, help="Its text tokens.")] = 60,
    prune: Annotated[
        list[str] | None,
        typer.Option(help="A method; several times for several. Default: FastV that drops 50, 75 and 90 %."),
    ] = None,
    tower: Annotated[
        bool, typer.Option("--tower", help="Prefill begins with pixels, for methods before the LLM too.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="In each of which everything has its turn.")] = 5,
    steps: Annotated[int, typer.Option(min=0, help="Of decoding, that are timed.")] = 32,
    dtype: Annotated[Dtype | None, typer.Option(help="Default: float32 on a CPU, else bfloat16.")] = None,
    attention: Annotated[Attention, typer.Option(help="Of the LLM; auto is sdpa.")] = Attention.auto,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time to the first token, decode, memory: unpruned against methods, and against what their FLOPs say."""
    from .bench_prefill import METHODS, PrefillBench, bench_prefill

    settings = PrefillBench(
        shape.value,
        _counts("--visual", visual),
        text,
        tuple(prune or METHODS),
        tower,
        rounds,
        steps,
        device,
        dtype.value if dtype else None,
        "sdpa" if attention == Attention.auto else attention.value,
    )
    _report(bench_prefill(settings, _show), as_json, ("torch", "transformers"))


@app.command()
def decode(
    shape: Annotated[Shape, typer.Option(help="Of the LLM, with random weights; the last three are for a GPU.")] = (
        Shape.small
    ),
    context: Annotated[int, typer.Option(min=1, help="Tokens of each sequence before the first step.")] = 32768,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    kv: Annotated[
        list[str] | None,
        typer.Option(help="A KV cache, such as int4; several times for several. Default: int8, int4 and int2."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="In each of which every cache is filled, and decodes.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Of each of these turns, that are timed.")] = 8,
    dtype: Annotated[Dtype | None, typer.Option(help="Default: float32 on a CPU, else bfloat16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Decode steps, KV bytes and the largest context, against transformers' caches and a preallocated one."""
    from .bench_decode import DecodeBench, bench_decode

    settings = DecodeBench(
        shape.value,
        context,
        batch,
        tuple(kv) if kv else DecodeBench.kv,
        rounds,
        steps,
        device,
        dtype.value if dtype else None,
    )
    _report(bench_decode(settings, _show), as_json, ("torch", "transformers", *QUANTIZERS))


@app.command()
def kernels(
    shape: Annotated[Shape, typer.Option(help="Whose LLM's heads count.")] = Shape.small,
    context: Annotated[int, typer.Option(min=1, help="Tokens of each sequence.")] = 32768,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    bits: Annotated[str, typer.Option(help="Of packed keys and values; several with commas.")] = "8,4,2",
    group: Annotated[int, typer.Option(min=1, help="Tokens that share a scale of the keys.")] = 64,
    residual: Annotated[int, typer.Option(min=0, help="Last tokens, that are not packed.")] = 128,
    pages: Annotated[float, typer.Option(help="Fraction of the pages that Quest reads.")] = 1 / 16,
    rounds: Annotated[int, typer.Option(min=1, help="In each of which everything has its turn.")] = 7,
    dtype: Annotated[Dtype | None, typer.Option(help="Default: float32 on a CPU, else bfloat16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Attention of a decode step alone: its time, bytes and bandwidth, dense, packed, and Quest's chosen pages."""
    from .bench_kernels import KernelBench, bench_kernels

    settings = KernelBench(
        shape.value,
        context,
        batch,
        _counts("--bits", bits),
        group,
        residual,
        pages,
        rounds,
        device,
        dtype.value if dtype else None,
    )
    _report(bench_kernels(settings, _show), as_json, ("torch", "transformers", *QUANTIZERS, "flashinfer-python"))


@app.command()
def parallel(
    processes: Annotated[int, typer.Option(help="Of this machine, that share a sequence: 1, 2 or 4.")] = 4,
    tokens: Annotated[
        int | None, typer.Option(help="Of the pack that they share. Default: 8192; with --kernel 65536.")
    ] = None,
    kernel: Annotated[
        bool, typer.Option("--kernel", help="Measure instead the ring's kernel, with the heads of an 8B model's rank.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Of --kernel, in each of which everything has its turn.")] = 7,
    dtype: Annotated[Dtype | None, typer.Option(help="Of --kernel. Default: float32 on a CPU, else bfloat16.")] = None,
    device: Annotated[str | None, typer.Option(help="Of --kernel, cpu or cuda. Default: cuda if there is one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Sequence parallelism: bytes against their formula, memory a rank, balance, and a model of a step's time."""
    if kernel:
        from .bench_ring import RingBench, bench_ring

        ring = RingBench(tokens or 65536, rounds=rounds, device=device, dtype=dtype.value if dtype else None)
        _report(bench_ring(ring, _show), as_json, ("torch",))
        return
    from .bench_parallel import ParallelBench, bench_parallel, cost_table
    from .parallel_costs import ASSUMPTIONS

    results = bench_parallel(ParallelBench(processes, tokens or 8192), _show)
    for line in ("The model of a step takes for granted:", *ASSUMPTIONS):
        _show(line)
    if as_json:
        _report(results, as_json, ("torch", "transformers"))
        return
    _report([entry for entry in results if not entry["name"].startswith("step_")], as_json, ())
    for line in cost_table(results):
        print(line)


def _counts(option: str, text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise ValueError(f"{option} is {text!r}; accepted: numbers of at least 1, with commas between them")
    return tuple(int(part) for part in parts)


def _show(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _report(results: list[dict[str, Any]], as_json: bool, packages: tuple[str, ...]) -> None:
    if as_json:
        from ..eval.facts import run_facts

        command = " ".join(["foveate", *(argument for argument in sys.argv[1:] if argument != "--debug")])
        print(json.dumps(run_facts(command, packages) | {"results": results}, indent=1))
        return
    for entry in results:
        against = f"   {entry['ratio']:.3f} × {entry['baseline']}" if "ratio" in entry else ""
        between = f"   [{entry['low']:.4g}, {entry['high']:.4g}]" if "low" in entry else ""
        print(f"{entry['name']:>32}  {entry['value']:,.6g} {entry['unit']}{between}{against}")
