"""Tables of docs/lmms.md, from docs/results/lmms_local.json."""

from typing import Any

from .tables import markdown

WAYS = ("one by one", "eight at a time", "two processes")


def tables(results: dict[str, Any]) -> dict[str, str]:
    """By mark: accuracies of `foveate eval` and of lmms-eval on the same questions, and how sure equal answers are."""
    rows = []
    for point in results["points"]:
        of = {one["name"]: one for one in point["results"]}
        ours = of["foveate eval"]
        lmms = " ".join(f"{of[way]['value']:.3f}" for way in WAYS)
        other = " ".join(f"{of[f'{way}: answers that differ']['value']:.0f}" for way in WAYS)
        drift = of["largest difference of a log-likelihood by batching"]["value"]
        lead = of["least lead of a generated token"]["value"]
        accuracy = f"{ours['value']:.3f} [{ours['low']:.3f}, {ours['high']:.3f}]"
        rows.append(
            [f"`{point['task']}`", point["model"], str(ours["n"]), accuracy, lmms, other, f"{drift:.0e}", f"{lead:.2g}"]
        )
    header = [
        "task", "model", "n", "`foveate eval`", "lmms-eval", "answers that differ", "drift by batching, nats",
        "least lead, nats",
    ]  # fmt: skip
    return {"lmms_local": markdown(header, rows)}
