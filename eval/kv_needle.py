"""A needle in 64 to 512 frames through every KV cache: the settings, table and picture of docs/kv_quality.md."""

from collections.abc import Sequence
from typing import Any

from .report import plt, png

FRAMES = (64, 128, 256, 512)
LATER = 256  # frames of the clips with a second question
PACKED = "group=32,residual=32"  # of a prompt of 73 tokens, too, something is packed
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
SELECTORS = {
    "dense": "dense",
    "quest, 25 % of pages": "quest:keep=0.25,first=0+paged:page=16",
    "quest, 10 % of pages": "quest:keep=0.1,first=0+paged:page=16",
    "duo": "duo:heads={heads}",
    "duo + int4": f"duo:heads={{heads}}+int4:{PACKED}",
    "duo, all heads streaming": "duo:heads={heads},ratio=0",
}


def tables(results: dict[str, Any]) -> dict[str, str]:
    """By mark; of docs/results/kv_needle.json."""
    return {"needle": table(results["points"])}


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
