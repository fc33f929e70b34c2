"""A needle in 64 to 512 frames through every KV cache: `kv_needle.py runs/kv_needle` (docs/kv.md).

Trains the recipe `needle`, finds its retrieval heads, and asks as many questions at each length in each setting, the
same in all of them; at 256 frames a second question, too, whose needle the first one did not ask for. What is finished
in the folder is not run again. Writes `results.json` and `kv_needle.png` to it; --publish also puts them into docs/.
"""

import argparse
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as the command `foveate` sets it, and for the same reason

import torch
from rich.console import Console

from foveate.eval.facts import result, run_facts
from foveate.eval.needle import Batch, Found, ask, find, prepare
from foveate.eval.report import plt, png
from foveate.eval.statistics import wilson_interval
from foveate.train.duo import DuoSettings, needle_clips, train_gates, write_heads
from foveate.train.loop import FINISHED, train
from foveate.train.recipe import load_recipe
from foveate.vlm.chat import load_model

ROOT = Path(__file__).resolve().parent.parent
FRAMES = (64, 128, 256, 512)
LATER = 256  # frames of the clips with a second question
PACKED = "group=32,residual=32"  # of a prompt of 73 tokens, too, something is packed
DUO = DuoSettings(sink=4, window=64, lengths=(64, 512), passkeys=4, steps=200)
STORES = {
    "dense": "dense",
    "int8": f"int8:{PACKED}",
    "int4": f"int4:{PACKED}",
    "int2": f"int2:{PACKED}",
    "int2, keys per token": f"int2:{PACKED},keys_per=token",
    "zipvl": f"zipvl:{PACKED}",
    "akvq-vl": f"akvq-vl:{PACKED}",
    "vidkv": f"vidkv:{PACKED}",
}
POLICIES = {
    "dense": "dense",
    "streaming, 64 tokens": "streaming:sink=4,window=64",
    "streaming, 256 tokens": "streaming:sink=4,window=256",
    "snapkv, 25 %": "snapkv:keep=0.25,window=8",
    "snapkv, 10 %": "snapkv:keep=0.1,window=8",
    "h2o, 25 %": "h2o:keep=0.25",
    "h2o, 10 %": "h2o:keep=0.1",
    "look-m, 25 %": "look-m:keep=0.25",
    "snapkv, 25 % + int4": f"snapkv:keep=0.25,window=8+int4:{PACKED}",
}
WINDOWS = {"streaming, 64 tokens": 64, "streaming, 256 tokens": 256, "duo, all heads streaming": 64}
BEFORE, BEHIND = 1, 7  # tokens of text before the first frame, and behind the last up to where the digit is said
SELECTORS = {
    "dense": "dense",
    "quest, 25 % of pages": "quest:keep=0.25,first=0+paged:page=16",
    "quest, 10 % of pages": "quest:keep=0.1,first=0+paged:page=16",
    "duo": "duo:heads={heads}",
    "duo + int4": f"duo:heads={{heads}}+int4:{PACKED}",
    "duo, all heads streaming": "duo:heads={heads},ratio=0",
}


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


def table(points: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each setting."""
    columns = [(frames, 1) for frames in FRAMES] + [(LATER, 2)]
    titles = [f"{frames} frames" for frames in FRAMES] + [f"second question, {LATER}", f"kB, {FRAMES[-1]}"]
    lines = [f"| | {' | '.join(titles)} |", "|---" * (1 + len(titles)) + "|"]
    at = {(one["setting"], one["frames"], one["question"]): one for one in points}
    for name in dict.fromkeys(one["setting"] for one in points):
        cells = []
        for column in columns:
            one = at[name, *column]["results"][0]
            cells.append(f"**{one['value']:.3f}** ({one['low']:.3f} – {one['high']:.3f})")
        cells.append(f"{at[name, FRAMES[-1], 1]['kv_bytes'] / 1e3:.0f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(points: Sequence[dict[str, Any]]) -> bytes:
    """A PNG: accuracy over frames; stores, policies, what reads a part."""
    figure, panels = plt.subplots(1, 3, figsize=(13.5, 5), sharey=True)
    for axes, names in zip(panels, (STORES, POLICIES, SELECTORS), strict=True):
        for number, name in enumerate(names):
            of = [one for one in points if one["setting"] == name and one["question"] == 1]
            [values, lows, highs] = ([one["results"][0][key] for one in of] for key in ("value", "low", "high"))
            style = {"color": "0.4", "ls": ":"} if name == "dense" else {"color": f"C{number - 1}"}
            axes.plot(FRAMES, values, marker=".", label=name, **style)
            axes.fill_between(FRAMES, lows, highs, alpha=0.12, color=style["color"], lw=0)
        axes.axhline(0.25, lw=0.8, ls="--", color="0.7", label="one of the clip's four digits")
        axes.axhline(0.1, lw=0.8, ls="-.", color="0.7", label="any digit")
        axes.set_xscale("log", base=2)
        axes.set_xticks(FRAMES, [str(frames) for frames in FRAMES])
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("frames, a visual token each")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    panels[0].set_ylabel("needles found")
    figure.tight_layout()
    return png(figure)


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
        shutil.copyfile(options.out / "results.json", ROOT / "docs" / "results" / "kv_needle.json")
        shutil.copyfile(options.out / "kv_needle.png", ROOT / "docs" / "kv_needle.png")


if __name__ == "__main__":
    main()
