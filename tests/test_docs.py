"""The documentation's numbers are the committed results."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "quickstart.json"


def publisher():
    spec = importlib.util.spec_from_file_location("publish_quickstart", ROOT / "scripts" / "publish_quickstart.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_numbers_are_the_committed_results() -> None:
    readme = (ROOT / "README.md").read_text()
    block = readme.split("<!-- quickstart -->\n")[1].split("\n<!-- /quickstart -->")[0]
    assert block == publisher().readme_block(json.loads(RESULTS.read_text()))


@pytest.mark.parametrize(
    ("task", "least"),
    [
        ("what_at", 0.95), ("colour_at", 0.95), ("where_is", 0.85), ("row_column", 0.90), ("clip_colour_8", 0.90),
        ("needle_64", 0.90), ("needle_128", 0.80),
    ],
)  # fmt: skip
def test_committed_quickstart_reaches_what_it_must(task: str, least: float) -> None:
    result = json.loads(RESULTS.read_text())["tasks"][task]
    assert result["accuracy"] >= least
    assert result["n"] >= 500
    assert result["low"] <= result["accuracy"] <= result["high"]


def test_committed_quickstart_stays_within_its_budget() -> None:
    results = json.loads(RESULTS.read_text())
    assert sum(stage["seconds"] for stage in results["stages"]) <= 360
    assert results["peak_memory_bytes"] < 4e9
    assert results["packing_waste"] < 0.05
    assert sum(a["answer"] == a["truth"] for a in results["ask"]) >= 3
    for answer in results["ask"]:  # both exports, run by transformers alone, say the same
        assert answer["answer"] == answer["answer_code"] == answer["answer_stock"]


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_links_of_the_documentation_lead_somewhere(page: str) -> None:
    folder = ROOT / "docs"
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (folder / page).read_text()):
        assert (folder / target).exists(), f"{page}: {target}"
