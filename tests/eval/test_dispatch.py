"""`foveate eval --task`: each task is measured by its own function, with what the options say."""

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from foveate.eval.dispatch import LMMS, OPTIONS, QUESTIONS, check_task, run_task
from foveate.vlm.parallel.topology import Topology

MEASURED_BY = {
    "glyphs": ("report", "evaluate_and_report"),
    "rows": ("rows", "evaluate_rows"),
    "needles": ("needle", "evaluate_needles"),
    "haystack": ("haystack", "evaluate_haystack"),
    "shots": ("shots", "evaluate_shots"),
    "text": ("text", "evaluate_text"),
}


@pytest.mark.parametrize("task", MEASURED_BY)
@pytest.mark.parametrize("given", [False, True])
def test_each_task_gets_what_the_options_say(task: str, given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name = MEASURED_BY[task]
    target = importlib.import_module(f"foveate.eval.{module}")
    signature, called = inspect.signature(getattr(target, name)), []

    def record(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        called.append(bound.arguments)

    monkeypatch.setattr(target, name, record)
    options: dict[str, Any] = {"frames": [32], "depths": 3, "needles": 2, "shots": [1, 2], "ways": 4}
    some = {option: value for option, value in options.items() if given and task in OPTIONS[option]}
    console, topology, out = Console(), Topology(), Path("out")
    run_task(
        task, "model", "processor", out, 7 if given else None, "dev", console, ["method"], "kv", topology, **some
    )  # type: ignore[arg-type]  # fmt: skip

    [asked] = called
    assert (asked["model"], asked["processor"], asked["out"], asked["split"]) == ("model", "processor", out, "dev")
    assert asked["n"] == (7 if given else QUESTIONS[task])
    assert asked["console"] is console and asked["topology"] is topology
    if task != "text":
        assert (asked["methods"], asked["kv"]) == (["method"], "kv")
    if task == "needles":
        assert asked["frames"] == (32 if given else 64)
    elif given:
        assert {option: asked[option] for option in some} == some


def test_options_are_refused_where_they_would_do_nothing() -> None:
    values = {"frames": [8], "shots": [1], "prune": ["evs"], "kv": "int4"}
    for option, takers in OPTIONS.items():
        given = {option.replace("-", "_"): values.get(option, 3)}
        for task in (*QUESTIONS, f"{LMMS}mme"):
            kind = LMMS if task.startswith(LMMS) else task
            if kind in takers:
                assert check_task([task], **given) == kind
            else:
                with pytest.raises(ValueError, match=f"--{option} with --task {task}; accepted: --task"):
                    check_task([task], **given)
