"""What smaller KV caches cost, on tiny trained models: `kv_quality.py runs/quickstart/model` (docs/kv.md).

Every model answers the same questions in every setting. What is finished in the folder of --out is not run again.
Writes to it the results as JSON, the tables as Markdown, and a picture; --publish also puts them into docs/. With
--weights quantised weights are compared instead, of one model.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as the command `foveate` sets it, and for the same reason

import torch
from rich.console import Console

from foveate.eval import kv_quality as quality
from foveate.eval import weights_quality
from foveate.eval.facts import run_facts
from foveate.eval.figures import publish
from foveate.vlm.chat import load_model


def run(models: list[Path], out: Path, tasks: tuple[quality.Task, ...], split: str, console: Console) -> list[dict]:
    """One entry a setting."""
    measured = []
    for seed, folder in enumerate(models):
        model, processor = load_model(folder, device="cpu")
        model = model.float()
        asked = {task.name: quality.batches(model, processor, task, split) for task in tasks}
        prompts = quality.random_prompts(model)
        for setting in quality.SETTINGS:
            measured.append(quality.measure_once(out, model, asked, setting, prompts, seed))
            console.print(measured[-1].line(), soft_wrap=True, highlight=False)
    return quality.as_json(measured)


def run_weights(model: Path, tasks: tuple[quality.Task, ...], split: str, console: Console) -> list[dict]:
    """One entry for each way to keep weights."""
    measured = []
    for way in weights_quality.WEIGHTS:
        measured.append(
            weights_quality.measure(model, way, [task for task in tasks if task.when == quality.LATER], split)
        )
        console.print(f"{way.name}: KL {measured[-1].kl:.1e}", highlight=False)
    return weights_quality.as_json(measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="folders of models of one recipe: quickstart or sort-row")
    parser.add_argument("--out", type=Path, default=Path("runs/kv-quality"), help="folder for what is measured")
    parser.add_argument("--rows", action="store_true", help="the models are of the recipe sort-row")
    parser.add_argument("--weights", action="store_true", help="compare quantised weights, not KV caches")
    parser.add_argument("--split", default="test", choices=["dev", "test"], help="whose digit images are shown")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--publish", action="store_true", help="put the results into docs/")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tasks = quality.ROW_TASKS if options.rows else quality.GLYPH_TASKS
    name = f"{'weights' if options.weights else 'kv'}_quality{'_rows' if options.rows else ''}"
    if options.weights:
        entries = run_weights(options.models[0], tasks, options.split, Console())
        tables, pictures = [weights_quality.table(entries)], {}
    else:
        entries = run(options.models, options.out, tasks, options.split, Console())
        tables, pictures = (
            [quality.table(entries), quality.what_breaks(entries)],
            {f"{name}.png": quality.picture(entries)},
        )
    flags = "".join(f" --{flag}" for flag in ("rows", "weights") if getattr(options, flag))
    facts = run_facts(f"scripts/kv_quality.py{' MODEL' * len(options.models)} --split {options.split}{flags}")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{name}.json").write_text(json.dumps(facts | {"settings": entries}, indent=1) + "\n")
    (options.out / f"{name}.md").write_text("\n\n".join(tables) + "\n")
    for file, content in pictures.items():
        (options.out / file).write_bytes(content)
    if options.publish:
        publish(name, facts | {"settings": entries})


if __name__ == "__main__":
    main()
