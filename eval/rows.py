"""`foveate eval --task rows`: one point of the curves of docs/prune.md."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..data.drawing import CELL
from ..data.sorting import COLUMNS, ROWS
from ..vlm.cache.parse import KVSpec
from ..vlm.model import FoveateForConditionalGeneration
from ..vlm.parallel.topology import Topology
from ..vlm.processor import FoveateProcessor
from .facts import result, run_facts
from .prune import Measured, Setting, exact_scores, measure, per_question, row_items, word_scores
from .report import options_of
from .sharing import ALONE
from .statistics import bootstrap_interval


def evaluate_rows(
    model: FoveateForConditionalGeneration,
    processor: FoveateProcessor,
    out: Path | None,
    n: int,
    split: str,
    console: Console,
    methods: Sequence[Any] = (),
    kv: KVSpec | None = None,
    topology: Topology = ALONE,
) -> Measured:
    """Asks for sorted rows, prints what is right, and writes `metrics.json` in `out`.

    Args:
        model, processor: trained on rows, as by the recipe `sort-row`.
        out: None: nothing is written.
        n: questions, each about its own scene.
        methods: that drop visual tokens meanwhile; see `foveate.reduce`.
        kv: how keys and values are kept meanwhile; likewise.
        topology: of the ranks, all of which call it; the first one writes.

    Raises:
        ValueError: the model does not read one token a cell.
    """
    tokens = processor.plan_image((ROWS * CELL, COLUMNS * CELL)).tokens
    if tokens != ROWS * COLUMNS:
        raise ValueError(
            f"the model reads {tokens} tokens of a scene of rows; accepted: {ROWS * COLUMNS}, one a cell, as "
            "models of the recipe sort-row do"
        )
    options, asked_for = options_of(methods, kv, topology)
    setting = Setting(options.strip() or "full", 1.0)
    items = row_items(n, split)
    measured = measure(model, processor, items, setting, 0, methods=methods, kv=kv, topology=topology)
    results = []
    for name, value in (("word_accuracy", word_scores), ("exact_match", exact_scores)):
        scores = per_question([measured], value)
        low, high = bootstrap_interval(lambda mean: mean, scores)
        results.append(result(name, float(scores[0].mean()), "fraction", n, low=low, high=high))
        console.print(f"{name:>14}  {results[-1]['value']:.3f}  [{low:.3f}, {high:.3f}]  n={n}", highlight=False)
    told = {"visual_tokens": measured.visual, "flops": measured.flops, "recall": measured.recall}
    console.print(
        f"{'processed':>14}  visual tokens {measured.visual:.1f} of {tokens} (mean), FLOPs of the LLM's prefill "
        f"{measured.flops:.2f}, needed tokens kept {measured.recall:.2f}",
        highlight=False,
        soft_wrap=True,
    )
    if out is not None and topology.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        facts = run_facts(f"foveate eval --task rows --n {n} --split {split}{options}")
        content = facts | asked_for | told | {"results": results}
        (out / "metrics.json").write_text(json.dumps(content, indent=1))
        console.print(f"metrics in {out / 'metrics.json'}")
    return measured
