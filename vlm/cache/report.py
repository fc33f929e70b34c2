"""What a KV cache holds, for people and as JSON."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from transformers import Cache


@dataclass(frozen=True)
class KVCosts:
    """What a KV cache holds of its sequences.

    Attributes:
        length: tokens of a sequence.
        bytes: allocated for keys and values, in all layers.
        full_bytes: what those of all tokens take in the model's dtype.
        numbers: of all tokens' keys and values.
        tokens: of each layer, how many are held; mean over samples and KV heads.
        packed: of each layer, how many of its columns are quantised; mean over KV heads.
    """

    length: int
    bytes: int
    full_bytes: int
    numbers: int
    tokens: tuple[float, ...]
    packed: tuple[float, ...]

    @property
    def bits(self) -> float:
        """Allocated for each number of all tokens' keys and values."""
        return self.bytes * 8 / self.numbers

    @property
    def mean_tokens(self) -> float:
        return sum(self.tokens) / len(self.tokens)

    @property
    def mean_packed(self) -> float:
        return sum(self.packed) / len(self.packed)

    def lines(self) -> list[str]:
        """What is printed of it."""
        return [
            f"KV cache: {self.bytes / 1e6:.3g} MB of {self.full_bytes / 1e6:.3g} MB "
            f"({self.bytes / self.full_bytes:.1%}), {self.bits:.3g} bits a number",
            f"tokens held by a layer (mean): {self.mean_tokens:.4g} of {self.length}, {self.mean_packed:.4g} quantised",
        ]

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        told = asdict(self)
        del told["numbers"]
        return told | {"bits": self.bits}


def costs(cache: Cache) -> KVCosts:
    """What a KV cache holds; one of transformers' too, after a first pass."""
    held = [list(_parts(layer)) for layer in cache.layers]
    parts = [part for layer in held for part in layer]

    def mean(values: str) -> tuple[float, ...]:
        return tuple(
            sum(getattr(part, values) * part.heads for part in layer) / sum(part.heads for part in layer)
            for layer in held
        )

    length = cache.get_seq_length()
    numbers = sum(part.width * part.heads * part.batch * length for part in parts)
    itemsize = parts[0].itemsize
    total = sum(part.bytes for part in parts)
    return KVCosts(length, total, numbers * itemsize, numbers, mean("tokens"), mean("packed"))


@dataclass(frozen=True)
class _Part:
    """KV heads of a layer that are kept alike; `width` is head_dim of key and value together."""

    batch: int
    heads: int
    width: int
    itemsize: int
    bytes: int
    tokens: float
    packed: float


def _parts(layer: Any) -> Iterator[_Part]:
    for one in getattr(layer, "layers", [layer]):
        if hasattr(one, "store"):
            keys, values = one.store.dense(0, 1)
            nbytes, packed = one.nbytes, float(getattr(one.store, "packed", 0))
            tokens = float((one.all_slots() >= 0).sum(-1).float().mean())
        else:
            keys, values = one.keys, one.values
            nbytes, packed, tokens = keys.nbytes + values.nbytes, 0.0, float(keys.shape[2])
        batch, heads, _, width = keys.shape
        yield _Part(batch, heads, width + values.shape[3], keys.itemsize, nbytes, tokens, packed)
