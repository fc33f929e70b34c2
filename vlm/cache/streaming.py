"""StreamingLLM: the first tokens, which attention sinks into, and a window of the latest ones.

Efficient Streaming Language Models with Attention Sinks (ICLR 2024), https://arxiv.org/abs/2309.17453, section 3.2.
"""

import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .base import Eviction, Policy, Seen
from .budget import latest


@dataclass(frozen=True)
class StreamingLLM(Policy):
    """A token that is generated sees the sinks and the window; what lies between is evicted after every pass.

    Positions are those within the cache, as in the paper. RoPE sees their differences alone, so it is the sinks that
    move, behind what was evicted, and the window stays as it is.

    Attributes:
        sink: first columns of a row, which always stay.
        window: latest columns that a token sees, its own among them.
        reindex: whether positions are those within the cache; otherwise each token keeps that in the text.
        windowed: whether a prompt's tokens, too, see sinks and window alone; otherwise they see all before them.

    Raises:
        ValueError: a field is out of range, or `windowed` comes with `reindex`.
    """

    sink: int = 4
    window: int = 1024
    reindex: bool = True
    windowed: bool = False
    evicts_in_decode: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.sink < 0:
            raise ValueError(f"sink is {self.sink}; accepted: at least 0")
        if self.window < 1:
            raise ValueError(f"window is {self.window}; accepted: at least 1")
        if self.windowed and self.reindex:
            raise ValueError(
                "windowed is true with reindex, for which each token would turn the sinks anew; accepted: reindex=false"
            )

    @property
    def sinks(self) -> int:
        return self.sink

    def evict(self, seen: Seen) -> Eviction | None:
        columns, start = seen.store.columns, self.sink if seen.first_new else 0
        if columns < self.sink + self.window:
            return None
        live = seen.slots[:, 0] >= 0  # [batch, columns]
        if start:
            sinks = torch.arange(columns, device=live.device).expand_as(live) < start
        else:
            sinks = live.cumsum(-1) <= self.sink  # in a first prefill padding may stand before them
        keep = sinks | latest(live & ~sinks, self.window - 1)  # with the token to come it is the window
        if self.reindex and self.sink:
            self._move_sinks(seen, live & sinks, (live & ~keep).sum(-1))
        return Eviction(keep[:, None, start:], start)

    def visible(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | None:
        if not self.windowed:
            return None
        order = (keys >= 0).cumsum(-1)  # 1 for a row's first column
        own = order[..., -queries.shape[2] :].mT
        return (order <= self.sink) | (order > own - self.window)

    def _move_sinks(self, seen: Seen, sinks: torch.Tensor, evicted: torch.Tensor) -> None:
        """Turns the sinks' keys to their new positions, from what they were at first, so that no error adds up.

        Args:
            sinks: bool [batch, columns].
            evicted: int64 [batch], columns that go now.
        """
        assert seen.frequencies is not None
        memory = seen.memory
        if seen.first_new:
            places, first, last = torch.arange(self.sink, device=sinks.device).expand(len(sinks), -1), 0, self.sink
        else:
            places = sinks.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, : self.sink]
            first, last = int(places.min()), int(places.max()) + 1
        keys, values = seen.store.dense(first, last)
        index = (places - first)[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        if "sinks" not in memory:
            memory["sinks"] = keys.gather(2, index)
            memory["evicted"] = torch.zeros_like(evicted)
        memory["evicted"] = memory["evicted"] + evicted
        turned = rotated(memory["sinks"], memory["evicted"][:, None, None], seen.frequencies)
        seen.store.replace(first, keys.scatter(2, index, turned), values)

    def check(self, decoder: Any) -> None:
        """Raises ValueError where keys can't be turned to other positions."""
        if not self.reindex or not self.sink:
            return
        kind, rotary = type(decoder).__name__, decoder.rotary_emb
        rope = getattr(decoder.config, "rope_parameters", None) or {}
        if "mrope_section" in rope:
            odd = "M-RoPE, whose positions are those of a grid"
        elif getattr(rotary, "rope_type", "default") in ("dynamic", "longrope"):
            odd = f"RoPE of type {rotary.rope_type!r}, which depends on the length"
        elif not _turns_halves(decoder):
            odd = "positions that are not RoPE on halves of each head"
        else:
            return
        raise ValueError(f"{kind} has {odd}; accepted: reindex=false, so that tokens keep their positions in the text")


def rotated(keys: torch.Tensor, shift: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Keys after RoPE, at positions that are higher by `shift`, in RoPE's half-split layout.

    Args:
        keys: [..., head_dim].
        shift: of positions, broadcast to [...].
        frequencies: [rotary width / 2], radians a position; channels beyond the rotary width are left as they are.
    """
    wide = torch.promote_types(keys.dtype, torch.float32)
    angles = shift[..., None].to(wide) * frequencies.to(keys.device, wide)
    cos, sin, half = angles.cos(), angles.sin(), len(frequencies)
    first, second = keys[..., :half].to(wide), keys[..., half : 2 * half].to(wide)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([turned.to(keys.dtype), keys[..., 2 * half :]], dim=-1)


def _turns_halves(decoder: Any) -> bool:
    """Whether every layer's keys are turned as `rotated` does it: tried on a vector."""
    module = sys.modules[type(decoder.layers[0].self_attn).__module__]
    apply, frequencies = getattr(module, "apply_rotary_pos_emb", None), getattr(decoder.rotary_emb, "inv_freq", None)
    if apply is None or frequencies is None or any(not getattr(x.self_attn, "use_rope", True) for x in decoder.layers):
        return False
    x = torch.linspace(1, 2, 2 * len(frequencies), device=frequencies.device)[None, None, None]
    place = torch.tensor([[3]], device=frequencies.device)
    turned = apply(x, x, *decoder.rotary_emb(x, position_ids=place))[1]
    norm = getattr(decoder.rotary_emb, "attention_scaling", 1.0)
    return torch.allclose(turned, rotated(x, place[:, None], frequencies) * norm, atol=1e-4)
