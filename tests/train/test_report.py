import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from foveate.train import report
from foveate.train.report import write_report

EVIL = "<script>alert('&')</script>"


class Page(HTMLParser):
    """Headings, table rows, preformatted text and pictures of a page, and every tag and address in it."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.headings: list[str] = []
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.tags[-1] == "h2":
            self.headings.append(data)
        if self.tags[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def line(step: int, stage: str, **more: Any) -> dict[str, Any]:
    rates = {"tokens_per_s": 100.0 + step, "samples_per_s": 9.0, "step_s": 0.5}
    health = {"data_wait": 0.1, "packing_waste": 0.02, "imbalance": 1.1, "memory_bytes": 3e9}
    return {"step": step, "stage": stage, "loss": 5 / step, "grad_norm": 1.5} | rates | health | more


LINES = [
    line(1, "align", lr_projector=1e-3, grad_norm_projector=1.5, validation_loss=None),
    line(2, "align", lr_projector=5e-4, grad_norm_projector=1.0, validation_loss=4.5),
    line(3, "sft", lr_projector=2e-5, lr_llm=1e-5, grad_norm_projector=0.3, grad_norm_llm=0.4, mfu=0.41),
    line(4, "sft", lr_projector=1e-5, lr_llm=5e-6, grad_norm_projector=0.2, grad_norm_llm=0.3, mfu=0.42,
         validation_loss=1.25, bad_missing_media=2),
]  # fmt: skip
RECIPE = {
    "name": f"mine {EVIL}",
    "stages": [
        {"name": "align", "steps": 2, "epochs": None, "learning_rates": {"projector": 1e-3}},
        {"name": "sft", "steps": None, "epochs": 1, "learning_rates": {"projector": 2e-5, "llm": 1e-5}},
    ],
}
SUMMARIES = [
    {"name": "align", "seconds": 12.34, "steps": 2, "tokens": 12345, "positions": 12500},
    {"name": "sft", "seconds": 4.0, "steps": 2, "tokens": 678, "positions": 700},
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of four steps that ended before its first checkpoint."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in LINES))
    return folder


def add_checkpoint(run: Path, step: int, whole: bool = True, **state: Any) -> None:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    text = json.dumps({"step": step, "recipe": RECIPE, "summaries": SUMMARIES} | state)
    (folder / "state.json").write_text(text)
    entry = {"bytes": len(text) if whole else len(text) + 1, "sha256": "not looked at"}
    (folder / "manifest.json").write_text(json.dumps({"state.json": entry}))


@pytest.fixture
def diagrams(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Title of each diagram that is drawn → label → points."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    save = report.png

    def note(figure: Any) -> bytes:
        for axes in figure.axes:
            curves: dict[str, list[tuple[float, float]]] = {}
            colours = {curve.get_color(): curve.get_label() for curve in axes.lines if curve.get_label()[:1] != "_"}
            for curve in axes.lines:
                if curve.get_color() in colours:
                    curves.setdefault(colours[curve.get_color()], []).extend(map(tuple, curve.get_xydata().tolist()))
            found[axes.get_title(loc="left")] = curves
        return save(figure)

    monkeypatch.setattr(report, "png", note)
    return found


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes a second a page."""
    monkeypatch.setattr(report, "_pictures", lambda lines: [])


def test_finished_run(run: Path) -> None:
    add_checkpoint(run, 4)
    (run / "stages.json").write_text(json.dumps(SUMMARIES))
    path = write_report(run)
    assert path == run / "report.html"
    page = Page(path)
    assert page.headings == [
        "Stages", "Loss", "Learning rates and gradients", "Speed", "Where time and memory go",
        "Documents that could not be used", "Recipe",
    ]  # fmt: skip
    assert page.rows[1:] == [
        ["align", "projector", "2 of 2", "12,345", "12.3", "2.5", "4.5"],
        ["sft", "projector, llm", "2 of 1 epochs", "678", "4.0", "1.25", "1.25"],
    ]
    assert any(
        text.startswith("Finished. The last line of metrics.jsonl is of step 4, stage sft") for text in page.texts
    )
    assert page.tags.count("img") == 4
    assert any("learning_rates: {projector: 2.0e-05, llm: 1.0e-05}" in text for text in page.texts)


def test_page_stands_alone_and_all_text_is_escaped(run: Path, tmp_path: Path) -> None:
    add_checkpoint(run, 4)
    bad = {"step": 4, "key": EVIL, "reason": "bad_json", "message": f"<img src=x onerror=1> {EVIL}"}
    (run / "bad_documents.jsonl").write_text(json.dumps(bad) + "\n")
    page = Page(write_report(run, tmp_path / "new" / "page.html"))
    assert "script" not in page.tags
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert ["4", "bad_json", EVIL, f"<img src=x onerror=1> {EVIL}"] in page.rows
    assert f"Training: mine {EVIL}" in page.texts  # the recipe's name


def test_diagrams_show_what_the_metrics_say(run: Path, diagrams: dict) -> None:
    write_report(run)
    loss = diagrams["loss"]
    assert loss["training"] == [(1, 5), (2, 2.5), (3, pytest.approx(5 / 3)), (4, 1.25)]
    assert loss["validation"] == [(2, 4.5), (4, 1.25)]
    assert diagrams["learning rate"] == {
        "projector": [(1, 1e-3), (2, 5e-4), (3, 2e-5), (4, 1e-5)], "llm": [(3, 1e-5), (4, 5e-6)],
    }  # fmt: skip
    norms = diagrams["gradient norm before clipping"]
    assert set(norms) == {"all", "projector", "llm"} and norms["llm"] == [(3, 0.4), (4, 0.3)]
    titles = set(diagrams)
    assert {"tokens a second", "samples a second", "seconds a step", "MFU"} <= titles
    assert {"waiting for data, of the time", "costliest process, of the mean", "padding, of the positions"} <= titles
    assert "memory of the first process, GB" in titles and "accuracy of generated answers" not in titles


@pytest.mark.usefixtures("without_pictures")
def test_run_before_its_first_checkpoint(run: Path) -> None:
    page = Page(write_report(run))
    assert any(text.startswith("Not finished") for text in page.texts)
    assert page.rows[1:] == [
        ["align", "", "0 of ?", "0", "0.0", "2.5", "4.5"],
        ["sft", "", "0 of ?", "0", "0.0", "1.25", "1.25"],
    ]
    assert "It comes with the first checkpoint." in page.texts


@pytest.mark.usefixtures("without_pictures")
def test_killed_run(run: Path) -> None:
    """A line of metrics was cut short, the newest checkpoint is not whole."""
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "stage": "sf')
    add_checkpoint(run, 2, summaries=SUMMARIES[:1])
    add_checkpoint(run, 4, whole=False)
    page = Page(write_report(run))
    assert page.rows[1:] == [
        ["align", "projector", "2 of 2", "12,345", "12.3", "2.5", "4.5"],
        ["sft", "projector, llm", "0 of 1 epochs", "0", "0.0", "1.25", "1.25"],
    ]
    assert "Steps, tokens and seconds are those of the checkpoint at step 2." in page.texts
    assert any("is of step 4, stage sft" in text for text in page.texts)


@pytest.mark.usefixtures("without_pictures")
def test_refused_documents_are_counted_by_reason_and_listed(run: Path) -> None:
    lines = [
        {"step": 1, "key": f"a.tar/{i}", "reason": "bad_json" if i % 3 else "too_large", "message": "m"}
        for i in range(60)
    ]
    (run / "bad_documents.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    page = Page(write_report(run))
    assert ["bad_json", "40"] in page.rows and ["too_large", "20"] in page.rows
    assert [row[2] for row in page.rows if row[0] == "1"] == [f"a.tar/{i}" for i in range(50)]
    assert any("10 more" in text for text in page.texts)


def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl there; accepted: the folder of a training run"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "sta')
    with pytest.raises(ValueError, match="no line yet"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
