"""Every policy and selector: what the package has, and its rule by brute force."""

from typing import Any, get_args

from foveate.vlm.cache.h2o import H2O
from foveate.vlm.cache.lookm import LookM, Merge
from foveate.vlm.cache.paged import PagedConfig
from foveate.vlm.cache.parse import KVSpec
from foveate.vlm.cache.quest import Quest
from foveate.vlm.cache.snapkv import SnapKV
from foveate.vlm.cache.streaming import StreamingLLM

from . import agreement, brute

Case = tuple[Any, brute.Rule]

STREAMING: dict[str, Case] = {
    "streaming": (StreamingLLM(2, 9), brute.streaming(2, 9)),
    "streaming, own positions": (StreamingLLM(3, 8, reindex=False), brute.streaming(3, 8, reindex=False)),
    "streaming, windowed": (
        StreamingLLM(2, 9, reindex=False, windowed=True),
        brute.streaming(2, 9, reindex=False, windowed=True),
    ),
}
SNAPKV: dict[str, Case] = {
    "snapkv": (SnapKV(0.5, window=5, kernel=3), brute.snapkv(0.5, 5, 3)),
    "snapkv, highest": (SnapKV(0.4, window=4, kernel=5, pooling="max"), brute.snapkv(0.4, 4, 5, "max")),
}
H2OS: dict[str, Case] = {
    "h2o": (H2O(0.4), brute.h2o(0.4, 0.5)),
    "h2o, few recent": (H2O(0.5, recent=0.2), brute.h2o(0.5, 0.2)),
}
LOOKM: dict[str, Case] = {
    f"look-m, {merge}": (LookM(0.6, merge=merge), brute.lookm(0.6, 0.5, merge)) for merge in get_args(Merge)
}
QUEST: dict[str, Case] = {
    "quest": (Quest(0.4, first=1), brute.quest(agreement.PAGE, 0.4, 1)),
    "quest, all layers": (Quest(0.3, first=0), brute.quest(agreement.PAGE, 0.3, 0)),
}

FAMILIES = {"streaming": STREAMING, "snapkv": SNAPKV, "h2o": H2OS, "look-m": LOOKM, "quest": QUEST}
CASES = {name: case for family in FAMILIES.values() for name, case in family.items()}


def spec(name: str, **parts: Any) -> KVSpec:
    """What the KV cache is made from, a case of this name among it."""
    if name in QUEST:
        return KVSpec(**{"store": PagedConfig(agreement.PAGE), "selector": CASES[name][0]} | parts)
    return KVSpec(policy=CASES[name][0], **parts)


def rule(name: str) -> brute.Rule:
    return CASES[name][1]


def works(model: str, case: str) -> bool:
    """M-RoPE has no positions within the cache, and LOOK-M needs images."""
    if case == "streaming":
        return not model.startswith("qwen")
    return case not in LOOKM or not model.startswith("text")
