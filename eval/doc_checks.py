"""Whether the documentation's figures and tables are those of the committed results: `foveate report --docs`."""

import io
import re
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from .figures import (
    DOCS,
    FIGURES,
    ILLUSTRATIONS,
    README,
    RESULTS_PAGE,
    TABLES,
    contents_of,
    drawn,
    made_from,
    make,
    same_picture,
    software,
    with_tables,
)
from .results import load_results


def report_docs(check: bool, docs: Path = DOCS) -> bool:
    """Makes figures and tables anew, or only looks; prints what changed, and what is wrong.

    Returns:
        Whether nothing is wrong.

    Raises:
        FileNotFoundError: the package is not in a checkout.
    """
    if not (docs / "results").is_dir():
        raise FileNotFoundError(f"{docs / 'results'}: not there; accepted: foveate installed from a checkout (pip -e)")
    if not check:
        for path in make(docs):
            print(f"made {path.resolve().relative_to(docs.resolve().parent)}")
    wrong = problems(docs, redraw=check)
    for line in wrong:
        print(line)
    if not wrong:
        print(f"{len(FIGURES)} figures and the tables of {len({one.page for one in TABLES})} pages are the results'")
    return not wrong


def problems(docs: Path = DOCS, redraw: bool = True) -> list[str]:
    """What is wrong with the documentation's figures and tables, a line each; nothing is written.

    Args:
        redraw: also draw each figure and compare the pixels, where it was drawn by the same matplotlib.
    """
    return [*_wrong_results(docs), *_wrong_figures(docs, redraw), *_wrong_tables(docs), *_wrong_pictures(docs)]


def _wrong_results(docs: Path) -> Iterator[str]:
    pages = "".join(path.read_text(encoding="utf-8") for path in _pages(docs) if path.name != RESULTS_PAGE)
    for path in sorted((docs / "results").glob("*.json")):
        try:
            load_results(path)
        except ValueError as error:
            yield f"results/{error}"
        if f"results/{path.name}" not in pages:
            yield f"results/{path.name}: no page links to it"


def _wrong_figures(docs: Path, redraw: bool) -> Iterator[str]:
    for figure in FIGURES:
        path = docs / figure.file
        try:
            source = made_from(figure.sources, docs)
            if not path.exists():
                yield f"{figure.file}: not there; `foveate report --docs` draws it"
                continue
            content = path.read_bytes()
            with Image.open(io.BytesIO(content)) as image:
                told = image.info
            if told.get("Source") != source:
                yield f"{figure.file}: drawn from {told.get('Source')}, but the results are now {source}"
            elif redraw and told.get("Software") == software() and not same_picture(content, drawn(figure, docs)):
                yield f"{figure.file}: is drawn otherwise now; `foveate report --docs` draws it"
        except ValueError as error:
            yield f"{figure.file}: {error}"


def _wrong_tables(docs: Path) -> Iterator[str]:
    for tables in TABLES:
        try:
            page = (docs / tables.page).read_text(encoding="utf-8")
            made = tables.make(*contents_of(tables.sources, docs))
        except (OSError, ValueError) as error:
            yield f"{tables.page}: {error}"
            continue
        for mark, table in made.items():
            try:
                if with_tables(page, {mark: table}, tables.page) != page:
                    yield f"{tables.page}: what stands between the marks {mark} is not what the results give"
            except ValueError as error:
                yield str(error)


def _wrong_pictures(docs: Path) -> Iterator[str]:
    """Pictures that nothing says how to make, and links to pictures that are none of ours."""
    made = {figure.file for figure in FIGURES}
    commands = {one.file: one.command for one in ILLUSTRATIONS}
    known = made | set(commands)
    there = {str(path.relative_to(docs)) for path in docs.rglob("*.png")}
    yield from (f"{file}: not registered in eval/figures.py" for file in sorted(there - known))
    yield from (f"{file}: not there" for file in sorted(set(commands) - there))
    shown = set()
    for path in _pages(docs):
        page = " ".join(path.read_text(encoding="utf-8").replace("\\\n", "").split())
        for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page):
            file = target.removeprefix("docs/") if path.parent != docs else target
            shown.add(file)
            if file not in known:
                yield f"{path.name}: {target} is not registered in eval/figures.py"
            elif file in commands and commands[file] not in page:
                yield f"{path.name}: shows {file}, but does not say {commands[file]!r}, which makes it"
    yield from (f"{file}: no page shows it" for file in sorted(known - shown))


def _pages(docs: Path) -> list[Path]:
    return [docs / README, *sorted(docs.glob("*.md"))]
