"""Compiles the rater attention kernels for an H100 on any machine and prints what each needs, as JSON.

Run in a process of its own, without TRITON_INTERPRET: `python compile_sm90.py`.
"""

import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from foveate.kernels import rater_attention_triton as kernels

POINTERS = {"q_ptr": None, "k_ptr": None, "last_ptr": "*i64", "columns_ptr": "*i64"}  # the others are float32
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
CASES = [(torch.bfloat16, 128, 28, 4), (torch.float16, 256, 8, 4)]  # dtype, head_dim, heads, kv_heads


def compile_kernel(kernel, dtype: torch.dtype, head_dim: int, group: int, raters: int):
    blocks = kernels.block_sizes(raters, group, head_dim, dtype)
    known = blocks | {"GROUP": group, "HEAD_DIM": head_dim, "WEIGHTED": True}
    constants = {name: known[name] for name in kernel.arg_names if name.isupper()}
    signature = {}
    for name in kernel.arg_names:
        if name.isupper():
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name, "*fp32") or "*" + TYPES[dtype]
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    whole = [i for i, name in enumerate(kernel.arg_names) if name.endswith("_ptr") or "stride" in name]
    aligned = {(i,): [["tt.divisibility", 16]] for i in whole}
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32))


def resource_usage(cubin: bytes) -> dict[str, int]:
    """As `cuobjdump` reads it off the machine code; spilled registers are on the stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(re.search(rf"{name}:(\d+)", report)[1]) for name in ("REG", "STACK", "LOCAL")}


def main() -> None:
    results = []
    for dtype, head_dim, heads, kv_heads in CASES:
        for kernel in (kernels.log_sum_exp_kernel, kernels.head_mean_kernel, kernels.rater_mean_kernel):
            compiled = compile_kernel(kernel, dtype, head_dim, heads // kv_heads, raters=60)
            usage = resource_usage(compiled.asm["cubin"])
            results.append(
                {
                    "kernel": kernel.__name__,
                    "dtype": TYPES[dtype],
                    "head_dim": head_dim,
                    "registers": usage["REG"],
                    "spill_bytes": usage["STACK"] + usage["LOCAL"],
                    "shared_bytes": compiled.metadata.shared,
                    "tensor_cores": bool(re.search(r"\b(wgmma|mma)\b", compiled.asm["ptx"])),
                }
            )
    json.dump(results, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
