"""What training on pictures leaves of an LLM's language, with and without text in it: `text_retention.py
runs/text-retention` (docs/text_retention.md).

Trains the recipe `text-retention-start` with each seed, from it the arms of `text-retention`, and measures the loss on
held-out text after every stage, and the image tasks after the last. What is finished in the folder is not run again.
Writes `results.json` and `text_retention.png` to it; --publish also puts them into docs/, with the page's tables.
"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as the command `foveate` sets it, and for the same reason

from foveate.train import quiet  # noqa: F401, I001  for its effect, before the others

from rich.console import Console

from foveate.eval.facts import run_facts
from foveate.eval.figures import publish
from foveate.eval.retention import START, arms_table, as_points, picture, unchanged
from foveate.train.loop import FINISHED
from foveate.train.retention import ARMS, arm_recipe, run_experiment, text_shares


def seconds(out: Path, seed: int) -> dict[str, float]:
    """Of training the seed's models, by arm."""
    told = {}
    for arm in (START, *ARMS):
        stages = json.loads((out / f"seed-{seed}" / arm.lower().replace(" ", "-") / FINISHED).read_text())
        told[arm] = round(sum(stage["seconds"] for stage in stages), 1)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--texts", type=int, default=1000, help="held-out texts that each seed's models read")
    parser.add_argument("--questions", type=int, default=500, help="of each image task, asked of each arm's model")
    parser.add_argument("--jobs", type=int, default=2, help="models that are trained at the same time")
    parser.add_argument("--publish", action="store_true", help="put the results into docs/")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes that train are ended, too
    console = Console()
    measured = run_experiment(options.out, console, options.seeds, options.texts, options.questions, options.jobs)
    start = options.out / f"seed-{options.seeds[0]}" / START / "model"
    results = {
        "seeds": options.seeds,
        "points": as_points(measured),
        "frozen": unchanged(measured, [name for name, arm in ARMS.items() if arm.frozen]),
        "shares": [
            {"arm": arm} | share for arm in ARMS for share in text_shares(arm_recipe(arm, options.seeds[0], start))
        ],
        "training_seconds": [{"seed": seed} | seconds(options.out, seed) for seed in options.seeds],
    }
    seeds = " ".join(map(str, options.seeds))
    facts = run_facts(
        f"scripts/text_retention.py OUT --seeds {seeds} --texts {options.texts} --questions {options.questions}",
        ("torch", "transformers"),
    )
    (options.out / "results.json").write_text(json.dumps(facts | results, indent=1) + "\n")
    (options.out / "text_retention.png").write_bytes(picture(facts | results))
    console.print(arms_table(facts | results), highlight=False, soft_wrap=True)
    if options.publish:
        publish("text_retention", facts | results)


if __name__ == "__main__":
    main()
