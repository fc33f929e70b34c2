"""`packed_attention` on CUDA: columns are split over programs, whose results a second kernel joins (flash-decoding).

A program holds all query rows of one KV head, so codes are read once for the heads of a group. Codes become numbers in
registers without a conversion instruction: the bits of a code are put under the exponent of a float16, which makes it
2^k + code, and 2^k is subtracted. One logic instruction does that for two channels at a time, since two neighbouring
16-bit words lie in a register; and a word's digits are tiles of their own, laid side by side, so that nothing is
interleaved. The channels of a tile therefore come in another order, in which queries are read and outputs written.

With packed columns all products are in float16 and sums in float32 (bfloat16 would round keys to less than a code's
step); float32 queries are served in float32.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from .packing import PackedKeys, PackedValues

LOG2_E = 1.4426950408889634
BITS = (8, 4, 2)
LARGEST_HEAD = 256
PROGRAMS_PER_SM = 4  # of four warps, with 128 registers a thread
SPLIT_TOKENS = 256  # the fewest 4-bit columns for which a program is worth its start and its share of the joining
MOST_SPLITS = 256

# They change from token to token: no kernel is compiled for those that 16 divides.
LENGTHS = (
    "packed_columns", "dense_columns", "packed_splits", "packed_per_split", "dense_per_split",
    "packed_mask_stride_batch", "packed_mask_stride_head", "packed_mask_stride_query",
    "dense_mask_stride_batch", "dense_mask_stride_head", "dense_mask_stride_query",
    "pages_stride_batch", "pages_stride_head",
)  # fmt: skip

COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)  # the interpreter knows no assembly
LIFT = tl.constexpr(12.0)  # probabilities are kept times 2^12: more of the small ones are normal float16 numbers
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def digit(words, DIGIT: tl.constexpr, BITS: tl.constexpr):
    """A digit of 16-bit words [tokens, words], as float16: its bits under the exponent of 2^(10 - position)."""
    SHIFT: tl.constexpr = DIGIT * BITS // 8 * 8
    POSITION: tl.constexpr = DIGIT * BITS - SHIFT
    MASK: tl.constexpr = (1 << BITS) - 1 << POSITION
    EXPONENT: tl.constexpr = (25 - POSITION) << 10
    if COMPILED:  # two words in a register: (words >> SHIFT) & MASK | EXPONENT
        TAKE: tl.constexpr = f"{MASK * 0x10001}, {EXPONENT * 0x10001}, 0xEA;"
        SHIFTED: tl.constexpr = f"{{ .reg .b32 t; shr.b32 t, $1, {SHIFT}; lop3.b32 $0, t, {TAKE} }}"
        ASSEMBLY: tl.constexpr = SHIFTED if SHIFT > 0 else f"lop3.b32 $0, $1, {TAKE}"
        number = tl.inline_asm_elementwise(ASSEMBLY, "=r,r", [words], tl.float16, True, 2)
    else:
        number = ((words >> SHIFT) & MASK | EXPONENT).to(tl.uint16).to(tl.float16, bitcast=True)
    return number - 2.0 ** (10 - POSITION)


@triton.jit
def beside(left, right):
    """[tokens, channels] twice -> [tokens, 2 · channels], the left ones first."""
    return tl.join(left, right).permute(0, 2, 1).reshape(left.shape[0], 2 * left.shape[1])


@triton.jit
def place_of_words(words, even_scale, even_zero, odd_scale, odd_zero, PLACE: tl.constexpr, BITS: tl.constexpr):
    """Numbers at one place of each byte: those of even bytes, then of odd ones, [tokens, 2 · words]."""
    even = digit(words, PLACE, BITS).to(even_scale.dtype) * even_scale + even_zero
    odd = digit(words, PLACE + 8 // BITS, BITS).to(odd_scale.dtype) * odd_scale + odd_zero
    return beside(even, odd)


@triton.jit
def channel_of(c, WORDS: tl.constexpr, BLOCK_WORDS: tl.constexpr):
    """The channel that stands at c in a tile of numbers, and whether there is one."""
    place, odd, word = c // (2 * BLOCK_WORDS), c // BLOCK_WORDS % 2, c % BLOCK_WORDS
    return (place * WORDS + word) * 2 + odd, word < WORDS


@triton.jit
def key_place(
    codes, scale_ptr, zero_ptr, word, PLACE: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr, DTYPE: tl.constexpr
):
    """Keys at one place of each byte; pairs of scales lie in 32-bit words."""
    scale = tl.load(scale_ptr + PLACE * WORDS + word, mask=word < WORDS, other=0)
    zero = tl.load(zero_ptr + PLACE * WORDS + word, mask=word < WORDS, other=0)
    even_scale = scale.to(tl.int16).to(tl.float16, bitcast=True).to(DTYPE)[None, :]
    even_zero = zero.to(tl.int16).to(tl.float16, bitcast=True).to(DTYPE)[None, :]
    odd_scale = (scale >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(DTYPE)[None, :]
    odd_zero = (zero >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(DTYPE)[None, :]
    return place_of_words(codes, even_scale, even_zero, odd_scale, odd_zero, PLACE, BITS)


@triton.jit
def key_numbers(codes, scale_ptr, zero_ptr, word, BITS: tl.constexpr, WORDS: tl.constexpr, DTYPE: tl.constexpr):
    """Keys of a block of tokens that share a scale, [tokens, channels in the order of `channel_of`]."""
    numbers = key_place(codes, scale_ptr, zero_ptr, word, 0, BITS, WORDS, DTYPE)
    if BITS < 8:
        numbers = beside(numbers, key_place(codes, scale_ptr, zero_ptr, word, 1, BITS, WORDS, DTYPE))
    if BITS < 4:
        third = key_place(codes, scale_ptr, zero_ptr, word, 2, BITS, WORDS, DTYPE)
        fourth = key_place(codes, scale_ptr, zero_ptr, word, 3, BITS, WORDS, DTYPE)
        numbers = beside(numbers, beside(third, fourth))
    return numbers


@triton.jit
def value_numbers(words, scale, zero, BITS: tl.constexpr):
    """Values of a block of tokens with a scale each, [tokens, channels in the order of `channel_of`]."""
    numbers = place_of_words(words, scale, zero, scale, zero, 0, BITS)
    if BITS < 8:
        numbers = beside(numbers, place_of_words(words, scale, zero, scale, zero, 1, BITS))
    if BITS < 4:
        third = place_of_words(words, scale, zero, scale, zero, 2, BITS)
        fourth = place_of_words(words, scale, zero, scale, zero, 3, BITS)
        numbers = beside(numbers, beside(third, fourth))
    return numbers


@triton.jit
def seen_columns(
    mask_ptr, column, real, query, stride_query, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr, MASK: tl.constexpr
):
    """Which columns each row sees, [BLOCK_ROWS, BLOCK]; MASK: "none", "shared" by the queries or one for "each"."""
    if MASK == "none":
        seen = tl.broadcast_to(real[None, :], BLOCK_ROWS, BLOCK)
    elif MASK == "shared":
        shared = tl.load(mask_ptr + column, mask=real, other=0) != 0
        seen = tl.broadcast_to(shared[None, :], BLOCK_ROWS, BLOCK)
    else:
        at = mask_ptr + query[:, None] * stride_query + column[None, :]
        seen = tl.load(at, mask=tl.broadcast_to(real[None, :], BLOCK_ROWS, BLOCK), other=0) != 0
    return seen


@triton.jit
def running_softmax(scores, values, out, total, largest):
    """Adds a block of columns to the sums; the total is kept for each column of the block, and summed in the end."""
    new_largest = tl.maximum(largest, tl.max(scores, 1))
    shift = tl.where(new_largest == float("-inf"), 0.0, new_largest) - LIFT  # nothing seen yet: no inf - inf
    p = tl.exp2(scores - shift[:, None])
    before = tl.exp2(largest - LIFT - shift)
    total = total * before[:, None] + p
    out = tl.dot(p.to(values.dtype), values, out * before[:, None], input_precision="tf32x3")
    return out, total, new_largest


@triton.jit
def write_split(
    out, total, largest, out_ptr, lse_ptr, row, real_row, channel, real_channel, splits, split, HEAD_DIM: tl.constexpr
):
    """A split's part of the output [rows, splits, head_dim] and natural log-sum-exp [rows, splits]."""
    sums = tl.sum(total, 1)
    lse = (largest - LIFT + tl.log2(tl.where(sums > 0, sums, 1.0))) * LN_2  # -inf where nothing is seen
    place = row.to(tl.int64) * splits + split
    tl.store(lse_ptr + place, lse, mask=real_row)
    out = out / tl.where(sums > 0, sums, 1.0)[:, None]
    at = out_ptr + place[:, None] * HEAD_DIM + channel[None, :]
    tl.store(at, out, mask=real_row[:, None] & real_channel[None, :])


@triton.jit
def attend_dense(
    q_ptr, keys_ptr, values_ptr, mask_ptr, pages_ptr, out_ptr, lse_ptr,
    q_stride_head, q_stride_query, key_stride, value_stride, mask_stride_query,
    first, last, out_row, rows, queries, splits, split, scale,
    HEAD_DIM: tl.constexpr,
    MASK: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of a KV head to its columns from `first` to `last`; where PAGE > 0, to those of pages of so many columns."""
    row, c, t = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK)
    real_row, real_channel, query = row < rows, c < HEAD_DIM, row % queries
    q_at = q_ptr + (row // queries)[:, None] * q_stride_head + query[:, None] * q_stride_query + c[None, :]
    q = tl.load(q_at, mask=real_row[:, None] & real_channel[None, :], other=0.0)

    out = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    total = tl.zeros([BLOCK_ROWS, BLOCK], tl.float32)
    largest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    for start in range(first, last, BLOCK):
        column = start + t
        real = column < last
        if PAGE > 0:
            number = tl.load(pages_ptr + column // PAGE, mask=real, other=-1)
            real = number >= 0
            column = tl.maximum(number, 0) * PAGE + column % PAGE
        inside = real[:, None] & real_channel[None, :]
        offset = column.to(tl.int64)[:, None]
        keys = tl.load(keys_ptr + offset * key_stride + c[None, :], mask=inside, other=0.0).to(q.dtype)
        values = tl.load(values_ptr + offset * value_stride + c[None, :], mask=inside, other=0.0).to(q.dtype)
        seen = seen_columns(mask_ptr, column, real, query, mask_stride_query, BLOCK_ROWS, BLOCK, MASK)
        scores = tl.dot(q, tl.trans(keys), input_precision="tf32x3") * scale
        scores = tl.where(seen, scores, float("-inf"))
        out, total, largest = running_softmax(scores, values, out, total, largest)
    write_split(
        out, total, largest, out_ptr, lse_ptr, out_row + row, real_row, c, real_channel, splits, split, HEAD_DIM
    )  # fmt: skip


@triton.jit
def attend_packed(
    q_ptr, key_codes_ptr, key_scale_ptr, key_zero_ptr, value_codes_ptr, value_scale_ptr, value_zero_ptr,
    mask_ptr, pages_ptr, out_ptr, lse_ptr,
    q_stride_head, q_stride_query, key_stride, scale_stride, zero_stride, value_stride, mask_stride_query,
    first, last, group, out_row, rows, queries, splits, split, scale,
    HEAD_DIM: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    MASK: tl.constexpr,
    PAGED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of a KV head to its packed columns from `first` to `last`; of pages of `group` columns where PAGED."""
    row, c, t = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK)
    KEY_WORDS: tl.constexpr = HEAD_DIM * KEY_BITS // 16
    KEY_BLOCK: tl.constexpr = BLOCK_DIM * KEY_BITS // 16
    VALUE_WORDS: tl.constexpr = HEAD_DIM * VALUE_BITS // 16
    VALUE_BLOCK: tl.constexpr = BLOCK_DIM * VALUE_BITS // 16
    key_word, value_word = tl.arange(0, KEY_BLOCK), tl.arange(0, VALUE_BLOCK)
    real_row, query = row < rows, row % queries
    channel, real_channel = channel_of(c, KEY_WORDS, KEY_BLOCK)
    q_at = q_ptr + (row // queries)[:, None] * q_stride_head + query[:, None] * q_stride_query + channel[None, :]
    q = tl.load(q_at, mask=real_row[:, None] & real_channel[None, :], other=0.0).to(DTYPE)
    key_tile = t[:, None] * key_stride + key_word[None, :]
    value_tile = t[:, None] * value_stride + value_word[None, :]

    out = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    total = tl.zeros([BLOCK_ROWS, BLOCK], tl.float32)
    largest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    for start in range(first, last, BLOCK):  # a block lies in one group
        block = tl.cast(start, tl.int64)
        real = t < BLOCK
        if PAGED:
            number = tl.load(pages_ptr + start // group)
            real = t < tl.where(number >= 0, BLOCK, 0)
            block = tl.maximum(number, 0) * group + start % group
        value_scale = tl.load(value_scale_ptr + block + t).to(DTYPE)[:, None]
        value_zero = tl.load(value_zero_ptr + block + t).to(DTYPE)[:, None]
        key_codes = tl.load(
            key_codes_ptr + block * key_stride + key_tile, mask=(key_word < KEY_WORDS)[None, :], other=0
        )
        scale_row = block // group
        keys = key_numbers(
            key_codes, key_scale_ptr + scale_row * scale_stride, key_zero_ptr + scale_row * zero_stride,
            key_word, KEY_BITS, KEY_WORDS, DTYPE,
        )  # fmt: skip
        scores = tl.dot(q, tl.trans(keys), input_precision="tf32x3") * scale
        if PAGED or MASK != "none":
            seen = seen_columns(mask_ptr, block + t, real, query, mask_stride_query, BLOCK_ROWS, BLOCK, MASK)
            scores = tl.where(seen, scores, float("-inf"))
        value_codes = tl.load(
            value_codes_ptr + block * value_stride + value_tile, mask=(value_word < VALUE_WORDS)[None, :], other=0
        )
        values = value_numbers(value_codes, value_scale, value_zero, VALUE_BITS)
        out, total, largest = running_softmax(scores, values, out, total, largest)
    channel, real_channel = channel_of(c, VALUE_WORDS, VALUE_BLOCK)
    write_split(
        out, total, largest, out_ptr, lse_ptr, out_row + row, real_row, channel, real_channel, splits, split, HEAD_DIM
    )  # fmt: skip


@triton.jit(do_not_specialize=LENGTHS)
def packed_attention_kernel(
    q_ptr,
    key_codes_ptr,  # 16-bit words
    key_scale_ptr,  # 32-bit words, of two float16
    key_zero_ptr,
    value_codes_ptr,  # 16-bit words
    value_scale_ptr,
    value_zero_ptr,
    dense_keys_ptr,
    dense_values_ptr,
    packed_mask_ptr,
    dense_mask_ptr,
    pages_ptr,
    out_ptr,  # [batch, heads, queries, splits, head_dim]
    lse_ptr,  # [batch, heads, queries, splits]
    q_stride_batch, q_stride_head, q_stride_query,
    key_stride_batch, key_stride_head, key_stride,
    scale_stride_batch, scale_stride_head, scale_stride,
    zero_stride_batch, zero_stride_head, zero_stride,
    value_stride_batch, value_stride_head, value_stride,
    value_scale_stride_batch, value_scale_stride_head,
    value_zero_stride_batch, value_zero_stride_head,
    dense_key_stride_batch, dense_key_stride_head, dense_key_stride,
    dense_value_stride_batch, dense_value_stride_head, dense_value_stride,
    packed_mask_stride_batch, packed_mask_stride_head, packed_mask_stride_query,
    dense_mask_stride_batch, dense_mask_stride_head, dense_mask_stride_query,
    pages_stride_batch, pages_stride_head,
    kv_heads,
    rows,  # heads of a group · queries
    queries,
    group,  # tokens that share a key scale, and of a page; a multiple of BLOCK
    packed_columns,  # to read
    dense_columns,
    packed_splits,  # programs for packed columns; those after them are for dense ones
    packed_per_split,  # a multiple of BLOCK
    dense_per_split,
    scale,  # scaling · log2(e)
    ALIGNED: tl.constexpr,  # words that all strides of codes are multiples of
    HEAD_DIM: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    PACKED_MASK: tl.constexpr,
    DENSE_MASK: tl.constexpr,
    PAGED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    DENSE_BLOCK: tl.constexpr,
):  # fmt: skip
    """One split of the columns, for all rows of one KV head."""
    split, splits = tl.program_id(0), tl.num_programs(0)
    head, batch = tl.program_id(1).to(tl.int64) % kv_heads, tl.program_id(1).to(tl.int64) // kv_heads
    out_row = tl.program_id(1).to(tl.int64) * rows
    q_ptr += batch * q_stride_batch + head * (rows // queries) * q_stride_head
    if split < packed_splits:
        first = split * packed_per_split
        key_stride, value_stride = key_stride // ALIGNED * ALIGNED, value_stride // ALIGNED * ALIGNED
        key_row = (batch * key_stride_batch + head * key_stride_head) // ALIGNED * ALIGNED
        value_row = (batch * value_stride_batch + head * value_stride_head) // ALIGNED * ALIGNED
        attend_packed(
            q_ptr,
            key_codes_ptr + key_row,
            key_scale_ptr + batch * scale_stride_batch + head * scale_stride_head,
            key_zero_ptr + batch * zero_stride_batch + head * zero_stride_head,
            value_codes_ptr + value_row,
            value_scale_ptr + batch * value_scale_stride_batch + head * value_scale_stride_head,
            value_zero_ptr + batch * value_zero_stride_batch + head * value_zero_stride_head,
            packed_mask_ptr + batch * packed_mask_stride_batch + head * packed_mask_stride_head,
            pages_ptr + batch * pages_stride_batch + head * pages_stride_head,
            out_ptr, lse_ptr, q_stride_head, q_stride_query, key_stride, scale_stride, zero_stride, value_stride,
            packed_mask_stride_query, first, tl.minimum(first + packed_per_split, packed_columns), group,
            out_row, rows, queries, splits, split, scale, HEAD_DIM, KEY_BITS, VALUE_BITS, DTYPE, PACKED_MASK, PAGED,
            BLOCK_ROWS, BLOCK_DIM, BLOCK,
        )  # fmt: skip
    else:
        first = (split - packed_splits) * dense_per_split
        last = tl.minimum(first + dense_per_split, dense_columns)
        attend_dense(
            q_ptr,
            dense_keys_ptr + batch * dense_key_stride_batch + head * dense_key_stride_head,
            dense_values_ptr + batch * dense_value_stride_batch + head * dense_value_stride_head,
            dense_mask_ptr + batch * dense_mask_stride_batch + head * dense_mask_stride_head,
            pages_ptr, out_ptr, lse_ptr, q_stride_head, q_stride_query, dense_key_stride, dense_value_stride,
            dense_mask_stride_query, first, last, out_row, rows, queries, splits, split, scale,
            HEAD_DIM, DENSE_MASK, 0, BLOCK_ROWS, BLOCK_DIM, DENSE_BLOCK,
        )  # fmt: skip


@triton.jit
def join_splits_kernel(
    part_ptr,  # [rows, splits, head_dim]
    part_lse_ptr,  # [rows, splits]
    out_ptr,  # [rows, head_dim]
    lse_ptr,  # [rows]
    splits,
    head_dim,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """One row's output and log-sum-exp from those of its splits."""
    row = tl.program_id(0).to(tl.int64)
    c, s = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_SPLITS)
    out = tl.zeros([BLOCK_DIM], tl.float32)
    largest = tl.max(tl.full([BLOCK_SPLITS], float("-inf"), tl.float32), 0)
    total = tl.sum(tl.zeros([BLOCK_SPLITS], tl.float32), 0)
    for start in range(0, splits, BLOCK_SPLITS):
        real = start + s < splits
        lse = tl.load(part_lse_ptr + row * splits + start + s, mask=real, other=float("-inf"))
        at = part_ptr + (row * splits + start + s)[:, None] * head_dim + c[None, :]
        part = tl.load(at, mask=real[:, None] & (c < head_dim)[None, :], other=0.0)
        new_largest = tl.maximum(largest, tl.max(lse, 0))
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weight, before = tl.exp(lse - shift), tl.exp(largest - shift)
        total = total * before + tl.sum(weight, 0)
        out = out * before + tl.sum(part * weight[:, None], 0)
        largest = new_largest
    seen = tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row * head_dim + c, out / seen, mask=c < head_dim)
    tl.store(lse_ptr + row, largest + tl.log(seen))


def takes(query: torch.Tensor, keys: PackedKeys, values: PackedValues) -> bool:
    """Whether the kernel serves these: 8, 4 or 2 bits, groups of a multiple of 16 tokens, head_dim of at most 256."""
    if not (isinstance(keys, PackedKeys) and isinstance(values, PackedValues)):
        return False
    if keys.bits not in BITS or values.bits not in BITS or keys.group % 16:
        return False
    rows = query.shape[1] // keys.codes.shape[1] * query.shape[2]
    return takes_query(query, rows)


def takes_query(query: torch.Tensor, rows: int) -> bool:
    """Whether a program holds so many rows of such queries."""
    known = (torch.bfloat16, torch.float16, torch.float32)
    return query.dtype in known and rows <= 64 and query.shape[-1] % 8 == 0 and 16 <= query.shape[-1] <= LARGEST_HEAD


def block_sizes(rows: int, head_dim: int, group: int, itemsize: int) -> dict[str, int]:
    """Of the kernels' tiles; `group` is a number of columns that a block must divide."""
    dim = triton.next_power_of_2(head_dim)
    block = 64 if dim * itemsize <= 256 else 32 if dim * itemsize <= 512 else 16
    return {
        "BLOCK_ROWS": max(16, triton.next_power_of_2(rows)),
        "BLOCK_DIM": dim,
        "BLOCK": min(block, group & -group),  # the largest power of two that divides the group
        "DENSE_BLOCK": max(16, block // 2),
    }


def launch_options(blocks: dict[str, int], bits: int, itemsize: int) -> dict[str, int]:
    """Registers are bounded so that four programs, or three, are on a multiprocessor at a time; it has 65,536."""
    registers = 255
    if itemsize == 2 and blocks["BLOCK_ROWS"] <= 32:
        small = blocks["BLOCK_ROWS"] == 16 and blocks["BLOCK_DIM"] <= 128 and bits <= 4
        registers = 128 if small else 168
    return {"num_warps": 4, "num_stages": 2, "maxnreg": registers, "enable_fp_fusion": True}


def split_sizes(
    packed_columns: int, dense_columns: int, bits: float, pairs: int, block: int, device: torch.device
) -> tuple[int, int, int, int]:
    """Programs for packed columns, columns of each of these, programs for dense columns, columns of each of these.

    Args:
        packed_columns, dense_columns: to be read for each of `pairs` of batch and KV head.
        bits: of a packed number; programs for dense columns get as many bytes as those for packed ones.
        block: columns that a program reads at a time.
    """
    ratio = 16 / bits
    work = packed_columns + dense_columns * ratio
    slots = programs_at_once(device)
    most = max(1, min(MOST_SPLITS, int(work * bits / 4) // SPLIT_TOKENS))
    one_wave, three_waves = slots // pairs, triton.cdiv(3 * slots, pairs)  # so that the last wave is most of a wave
    splits = min(most, one_wave if one_wave > 1 else three_waves)
    packed_per_split = max(1, triton.cdiv(int(work), splits * block)) * block
    dense_per_split = max(1, round(packed_per_split / ratio / block)) * block
    return (
        triton.cdiv(packed_columns, packed_per_split),
        packed_per_split,
        triton.cdiv(dense_columns, dense_per_split),
        dense_per_split,
    )


def programs_at_once(device: torch.device) -> int:
    if device.type != "cuda":
        return 8
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


def packed_attention_triton(
    query: torch.Tensor,
    keys: PackedKeys,
    values: PackedValues,
    dense_keys: torch.Tensor,
    dense_values: torch.Tensor,
    scaling: float,
    packed_mask: torch.Tensor | None = None,
    dense_mask: torch.Tensor | None = None,
    pages: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`packed_attention`, or `packed_page_attention` with pages, on CUDA or under Triton's interpreter."""
    query, dense_keys, dense_values = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (query, dense_keys, dense_values)
    )
    (batch, heads, queries, head_dim), kv_heads = query.shape, keys.codes.shape[1]
    rows = heads // kv_heads * queries
    dtype = tl.float32 if query.dtype == torch.float32 else tl.float16
    blocks = block_sizes(rows, head_dim, keys.group, query.dtype.itemsize)
    packed_columns = keys.tokens if pages is None else pages.shape[2] * keys.group
    packed_splits, packed_per_split, dense_splits, dense_per_split = split_sizes(
        packed_columns,
        dense_keys.shape[2],
        (keys.bits + values.bits) / 2,
        batch * kv_heads,
        blocks["BLOCK"],
        query.device,
    )
    splits = packed_splits + dense_splits
    if splits == 0:
        return nothing_seen(query)
    parts = torch.empty(batch, heads, queries, splits, head_dim, dtype=torch.float32, device=query.device)
    part_lse = torch.empty(batch, heads, queries, splits, dtype=torch.float32, device=query.device)
    packed_mask, packed_kind = mask_of(packed_mask, batch, kv_heads, query)
    dense_mask, dense_kind = mask_of(dense_mask, batch, kv_heads, query)
    paged, pages = pages is not None, query.new_empty(1, 1, 1, dtype=torch.int64) if pages is None else pages
    pages = pages if pages.stride(-1) == 1 else pages.contiguous()
    key_codes, value_codes = words_of(keys.codes, torch.uint16), words_of(values.codes, torch.uint16)
    key_scale, key_zero = words_of(keys.scale, torch.int32), words_of(keys.zero, torch.int32)
    value_scale, value_zero = (x if x.stride(-1) == 1 else x.contiguous() for x in (values.scale, values.zero))
    packed_attention_kernel[splits, batch * kv_heads](
        query, key_codes, key_scale, key_zero, value_codes, value_scale, value_zero, dense_keys, dense_values,
        packed_mask, dense_mask, pages, parts, part_lse, *query.stride()[:3], *key_codes.stride()[:3],
        *key_scale.stride()[:3], *key_zero.stride()[:3], *value_codes.stride()[:3], *value_scale.stride()[:2],
        *value_zero.stride()[:2], *dense_keys.stride()[:3], *dense_values.stride()[:3], *packed_mask.stride()[:3],
        *dense_mask.stride()[:3], *pages.stride()[:2], kv_heads, rows, queries, keys.group,
        packed_columns, dense_keys.shape[2], packed_splits, packed_per_split, dense_per_split, scaling * LOG2_E,
        ALIGNED=math.gcd(8, *key_codes.stride()[:3], *value_codes.stride()[:3]), HEAD_DIM=head_dim,
        KEY_BITS=int(keys.bits), VALUE_BITS=int(values.bits), DTYPE=dtype, PACKED_MASK=packed_kind,
        DENSE_MASK=dense_kind, PAGED=paged, **blocks,
        **launch_options(blocks, int(max(keys.bits, values.bits)), query.dtype.itemsize),
    )  # fmt: skip
    return join_splits(parts, part_lse)


def nothing_seen(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp where there are no columns."""
    out = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
    return out, out.new_full(query.shape[:3], -torch.inf)


def mask_of(mask: torch.Tensor | None, batch: int, kv_heads: int, query: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """The mask [batch, kv_heads, queries, columns] as bytes, and what kind of mask it is for the kernel."""
    if mask is None:
        return query.new_empty(1, 1, 1, 1, dtype=torch.uint8), "none"
    kind = "shared" if mask.shape[2] == 1 else "each"
    mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    return mask.view(torch.uint8).expand(batch, kv_heads, query.shape[2], -1), kind


def words_of(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x as wider words; a view, unless its rows do not begin at whole words."""
    width = dtype.itemsize // x.dtype.itemsize
    whole = x.stride(-1) == 1 and all(stride % width == 0 for stride in (x.storage_offset(), *x.stride()[:-1]))
    return (x if whole else x.contiguous()).view(dtype)


def join_splits(parts: torch.Tensor, part_lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [batch, heads, queries, head_dim] and log-sum-exp from parts [batch, heads, queries, splits, head_dim]."""
    *shape, splits, head_dim = parts.shape
    if splits == 1:
        return parts.squeeze(3), part_lse.squeeze(3)
    out, lse = parts.new_empty(*shape, head_dim), part_lse.new_empty(shape)
    join_splits_kernel[(lse.numel(),)](
        parts, part_lse, out, lse, splits, head_dim, BLOCK_DIM=triton.next_power_of_2(head_dim), BLOCK_SPLITS=16
    )  # fmt: skip
    return out, lse
