"""Every figure and table of the documentation that shows results, and the results files that each is made from.

`foveate report --docs` makes all of them again from docs/results; `publish` those of one file. A figure carries the
SHA-256 of its files' contents, so that one that was drawn from other results is found without drawing it.
"""

import hashlib
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from . import (
    bench_tables,
    compress,
    findings,
    frontier_report,
    in_context,
    kv_needle,
    kv_quality,
    kv_tables,
    lmms_tables,
    needle_grid,
    parallel_figures,
    prune,
    quickstart,
    retention,
)
from .results import check_results, load_results
from .tables import markdown

DOCS = Path(__file__).resolve().parent.parent / "docs"  # of a checkout; an installed package has none
README = "../README.md"
RESULTS_PAGE = "results.md"
Results = dict[str, Any]  # a results file's content


@dataclass(frozen=True)
class Figure:
    """A picture of results.

    Attributes:
        file: its name in docs.
        sources: names of results files, without `.json`.
        draw: their contents → PNG.
    """

    file: str
    sources: tuple[str, ...]
    draw: Callable[..., bytes]


@dataclass(frozen=True)
class Tables:
    """The parts of a page between marks such as `<!-- points -->` and `<!-- /points -->`, each on a line of its own.

    Attributes:
        page: its path from docs.
        sources: names of results files, without `.json`.
        make: their contents → mark → Markdown.
    """

    page: str
    sources: tuple[str, ...]
    make: Callable[..., dict[str, str]]


@dataclass(frozen=True)
class Illustration:
    """A picture that shows no committed results: what a command makes, as it is said on the page that shows it."""

    file: str
    command: str


FIGURES: tuple[Figure, ...] = (
    Figure("compress.png", ("scale_then_compress",), lambda results: compress.picture(results["variants"])),
    Figure("frontier_clips.png", ("frontier_clips",), frontier_report.picture),
    Figure("frontier_glyphs.png", ("frontier_glyphs",), frontier_report.picture),
    Figure("frontier_needles.png", ("frontier_needles",), frontier_report.picture),
    Figure("frontier_rows.png", ("frontier_rows",), frontier_report.picture),
    Figure("in_context.png", ("in_context",), in_context.draw),
    Figure("kv_needle.png", ("kv_needle",), lambda results: kv_needle.picture(results["points"])),
    Figure("kv_quality.png", ("kv_quality",), lambda results: kv_quality.picture(results["settings"])),
    Figure("needle_grid.png", ("needle_grid",), needle_grid.draw),
    Figure("parallel_balance.png", ("bench_parallel_cpu",), parallel_figures.balance),
    Figure("parallel_costs.png", ("bench_parallel_cpu",), parallel_figures.costs),
    Figure("prune_curves.png", ("prune_curves",), lambda results: prune.picture(results["points"])),
    Figure("text_retention.png", ("text_retention",), retention.picture),
)
TABLES: tuple[Tables, ...] = (
    Tables(README, ("quickstart",), quickstart.tables),
    Tables(README, ("needle_grid", "in_context", "text_retention", "frontier_rows"), findings.tables),
    Tables("benchmarks.md", ("bench_data", "bench_train_tiny"), bench_tables.training),
    Tables("benchmarks.md", ("bench_prefill_cpu",), bench_tables.prefill),
    Tables("benchmarks.md", ("bench_media", "bench_media_no_b_frames"), bench_tables.media),
    Tables("benchmarks.md", ("bench_encode_tiny",), bench_tables.encode),
    Tables("compress.md", ("scale_then_compress",), compress.tables),
    Tables("frontier.md", ("frontier_rows",), frontier_report.tables),
    Tables("frontier.md", ("frontier_glyphs",), frontier_report.tables),
    Tables("frontier.md", ("frontier_clips",), frontier_report.tables),
    Tables("frontier.md", ("frontier_needles",), frontier_report.tables),
    Tables("in_context.md", ("in_context",), in_context.tables),
    Tables("kv.md", ("kv_quality", "kv_needle"), kv_tables.summary),
    Tables("kv.md", ("bench_decode_cpu", "bench_decode_cpu_bf16"), kv_tables.decode),
    Tables("kv.md", ("bench_kernels_cpu",), kv_tables.kernels),
    Tables("kv.md", ("weights_quality",), kv_tables.weights),
    Tables("kv_methods.md", ("duo",), kv_tables.duo),
    Tables("kv_quality.md", ("kv_quality", "kv_quality_rows"), kv_tables.quality),
    Tables("kv_quality.md", ("kv_needle",), kv_needle.tables),
    Tables("lmms.md", ("lmms_local",), lmms_tables.tables),
    Tables("media.md", ("bench_media_memory",), bench_tables.memory),
    Tables("needle.md", ("needle_grid",), needle_grid.tables),
    Tables("parallel.md", ("parallel_needle",), parallel_figures.needle_tables),
    Tables("parallel_costs.md", ("bench_parallel_cpu",), parallel_figures.cost_tables),
    Tables("prune.md", ("prune_curves",), prune.tables),
    Tables("text_retention.md", ("text_retention",), retention.tables),
)
ILLUSTRATIONS = (
    Illustration("inspect.png", "foveate data inspect chat chat.html --processor glyphs --count 12"),
    Illustration(
        "prune_ask.png",
        'foveate ask runs/quickstart/model runs/quickstart/clip.mp4 "what colour is the 6 ?" '
        "--prune evs:keep=0.75 --prune pyramiddrop:layers=2/3,keep=0.5/0.25 --show kept.png",
    ),
    Illustration("quickstart.png", "make quickstart"),
    Illustration("tokens.png", "scripts/draw_tilings.py docs/tokens.png"),
)

SOURCES = tuple(
    sorted({name for one in FIGURES for name in one.sources} | {name for one in TABLES for name in one.sources})
)


def origins(*contents: Results) -> dict[str, str]:
    """By mark: a row for each results file, with the command that prints it and what is made from it; illustrations.

    Args:
        contents: of `SOURCES`.
    """
    rows = []
    for name, content in zip(SOURCES, contents, strict=True):
        figures = [figure.file for figure in FIGURES if name in figure.sources]
        pages = [tables.page for tables in TABLES if name in tables.sources and tables.page != RESULTS_PAGE]
        links = (f"[{file.removeprefix('../')}]({file})" for file in dict.fromkeys([*figures, *pages]))
        rows.append([f"[{name}](results/{name}.json)", f"`{content['command']}`", ", ".join(links)])
    pictures = ([f"[{one.file}]({one.file})", f"`{one.command}`"] for one in ILLUSTRATIONS)
    return {
        "origins": markdown(["results", "printed by", "shown in"], rows),
        "illustrations": markdown(["picture", "made by"], pictures),
    }


TABLES = (*TABLES, Tables(RESULTS_PAGE, SOURCES, origins))


def publish(name: str, results: Results, docs: Path = DOCS) -> None:
    """Writes a results file, and what is made from it alone or with others that are there.

    Args:
        name: of the file, without `.json`.
        results: facts and entries; see `results.py`.

    Raises:
        ResultsError: they are not what a results file must be; nothing is written.
    """
    check_results(results, f"{name}.json")
    (docs / "results").mkdir(parents=True, exist_ok=True)
    (docs / "results" / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    make(docs, [name])


def make(docs: Path = DOCS, sources: Sequence[str] | None = None) -> list[Path]:
    """Draws figures and writes tables anew; files whose content is the same are left alone.

    Args:
        sources: only what is made from one of these results files; all by default.

    Returns:
        The files that changed.

    Raises:
        ResultsError: a results file is missing or wrong.
        ValueError: a page lacks a mark.
    """
    changed = []
    for figure in FIGURES:
        if sources is None or set(sources) & set(figure.sources):
            picture, path = drawn(figure, docs), docs / figure.file
            if not path.exists() or not same_picture(path.read_bytes(), picture):
                path.write_bytes(picture)
                changed.append(path)
    pages: dict[Path, str] = {}
    for tables in TABLES:
        if sources is None or set(sources) & set(tables.sources):
            path = docs / tables.page
            page = pages.get(path) or path.read_text(encoding="utf-8")
            pages[path] = with_tables(page, tables.make(*contents_of(tables.sources, docs)), tables.page)
    for path, page in pages.items():
        if page != path.read_text(encoding="utf-8"):
            path.write_text(page, encoding="utf-8")
            changed.append(path)
    return changed


def with_tables(page: str, tables: dict[str, str], name: str = "page") -> str:
    """A Markdown page with what stands between its marks made anew.

    Args:
        name: of the page, for errors.

    Raises:
        ValueError: a mark is not there exactly once.
    """
    for mark, table in tables.items():
        start, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->\n"
        parts = re.split(f"^({re.escape(start)}|{re.escape(end)})", page, flags=re.MULTILINE)
        if parts[1::2] != [start, end]:
            raise ValueError(f"{name}: {start.strip()} and {end.strip()} must be there once, each a line of its own")
        page = f"{parts[0]}{start}{table}\n{end}{parts[4]}"
    return page


def contents_of(sources: Sequence[str], docs: Path) -> list[Results]:
    return [load_results(docs / "results" / f"{name}.json") for name in sources]


def made_from(sources: Sequence[str], docs: Path) -> str:
    """What a figure carries: its files, and the SHA-256 of each one's content (however it is laid out)."""
    told = []
    for name, content in zip(sources, contents_of(sources, docs), strict=True):
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        told.append(f"{name}.json sha256 {hashlib.sha256(canonical.encode()).hexdigest()}")
    return ", ".join(told)


def software() -> str:
    return f"matplotlib {matplotlib.__version__}"


def drawn(figure: Figure, docs: Path) -> bytes:
    """The figure as PNG, with what it was made from and by."""
    about = PngInfo()
    about.add_text("Source", made_from(figure.sources, docs))
    about.add_text("Software", software())
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(figure.draw(*contents_of(figure.sources, docs)))) as image:
        image.convert("RGB").save(buffer, "PNG", pnginfo=about, optimize=True)
    return buffer.getvalue()


def same_picture(first: bytes, second: bytes) -> bool:
    """Whether two PNGs have the same pixels and tell the same of themselves."""
    with Image.open(io.BytesIO(first)) as one, Image.open(io.BytesIO(second)) as other:
        told = [(image.size, image.info.get("Source"), image.info.get("Software")) for image in (one, other)]
        return told[0] == told[1] and np.array_equal(np.asarray(one.convert("RGB")), np.asarray(other.convert("RGB")))
