"""Draws how one image is cut by each tiling, and how many tokens it becomes: docs/tokens.png.

.venv/bin/python scripts/draw_tilings.py docs/tokens.png
"""

import sys

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from foveate.vlm.tiling import Tiling, merge_tiles

HEIGHT, WIDTH = 900, 1600
COMMON = {"patch_size": 14, "r": 3}
TILINGS = {
    "resize": Tiling("resize", (448, 448), **COMMON),
    "s2": Tiling("s2", (448, 448), scales=(1, 2, 3), **COMMON),
    "dynamic-s2": Tiling("dynamic-s2", (448, 448), scales=(1, 2, 3), **COMMON),
    "tiles": Tiling("tiles", (448, 448), **COMMON),
    "native": Tiling("native", (14, 14), max_patches=4096, **COMMON),
}


def picture() -> Image.Image:
    """Rings and a slope: lines show the grain, circles show a changed aspect ratio."""
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float64)
    rings = np.hypot(x - WIDTH / 2, y - HEIGHT / 2)
    channels = [0.5 + 0.4 * np.sin(rings / 24), x / WIDTH, 1 - y / HEIGHT]
    return Image.fromarray((np.stack(channels, -1) * 255).astype(np.uint8))


def main(out: str) -> None:
    """Writes the picture."""
    image = picture()
    plans = {name: tiling.plan(HEIGHT, WIDTH) for name, tiling in TILINGS.items()}
    columns = max(len(plan.levels) for plan in plans.values())
    figure, axes = plt.subplots(len(plans), columns, figsize=(9, 11), layout="constrained")
    for row, (name, tiling) in zip(axes, TILINGS.items(), strict=True):
        plan = plans[name]
        tiles, start = tiling.cut(image, plan, Image.Resampling.BICUBIC), 0
        unit = "patches" if name == "native" else "tiles"
        row[0].set_title(f"{name}: {plan.tiles:,} {unit}, {plan.tokens:,} tokens", loc="left", fontsize=10)
        for axis, level in zip(row, plan.levels, strict=False):
            count = level[0] * level[1]
            axis.imshow(merge_tiles(tiles[start : start + count], level))
            start += count
            if name != "native":
                for number in range(1, level[1]):
                    axis.axvline(number * plan.tile[1], color="white", linewidth=1.5)
                for number in range(1, level[0]):
                    axis.axhline(number * plan.tile[0], color="white", linewidth=1.5)
            axis.set_xlabel(f"{level[0]} × {level[1]} {unit}", fontsize=9)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
        for axis in row[len(plan.levels) :]:
            axis.axis("off")
    figure.savefig(out, dpi=80, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main(sys.argv[1])
