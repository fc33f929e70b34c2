"""A needle in 64 to 512 frames through every KV cache: `kv_needle.py runs/kv_needle` (docs/kv.md).

Trains the recipe `needle`, finds its retrieval heads, and asks as many questions at each length in each setting, the
same in all of them; at 256 frames a second question, too, whose needle the first one did not ask for. What is finished
in the folder is not run again. Writes `results.json` and `kv_needle.png` to it; --publish also puts them into docs/.
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as the command `foveate` sets it, and for the same reason

import torch
from rich.console import Console

from foveate.eval.facts import result, run_facts
from foveate.eval.figures import publish
from foveate.eval.kv_needle import FRAMES, LATER, POLICIES, SELECTORS, STORES, picture, table
from foveate.eval.needle import Batch, Found, ask, find, prepare
from foveate.eval.statistics import wilson_interval
from foveate.train.duo import DuoSettings, needle_clips, train_gates, write_heads
from foveate.train.loop import FINISHED, train
from foveate.train.recipe import load_recipe
from foveate.vlm.chat import load_model

DUO = DuoSettings(sink=4, window=64, lengths=(64, 512), passkeys=4, steps=200)
WINDOWS = {"streaming, 64 tokens": 64, "streaming, 256 tokens": 256, "duo, all heads streaming": 64}
BEFORE, BEHIND = 1, 7  # tokens of text before the first frame, and behind the last up to where the digit is said


def trained(out: Path, console: Console) -> Path:
    """The folder of the model; it is trained unless that is done."""
    if not (out / FINISHED).exists():
        train(load_recipe("needle", ["tracking.wandb=disabled"]), out, resume="auto", console=console)
    return out / "model"


def find_once(file: Path, model: Any, processor: Any, batches: Callable[[], list[Batch]], **setting: Any) -> Found:
    """`find`, or what it has written before."""
    if file.exists():
        return Found(**json.loads(file.read_text()))
    found = find(model, processor, batches(), **setting)
    file.write_text(json.dumps(asdict(found)))
    return found


def accuracy(name: str, right: Sequence[bool]) -> dict[str, Any]:
    """With its interval."""
    low, high = wilson_interval(sum(right), len(right))
    return result(name, sum(right) / len(right), "fraction", len(right), low=low, high=high)


def run(out: Path, questions: int, console: Console) -> dict[str, Any]:
    """Everything, as JSON."""
    model, processor = load_model(trained(out / "model", console), device="cpu")
    model.float()
    heads = out / "heads.json"
    if not heads.exists():
        write_heads(heads, train_gates(model, needle_clips(model, processor, DUO), DUO), DUO, {"data": "needles"})
    points = []
    for frames in FRAMES:
        batches = cache(lambda frames=frames: list(prepare(model, processor, list(ask(questions, frames)))))
        for name, kv in (STORES | POLICIES | SELECTORS).items():
            for later in (False, True) if frames == LATER else (False,):
                file = out / f"{questions} {frames} {name}{' later' * later}.json"
                found = find_once(file, model, processor, batches, kv=kv.format(heads=heads), later=later)
                results = [accuracy("all", found.right)]
                if (window := WINDOWS.get(name)) and not later:
                    places = [round(depth * frames) for depth in found.depths]
                    inside = [place < 4 - BEFORE or place >= frames + BEHIND - window for place in places]
                    for part, wanted in (("among sinks and window", True), ("evicted", False)):
                        some = [right for right, within in zip(found.right, inside, strict=True) if within == wanted]
                        results += [accuracy(part, some)] if some else []
                points.append(
                    {"setting": name, "kv": kv, "frames": frames, "question": 1 + later, "by_depth": found.by_depth()}
                    | {"kv_bytes": found.kv_bytes, "results": results}
                )
                told = "  ".join(f"{one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]" for one in results)
                console.print(
                    f"{frames:>4} frames, question {1 + later}  {name:>26}  {told}  {found.kv_bytes / 1e3:.0f} kB",
                    highlight=False,
                    soft_wrap=True,
                )
    return {"heads": json.loads(heads.read_text()), "points": points}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--questions", type=int, default=300, help="asked at each length in each setting")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--publish", action="store_true", help="put the results into docs/")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    results = run(options.out, options.questions, console)
    facts = run_facts(f"scripts/kv_needle.py OUT --questions {options.questions}")
    (options.out / "results.json").write_text(json.dumps(facts | results, indent=1) + "\n")
    (options.out / "kv_needle.png").write_bytes(picture(results["points"]))
    console.print(table(results["points"]), highlight=False, soft_wrap=True)
    if options.publish:
        publish("kv_needle", facts | results)


if __name__ == "__main__":
    main()
