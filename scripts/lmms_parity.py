"""The local tasks by lmms-eval and by `foveate eval`: `lmms_parity.py runs/lmms --quickstart MODEL` (docs/lmms.md).

lmms-eval's own command asks the same questions one by one, eight at a time, and in two processes; every answer is
compared with those of `foveate eval`'s functions. Beside them: how far log-likelihoods of the answers in a batch are
from those of each alone, and by how much the least certain token of all answers was likelier than the next.
What is finished in the folder is not run again. Writes `results.json` to it; --publish also puts it into docs/.
"""

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from foveate.eval.facts import result, run_facts
from foveate.eval.figures import publish
from foveate.eval.glyphs import TASKS, evaluate
from foveate.eval.haystack import DEPTHS, haystack_items, search
from foveate.eval.lmms_run import PACKAGES, model_arguments
from foveate.eval.lmms_tasks import LOCAL_TASKS, Doc, write_tasks
from foveate.eval.prompts import Asker, Messages
from foveate.eval.shots import answer_shots, shot_items
from foveate.eval.statistics import wilson_interval
from foveate.vlm.chat import load_model
from foveate.vlm.planning import VideoSource

BIN = Path(sys.executable).parent
WAYS = {"one by one": (1, 1), "eight at a time": (8, 1), "two processes": (8, 2)}  # batch size, processes
TASKS_OF = {
    "quickstart": tuple(f"foveate_{task}" for task in TASKS if task != "needle_128"),  # as needle_64, twice as long
    "needle": ("foveate_haystack_64",),
    "in-context": ("foveate_shots_1", "foveate_shots_4", "foveate_shots_4_choice"),
}
Answers = list[str]


def ours(name: str, model: Any, processor: Any, n: int) -> list[tuple[str, bool]]:
    """Answers of `foveate eval`'s functions, and whether each is right."""
    task = name.removeprefix("foveate_")
    if task in TASKS:
        return [(one["answer"], one["answer"] == one["truth"]) for one in evaluate(model, processor, task, n).answers]
    if task.startswith("haystack"):
        frames = int(task.rpartition("_")[2])
        row = search(model, processor, haystack_items(n // DEPTHS, frames), frames, DEPTHS, defaultdict(str))
        return list(zip(row.said, row.right, strict=True))
    items = list(shot_items(n, int(task.split("_")[1])))
    answers = [one for start in range(0, n, 50) for one in answer_shots(model, processor, items[start : start + 50])]
    said = [one.chosen if task.endswith("choice") else one.said for one in answers]
    return [(text, text == item.answer) for text, item in zip(said, items, strict=True)]


def ask_lmms_eval(names: Sequence[str], model: str, tasks: Path, way: str, out: Path) -> None:
    """Runs lmms-eval's own command, unless it is done: on the tasks whose answers are generated, and on the others."""
    batch_size, processes = WAYS[way]
    for rated in (False, True):
        asked = [name for name in names if name.endswith("choice") == rated and not answers_of(name, out)]
        if not asked:
            continue
        command = [
            BIN / "lmms-eval", "--model", "foveate", "--model_args", model_arguments(model), "--include_path", tasks,
            "--tasks", ",".join(asked), "--batch_size", batch_size, "--output_path", out, "--log_samples",
        ] + ["--force_simple"] * rated  # fmt: skip
        if processes > 1:
            command = [BIN / "torchrun", "--nproc-per-node", processes, "--no-python", "--", *command]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def answers_of(name: str, out: Path) -> list[Path]:
    """What lmms-eval wrote of a task."""
    return sorted(out.glob(f"**/*_samples_{name}.jsonl"))


def by_lmms_eval(name: str, n: int, out: Path) -> list[tuple[str, bool]]:
    """Answers of lmms-eval's own command, and whether it takes each to be right."""
    *_, path = answers_of(name, out)
    lines = sorted(map(json.loads, path.read_text().splitlines()), key=lambda line: line["doc_id"])
    if [line["doc_id"] for line in lines] != list(range(n)):
        raise ValueError(f"{path}: not the {n} questions that were asked")
    rated = name.endswith("choice")
    docs = LOCAL_TASKS[name](n, "test", 0) if rated else iter(())

    def said(line: dict[str, Any]) -> str:
        if not rated:
            return line["filtered_resps"]
        losses = [float(loss) for loss, _ in line["filtered_resps"]]
        return next(docs).choices[losses.index(min(losses))]

    return [(said(line), line["accuracy"] == 1.0) for line in lines]


def messages(doc: Doc, frames: int | None) -> Messages:
    """A document with its media, as `Asker` takes it."""
    images, videos = iter(doc.images), iter(doc.videos)
    filled = json.loads(json.dumps(doc.messages))
    for part in (part for message in filled for part in message["content"]):
        if part["type"] == "image":
            part["image"] = next(images)
        elif part["type"] == "video":
            part["video"] = VideoSource(next(videos), frames)
    return filled


@contextmanager
def least_margin(model: Any) -> Iterator[list[float]]:
    """By how many nats the likeliest next token leads, of every step of generation within it."""
    margins: list[float] = []

    def note(_: Any, __: Any, output: Any) -> None:
        best = output.logits[:, -1].float().topk(2).values
        margins.extend((best[:, 0] - best[:, 1]).tolist())

    handle = model.register_forward_hook(note)
    try:
        yield margins
    finally:
        handle.remove()


def certainty(name: str, model: Any, processor: Any, n: int, said: Answers) -> list[dict[str, Any]]:
    """How far batches are from what would change an answer."""
    frames = int(name.rpartition("_")[2]) if name.rpartition("_")[2].isdigit() and "shots" not in name else None
    asked = [messages(doc, frames) for doc in LOCAL_TASKS[name](n, "test", 0)]
    tokens = 2 if "shots" in name else 3 if "haystack" in name else 12
    totals = []
    for size in (1, 8):
        asker = Asker(model, processor, batch_size=size)
        readers: list[Callable[[], Any]] = [lambda a=a, asker=asker: asker.read(a) for a in asked]  # type: ignore[misc]
        if size == 1:
            with least_margin(model) as margins:
                asker.generate(readers, max_new_tokens=tokens, do_sample=False)
        rated = [
            (number, read, text or "nothing") for number, (read, text) in enumerate(zip(readers, said, strict=True))
        ]
        totals.append([total for total, _, _ in asker.log_likelihoods(rated)])
    furthest = max(abs(one - eight) for one, eight in zip(*totals, strict=True))
    return [
        result("largest difference of a log-likelihood by batching", furthest, "nats", n),
        result("least lead of a generated token", min(margins), "nats", len(margins)),
    ]


def measured(names: Sequence[str], model_name: str, n: int, out: Path, console: Console) -> list[dict[str, Any]]:
    """Entries of a model's tasks."""
    missing = [name for name in names if not (out / f"{name}.json").exists()]
    tasks = out / "tasks" / "-".join(missing)
    if missing and not tasks.exists():
        write_tasks(tasks, n, missing)
    folders = {way: out / "lmms-eval" / way.replace(" ", "-") for way in WAYS}
    for way, folder in folders.items():
        if missing:
            ask_lmms_eval(missing, model_name, tasks, way, folder)
    model, processor = load_model(model_name, "cpu")
    for name in missing:
        answers = {"foveate eval": ours(name, model, processor, n)}
        answers |= {way: by_lmms_eval(name, n, folder) for way, folder in folders.items()}
        first = answers["foveate eval"]
        entries = []
        for way, given in answers.items():
            right = sum(correct for _, correct in given)
            low, high = wilson_interval(right, n)
            entries.append(result(way, right / n, "fraction", n, low=low, high=high))
            if way != "foveate eval":
                other = sum(one != theirs for one, theirs in zip(given, first, strict=True))
                entries.append(result(f"{way}: answers that differ", other, "questions", n))
        entries += certainty(name, model, processor, n, [text for text, _ in first])
        for one in entries:
            console.print(f"{name}  {one['name']}  {one['value']:.6g}", highlight=False, soft_wrap=True)
        (out / f"{name}.json").write_text(json.dumps({"task": name, "results": entries}))
    return [json.loads((out / f"{name}.json").read_text()) for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    for name in TASKS_OF:
        parser.add_argument(f"--{name}", help=f"a model of the recipe {name}")
    parser.add_argument("--n", type=int, default=200, help="questions a task, a multiple of 8")
    parser.add_argument("--publish", action="store_true")
    given = parser.parse_args()
    if given.n % DEPTHS:
        parser.error(f"--n {given.n}; accepted: a multiple of {DEPTHS}")
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    tasks, models = [], []
    for name, names in TASKS_OF.items():
        if (model := getattr(given, name.replace("-", "_"))) is not None:
            models.append(name)
            tasks += [{"model": name} | task for task in measured(names, model, given.n, given.out, console)]
    options = "".join(f" --{name} MODEL" for name in models)
    facts = run_facts(f"lmms_parity.py runs/lmms{options} --n {given.n}", PACKAGES)
    content = facts | {"points": tasks}
    (given.out / "results.json").write_text(json.dumps(content, indent=1))
    if given.publish:
        publish("lmms_local", content)


if __name__ == "__main__":
    main()
