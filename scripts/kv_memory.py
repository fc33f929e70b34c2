"""Bytes that each packed KV store allocates for a long prompt, as a table: `python scripts/kv_memory.py [HEAD_DIM]`."""

import sys
from typing import Any

import torch

from foveate.vlm.cache.base import Seen
from foveate.vlm.cache.parse import parse_kv

TOKENS = 16384  # that are packed
TEXTS = [
    "int8",
    "int4",
    "int4:group=32",
    "int4:keys=4,values=2",
    "int2",
    "int2:group=32",
    "int2:group=128",
    "zipvl",
    "akvq-vl",
    "vidkv",
    "vidkv:salient=0",
    "vidkv:salient=0,group=128",
]


def measured(text: str, head_dim: int) -> tuple[float, str]:
    """Bytes for a token in a KV head, and which part of the tokens is salient; of two heads, a third of it text."""
    torch.manual_seed(0)
    config: Any = parse_kv(text).store
    store, tokens = config.make(), TOKENS + config.residual
    keys, values = torch.randn(2, 1, 2, tokens, head_dim).bfloat16()
    query = 3 * torch.randn(1, 4, 64, head_dim).bfloat16()
    slots = torch.arange(tokens)[None, None]
    store.append(keys, values)
    store.settle(lambda: Seen(query, head_dim**-0.5, tokens, store, slots, slots[0] % 3 > 0, None, 0))
    assert store.packed == TOKENS
    allocated = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in store.bank.tensors}
    banks = getattr(store.bank, "banks", ())
    return sum(allocated.values()) / 2 / TOKENS, f"{banks[0].tokens / TOKENS:.0%}" if banks else ""


def main(head_dim: int) -> None:
    print("| store | bytes a token and head | in bfloat16 | ratio | bits a number | salient |")
    print("|---|--:|--:|--:|--:|--:|")
    for text in TEXTS:
        each, salient = measured(text, head_dim)
        dense = 2 * 2 * head_dim
        print(f"| `{text}` | {each:.1f} | {dense} | {dense / each:.2f} | {8 * each / 2 / head_dim:.2f} | {salient} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 128)
