"""The command `foveate`: each subcommand calls one function."""

import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

# Read when torch is loaded: how often a waiting thread looks again before it sleeps. The default makes small steps many
# times slower on a busy machine; never to look again makes them half as slow again on an idle one.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import typer
from rich.console import Console

from .data.commands import app as data_app
from .train import quiet  # noqa: F401  for its effect
from .train.bench_commands import app as bench_app

if TYPE_CHECKING:
    from .vlm.model import FoveateForConditionalGeneration
    from .vlm.parallel.topology import Topology
    from .vlm.processor import FoveateProcessor

app = typer.Typer(
    name="foveate",
    help="Train vision-language models, and run them with fewer visual tokens and a smaller KV cache.",
    epilog="Every command takes --debug, which shows the traceback of an error.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")

UsageError: Any = typer.BadParameter.__base__  # click's own, of which newer typers carry a copy
STOPPED = 130  # the exit code that typer turns Ctrl-C into
WEEK_S = 7 * 24 * 3600.0
SILENT_S = 10.0  # longer than the first process needs to tell what failed

ModelArgument = Annotated[
    str, typer.Argument(help="Directory or Hugging Face name of a Foveate model.", metavar="MODEL")
]
PruneOption = Annotated[
    list[str] | None,
    typer.Option(
        "--prune",
        help="Drop visual tokens by this method, such as fastv:layer=2,keep=0.5; may be given several times.",
        metavar="METHOD[:FIELD=VALUE,...]",
    ),
]
KVOption = Annotated[
    str | None,
    typer.Option(
        "--kv",
        help="Keep a smaller KV cache, such as int4, streaming:sink=4,window=1024 or snapkv:keep=0.25+int4.",
        metavar="PART[:FIELD=VALUE,...][+PART...]",
    ),
]
WeightsOption = Annotated[
    str | None,
    typer.Option("--weights", help="Quantise the LLM's layers on loading: w4a16, w4a16:group=64, w8a8 or w4a8."),
]
TowerWeightsOption = Annotated[
    str | None, typer.Option("--tower-weights", help="Quantise the vision tower's layers on loading: w8a8.")
]


UlyssesOption = Annotated[
    int,
    typer.Option(
        min=1, help="Processes of a node that share a sequence and exchange attention heads; see --ring.", metavar="U"
    ),
]
RingOption = Annotated[
    int,
    typer.Option(
        min=1,
        help="Rows of such processes, which pass keys and values on. With --ulysses U: torchrun --nproc-per-node U*R "
        "--no-python -- foveate ...",
        metavar="R",
    ),
]


class ExportFormat(StrEnum):
    code = "code"
    stock = "stock"
    vila = "vila"


class FrontierTask(StrEnum):
    rows = "rows"
    glyphs = "glyphs"
    clips = "clips"
    needles = "needles"


class DuoData(StrEnum):
    passkeys = "passkeys"
    needles = "needles"


class Split(StrEnum):
    train = "train"
    dev = "dev"
    test = "test"


def _seconds(text: str) -> float:
    """`1:02:03.5`, `2:03.5` or `123.5` in seconds."""
    parts = text.split(":")
    whole, last = parts[:-1], parts[-1]
    numbers = len(parts) <= 3 and all(part.isdecimal() for part in whole) and re.fullmatch(r"\d+(\.\d*)?|\.\d+", last)
    if not numbers or any(float(part) >= 60 for part in parts[1:]):
        raise typer.BadParameter(f"{text!r}: accepted: [[hours:]minutes:]seconds, such as 90, 1:30 or 0:01:30.5")
    return sum(float(part) * 60**place for place, part in enumerate(reversed(parts)))


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for everything that the run writes.")] = Path("runs/quickstart"),
) -> None:
    """Train the tiny model on the embedded data, evaluate it, export it, and question a real mp4 file."""
    from .train.quickstart import run_quickstart

    _quiet_libraries()
    run_quickstart(out, Console())


@app.command()
def train(
    recipe: Annotated[
        str, typer.Argument(help="Name of a shipped recipe (quickstart), or path of a YAML file.", metavar="RECIPE")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes, for example stages.align.steps=10.", metavar="[KEY=VALUE]...")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run. Default: runs/ and the recipe's name.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint in --out.")] = False,
    auto_resume: Annotated[
        bool, typer.Option("--auto-resume", help="Go on where --out holds a checkpoint, begin where it does not.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check recipe, sources and every stage's first batches; train nothing.")
    ] = False,
    processes: Annotated[int, typer.Option(min=1, help="With --dry-run: of how many processes.")] = 1,
) -> None:
    """Train a recipe's stages; checkpoints and metrics go to --out, the model to its folder `model`.

    Several processes: `torchrun --no-python foveate train …`, or the scripts in scripts/.
    """
    from .train.recipe import load_recipe

    _quiet_libraries()
    console = Console()
    loaded = load_recipe(recipe, overrides or [])
    if dry_run:
        from .train.dryrun import dry_run as check
        from .train.dryrun import print_checks

        print_checks(check(loaded, processes), console)
        return
    from .train.loop import Requeue
    from .train.loop import train as run

    folder = out or Path("runs") / loaded.name
    try:
        run(loaded, folder, resume="auto" if auto_resume else resume, console=console)
        done = f"model in {folder / 'model'}"
    except Requeue:
        done = f"stopped by a signal and saved; --resume goes on with {folder}"
    if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0:
        console.print(done, soft_wrap=True)


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or path of a YAML file.", metavar="RECIPE")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes, as of `train`.", metavar="[KEY=VALUE]...")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that train together.")] = 8,
    gpu: Annotated[str, typer.Option(help="Their kind, such as H100 or A100.")] = "H100",
    mfu: Annotated[float, typer.Option(help="Share of their operations that a step is taken to use.")] = 0.4,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Tell what a recipe will take: parameters, tokens, operations, memory of a GPU, time. Nothing is loaded."""
    from dataclasses import asdict

    from .train.plan import plan as make_plan
    from .train.plan import print_plan
    from .train.recipe import load_recipe

    _quiet_libraries()
    made = make_plan(load_recipe(recipe, overrides or []), gpus, gpu, mfu)
    if as_json:
        print(json.dumps(asdict(made), indent=1))
    else:
        terminal = Console().is_terminal
        print_plan(made, Console(width=None if terminal else 140))  # a file has no width


@app.command()
def convert(
    checkpoint: Annotated[
        Path, typer.Argument(help="A run's checkpoint, such as runs/mine/checkpoints/step-00000500.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write; new or empty.", metavar="OUT")],
) -> None:
    """Write a training checkpoint, of any engine and number of processes, as one model directory."""
    from .train.build import convert_checkpoint

    _quiet_libraries()
    convert_checkpoint(checkpoint, out)
    print(f"model in {out}")


@app.command()
def report(
    run: Annotated[Path | None, typer.Argument(help="Folder of a training run.", metavar="[RUN]")] = None,
    out: Annotated[Path | None, typer.Option(help="The page to write. Default: report.html in RUN.")] = None,
    docs: Annotated[
        bool,
        typer.Option("--docs", help="Instead: make the documentation's figures and tables anew from docs/results."),
    ] = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="With --docs: write nothing, tell what differs; exit code 1 if anything does."),
    ] = False,
) -> None:
    """Make an HTML page of a run: loss, rates, memory, packing, gradient norms, documents that could not be used.

    With --docs, in a checkout: every figure of docs/ and every table between marks, from the results files.
    """
    if (check and not docs) or (docs and out is not None):
        raise typer.BadParameter("--check goes with --docs, --out with the folder of a run")
    if run is not None and not docs:
        from .train.report import write_report

        print(f"report in {write_report(run, out)}")
        return
    if run is not None or not docs:
        raise typer.BadParameter("accepted: the folder of a run, or --docs")
    from .eval.doc_checks import report_docs

    if not report_docs(check):
        raise typer.Exit(1)


@data_app.command("prune")  # here, because it runs models, which is no business of the data's floor
def prune(
    source: Annotated[str, typer.Argument(help="What `data stats` takes, with an end.", metavar="SOURCE")],
    out: Annotated[Path, typer.Argument(help="Subset index file to write; scores go beside it.", metavar="OUT.json")],
    small: Annotated[str, typer.Option(help="Folder or name of the small model.")],
    large: Annotated[str, typer.Option(help="Folder or name of the large model.")],
    keep: Annotated[float, typer.Option(help="Fraction of the documents to keep.")] = 0.5,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read documents.")] = 0,
) -> None:
    """Choose the documents that a large model knows and a small one does not (DeltaLoss, NVILA)."""
    from rich.progress import Progress

    from .train.deltaloss import prune as choose

    _quiet_libraries()
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("")

        def show(model: str, done: int, of: int) -> None:
            progress.update(bar, description=model, completed=done, total=of)

        about = choose(source, out, small, large, keep, workers=workers, after_document=show)
    print(f"kept {about['kept']:,} of {about['documents']:,} documents in {out}")


@data_app.command("lmms")  # here, because its questions are those of evaluations
def lmms_tasks(
    out: Annotated[Path, typer.Argument(help="Folder to write; new or empty.", metavar="OUT")],
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Tasks or groups, such as foveate_glyphs. Default: all.", metavar="[NAME]..."),
    ] = None,
    n: Annotated[int, typer.Option(min=1, help="Questions a task.")] = 200,
    split: Annotated[Split, typer.Option(help="Whose digit images are shown; test is held out.")] = Split.test,
    seed: Annotated[
        int, typer.Option(min=0, help="Of what is drawn; `foveate eval` asks the questions of seed 0.")
    ] = 0,
) -> None:
    """Write tasks of lmms-eval with their data: the questions of `foveate eval`, for lmms-eval --include_path OUT."""
    _quiet_libraries()
    from .eval.lmms_tasks import write_tasks

    written = write_tasks(out, n, names or (), split.value, seed)
    print(f"{len(written)} tasks of {n} questions; lmms-eval --include_path {out} --tasks {','.join(written)}")


@app.command()
def ask(
    model: ModelArgument,
    media_and_question: Annotated[
        list[str] | None,
        typer.Argument(
            help="Image and video files, then the question; without one, a prompt opens.",
            metavar="[MEDIA]... [QUESTION]",
        ),
    ] = None,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Frames to take of each video. Default: the model's own.")
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Frames to take of each second of video, instead.")] = None,
    start_s: Annotated[
        float | None, typer.Option("--from", parser=_seconds, metavar="[[H:]M:]S", help="Where videos begin.")
    ] = None,
    end_s: Annotated[
        float | None, typer.Option("--to", parser=_seconds, metavar="[[H:]M:]S", help="Where videos end.")
    ] = None,
    max_visual_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of all media: fewer frames, then a lower resolution, until they fit.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    prune: PruneOption = None,
    kv: KVOption = None,
    weights: WeightsOption = None,
    tower_weights: TowerWeightsOption = None,
    show: Annotated[
        Path | None, typer.Option(help="With --prune: PNG to write, the media with the tokens lit that are kept.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print answer, tokens and seconds as JSON.")] = False,
    ulysses: UlyssesOption = 1,
    ring: RingOption = 1,
) -> None:
    """Answer a question about images and videos; without a question, answer several about the same media.

    With --prune, what was processed is told on stderr; with --kv, what the KV cache holds. With --ulysses or --ring
    several processes share the frames and the tokens; the first one prints, and tells of its own KV cache.
    """
    paths, question = _split_question(media_and_question or [])
    if as_json and question is None:
        raise typer.BadParameter("--json needs a question")
    if show is not None:
        for given, needed in ((prune, "--prune"), (paths, "an image or a video"), (question, "a question")):
            if not given:
                raise typer.BadParameter(f"--show needs {needed}")
        if show.is_dir() or not show.parent.is_dir():
            raise typer.BadParameter(f"--show {show}: accepted: a file in a folder that exists")
    if frames is not None and fps is not None:
        raise typer.BadParameter(f"--frames {frames} and --fps {fps}: only one of them is accepted")
    if end_s is not None and end_s <= (start_s or 0):
        raise typer.BadParameter(f"--from {start_s or 0} s and --to {end_s} s: the end must be after the beginning")
    methods, spec, schemes = _methods(prune), _kv(kv), _schemes(weights, tower_weights)
    from .vlm.cache.parse import kv_text
    from .vlm.cache.report import costs
    from .vlm.chat import Chat, load_media
    from .vlm.parallel.inference import sequence_parallel
    from .vlm.pruning import Reduction
    from .vlm.pruning.report import cost_lines, costs_of_first
    from .vlm.pruning.show import check_places, kept_picture

    began = time.perf_counter()
    with ExitStack() as stack:
        topology, device = stack.enter_context(_processes(ulysses, ring, "ask", waits=question is None))
        speaks = topology.rank == 0
        with _all_or_none(topology):
            loaded, processor = _load(model, schemes, device)
        after_load = time.perf_counter()
        if show is not None:
            check_places(processor.image_tiling)
        clip: dict[str, float | None] = {"fps": fps, "start_s": start_s, "end_s": end_s}
        reduction = Reduction(loaded, methods, spec) if methods or spec else None

        def write(text: str) -> None:
            if speaks:
                print(text, end="", flush=True)

        def tell(since: int = 0, none: Sequence[str] = ()) -> None:
            """What was saved goes to stderr, as it is no answer."""
            assert reduction is not None
            pruned = (cost_lines(reduction, since) or none) if methods else []
            held = costs(chat.cache).lines() if spec and chat.cache else []
            for line in (*pruned, *held):
                print(line, file=sys.stderr)

        with reduction or nullcontext(), sequence_parallel(loaded, topology):
            with _all_or_none(topology):
                media = [load_media(path, frames, processor, **clip) for path in paths]
            chat = Chat(loaded, processor, media, max_visual_tokens)
            media_s = time.perf_counter() - after_load
            if question is None:
                while (line := _read_question(topology)) is not None:
                    told = len(reduction.prefills) if reduction else 0
                    try:
                        chat.ask(line, max_new_tokens, write)
                    except ValueError as error:  # of this question; the conversation goes on
                        if speaks:
                            print(f"foveate: {error}", end="", file=sys.stderr, flush=True)
                    write("\n")
                    if reduction and speaks:
                        tell(told)
                return
            answer = chat.ask(question, max_new_tokens, None if as_json else write)
        if not speaks:
            return
        if not as_json:
            print()
            if reduction:
                tell(none=["visual tokens: none"])
        if reduction and show is not None:
            kept_picture(chat, reduction.prefills[0], methods).save(show, format="PNG")
        if not as_json:
            return
        seconds = {
            "load": after_load - began,
            "media": media_s,
            "prefill": answer.prefill_s,
            "decode": answer.decode_s,
        }
        tokens = {"prompt": answer.prompt_tokens, "visual": answer.visual_tokens, "new": answer.new_tokens}
        said: dict[str, Any] = {
            "answer": answer.text,
            "tokens": tokens,
            "seconds": {k: round(v, 4) for k, v in seconds.items()},
        }
        if reduction and methods:
            said["prune"] = costs_of_first(reduction)
        if spec and chat.cache:
            said["kv"] = {"kv": kv_text(spec)} | costs(chat.cache).as_json()
        print(json.dumps(said))


@app.command("import")
def import_(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder or Hugging Face name of a LLaVA (1.5, NeXT, OneVision) or InternVL model, or a folder in "
            "VILA's layout.",
            metavar="SOURCE",
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write; new or empty.", metavar="OUT")],
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32. Default: as the checkpoint says.")
    ] = None,
) -> None:
    """Write a checkpoint of others as a model of this package."""
    _check_folder(source)
    if dtype not in (None, "bfloat16", "float16", "float32"):
        raise typer.BadParameter(f"--dtype {dtype}: accepted: bfloat16, float16, float32")
    _quiet_libraries()
    from .vlm.checkpoints import import_checkpoint

    model, processor = import_checkpoint(source, out, dtype or "auto")
    config, tokens = model.config, processor.tokens_per_image()
    print(
        f"{config.vision_config.model_type} > {config.projector} > {config.text_config.model_type}, tiling "
        f"{config.tiling}, {tokens:,} tokens for an image of one tile, in {out}"
    )


@app.command()
def export(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(help="Folder to write; new or empty.", metavar="OUT")],
    format: Annotated[
        ExportFormat,
        typer.Option(
            help="code: with this project's model code (trust_remote_code). stock: an architecture of transformers. "
            "vila: VILA's folders."
        ),
    ] = ExportFormat.code,
    quant: Annotated[
        str | None, typer.Option(help="Quantise the LLM's layers: w4a16, w4a16:group=64, w8a8 or w4a8.")
    ] = None,
    tower_quant: Annotated[str | None, typer.Option(help="Quantise the vision tower's layers: w8a8.")] = None,
) -> None:
    """Write a model so that transformers loads it without this package.

    With --quant or --tower-quant its weights are quantised, which only --format code takes.
    """
    schemes = _schemes(quant, tower_quant, "--quant", "--tower-quant")
    if schemes and format != ExportFormat.code:
        raise typer.BadParameter(f"--format {format.value} takes no quantised weights; accepted: --format code")
    _check_folder(model)
    _quiet_libraries()
    from .vlm.checkpoints import load
    from .vlm.export import export as write
    from .vlm.quantised_weights import quantise, weight_bytes

    loaded, processor = load(model)
    before = weight_bytes(loaded)
    if schemes:
        quantise(loaded, **schemes)
    write(loaded, processor, out, format=format.value)
    print(f"{format.value} export in {out}")
    if schemes:
        print(f"weights {weight_bytes(loaded) / 1e6:.3g} MB of {before / 1e6:.3g} MB")


@app.command("eval")
def evaluate(
    model: ModelArgument,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="glyphs: the embedded data's tasks (the default). rows: rows of glyphs sorted, for models of "
            "`sort-row`. needles: one frame of a long clip; haystack: a grid of depths and numbers of frames, on mp4 "
            "files, both for models of `needle`. shots: names learned from the prompt's examples, for models of "
            "`in-context`. text: loss on held-out text, for models of `text-retention`. lmms:NAME: a task of "
            "lmms-eval; may be given several times."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for metrics.json, and a report or picture. Default: only printed.")
    ] = None,
    n: Annotated[
        int | None, typer.Option(min=1, help="Questions a task; of haystack a cell. Default: the task's own.")
    ] = None,
    split: Annotated[Split, typer.Option(help="Whose digit images are shown; test is held out.")] = Split.test,
    frames: Annotated[
        list[int] | None,
        typer.Option(min=4, help="Of each clip, with needles, haystack (may be given several times) and lmms:NAME."),
    ] = None,
    depths: Annotated[
        int | None, typer.Option(min=2, help="With haystack: places from the first frame to the last. Default: 8.")
    ] = None,
    needles: Annotated[
        int | None,
        typer.Option(min=1, max=6, help="With haystack: digits in a clip, of different colours. Default: 4."),
    ] = None,
    shots: Annotated[
        list[int] | None, typer.Option(min=0, help="With shots: examples of each class. Default: 0, 1, 2, 4 and 8.")
    ] = None,
    ways: Annotated[int | None, typer.Option(min=2, help="With shots: classes to choose from. Default: 2.")] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="With lmms:NAME: prompts that are asked together. Default: 8.")
    ] = None,
    max_visual_tokens: Annotated[
        int | None, typer.Option(min=1, help="With lmms:NAME: of all media of a question, as of `ask`.")
    ] = None,
    prune: PruneOption = None,
    kv: KVOption = None,
    weights: WeightsOption = None,
    tower_weights: TowerWeightsOption = None,
    ulysses: UlyssesOption = 1,
    ring: RingOption = 1,
) -> None:
    """Measure a model's generated answers on a task, with 95 % intervals and baselines.

    With torchrun several processes share out the questions, or with --ulysses and --ring each sequence.
    """
    from .eval.dispatch import LMMS, check_task, run_task

    tasks = task or ["glyphs"]
    grid: dict[str, Any] = {"depths": depths, "needles": needles, "shots": shots, "ways": ways}
    limits: dict[str, Any] = {"batch": batch, "max_visual_tokens": max_visual_tokens}
    try:
        kind = check_task(tasks, frames=frames, prune=prune, kv=kv, **grid, **limits)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    methods, spec, schemes = _methods(prune), _kv(kv), _schemes(weights, tower_weights)
    from .vlm.parallel.inference import sequence_parallel

    with _processes(ulysses, ring, "eval") as (topology, device):
        console = Console(quiet=topology.rank > 0)
        if kind == LMMS:  # it loads the model itself
            from .eval.lmms_run import run_lmms

            _check_folder(model)
            _quiet_libraries()
            names = [name.removeprefix(LMMS) for name in tasks]
            run_lmms(
                model, names, out, n, console, split.value, batch or 8, topology, prune=prune or (), kv=kv,
                frames=frames[0] if frames else None, max_visual_tokens=max_visual_tokens, weights=weights,
                tower_weights=tower_weights, device=device,
            )  # fmt: skip
            return
        with _all_or_none(topology):
            loaded, processor = _load(model, schemes, device)
        with sequence_parallel(loaded, topology):
            run_task(
                kind, loaded, processor, out, n, split.value, console, methods, spec, topology, frames=frames or (),
                **grid,
            )  # fmt: skip


@app.command()
def frontier(
    models: Annotated[
        list[str], typer.Argument(help="Folders of models; several are seeds of one recipe.", metavar="MODEL...")
    ],
    task: Annotated[
        FrontierTask,
        typer.Option(help="rows: models of `sort-row`. glyphs, clips: the quickstart's. needles: models of `needle`."),
    ] = FrontierTask.rows,
    out: Annotated[
        Path, typer.Option(help="Folder for results, picture and answers; a run that was stopped goes on there.")
    ] = Path("runs/frontier"),
    n: Annotated[
        int, typer.Option(min=2, help="Test questions of each model, which what is told is measured on.")
    ] = 1000,
    n_dev: Annotated[
        int | None,
        typer.Option("--n-dev", min=1, help="Questions of the dev split, which choose. Default: half of --n."),
    ] = None,
    n_claims: Annotated[
        int | None,
        typer.Option(
            "--n-claims", min=1, help="Test questions for the best method and the KV stores alone. Default: --n."
        ),
    ] = None,
    prune: Annotated[
        list[str] | None,
        typer.Option(help="Pruning methods by name, such as fastv. Default: all that apply.", metavar="NAME"),
    ] = None,
    keep: Annotated[
        list[float] | None,
        typer.Option(help="Fractions of the visual tokens. Default: 0.75, 0.5, 0.25 and 0.1.", metavar="FRACTION"),
    ] = None,
    kv: Annotated[
        list[str] | None,
        typer.Option(help="KV caches, besides the dense one, as of `ask`. Default: int8, int4, int2 and mixtures."),
    ] = None,
    frames: Annotated[int | None, typer.Option(min=4, help="With --task needles: of each clip. Default: 64.")] = None,
) -> None:
    """Draw accuracy over a prefill's FLOPs and the KV cache's bytes, of pruning methods, budgets and KV stores.

    Prints the Pareto set: what nothing else beats at once in accuracy, FLOPs and bytes.
    """
    if frames is not None and task != FrontierTask.needles:
        raise typer.BadParameter(f"--frames with --task {task.value}; accepted: --task needles")
    from .eval.frontier import run_frontier
    from .eval.prune import KEEPS

    loaded = [(model.float(), processor) for model, processor in (_load(name, {}, None) for name in models)]
    run_frontier(
        loaded, task.value, out, n, Console(), names=models, pruners=prune or (), keeps=keep or KEEPS, kv=kv or (),
        frames=frames or 64, n_dev=n_dev, n_claims=n_claims,
    )  # fmt: skip


@app.command()
def duo(
    model: ModelArgument,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            help="How gates are trained, for example steps=500 window=64 lengths=500/4000.", metavar="[FIELD=VALUE]..."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="File to write, for --kv duo:heads=FILE.")] = Path("heads.json"),
    data: Annotated[
        DuoData, typer.Option(help="passkeys: random texts with passkeys. needles: clips, for models of `needle`.")
    ] = DuoData.passkeys,
) -> None:
    """Find the KV heads that need the whole context, by DuoAttention's gates; others keep a window (--kv duo).

    MODEL is one of Foveate's, or a transformers LLM or VLM such as Llama or Qwen2.
    """
    _check_folder(model)
    _quiet_libraries()
    from .train.duo import DuoSettings, identify_heads
    from .vlm.spec import read

    try:
        chosen = read("duo:" + ",".join(settings or []), {"duo": DuoSettings}, "settings")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    identify_heads(model, out, chosen, data.value, Console())


def _methods(texts: list[str] | None) -> list[Any]:
    """The methods that --prune names."""
    if not texts:
        return []
    _quiet_libraries()
    from .vlm.pruning import parse_method

    try:
        return [parse_method(text) for text in texts]
    except ValueError as error:
        raise typer.BadParameter(f"--prune: {error}") from error


def _kv(text: str | None) -> Any:
    """How keys and values are kept, as --kv says."""
    if text is None:
        return None
    _quiet_libraries()
    from .vlm.cache.parse import parse_kv

    try:
        return parse_kv(text)
    except ValueError as error:
        raise typer.BadParameter(f"--kv: {error}") from error


def _schemes(
    weights: str | None, tower: str | None, option: str = "--weights", tower_option: str = "--tower-weights"
) -> dict[str, Any]:
    """How weights are quantised, as two options say: arguments of `quantise`."""
    given = [("weights", weights, option), ("tower_weights", tower, tower_option)]
    if not any(text for _, text, _ in given):
        return {}
    _quiet_libraries()
    from .vlm.quantised_weights import SCHEMES, TOWER_SCHEMES, parse_scheme

    schemes = {}
    for (part, text, name), accepted in zip(given, (SCHEMES, TOWER_SCHEMES), strict=True):
        try:
            schemes[part] = None if text is None else parse_scheme(text, accepted)
        except ValueError as error:
            raise typer.BadParameter(f"{name}: {error}") from error
    return schemes


def _load(
    model: str, schemes: dict[str, Any], device: str | None
) -> "tuple[FoveateForConditionalGeneration, FoveateProcessor]":
    """Loads a model from a folder or by name, its weights quantised as `_schemes` says."""
    _check_folder(model)
    _quiet_libraries()
    from .vlm.chat import load_model

    return load_model(model, device, **schemes)


@contextmanager
def _processes(ulysses: int, ring: int, command: str, waits: bool = False) -> "Iterator[tuple[Topology, str | None]]":
    """Joins the processes that torchrun started, and tells this one's place among them and its device, if it has one.

    What all of them fail with is told by the first one, what a group fails with alone by its first.

    Args:
        command: `eval` may have several groups of processes that share a sequence, `ask` one.
        waits: whether a person may let the others wait.
    """
    degree, launched = ulysses * ring, int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")))
    start = f"torchrun --nproc-per-node {degree} --no-python -- foveate {command} ..."  # or it would read --n itself
    if degree > launched or launched % degree or (command == "ask" and launched != degree):
        many = f"{'a multiple of ' if command == 'eval' else ''}{degree} process{'es' if degree > 1 else ''}"
        raise typer.BadParameter(
            f"--ulysses {ulysses} --ring {ring} are for {many}, but there {'is' if launched == 1 else 'are'} "
            f"{launched}; accepted: {start}"
        )
    if launched == 1:
        from .vlm.parallel.topology import Topology

        yield Topology(), None
        return
    from .train.distributed import init_world
    from .train.peers import ProcessLostError
    from .vlm.parallel.topology import make_topology

    rank = 0
    try:
        with init_world(timeout_s=WEEK_S if waits else 1800, advice="") as world:
            rank = world.rank
            try:
                yield make_topology(ulysses, ring), str(world.device)
            except KeyboardInterrupt:
                if not rank:
                    print("stopped", file=sys.stderr, flush=True)
                os._exit(STOPPED)  # at once: the others are told to stop, too, and answer no more
            except (UsageError, ValueError, OSError):
                if rank:  # where the first one fails alike, it tells, and a launcher then ends all
                    time.sleep(SILENT_S)
                if rank % degree:
                    raise typer.Exit(2) from None
                raise
    except RuntimeError as error:
        if isinstance(error, ProcessLostError | typer.Exit):
            raise
        raise RuntimeError(f"rank {rank}: {error}") from error


def _check_folder(model: str) -> None:
    """Raises where a model is named that is no folder and can be no name."""
    if not os.path.isdir(model) and (
        os.path.exists(model) or model.startswith((".", "/", "~")) or model.count("/") > 1
    ):
        raise typer.BadParameter(f"{model}: no such folder")


def _quiet_libraries() -> None:
    """Leaves out transformers' progress bars for files on disk (not for downloads), and DeepSpeed's word that it found
    no GPU."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    enable_progress_bars()
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


def _split_question(arguments: list[str]) -> tuple[list[str], str | None]:
    """Files come first; a last argument that is no file is the question."""
    if not arguments:
        return [], None
    *first, last = arguments
    missing = [path for path in first if not os.path.exists(path)]
    if missing:
        raise typer.BadParameter(f"{missing[0]}: no such file")
    if os.path.exists(last):  # Path.exists would raise on a long question
        return arguments, None
    if " " not in last.strip() and Path(last).suffix:
        raise typer.BadParameter(f"{last}: no such file")
    return first, last


def _all_or_none(topology: "Topology") -> AbstractContextManager[None]:
    """What fails on one process within it, fails on all."""
    from .vlm.parallel.inference import together

    return together(None) if topology.size > 1 else nullcontext()


def _read_question(topology: "Topology") -> str | None:
    """A question from the first process's prompt; None at its end (Ctrl-D, or `exit`)."""
    if topology.size == 1:
        return _read_line()
    import torch.distributed as dist

    read = [_read_line() if topology.rank == 0 else None]
    dist.broadcast_object_list(read, src=0)
    return read[0]


def _read_line() -> str | None:
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        if line in ("exit", "quit"):
            return None
        if line:
            return line


def main() -> None:
    """Runs the command: 0 when done, 2 and one line for what the user can mend, 130 after Ctrl-C."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        code = app(args=arguments or ["--help"], standalone_mode=False) or 0
    except UsageError as error:
        command = getattr(getattr(error, "ctx", None), "command_path", "foveate")
        if int(os.environ.get("RANK", "0")):  # the command line is the same on all
            time.sleep(SILENT_S)
        else:
            message = " ".join(error.format_message().split())
            print(f"{command}: {message} ({command} --help says more)", file=sys.stderr)
        code = 2
    except BrokenPipeError:  # what reads our output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python writes the rest to it on exit
        code = 1
    except Exception as error:
        if debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ValueError | OSError | RuntimeError):
            print(f"foveate: {message}", file=sys.stderr)
        else:
            print(f"foveate: {type(error).__name__}: {message} (--debug shows where)", file=sys.stderr)
        code = 2 if isinstance(error, ValueError | OSError) else 1
    if code == STOPPED and int(os.environ.get("RANK", "0")) == 0:
        print("stopped", file=sys.stderr)
    sys.exit(code)
