import pytest
import torch

from foveate.kernels.packing import pack_keys, pack_values, unpack_keys, unpack_values
from foveate.kernels.page_attention import (
    packed_page_attention,
    packed_page_attention_reference,
    page_attention,
    page_attention_reference,
    page_scores,
    page_scores_reference,
)

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is on without a CUDA device")
SHAPES = [((2, 6, 2, 70, 32), 16, 3), ((1, 28, 4, 100, 128), 32, 2), ((1, 2, 2, 65, 80), 20, 3)]
# batch, heads, kv_heads, columns, head_dim; columns of a page; pages chosen


@pytest.fixture
def kernels(monkeypatch):
    """Triton's, with several splits of few tokens."""
    module = pytest.importorskip("foveate.kernels.page_attention_triton")
    from foveate.kernels import packed_attention_triton

    monkeypatch.setattr(packed_attention_triton, "SPLIT_TOKENS", 8)
    return module


def example(shape, page, chosen, dtype=torch.float32, device="cpu"):
    """Query, keys, values, different pages of which one is none, the first column after the pages, and a mask."""
    batch, heads, kv_heads, columns, head_dim = shape
    query = torch.randn(batch, heads, 1, head_dim, device=device).to(dtype)
    keys, values = torch.randn(2, batch, kv_heads, columns, head_dim, device=device).to(dtype)
    pages = torch.rand(batch, kv_heads, columns // page, device=device).argsort(2)[..., :chosen].contiguous()
    pages[0, 0, 1] = -1
    return (
        query,
        keys,
        values,
        pages,
        columns // page * page,
        torch.rand(batch, kv_heads, 1, columns, device=device) > 0.3,
    )


def brute_force(query, keys, values, pages, page, tail, scaling, mask=None):
    """In float64: attention over all columns of which those of other pages are masked."""
    batch, heads = query.shape[:2]
    group = heads // keys.shape[1]
    seen = torch.zeros(keys.shape[:3], dtype=torch.bool)
    seen[:, :, tail:] = True
    for b in range(batch):
        for kv in range(keys.shape[1]):
            for number in pages[b, kv].tolist():
                if number >= 0:
                    seen[b, kv, number * page : (number + 1) * page] = True
    if mask is not None:
        seen &= mask[:, :, 0]
    k, v, seen = (x.repeat_interleave(group, 1) for x in (keys.double(), values.double(), seen))
    scores = (query.double() @ k.mT * scaling).masked_fill(~seen[:, :, None], -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def brute_scores(query, low, high):
    """Channel by channel, in float64."""
    group = query.shape[1] // low.shape[1]
    low, high = (x.double().repeat_interleave(group, 1) for x in (low, high))
    bounds = torch.maximum(query.double() * low, query.double() * high).sum(3)
    return bounds.unflatten(1, (-1, group)).amax(2)


def bounds_of(keys, page):
    paged = keys[:, :, : keys.shape[2] // page * page].unflatten(2, (-1, page))
    return paged.amin(3), paged.amax(3)


def close(got, expected, tolerance):
    for part, reference in zip(got, expected, strict=True):
        assert part.dtype == torch.float32
        torch.testing.assert_close(part.double(), reference, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("shape", "page", "chosen"), SHAPES)
def test_scores_bound_every_key_of_a_page(shape, page, chosen):
    query, keys, *_ = example(shape, page, chosen)
    low, high = bounds_of(keys, page)
    scores = page_scores(query, low, high)
    torch.testing.assert_close(scores.double(), brute_scores(query, low, high), rtol=1e-6, atol=0)
    products = query.unflatten(1, (shape[2], -1))[:, :, :, 0] @ keys[:, :, : low.shape[2] * page].mT
    assert (products.unflatten(3, (-1, page)).amax((2, 4)) <= scores + 1e-4).all()


@pytest.mark.parametrize(("shape", "page", "chosen"), SHAPES)
def test_attention_to_pages_equals_attention_with_the_other_pages_masked(shape, page, chosen):
    query, keys, values, pages, tail, mask = example(shape, page, chosen)
    for seen in (None, mask, mask[:, :1]):
        got = page_attention(query, keys, values, pages, page, tail, 0.2, seen)
        close(got, brute_force(query, keys, values, pages, page, tail, 0.2, seen), 2e-6)


@pytest.mark.parametrize("dense", [7, 0])
def test_attention_to_packed_pages_equals_that_to_what_they_stand_for(dense):
    query, keys, values, pages, tail, mask = example((2, 6, 2, 64 + dense, 32), 16, 3)
    packed = pack_keys(keys[:, :, :tail], 4, 16), pack_values(values[:, :, :tail], 2)
    k, v = (
        torch.cat([unpack_keys(packed[0]), keys[:, :, tail:]], 2),
        torch.cat([unpack_values(packed[1]), values[:, :, tail:]], 2),
    )
    for seen in (None, mask):
        masks = (None, None) if seen is None else (seen[..., :tail], seen[..., tail:])
        got = packed_page_attention(query, *packed, keys[:, :, tail:], values[:, :, tail:], pages, 0.2, *masks)
        close(got, brute_force(query, k, v, pages, 16, tail, 0.2, seen), 5e-6)


def test_nothing_chosen_and_no_tail_gives_zero_and_minus_infinity():
    query, keys, values, pages, *_ = example((1, 4, 2, 64, 16), 16, 2)
    for chosen in (pages[..., :0], torch.full_like(pages, -1)):
        out, lse = page_attention(query, keys, values, chosen, 16, 64, 0.2)
        assert (out == 0).all() and (lse == -torch.inf).all()


def test_wrong_arguments_are_refused():
    query, keys, values, pages, tail, _ = example((1, 4, 2, 64, 16), 16, 2)
    with pytest.raises(ValueError, match="there are 2 queries"):
        page_scores(query.repeat(1, 1, 2, 1), *bounds_of(keys, 16))
    with pytest.raises(ValueError, match="query has 3 heads, keys 2"):
        page_attention(query[:, :3], keys, values, pages, 16, tail, 0.2)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("shape", "page", "chosen"), SHAPES[:2])
def test_kernels_equal_brute_force(kernels, shape, page, chosen, dtype):
    query, keys, values, pages, tail, mask = example(shape, page, chosen, dtype)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-3
    for seen in (None, mask[:, :1]):
        got = kernels.page_attention_triton(query, keys, values, pages, page, tail, 0.1, seen)
        close(got, brute_force(query, keys, values, pages, page, tail, 0.1, seen), tolerance)
    low, high = bounds_of(keys, page)
    got = kernels.page_scores_triton(query, low, high)
    torch.testing.assert_close(got.double(), brute_scores(query, low, high), rtol=1e-5, atol=0)
    low, high = bounds_of(-keys.abs(), page)  # no score of these is positive
    got = kernels.page_scores_triton(query.abs(), low, high)
    torch.testing.assert_close(got.double(), brute_scores(query.abs(), low, high), rtol=1e-5, atol=0)
    got = kernels.page_scores_triton(query, low.half(), high.half())  # other bounds than queries: in float32
    torch.testing.assert_close(got.double(), brute_scores(query, low.half(), high.half()), rtol=1e-5, atol=0)


@interpreted
@pytest.mark.parametrize("masked", [False, True])
def test_packed_kernel_reads_the_chosen_pages(kernels, masked):
    from foveate.kernels.packed_attention_triton import packed_attention_triton

    query, keys, values, pages, tail, mask = example((2, 6, 2, 70, 32), 16, 3)
    packed = pack_keys(keys[:, :, :tail], 4, 16), pack_values(values[:, :, :tail], 2)
    k, v = (
        torch.cat([unpack_keys(packed[0]), keys[:, :, tail:]], 2),
        torch.cat([unpack_values(packed[1]), values[:, :, tail:]], 2),
    )
    masks = (mask[..., :tail], mask[..., tail:]) if masked else (None, None)
    got = packed_attention_triton(query, *packed, keys[:, :, tail:], values[:, :, tail:], 0.2, *masks, pages)
    close(got, brute_force(query, k, v, pages, 16, tail, 0.2, mask if masked else None), 5e-6)


@interpreted
def test_kernels_take_no_pages_and_no_tail(kernels):
    query, keys, values, pages, tail, _ = example((1, 4, 2, 40, 32), 16, 2)
    got = kernels.page_attention_triton(query, keys, values, pages[..., :0], 16, tail, 0.2)
    close(got, brute_force(query, keys, values, pages[..., :0], 16, tail, 0.2), 2e-6)
    out, lse = kernels.page_attention_triton(query, keys, values, pages[..., :0], 16, 40, 0.2)
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(28, 4, 128), (14, 2, 64), (8, 8, 80)])
def test_kernels_equal_the_reference_on_cuda(heads, kv_heads, head_dim, dtype):
    page, chosen = 64, 64
    query, keys, values, pages, tail, mask = example(
        (2, heads, kv_heads, 32_768 + 50, head_dim), page, chosen, dtype, "cuda"
    )
    tolerance = {torch.bfloat16: 8e-3, torch.float16: 2e-3, torch.float32: 1e-4}[dtype]
    scaling = head_dim**-0.5
    wide = [x.double() for x in (query, keys, values)]
    low, high = bounds_of(keys, page)
    torch.testing.assert_close(
        page_scores(query, low, high).double(), page_scores_reference(wide[0], low, high), rtol=1e-4, atol=1e-3
    )
    for seen in (None, mask):
        got = page_attention(query, keys, values, pages, page, tail, scaling, seen)
        close(got, page_attention_reference(*wide, pages, page, tail, scaling, seen), tolerance)
        packed = pack_keys(keys[:, :, :tail], 4, page), pack_values(values[:, :, :tail], 4)
        rest = [x[:, :, tail:] for x in (keys, values)]
        masks = (None, None) if seen is None else (seen[..., :tail], seen[..., tail:])
        got = packed_page_attention(query, *packed, *rest, pages, scaling, *masks)
        wide_rest = [x.double() for x in rest]
        close(got, packed_page_attention_reference(wide[0], *packed, *wide_rest, pages, scaling, *masks), tolerance)
