"""Accuracy over compute of the pruning methods on a tiny trained model: `prune_curves.py runs/prune` (docs/prune.md).

Trains the recipe `sort-row` with each seed, chooses K of each method, and the best one, on the dev split, and asks
every model the same number of test questions in every setting. What is finished in the folder is not run again. Writes
to it `results.json` and `prune_curves.png`; --publish also puts them into docs/, with the tables of docs/prune.md.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as the command `foveate` sets it, and for the same reason

import torch
from rich.console import Console

from foveate.eval import prune
from foveate.eval.facts import run_facts
from foveate.eval.figures import publish
from foveate.train.loop import FINISHED, train
from foveate.train.recipe import load_recipe
from foveate.vlm.chat import load_model

DEV_KEEPS = (0.5, 0.25)


def trained(out: Path, seed: int, console: Console) -> Path:
    """The folder of the seed's model; it is trained unless that is done."""
    if not (out / FINISHED).exists():
        train(load_recipe("sort-row", [f"seed={seed}", "tracking.wandb=disabled"]), out, resume="auto", console=console)
    return out / "model"


def run(out: Path, seeds: list[int], questions: int, console: Console) -> dict:
    """Everything, as JSON."""
    models = {}
    for seed in seeds:
        console.rule(f"seed {seed}")
        model, processor = load_model(trained(out / f"seed-{seed}", seed, console), device="cpu")
        models[seed] = model.float(), processor

    def asked(split: str, settings: list[prune.Setting], number: int) -> list[prune.Measured]:
        measured = []
        for seed, (model, processor) in models.items():
            items = prune.row_items(number, split, seed)
            for setting in settings:
                folder = out / f"seed-{seed}" / split
                measured.append(prune.measure_once(folder, model, processor, items, setting, seed))
                console.print(measured[-1].line(), soft_wrap=True, highlight=False)
        return measured

    model, processor = models[seeds[0]]
    layers, tokens = model.config.text_config.num_hidden_layers, processor.tokens_per_image()
    console.rule("dev: K and the method")
    tried = [
        setting
        for layer in range(1, layers)
        for keep in DEV_KEEPS
        for setting in prune.llm_settings(layer, keep, tokens)
    ]
    dev = asked("dev", [prune.FULL, *tried], questions // 2)
    chosen, best, compared = prune.choose(dev)
    console.print(f"K: {chosen}; best: {best}")
    console.rule("test")
    test = asked("test", prune.settings(chosen, tokens), questions)
    return {
        "seeds": seeds,
        "layers": chosen,
        "best": best,
        "dev": compared,
        "tests": [one for curve, layer in chosen.items() for one in prune.kept_and_tests(test, curve, layer)],
        "points": prune.as_json(test),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--questions", type=int, default=1000, help="asked of each seed's model in each setting")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads for the questions")
    parser.add_argument("--publish", action="store_true", help="put the results into docs/")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = run(options.out, options.seeds, options.questions, Console())
    seeds = " ".join(map(str, options.seeds))
    facts = run_facts(f"scripts/prune_curves.py OUT --seeds {seeds} --questions {options.questions}")
    (options.out / "results.json").write_text(json.dumps(facts | results, indent=1) + "\n")
    (options.out / "prune_curves.png").write_bytes(prune.picture(results["points"]))
    if options.publish:
        publish("prune_curves", facts | results)


if __name__ == "__main__":
    main()
