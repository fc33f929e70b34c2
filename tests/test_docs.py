"""The documentation's figures, tables and numbers are the committed results."""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from foveate.eval.doc_checks import problems
from foveate.eval.results import load_results

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"


def test_figures_and_tables_are_made_from_the_committed_results() -> None:
    assert problems(ROOT / "docs", redraw=False) == []


# Numbers in sentences. A claim is a sentence, or a part of one, with its numbers taken from the results. To write a new
# number: add the claim to its page here, and run this file.


@cache
def read(name: str) -> dict[str, Any]:
    return load_results(RESULTS / f"{name}.json")


def entries(name: str) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in read(name)["results"]}


def values(name: str) -> dict[str, float]:
    return {name: entry["value"] for name, entry in entries(name).items()}


def share(part: float) -> str:
    """A part in words, to a tenth of itself."""
    words = {"all": 1.0, "a half": 1 / 2, "a quarter": 1 / 4, "a seventh": 1 / 7, "two sevenths": 2 / 7, "a tenth": 0.1}
    return next((word for word, of in words.items() if abs(part / of - 1) <= 0.1), f"{part:.3f}")


def points_of_accuracy(difference: dict[str, Any]) -> str:
    value, low, high = (100 * difference[key] for key in ("value", "low", "high"))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def of_kv_quality(setting: str, name: str) -> dict[str, Any]:
    of = next(one for one in read("kv_quality")["settings"] if one["setting"] == setting)
    return next(entry for entry in of["results"] if entry["name"] == name)


def of_prune_curves(curve: str, keep: float, layer: int = 3) -> dict[str, Any]:
    at = (curve, layer, keep)
    return next(one for one in read("prune_curves")["points"] if (one["curve"], one["layer"], one["keep"]) == at)


def readme() -> Iterator[str]:
    memory = values("bench_media_memory")
    many, some = (memory[f"encode_{frames}_frames_peak"] / 1e6 for frames in (2048, 256))
    yield f"2,048 frames of 720p took {many:.0f} MB with a tiny tower, 256 frames {some:.0f} MB"

    prefill, cores = values("bench_prefill_cpu"), read("bench_prefill_cpu")["device"].split(", ")[1].split()[0]
    keeps = {keep: f"fastv:layer=2,keep={keep}" for keep in (0.5, 0.25, 0.1)}
    first, second, third = (prefill[f"{method}_speed_up"] for method in keeps.values())
    yield (
        f"On {cores} CPU cores, an LLM of 0.5B shape and {prefill['unpruned_visual_tokens']:,.0f} visual tokens, FastV "
        f"with {share(0.5)}, {share(0.25)} and {share(0.1)} of the tokens reads the prompt {first:.1f}, {second:.1f} "
        f"and {third:.1f} times as fast, as its FLOPs say"
    )
    for method in keeps.values():
        assert prefill[f"{method}_speed_up"] == pytest.approx(prefill[f"{method}_flop_speed_up"], rel=0.1)

    assert read("prune_curves")["best"] == "fastv"
    own, random = (of_prune_curves(curve, keep=0.25)["results"][0]["ratio"] for curve in ("fastv", "random"))
    yield (
        f"a tiny model keeps {share(round(own, 2))} of its accuracy with {share(0.25)} of them, where random tokens "
        f"keep {100 * random:.0f} %"
    )

    single, half = values("bench_decode_cpu"), values("bench_decode_cpu_bf16")
    in_single, in_half = (share(found["int4_kv"] / found["dynamic_kv"]) for found in (single, half))
    assert in_half == "two sevenths" and "--shape 0.5b" in read("bench_decode_cpu")["command"]
    yield (
        f"With 32,768 tokens of context, an LLM of 0.5B shape and {cores} CPU cores, `int4` takes "
        f"{single['int4_over_dynamic']:.2f} of DynamicCache's time a step and {in_single} of its memory (in bfloat16 "
        f"{half['int4_over_dynamic']:.2f} and {in_half})"
    )
    int4, int2 = (of_kv_quality(setting, "later: difference") for setting in ("int4", "int2, residual 16"))
    assert int4["value"] == 0 and round(100 * int2["value"]) == -1
    yield "a tiny model answers as well with it, and loses a point with `int2`"

    long = [one for one in read("parallel_needle")["points"] if one["model"] == "after long-sft"]
    ranks, found = ([one["ulysses"] * one["ring"] for one in long], {one["results"][0]["value"] for one in long})
    assert ranks == [1, 2, 4] and len(found) == 1
    held = [max(rank["kv_bytes"] for rank in one["ranks"]) for one in long]
    yield (
        f"A tiny model whose context was extended to {long[0]['frames']:,} frames by four processes finds "
        f"{found.pop():.2f} of the needles there on one, two and four, with {share(held[2] / held[0])} of the KV cache "
        "each on four"
    )


# What stands in the README and was not measured: text → why.
NO_MEASUREMENT = {
    "Python ≥ 3.11": "a requirement",
    "fewer than 2 bits": "the method's format",
    "what colour is the 7 ?": "a question",
    "exit code 2": "what the command does",
    "a 95 % interval": "the kind of interval",
}


def kv() -> Iterator[str]:
    single, half = values("bench_decode_cpu"), values("bench_decode_cpu_bf16")
    yield (
        f"A step with `int4` takes {single['int4_over_dynamic']:.2f} of DynamicCache's time in float32 and "
        f"{half['int4_over_dynamic']:.2f} in bfloat16, and {single['int4_over_quantized']:.2f} and "
        f"{half['int4_over_quantized']:.2f} of QuantizedCache's"
    )
    kernels = values("bench_kernels_cpu")
    read_of, time_of = (kernels[f"int2_{what}"] / kernels[f"int4_{what}"] for what in ("bytes", "attention"))
    yield f"Copying reaches {kernels['copy_bandwidth'] / 1e9:.1f} GB/s here"
    yield f"int2 reads {read_of:.2f} of int4's and takes {time_of:.2f} of its time"


def kv_quality() -> Iterator[str]:
    bounds = {"int8 no measurable loss": "int8", "int4 at most 0.5": "int4"}
    bounds["int2 with a residual window (16) at most 3"] = "int2, residual 16"
    for bound, setting in bounds.items():
        later, asked = (of_kv_quality(setting, f"{when}: difference") for when in ("later", "asked"))
        yield f"- {bound}: {points_of_accuracy(later)} later, {points_of_accuracy(asked)} asked"
    later, asked = (of_kv_quality("DynamicCache", f"{when}: accuracy") for when in ("later", "asked"))
    yield (
        f"answers {later['n']:,} questions that come later ({later['value']:.1%} right with the full cache) and "
        f"{asked['n']:,} asked at once ({asked['value']:.1%})"
    )


def parallel_costs() -> Iterator[str]:
    found = entries("bench_parallel_cpu")
    equal = [entry for name, entry in found.items() if name.endswith("_equal_formula")]
    assert all(entry["value"] == entry["n"] == 4 for entry in equal)
    yield f"All {len(equal)} counters are equal to the formula on all 4 ranks"
    yield f"of {found['mixture_documents']['value']:.0f} documents"
    yield f"{found['mixture_tiles']['value']:,.0f} tiles a pack"

    def over(layout: str, tokens_a_rank: range, most_ranks: int = 256) -> list[float]:
        """Steps of a layout over those of 2-D attention, with so many K tokens a rank, on 64 ranks or more."""
        of = [(re.fullmatch(rf"step_P(\d+)_S(\d+)K_{layout}", name), entry) for name, entry in found.items()]
        return [
            entry["ratio"] for match, entry in of
            if match and 64 <= int(match[1]) <= most_ranks and int(match[2]) // int(match[1]) in tokens_a_rank
        ]  # fmt: skip

    few, more = over("ring_gqa", range(2)), over("ring_gqa", range(4, 5))
    yield (
        f"2-D attention is {min(few):.1f} to {max(few):.1f} times as fast; with 4K it is {min(more):.1f} to "
        f"{max(more):.1f} times"
    )
    rest = over("ring_gqa", range(8, 2049))
    assert len(rest) == 6 and rest == pytest.approx([1] * 6, abs=0.01)
    repeated = [entry["ratio"] for name, entry in found.items() if re.fullmatch(r"step_.*K_ring_repeated", name)]
    yield f"up to {max(repeated):.0f} times"
    megatron = [entry["ratio"] for name, entry in found.items() if re.fullmatch(r"step_.*_megatron_gqa", name)]
    yield f"{100 * (min(megatron) - 1):.0f} to {100 * (max(megatron) - 1):.0f} % here"


def prune() -> Iterator[str]:
    def kept(curve: str, keep: float, layer: int = 3) -> float:
        return 100 * of_prune_curves(curve, keep, layer)["results"][0]["ratio"]

    seeds = (f"{accuracy:.3f}".lstrip("0") for accuracy in of_prune_curves("full", 1.0, 0)["seeds"].values())
    yield "unpruned they have {}, {} and {} of the words".format(*seeds)
    yield f"({kept('fastv', 0.5):.1f} % and {kept('fastv', 0.25):.1f} % of the full accuracy)"
    random = [kept("random", keep) for keep in (0.5, 0.25)]
    yield f"*Random* at the same layer keeps {random[0]:.0f} % and {random[1]:.0f} %"
    yield f"*lowest* {kept('lowest', 0.25):.0f} %"
    tokens = [of_prune_curves(*at)["visual_tokens"] for at in (
        ("pyramiddrop", 0.5, 2), ("pyramiddrop", 0.25, 2), ("fastv", 0.5), ("fastv", 0.25),
    )]  # fmt: skip
    yield (
        f"At K = 2 it keeps {kept('pyramiddrop', 0.5, 2):.1f} % and {kept('pyramiddrop', 0.25, 2):.1f} % with "
        f"{tokens[0]:.0f} and {tokens[1]:.0f} visual tokens a layer where FastV needs {tokens[2]:.0f} and "
        f"{tokens[3]:.0f}"
    )
    half, quarter = ([kept(curve, keep) for curve in ("sparsevlm", "sparsevlm+")] for keep in (0.5, 0.25))
    assert {f"{part:.0f}" for part in half} == {"99"}
    yield f"keep 99 % with a half and {min(quarter):.0f} – {max(quarter):.0f} % with a quarter"


def media() -> Iterator[str]:
    tries = values("fuzz_media")
    yield ", ".join(f"{what} {tries[f'tries_{what}']}" for what in ("read", "refused", "crash", "hang", "wrong"))


def training() -> Iterator[str]:
    told = read("kill_and_resume")
    counts = {entry["name"]: entry["value"] for entry in told["results"]}
    yield (
        f"kills: {counts['kills']} {counts['in_save']} of them in a save, in {counts['one_rank_first']} one rank died "
        f"first resumed_at: {told['resumed_at']} of {counts['steps']} steps"
    )
    checks = ("same_weights", "same_documents", "each_document_once_an_epoch")
    yield " ".join(f"{name}: {told[name]}" for name in checks)
    assert all(told[name] for name in checks) and told["last_codes"] == [0, 0]


CLAIMS = {
    "README.md": readme,
    "docs/kv.md": kv,
    "docs/kv_quality.md": kv_quality,
    "docs/media.md": media,
    "docs/parallel_costs.md": parallel_costs,
    "docs/prune.md": prune,
    "docs/training.md": training,
}


@pytest.mark.parametrize("page", CLAIMS)
def test_sentences_say_what_the_results_say(page: str) -> None:
    text = " ".join((ROOT / page).read_text().split())
    for claim in CLAIMS[page]():
        assert claim in text, f"{page} should say, by the results: {claim}"


def test_every_number_in_the_readme_is_from_the_results() -> None:
    uncovered = numbers_beside(prose((ROOT / "README.md").read_text()), [*readme(), *NO_MEASUREMENT])
    assert not uncovered, (
        f"in the README, of no results; add a claim here, or say why it is no measurement: {uncovered}"
    )


def test_every_exception_is_in_the_readme() -> None:
    text = prose((ROOT / "README.md").read_text())
    assert [phrase for phrase in NO_MEASUREMENT if phrase not in text] == []


def prose(page: str) -> str:
    """A page's sentences in one line, without what is between marks, code blocks, and where links lead."""
    page = re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->\n", "", page, flags=re.DOTALL)
    page = re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE)
    page = re.sub(r"^(    |\t).*$", "", page, flags=re.MULTILINE)
    return " ".join(re.sub(r"\]\([^)]*\)", "]", page).split())


def numbers_beside(text: str, covered: list[str]) -> list[str]:
    """Numbers with what stands before them, but for those covered and those of names (LLaVA-1.5, int4, ZeRO-1/2/3)."""
    for part in covered:
        text = text.replace(part, "")
    text = re.sub(r"`[^`]*`", "", text)
    return re.findall(r"(?:\S+ )?(?<![\w.,/])(?<!\w-)-?\d[\d.,]*\S*", text)


def test_numbers_are_found_in_sentences_alone() -> None:
    page = """<!-- t -->
| 0.9 |
<!-- /t -->
See [page 12 here](b-13.md), `x 14`:

    code 15

LLaVA-1.5 int4 ZeRO-1/2/3 take
0.5 s, -7 %"""
    assert numbers_beside(prose(page), []) == ["[page 12", "take 0.5", "s, -7"]
    assert numbers_beside(prose(page), ["take 0.5 s", "page 12"]) == [", -7"]


# The quickstart


@pytest.mark.parametrize(
    ("task", "least"),
    [
        ("what_at", 0.95), ("colour_at", 0.95), ("where_is", 0.85), ("row_column", 0.90), ("clip_colour_8", 0.90),
        ("needle_64", 0.90), ("needle_128", 0.80),
    ],
)  # fmt: skip
def test_committed_quickstart_reaches_what_it_must(task: str, least: float) -> None:
    result = json.loads((RESULTS / "quickstart.json").read_text())["tasks"][task]
    assert result["accuracy"] >= least
    assert result["n"] >= 500
    assert result["low"] <= result["accuracy"] <= result["high"]


def test_committed_quickstart_stays_within_its_budget() -> None:
    results = json.loads((RESULTS / "quickstart.json").read_text())
    assert sum(stage["seconds"] for stage in results["stages"]) <= 360
    assert results["peak_memory_bytes"] < 4e9
    assert results["packing_waste"] < 0.05
    assert sum(a["answer"] == a["truth"] for a in results["ask"]) >= 3
    for answer in results["ask"]:  # both exports, run by transformers alone, say the same
        assert answer["answer"] == answer["answer_code"] == answer["answer_stock"]


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_of_the_documentation_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"
