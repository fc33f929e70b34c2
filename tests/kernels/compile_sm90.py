"""Compiles kernels for an H100 on any machine and prints what each needs, as JSON.

Run in a process of its own, without TRITON_INTERPRET: `python compile_sm90.py [MODULE ...]`, modules of foveate.kernels
without `_triton`; without any: rater_attention.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
POINTERS = {  # of those that have a type of their own; others are float32
    "last_ptr": "i64",
    "columns_ptr": "i64",
    "pages_ptr": "i64",
    "mask_ptr": "u8",
    "packed_mask_ptr": "u8",
    "dense_mask_ptr": "u8",
}
HEADS, KV_HEADS, HEAD_DIM = 28, 4, 128

Case = tuple[Any, dict[str, Any], dict[str, str], dict[str, int], dict[str, Any]]
# kernel, constants, types of what pointers point to, launch options, and what is printed of the case


def rater_attention() -> Iterator[Case]:
    from foveate.kernels import rater_attention_triton as kernels

    for dtype, head_dim, group in [(torch.bfloat16, 128, 7), (torch.float16, 256, 2)]:
        blocks = kernels.block_sizes(60, group, head_dim, dtype)
        constants = blocks | {"GROUP": group, "HEAD_DIM": head_dim, "WEIGHTED": True}
        pointers = dict.fromkeys(("q_ptr", "k_ptr"), TYPES[dtype])
        for kernel in (kernels.log_sum_exp_kernel, kernels.head_mean_kernel, kernels.rater_mean_kernel):
            yield kernel, constants, pointers, {}, {"dtype": TYPES[dtype], "head_dim": head_dim}


def packed_attention() -> Iterator[Case]:
    from foveate.kernels import packed_attention_triton as kernels

    cases = [
        (torch.bfloat16, 4, "none", False),
        (torch.float16, 8, "shared", True),
        (torch.bfloat16, 2, "none", False),
    ]
    for dtype, bits, mask, paged in cases:
        blocks = kernels.block_sizes(HEADS // KV_HEADS, HEAD_DIM, 64, dtype.itemsize)
        constants = blocks | {
            "ALIGNED": 8,
            "HEAD_DIM": HEAD_DIM,
            "KEY_BITS": bits,
            "VALUE_BITS": bits,
            "DTYPE": tl.float16,
        }
        constants |= {"PACKED_MASK": mask, "DENSE_MASK": mask, "PAGED": paged}
        pointers = dict.fromkeys(("q_ptr", "dense_keys_ptr", "dense_values_ptr"), TYPES[dtype])
        pointers |= {"key_codes_ptr": "u16", "value_codes_ptr": "u16", "key_scale_ptr": "i32", "key_zero_ptr": "i32"}
        pointers |= {"value_scale_ptr": "fp16", "value_zero_ptr": "fp16"}
        options = kernels.launch_options(blocks, bits, dtype.itemsize)
        about = {"dtype": TYPES[dtype], "bits": bits, "mask": mask, "paged": paged, "block": blocks["BLOCK"]}
        yield kernels.packed_attention_kernel, constants, pointers, options, about
    yield kernels.join_splits_kernel, {"BLOCK_DIM": HEAD_DIM, "BLOCK_SPLITS": 16}, {}, {}, {}


def page_attention() -> Iterator[Case]:
    from foveate.kernels import page_attention_triton as kernels

    blocks = kernels.block_sizes(HEADS // KV_HEADS, HEAD_DIM, kernels.BLOCK_PAGES, 2)
    constants = blocks | {"HEAD_DIM": HEAD_DIM, "DTYPE": tl.float16, "MASK": "shared", "PAGE": 64}
    pointers = dict.fromkeys(("q_ptr", "low_ptr", "high_ptr"), "fp16")
    yield kernels.page_scores_kernel, constants, pointers, kernels.score_options(torch.float16), {"dtype": "fp16"}
    constants["BLOCK"] = blocks["DENSE_BLOCK"]
    pointers = dict.fromkeys(("q_ptr", "keys_ptr", "values_ptr"), "bf16")
    yield kernels.page_attention_kernel, constants, pointers, kernels.launch_options(blocks, 16, 2), {"dtype": "bf16"}


def packing() -> Iterator[Case]:
    from foveate.kernels import packing_triton as kernels

    for kernel, dtype, bits in [
        (kernels.pack_keys_kernel, torch.bfloat16, 8),
        (kernels.pack_values_kernel, torch.bfloat16, 4),
        (kernels.pack_keys_kernel, torch.float16, 2),
    ]:
        is_keys = kernel is kernels.pack_keys_kernel
        blocks = kernels.key_blocks(HEAD_DIM, bits, 64) if is_keys else kernels.value_blocks(HEAD_DIM, bits)
        pointers = {"codes_ptr": "u8", "scale_ptr": "fp16", "zero_ptr": "fp16"}
        pointers["keys_ptr" if is_keys else "values_ptr"] = TYPES[dtype]
        about = {"dtype": TYPES[dtype], "bits": bits}
        yield kernel, blocks | {"BITS": bits}, pointers, kernels.launch_options(blocks), about


def compile_kernel(kernel: Any, constants: dict[str, Any], pointers: dict[str, str], options: dict[str, int]) -> Any:
    signature = {}
    for name in kernel.arg_names:
        if name.isupper():
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + (pointers | POINTERS).get(name, "fp32")
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    variable = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    whole = [
        i
        for i, name in enumerate(kernel.arg_names)
        if name.endswith("_ptr") or ("stride" in name and name not in variable)
    ]
    aligned = {(i,): [["tt.divisibility", 16]] for i in whole}
    used = {name: constants[name] for name in kernel.arg_names if name.isupper()}
    source = ASTSource(kernel, signature, used, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def cuobjdump(cubin: bytes, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, what, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def loops(machine_code: str) -> list[int]:
    """Instructions of each loop, from its branch back; loops of less than 50 are waiting or do nothing of weight."""
    found = []
    for address, target in re.findall(r"/\*([0-9a-f]{4,})\*/[^;\n]*\bBRA[^;\n]*?0x([0-9a-f]+)", machine_code):
        if int(target, 16) < int(address, 16):
            found.append((int(address, 16) - int(target, 16)) // 16 + 1)
    return [instructions for instructions in found if instructions >= 50]


def digits(ptx: str) -> list[list[int]]:
    """Shift, mask, bits of the exponent and truth table of the instructions that make numbers of digits."""
    found = re.findall(r"(?:shr\.b32 t, %r\d+, (\d+); )?lop3\.b32 %r\d+, (?:t|%r\d+), (\d+), (\d+), (0x\w+);", ptx)
    return [list(digit) for digit in sorted({tuple(int(number or "0", 0) for number in match) for match in found})]


def main() -> None:
    known = {case.__name__: case for case in (rater_attention, packed_attention, page_attention, packing)}
    results = []
    for module in sys.argv[1:] or ["rater_attention"]:
        for kernel, constants, pointers, options, about in known[module]():
            compiled = compile_kernel(kernel, constants, pointers, options)
            usage = cuobjdump(compiled.asm["cubin"], "-res-usage")
            need = {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}
            results.append(
                {
                    "kernel": kernel.__name__,
                    **about,
                    "registers": need["REG"],
                    "spill_bytes": need["STACK"] + need["LOCAL"],  # spilled registers are on the stack
                    "shared_bytes": compiled.metadata.shared,
                    "warps": compiled.metadata.num_warps,
                    "tensor_cores": bool(re.search(r"\b(wgmma|mma)\b", compiled.asm["ptx"])),
                    "loops": loops(cuobjdump(compiled.asm["cubin"], "-sass")),
                    "digits": digits(compiled.asm["ptx"]),
                }
            )
    json.dump(results, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
