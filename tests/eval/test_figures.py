"""What a results file must be, and that the documentation's figures and tables are made from such files."""

import io
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foveate.eval import bench_tables, doc_checks, figures, kv_tables, parallel_figures
from foveate.eval.doc_checks import problems
from foveate.eval.facts import result, run_facts
from foveate.eval.results import ResultsError, check_results, find, load_results
from foveate.eval.tables import markdown

ROOT = Path(__file__).resolve().parent.parent.parent


# Results files


def content(*entries: dict[str, Any], **more: Any) -> dict[str, Any]:
    facts = run_facts("foveate bench media --json") | {"commit": "0123456789abcdef" * 2 + "01234567"}
    return facts | {"results": list(entries)} | more


PLAIN = result("plain", 4.0, "s", 3, low=3.5, high=4.5)
FAST = result("fast", 1.0, "s", 3, baseline="plain", ratio=0.25)


def test_what_the_package_writes_is_accepted() -> None:
    check_results(content(PLAIN, FAST), "a.json")
    groups = [{"setting": "full", "results": [PLAIN]}, {"setting": "own", "results": [PLAIN | {"baseline": "full"}]}]
    check_results(content() | {"results": None, "points": groups}, "a.json")
    task = {"accuracy": 0.5, "n": 2, "low": 0.1, "high": 0.9, "chance": 0.25, "majority": 0.5}
    check_results({k: v for k, v in content().items() if k != "results"} | {"tasks": {"what": task}}, "a.json")


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (PLAIN | {"value": float("nan")}, r"a.json: results\[0\].value: .*finite"),
        (PLAIN | {"value": True}, r"a.json: results\[0\].value: "),
        (PLAIN | {"n": 0}, r"a.json: results\[0\].n: .*greater than or equal to 1"),
        (PLAIN | {"n": 2.5}, r"a.json: results\[0\].n: "),
        (PLAIN | {"unit": "parsecs"}, r"a.json: results\[0\]: unit is 'parsecs'; accepted: .*'bytes'"),
        (PLAIN | {"low": 4.1}, r"a.json: results\[0\]: value is 4.0 with low 4.1 and high 4.5"),
        ({k: v for k, v in PLAIN.items() if k != "high"}, r"a.json: results\[0\]: low is 3.5 and high None"),
        ({k: v for k, v in PLAIN.items() if k != "unit"}, r"a.json: results\[0\].unit: Field required"),
        (PLAIN | {"speed": 3}, r"a.json: results\[0\].speed: Extra inputs"),
        (PLAIN | {"ratio": 0.5}, r"a.json: results\[0\]: ratio without a baseline"),
        (PLAIN | {"baseline": "slow"}, r"a.json: results: plain: baseline is 'slow'; accepted: the name of an entry"),
        (PLAIN | {"p": 1.5}, r"a.json: results\[0\].p: .*less than or equal to 1"),
    ],
)
def test_bad_entries_are_refused_by_file_and_field(entry: dict[str, Any], told: str) -> None:
    with pytest.raises(ResultsError, match=told):
        check_results(content(entry), "a.json")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"commit": "main"}, "a.json: commit: "),
        ({"commit": None}, "a.json: commit: "),
        ({"date": "yesterday"}, "a.json: date: "),
        ({"device": ""}, "a.json: device: "),
        ({"versions": {"python": "3.11"}}, "a.json: versions lack foveate"),
        ({"results": []}, "a.json: no entries"),
        ({"results": [PLAIN, PLAIN]}, "a.json: results: 'plain' is the name of several entries"),
        ({"results": [PLAIN, FAST | {"ratio": 0.26}]}, r"a.json: results: fast: ratio is 0.26, but .* 1.0 / 4.0"),
        ({"points": [{"tests": [PLAIN | {"n": -1}]}]}, r"a.json: points\[0\].tests\[0\].n: "),
        ({"tasks": {"what": {"accuracy": 1.1}}}, "a.json: tasks.what.accuracy: "),
    ],
)
def test_bad_files_are_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ResultsError, match=told):
        check_results(content(PLAIN, FAST) | change, "a.json")


def test_ratio_to_another_group_is_checked_where_both_are_of_the_same_questions() -> None:
    def groups(n: int, ratio: float) -> dict[str, Any]:
        own = result("plain", 2.0, "s", n, baseline="full", ratio=ratio)
        return content() | {"points": [{"curve": "full", "results": [PLAIN]}, {"curve": "own", "results": [own]}]}

    check_results(groups(3, 0.5) | {"results": None}, "a.json")
    check_results(groups(2, 0.4) | {"results": None}, "a.json")  # of fewer questions: the baseline's own are not told
    with pytest.raises(ResultsError, match=r"points\[1\].results: plain: ratio is 0.4"):
        check_results(groups(3, 0.4) | {"results": None}, "a.json")


def test_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ResultsError, match=r"bad.json: no JSON"):
        load_results(tmp_path / "bad.json")
    with pytest.raises(ResultsError, match=r"none.json: No such file"):
        load_results(tmp_path / "none.json")


def test_entry_is_found_by_its_name() -> None:
    assert find([PLAIN, FAST], "fast") is FAST
    with pytest.raises(KeyError, match="no entry 'slow'; there are plain, fast"):
        find([PLAIN, FAST], "slow")


# Tables


def test_only_what_stands_between_the_marks_is_written() -> None:
    for old in ("", "old\n", "old\n\nold\n"):
        page = f"a <!-- points -->\n<!-- points -->\n{old}<!-- /points -->\n<!-- points 2 -->\nb\n"
        made = figures.with_tables(page, {"points": "new"})
        assert made == "a <!-- points -->\n<!-- points -->\nnew\n<!-- /points -->\n<!-- points 2 -->\nb\n"


@pytest.mark.parametrize("page", ["", "<!-- t -->\n", "<!-- /t -->\n<!-- t -->\n", "<!-- t -->\n<!-- /t -->\n" * 2])
def test_page_without_its_marks_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match=r"a.md: <!-- t --> and <!-- /t --> must be there once"):
        figures.with_tables(page, {"t": "x"}, "a.md")


def test_table_of_uneven_rows_is_refused() -> None:
    assert markdown(["a", ""], [["1", ""]]) == "| a | |\n|---|---|\n| 1 | |"
    with pytest.raises(ValueError, match="a row of 1 cells under 2 columns"):
        markdown(["a", "b"], [["1"]])


def test_steps_have_three_digits() -> None:
    seconds = {8: 0.2814, 16: 9.996, 32: 1291.7}
    entries = [result(f"step_P{ranks}_S64K_2d_gqa", value, "s", 1) for ranks, value in seconds.items()]
    found = bench_tables.by_name(content(*entries))
    assert [parallel_figures._step(one, seconds=True) for one in found.values()] == ["0.281 s", "10.0 s", "1,292 s"]
    assert parallel_figures._step(None, seconds=True) == "–"


def test_memory_table_is_in_megabytes() -> None:
    peaks = {"encode_8_frames_peak": 5e8, "encode_8_frames_beyond_result": 4e8, "load_8_frames_peak": 2.5e9}
    peaks |= {"load_8_frames_beyond_result": 1e6}
    made = bench_tables.memory(content(*(result(name, value, "bytes", 1) for name, value in peaks.items())))["memory"]
    assert made.splitlines()[2:] == ["| 8 | 500 MB | 400 MB | 2,500 MB | 1 MB |"]


def test_a_column_of_the_heads_table_is_a_seed() -> None:
    seeds = [
        {"seed": seed, "identified": 1, "gates": [[1, 0], [0, 0]], "results": [PLAIN | {"value": 4.0 + seed / 8}]}
        for seed in range(2)
    ]
    assert kv_tables.duo({"seeds": seeds})["duo"].splitlines() == [
        "| | seed 0, 1 of 4 heads identified | seed 1, 1 of 4 heads identified |",
        "|---|---|---|",
        "| plain | **4.000** (3.500 – 4.500) | **4.125** (3.500 – 4.500) |",
    ]


# The documentation: every change below is found


@cache
def committed() -> list[str]:
    return problems(ROOT / "docs", redraw=False)


def new_problems(docs: Path) -> list[str]:
    """Those that the committed documentation doesn't have; tests/test_docs.py sees to it that it has none."""
    return [one for one in problems(docs, redraw=False) if one not in committed()]


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """A copy of the documentation; what is no page, picture or result isn't copied."""
    shutil.copyfile(ROOT / "README.md", tmp_path / "README.md")
    keep = shutil.ignore_patterns("*.mp4", "*.html")
    return Path(shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=keep))


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    changed = json.loads(path.read_text())
    change(changed)
    path.write_text(json.dumps(changed))


def longer_training(results: dict[str, Any]) -> None:
    results["variants"][0]["training_seconds"] += 100


def nothing_learned(results: dict[str, Any]) -> None:
    results["variants"][0]["results"][0]["value"] = 0.0


def test_other_results_are_found_and_made_anew(docs: Path) -> None:
    rewrite(docs / "results" / "scale_then_compress.json", longer_training)
    found = new_problems(docs)
    assert len(found) == 2 and found[0].startswith("compress.png: drawn from scale_then_compress.json sha256 ")
    assert found[1] == "compress.md: what stands between the marks images is not what the results give"
    before = (docs / "compress.png").read_bytes()
    changed = figures.make(docs, ["scale_then_compress"])
    assert [path.name for path in changed] == ["compress.png", "compress.md"]
    assert new_problems(docs) == []
    with Image.open(io.BytesIO(before)) as old, Image.open(docs / "compress.png") as new:
        assert np.array_equal(old.convert("RGB"), new.convert("RGB"))  # seconds are in the table alone


def test_layout_of_a_results_file_does_not_matter(docs: Path) -> None:
    rewrite(docs / "results" / "scale_then_compress.json", lambda results: None)  # in one line now
    assert new_problems(docs) == []


def test_wrong_results_are_found(docs: Path) -> None:
    rewrite(docs / "results" / "scale_then_compress.json", nothing_learned)
    told = "scale_then_compress.json: variants[0].results[0]: value is 0.0 with low"
    assert new_problems(docs)[0].startswith(f"results/{told} 0.2")
    (docs / "results" / "scale_then_compress.json").unlink()
    told = "scale_then_compress.json: No such file or directory; accepted: a results file"
    assert {f"compress.png: {told}", f"compress.md: {told}"} <= set(new_problems(docs))


def test_missing_strange_and_unexplained_pictures_are_found(docs: Path) -> None:
    (docs / "prune_curves.png").unlink()
    (docs / "quickstart.png").unlink()
    shutil.copyfile(docs / "tokens.png", docs / "strange.png")
    for page, old, new in (
        ("kv_quality.md", "(kv_needle.png)", "(needle.png)"),
        ("tokens.md", "scripts/draw_tilings.py docs/tokens.png", "a script"),
    ):
        text = (docs / page).read_text()
        assert old in text
        (docs / page).write_text(text.replace(old, new))
    shutil.copyfile(docs / "results" / "duo.json", docs / "results" / "unread.json")
    assert new_problems(docs) == [
        "results/unread.json: no page links to it",
        "prune_curves.png: not there; `foveate report --docs` draws it",
        "strange.png: not registered in eval/figures.py",
        "quickstart.png: not there",
        "kv_quality.md: needle.png is not registered in eval/figures.py",
        "tokens.md: shows tokens.png, but does not say 'scripts/draw_tilings.py docs/tokens.png', which makes it",
        "kv_needle.png: no page shows it",
    ]


def test_changed_cells_and_lost_marks_are_found(docs: Path) -> None:
    readme = docs.parent / "README.md"
    readme.write_text(readme.read_text().replace("**1.000** | 0.992", "**1.000** | 0.993", 1))
    page = docs / "prune.md"
    page.write_text(page.read_text().replace("<!-- /dev -->\n", ""))
    assert new_problems(docs) == [
        "../README.md: what stands between the marks quickstart is not what the results give",
        "prune.md: <!-- dev --> and <!-- /dev --> must be there once, each a line of its own",
    ]


def test_figure_that_is_drawn_otherwise_is_found(docs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = figures.Figure("compress.png", ("scale_then_compress",), lambda results: blank())

    def blank() -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "PNG")
        return buffer.getvalue()

    told = "compress.png: is drawn otherwise now; `foveate report --docs` draws it"
    monkeypatch.setattr("foveate.eval.doc_checks.FIGURES", (one,))
    assert told not in problems(docs, redraw=False)
    with Image.open(docs / "compress.png") as image:
        if image.info["Software"] == figures.software():  # another matplotlib may draw it otherwise
            assert told in problems(docs)


def test_results_are_published_with_what_is_made_from_them(docs: Path) -> None:
    own = json.loads((docs / "results" / "bench_media_memory.json").read_text())
    with pytest.raises(ResultsError, match=r"bench_media_memory.json: commit"):
        figures.publish("bench_media_memory", own | {"commit": "?"}, docs)
    assert json.loads((docs / "results" / "bench_media_memory.json").read_text()) == own
    own["results"][0]["value"] = 123e6
    figures.publish("bench_media_memory", own, docs)
    assert "| 256 | 123 MB |" in (docs / "media.md").read_text()
    assert new_problems(docs) == []


def test_report_tells_what_it_made_and_what_is_wrong(
    docs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doc_checks, "problems", lambda docs, redraw: new_problems(docs))
    monkeypatch.setattr(doc_checks, "make", lambda docs: figures.make(docs, ["bench_media_memory"]))
    rewrite(docs / "results" / "bench_media_memory.json", lambda results: results["results"][0].update(value=123e6))
    assert not doc_checks.report_docs(True, docs)
    told = "media.md: what stands between the marks memory is not what the results give\n"
    assert capsys.readouterr().out == told
    assert doc_checks.report_docs(False, docs)
    told = f"made docs/media.md\n{len(figures.FIGURES)} figures and the tables of "
    assert capsys.readouterr().out.startswith(told)
    with pytest.raises(FileNotFoundError, match="results: not there; accepted: foveate installed from a checkout"):
        doc_checks.report_docs(True, docs / "results")
