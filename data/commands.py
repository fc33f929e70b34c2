"""The command `foveate data`: makes shards, checks them, and shows what is in a source."""

import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from ..vlm.processor import FoveateProcessor

app = typer.Typer(help="Make shards, check them, and see what is in a source of documents.", rich_markup_mode=None)

FAILED = 1  # the exit code of a check that found something
PROCESSOR_HELP = (
    "Folder or Hugging Face name of a Foveate model, whose processor is used; 'glyphs' for the embedded language's."
)

SourceArgument = Annotated[
    str,
    typer.Argument(
        help="Tar shards, a .json or .jsonl file, a Hugging Face dataset on disk, or embedded data, glyphs:KIND.",
        metavar="SOURCE",
    ),
]
FolderArgument = Annotated[
    Path, typer.Argument(help="Folder with .tar shards.", metavar="DIR", exists=True, file_okay=False)
]
ProcessorOption = Annotated[str | None, typer.Option(help=PROCESSOR_HELP)]
MediaRootOption = Annotated[
    Path | None, typer.Option(help="Folder that names of media start from and must not leave. Default: the data's.")
]
SubsetOption = Annotated[Path | None, typer.Option(help="Subset index file, as `data prune` writes it.")]
WorkersOption = Annotated[int | None, typer.Option(min=1, help="Processes. Default: the CPUs, 8 at most.")]


class Kind(StrEnum):
    auto = "auto"
    folder = "folder"
    json = "json"
    dataset = "dataset"
    glyphs = "glyphs"


class Format(StrEnum):
    auto = "auto"
    interleaved = "interleaved"
    chat = "chat"
    caption = "caption"
    text = "text"


FramesOption = Annotated[
    int | None, typer.Option(min=1, help="Frames to take of each video. Default: the processor's.")
]
MaxImagesOption = Annotated[
    int | None, typer.Option(min=0, help="Most images of an interleaved page that are kept. Default: 6.")
]
FormatOption = Annotated[Format, typer.Option(help="Layout of the records; auto tells it by their fields.")]


@app.command()
def make(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of images and videos with a .txt or .json of the same name; a .json list or .jsonl; a "
            "dataset on disk or .parquet files; or embedded data, glyphs:captions?documents=200.",
            metavar="SOURCE",
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder of the shards; new, or of a run that stopped.", metavar="OUT")],
    kind: Annotated[Kind, typer.Option(help="What SOURCE is; auto tells it by what lies there.")] = Kind.auto,
    documents_per_shard: Annotated[int | None, typer.Option(min=1, help="Default: 1000.")] = None,
    megabytes_per_shard: Annotated[
        float | None, typer.Option(help="About how large a shard shall be, instead of a number of documents.")
    ] = None,
    workers: WorkersOption = None,
    media_root: MediaRootOption = None,
    max_bad_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Of all documents, how many may be refused.")
    ] = 0.01,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check shards that are there already by SHA-256, not by size alone.")
    ] = False,
) -> None:
    """Write webdataset shards; a run that was stopped or killed goes on where it was."""
    from rich.filesize import decimal
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from .inputs import open_input
    from .writing import make_shards

    _quiet_datasets()
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task("reading", total=None)
            opened = open_input(source, kind.value, media_root)

            def show(done: int, total: int) -> None:
                progress.update(bar, description="documents", completed=done, total=total)

            made = make_shards(
                opened,
                out,
                documents_per_shard,
                megabytes_per_shard,
                _workers(workers),
                max_bad_fraction,
                verify,
                show,
            )
    except KeyboardInterrupt:
        shards = len(list(out.glob("shard-*.tar.json")))
        print(f"{shards} shards in {out} are whole; the same command goes on with the others", file=sys.stderr)
        raise
    index = made.index
    counts = [f"{index.documents:,} documents"]
    counts += [f"{index.counts[name]:,} {name}" for name in ("images", "videos") if index.counts[name]]
    size = sum(shard.bytes for shard in index.shards)
    before = f" ({made.found} were there)" if made.found else ""
    print(f"{', '.join(counts)}, {decimal(size)} in {len(index.shards)} shards{before} in {out}")
    if made.refused:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in made.refused.most_common())
        print(f"refused: {reasons}; listed in {out / 'refused.jsonl'}")


@app.command()
def index(folder: FolderArgument) -> None:
    """Write offsets and index.json for shards that were made elsewhere; they can then be opened at once."""
    from .shards import index_folder

    found = index_folder(folder)
    print(f"{found.documents:,} documents in {len(found.shards)} shards; index in {folder / 'index.json'}")


@app.command("verify")
def check(folder: FolderArgument) -> None:
    """Compare every shard with its checksum in index.json; exit code 1 and a list where one is damaged."""
    from .shards import ShardIndex, verify

    damaged = verify(folder)
    shards = len(ShardIndex.read(folder).shards)
    for line in damaged:
        print(line)
    print(f"{shards - len(damaged)} of {shards} shards are as index.json says")
    if damaged:
        raise typer.Exit(FAILED)


@app.command()
def inspect(
    source: SourceArgument,
    out: Annotated[Path, typer.Argument(help="The page to write.", metavar="OUT.html")],
    processor: ProcessorOption = None,
    count: Annotated[int, typer.Option(min=1, help="Documents to show, drawn at random.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    format: FormatOption = Format.auto,
    max_images: MaxImagesOption = None,
    frames: FramesOption = None,
    media_root: MediaRootOption = None,
    subset: SubsetOption = None,
) -> None:
    """Show documents on a page: media as the model sees them, tokens, and where loss falls."""
    from .inputs import open_data
    from .inspection import inspect_page

    loaded = load_processor(processor, source)
    opened = open_data(source, loaded, **_options(format, max_images, frames, media_root, subset))
    page = inspect_page(opened, source, loaded, count, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    print(f"page in {out}")


@app.command()
def stats(
    source: SourceArgument,
    processor: ProcessorOption = None,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Read so many evenly spread documents. Default: all.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for statistics.json and statistics.png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    workers: WorkersOption = None,
    format: FormatOption = Format.auto,
    max_images: MaxImagesOption = None,
    frames: FramesOption = None,
    media_root: MediaRootOption = None,
    subset: SubsetOption = None,
) -> None:
    """Count documents, tokens, images and frames, and documents that can't be used, by reason."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from .inputs import open_data
    from .statistics import measure, print_statistics, write_statistics

    loaded = load_processor(processor, source)
    opened = open_data(source, loaded, **_options(format, max_images, frames, media_root, subset))
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("documents")

        def show(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        found = measure(opened, loaded, sample, _workers(workers), show)
    if out is not None:
        write_statistics(found, source, out)
    if as_json:
        print(json.dumps({"source": source} | found.summary()))
        return
    print_statistics(found, Console())
    if out is not None:
        print(f"\nstatistics.json and statistics.png in {out}")


def _options(
    format: Format, max_images: int | None, frames: int | None, media_root: Path | None, subset: Path | None
) -> dict[str, Any]:
    """What is given of `open_source`'s options."""
    given = {
        "format": None if format is Format.auto else format.value,
        "max_images": max_images,
        "frames": frames,
        "media_root": media_root,
        "subset": subset,
    }
    return {name: value for name, value in given.items() if value is not None}


def _workers(given: int | None) -> int:
    return given or min(8, os.cpu_count() or 1)


def _quiet_datasets() -> None:
    """The datasets library reports files in memory as work in progress; our own bar does it."""
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()


def load_processor(name: str | None, source: str) -> "FoveateProcessor":
    """The processor that is named; the embedded language's for the embedded data."""
    from transformers import AutoProcessor

    from ..vlm.processor import FoveateProcessor
    from .inputs import GLYPHS, embedded_processor

    if name == "glyphs" or (name is None and source.startswith(GLYPHS)):
        return embedded_processor()
    if name is None:
        raise typer.BadParameter(f"--processor is not given; accepted: {PROCESSOR_HELP[0].lower()}{PROCESSOR_HELP[1:]}")
    if not os.path.isdir(name) and (os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise typer.BadParameter(f"{name}: no such folder")
    loaded = AutoProcessor.from_pretrained(name)
    if not isinstance(loaded, FoveateProcessor):
        raise typer.BadParameter(f"{name} holds a {type(loaded).__name__}; accepted: a model of Foveate")
    return loaded
