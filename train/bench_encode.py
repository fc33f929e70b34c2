"""`foveate bench encode`: tower and projector alone, random weights: what tilings and projectors cost beside one tile.

Each image is of the same photograph's size. All ways take turns, so that what else the machine does hits all.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from ..eval.facts import result
from ..vlm.config import FoveateConfig
from ..vlm.model import FoveateForConditionalGeneration
from ..vlm.tiling import Tiling
from .bench import SHAPES

TILINGS = ("resize", "s2", "dynamic-s2", "tiles")
PROJECTORS = ("downsample-2x2", "downsample-3x3")
TOWERS = {"tiny": "tiny", "base": "0.5b", "so400m": "2b"}  # by the size of the whole in `SHAPES`
TINY_TILE = 448  # pixels: as many patches as so400m has
IMAGE = (960, 1280)  # (height, width) of the photograph
BASELINE = "resize_downsample-2x2"


@dataclass(frozen=True)
class EncodeBench:
    """What `bench_encode` measures.

    Args:
        shape: a tower of TOWERS, with the width of the LLM that it goes with.
        images: encoded at a time; a video has as many frames.
        rounds: in each of which every way has its turn.
        seconds: of a turn, at least.
        device: `cpu` or `cuda`; where there is one, cuda when None.
    """

    shape: str = "tiny"
    images: int = 8
    rounds: int = 5
    seconds: float = 0.5
    device: str | None = None


@dataclass(frozen=True)
class _Way:
    """One way to encode: what it's called, what it does, and how much that is."""

    name: str
    unit: str  # images or frames
    encode: Callable[[], list[torch.Tensor]]
    tokens: int


def bench_encode(bench: EncodeBench, show: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
    """Measures tower and projector; results as of `eval.facts.result`."""
    device = torch.device(bench.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    ways = list(_ways(bench, device))
    rates: dict[str, list[float]] = {way.name: [] for way in ways}
    with torch.no_grad():
        for number in range(bench.rounds + 1):  # the first warms up
            for way in ways:
                show(f"{way.name}, round {number} of {bench.rounds}")
                rate = _rate(way, bench.images, bench.seconds, device)
                if number:
                    rates[way.name].append(rate)
    plain = median(rates[BASELINE])
    results = []
    for way in ways:
        rate, each = median(rates[way.name]), way.tokens / bench.images
        for unit, factor in ((way.unit, 1.0), ("tokens", each)):
            more: dict[str, Any] = {"low": min(rates[way.name]) * factor, "high": max(rates[way.name]) * factor}
            if unit != "tokens" and way.name != BASELINE:
                more |= {"baseline": f"{BASELINE}_images_per_s", "ratio": rate / plain}
            results.append(result(f"{way.name}_{unit}_per_s", rate * factor, f"{unit}/s", bench.rounds, **more))
    return results


def _ways(bench: EncodeBench, device: torch.device) -> Iterator[_Way]:
    for tiling in TILINGS:
        for projector in PROJECTORS:
            config = _config(bench.shape, tiling, projector)
            model = _model(config, device)
            side = config.vision_config.image_size
            plan = _tiling(config).plan(*IMAGE)
            pixels = torch.randn(bench.images * plan.tiles, 3, side, side, device=device, dtype=model.dtype)
            grids = None if tiling == "resize" else torch.tensor([plan.grid] * bench.images)

            def images(
                model: FoveateForConditionalGeneration = model, pixels: torch.Tensor = pixels, grids: Any = grids
            ) -> list[torch.Tensor]:
                return model.encode_images(pixels, grids)

            yield _Way(f"{tiling}_{projector}", "images", images, bench.images * plan.tokens)
            if tiling == "resize":

                def frames(
                    model: FoveateForConditionalGeneration = model, pixels: torch.Tensor = pixels
                ) -> list[torch.Tensor]:
                    return model.encode_videos(pixels)

                yield _Way(f"video_{projector}", "frames", frames, bench.images * plan.tokens)


def _config(shape: str, tiling: str, projector: str) -> FoveateConfig:
    fields = SHAPES[TOWERS[shape]]
    side = TINY_TILE if shape == "tiny" else fields["vision_config"]["image_size"]
    vision = fields["vision_config"] | {"image_size": side}
    text = fields["text_config"] | {"num_hidden_layers": 1, "vocab_size": 8}  # only its width counts
    scales = [side, 2 * side, 3 * side] if tiling in ("s2", "dynamic-s2") else None
    return FoveateConfig(vision, text, projector=projector, tiling=tiling, s2_scales=scales)


def _model(config: FoveateConfig, device: torch.device) -> FoveateForConditionalGeneration:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = FoveateForConditionalGeneration._from_config(config, dtype=dtype).to(device).eval()
    del model.language_model.model.layers[:]
    return model


def _tiling(config: FoveateConfig) -> Tiling:
    side = config.vision_config.image_size
    scales = tuple(scale // side for scale in config.s2_scales or ())
    return Tiling(config.tiling, (side, side), config.vision_config.patch_size, config.downsample_factor, scales=scales)


def _rate(way: _Way, images: int, seconds: float, device: torch.device) -> float:
    """Images or frames a second."""
    done = 0
    _wait(device)
    began = time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds:
        encoded = way.encode()
        _wait(device)
        done += images
    assert sum(len(tokens) for tokens in encoded) == way.tokens
    return done / passed


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
