"""The two products of packed attention in C++ on a CPU, for decoding: bytes are widened in the first-level cache.

`packed_attention_cpu.cpp` is compiled by GCC for the CPU that runs it and for a head_dim when first used, which takes a
second, and kept in the user's cache. Torch's own operations would write every code as a float and read it again.
"""

import ctypes
import hashlib
import os
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch

from .packing import PackedKeys, PackedStates, PackedValues

MOST_ROWS = 64  # of a KV head; for more, dequantising a block and a matmul is as fast
PER_THREAD = 1 << 18  # bytes of codes times rows, for which another thread pays
SPLITS = 4  # of the tokens, for each thread: partial outputs
SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=gnu++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-w")


def takes(query: torch.Tensor, keys: PackedKeys, values: PackedValues) -> bool:
    """Whether the C++ products do it, and can be compiled."""
    rows = query.shape[1] // keys.codes.shape[1] * query.shape[2]
    return (
        rows <= MOST_ROWS
        and query.dtype != torch.float64
        and not (torch.is_grad_enabled() and query.requires_grad)
        and {keys.bits, values.bits} <= {8, 4, 2, 1}
        and _library(query.shape[3]) is not None
    )


def scores(q: torch.Tensor, states: PackedKeys) -> torch.Tensor:
    """q · k, float32 [batch, kv_heads, rows, tokens], of q float32 [batch, kv_heads, rows, head_dim]."""
    out = q.new_empty(*q.shape[:3], states.tokens)
    _call("packed_scores", q, states, ctypes.c_int64(states.group), out)
    return out


def outputs(p: torch.Tensor, states: PackedValues) -> torch.Tensor:
    """p · v, float32 [batch, kv_heads, rows, head_dim], of p float32 [batch, kv_heads, rows, tokens]."""
    splits = SPLITS * torch.get_num_threads()
    out = p.new_empty(splits, *p.shape[:3], states.head_dim)
    _call("packed_outputs", p, states, ctypes.c_int64(splits), out)
    return out.sum(0)


class _Shape(ctypes.Structure):
    """As in the C++ source."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("batch", "kv_heads", "rows", "tokens", "batch_stride", "head_stride", "token_stride")
    ]


def _call(function: str, x: torch.Tensor, states: PackedStates, number: ctypes.c_int64, out: torch.Tensor) -> None:
    x = x.contiguous()
    scale, zero = states.scale.float().contiguous(), states.zero.float().contiguous()
    shape = _Shape(*x.shape[:3], states.tokens, *states.codes.stride()[:3])
    x_at, codes_at, scale_at, zero_at, out_at = (
        ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, states.codes, scale, zero, out)
    )
    threads = max(1, min(torch.get_num_threads(), states.codes.numel() * x.shape[2] // PER_THREAD))
    run = getattr(_library(states.head_dim), function)
    run(ctypes.byref(shape), int(states.bits), x_at, codes_at, scale_at, zero_at, number, out_at, threads)


@cache
def _library(head_dim: int) -> ctypes.CDLL | None:
    """The compiled source; None where it can't be compiled, which is said once."""
    compiler = os.environ.get("CXX", "c++")
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "foveate"
        target = _run(compiler, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull)  # compiler's version, CPU's features
        key = hashlib.sha256(SOURCE.read_bytes() + repr((target, FLAGS, head_dim)).encode()).hexdigest()[:16]
        library = folder / f"packed_attention-{key}.so"
        if not library.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as made:
                _run(compiler, *FLAGS, f"-DHEAD_DIM={head_dim}", str(SOURCE), "-o", f"{made}/library.so")
                os.replace(f"{made}/library.so", library)
        return ctypes.CDLL(str(library))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        warnings.warn(f"packed attention on the CPU runs in torch, several times slower: {said}", stacklevel=2)
        return None


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
