"""`foveate eval MODEL --task lmms:NAME`: lmms-eval's own command, called here, and its results with intervals."""

import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch.distributed as dist
from rich.console import Console

from ..vlm.parallel.topology import Topology
from .facts import result, run_facts
from .sharing import ALONE
from .statistics import wilson_interval

VERSION = "0.7.3"
PACKAGES = ("torch", "transformers", "av", "lmms-eval", "datasets")
LIKELIHOODS = ("loglikelihood", "multiple_choice")  # output types that only the plain protocol has
Results = list[dict[str, Any]]


def run_lmms(
    model: str,
    names: Sequence[str],
    out: Path | None,
    n: int | None,
    console: Console,
    split: str = "test",
    batch_size: int = 8,
    topology: Topology = ALONE,
    **model_args: Any,
) -> Results:
    """Evaluates a model by lmms-eval, prints its metrics and writes them to `metrics.json` in `out`.

    Args:
        model: folder or Hugging Face name.
        names: of tasks or groups: those of `lmms_tasks`, whose data are made, or any of lmms-eval.
        out: for `metrics.json` and, in `lmms-eval`, what lmms-eval writes; None: nothing is written.
        n: questions a task; all of one of lmms-eval's, 200 of a local one, when None.
        console: where metrics are printed; only of the first process.
        split: of local tasks, whose digit images are shown.
        batch_size: prompts that are asked together.
        topology: of the ranks, all of which call it; each answers its share with a model of its own.
        **model_args: arguments of the model `foveate` of lmms-eval, `prune` as a sequence of methods.

    Returns:
        An entry (`facts.result`) for each metric that is a number; with Wilson's interval where it is the mean of zeros
        and ones.

    Raises:
        ValueError: a name, an option, a question's media: the message names it.
        ImportError: lmms-eval is not installed.
        RuntimeError: it found nothing.
    """
    _check_installed()
    if topology.degree > 1:
        raise ValueError(
            f"--ulysses {topology.ulysses} --ring {topology.ring} with tasks of lmms-eval; accepted: without, by one "
            "process or several that each have the whole model"
        )
    from .lmms_tasks import is_local, write_tasks

    local = [name for name in names if is_local(name)]
    arguments = ["--model", "foveate", "--model_args", model_arguments(model, **model_args)]
    arguments += ["--tasks", ",".join(names), "--batch_size", str(batch_size)]
    with ExitStack() as stack:
        folder = _shared(lambda: Path(stack.enter_context(TemporaryDirectory(prefix="foveate-lmms-"))))
        written = out / "lmms-eval" if out is not None else folder / "written"
        if local:
            os.environ.setdefault("LMMS_EVAL_DATASETS_CACHE", str(folder / "cache"))
            _shared(lambda: write_tasks(folder / "tasks", n or 200, local, split) and folder)
            arguments += ["--include_path", str(folder / "tasks")]
        if n is not None and len(local) < len(names):
            arguments += ["--limit", str(n)]
        if _are_rated(names, folder / "tasks" if local else None):
            arguments += ["--force_simple"]
        found, samples = _evaluate([*arguments, "--output_path", str(written), "--log_samples"])
        if dist.is_initialized():
            dist.barrier()  # the folder is in use until all have done
    if found is None:  # of another rank than the first
        return []
    results = entries(found["results"], samples)
    if not results:
        raise RuntimeError(f"lmms-eval gave no number for {', '.join(names)}; {written} holds what it wrote")
    for one in results:
        interval = f"  [{one['low']:.3f}, {one['high']:.3f}]" if "low" in one else ""
        console.print(f"{one['name']:>32}  {one['value']:.3f}{interval}  n={one['n']}", highlight=False, soft_wrap=True)
    if out is not None:
        asked = "".join(f" --task lmms:{name}" for name in names) + (f" --n {n}" if n is not None else "")
        options = (f" --split {split}" if local else "") + f" --batch {batch_size}" + _options(model_args)
        facts = run_facts(f"foveate eval{asked}{options}", PACKAGES)
        told = {"lmms_eval": shlex.join(["lmms-eval", *arguments]), "processes": topology.size}
        (out / "metrics.json").write_text(json.dumps(facts | told | {"results": results}, indent=1))
        console.print(f"metrics in {out / 'metrics.json'}, lmms-eval's own in {written}", soft_wrap=True)
    return results


def model_arguments(model: str, prune: Sequence[str] = (), kv: str | None = None, **others: Any) -> str:
    """`--model_args` of lmms-eval.

    Raises:
        ValueError: a value that it can't take.
    """
    given = {"pretrained": model} | others
    if odd := [f"{name} is {value!r}" for name, value in given.items() if set(str(value)) & set(",[]{}\"'")]:
        raise ValueError(f"{odd[0]}; accepted by lmms-eval: without commas, brackets and quotes")
    if prune:
        given["prune"] = f"[{'+'.join(prune)}]"
    if kv is not None:
        given["kv"] = f"[{kv}]"
    return ",".join(f"{name}={value}" for name, value in given.items() if value is not None)


def entries(results: Mapping[str, Mapping[str, Any]], samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> Results:
    """lmms-eval's metrics as entries of a results file.

    Args:
        results: of each task by `METRIC,FILTER`.
        samples: of each task, every question with its own values.
    """
    made = []
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, comma, which = key.partition(",")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (comma and number) or metric.endswith(("_stderr", "_stderr_clt", "_stderr_clustered")):
                continue
            name = f"{task} {metric}" + ("" if which == "none" else f" ({which})")
            scores: list[Any] = [sample.get(metric) for sample in samples.get(task, ())]
            binary = bool(scores) and all(isinstance(score, bool | int | float) and score in (0, 1) for score in scores)
            if binary and abs(sum(scores) / len(scores) - value) < 1e-9:
                low, high = wilson_interval(int(sum(scores)), len(scores))
                made.append(result(name, value, "fraction", len(scores), low=low, high=high))
            else:
                made.append(result(name, value, "", max(1, len(scores))))
    return made


def _options(model_args: Mapping[str, Any]) -> str:
    """Model arguments as options of `foveate eval`, which chooses the device by itself."""
    given = {name.replace("_", "-"): value for name, value in model_args.items() if value is not None}
    methods, _ = given.pop("prune", ()), given.pop("device", None)
    return "".join(f" --prune {text}" for text in methods) + "".join(f" --{n} {value}" for n, value in given.items())


def _shared(make: Any) -> Path:
    """What the first process makes; all processes wait for it."""
    if not dist.is_initialized():
        return make()
    made: list[Any] = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(made, src=0)
    return made[0]


def _check_installed() -> None:
    try:
        found = version("lmms-eval")
    except PackageNotFoundError:
        found = None
    if found != VERSION:
        raise ImportError(
            f"tasks of lmms-eval need its version {VERSION}, and there is {found or 'none'}: pip install "
            f"'foveate[eval]', then pip install --no-deps lmms-eval=={VERSION} (docs/lmms.md says why)"
        )


def _are_rated(names: Sequence[str], folder: Path | None) -> bool:
    """Whether tasks rate answers by their likelihood, rather than have them generated.

    Raises:
        ValueError: some do and some don't, which lmms-eval has different protocols for.
    """
    from lmms_eval.tasks import TaskManager
    from lmms_eval.utils import load_yaml_config

    from .lmms_tasks import is_local

    foreign = not all(map(is_local, names))
    manager = TaskManager("ERROR", include_path=None if folder is None else str(folder), include_defaults=foreign)

    def types(name: Any) -> Iterator[str]:
        config = name
        if isinstance(name, str):
            known = manager.task_index.get(name, {})  # what is unknown lmms-eval tells of
            if known.get("type") == "tag":
                for task in known["task"]:
                    yield from types(task)
            path = known.get("yaml_path", -1)
            config = {} if path == -1 else load_yaml_config(path, mode="simple")
        if isinstance(config.get("task"), list):
            for task in config["task"]:
                yield from types(task)
        elif config:
            yield config.get("output_type") or "generate_until"

    rated = {name: any(one in LIKELIHOODS for one in types(name)) for name in names}
    if any(rated.values()) and not all(rated.values()):
        some = ", ".join(name for name, by_likelihood in rated.items() if by_likelihood)
        raise ValueError(f"{some} rate answers by their likelihood, others generate them; accepted: one kind in a run")
    return any(rated.values())


@contextmanager
def _command_line(arguments: Sequence[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, ["lmms-eval", *arguments]
    try:
        yield
    finally:
        sys.argv = before


def _evaluate(arguments: Sequence[str]) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """What `lmms-eval ARGUMENTS` runs; its errors come here, which its command only prints."""
    from lmms_eval.__main__ import cli_evaluate_single, parse_eval_args

    with _command_line(arguments):
        _, parsed = parse_eval_args()
    return cli_evaluate_single(parsed)
