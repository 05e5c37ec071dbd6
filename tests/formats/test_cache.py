"""Paged caches in every format: canaries around every written byte, views without copies, addresses, refusals."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcondense import CompressorWeights, KvCondenseError, ModelConfig, PagedCache, RaggedBatch, RopeTable, StatePool
from kvcondense.api import condense, store
from kvcondense.formats import FORMATS
from kvcondense.golden.run import all_bytes, golden_bytes
from kvcondense.spec import CompressorSpec

CANARY = 0xA5


def width(fmt):
    return fmt.head_dim or 64


def allocate(name, pages, page_rows, **options):
    fmt = FORMATS[name]
    scale = 0.05 if fmt.tensor_scale else None
    return PagedCache.allocate(width(fmt), pages, page_rows, format=name, tensor_scale=scale, **options)


def random_rows(cache, n, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(n, cache.head_dim, generator=gen) * torch.logspace(-4, 0, max(n, 1))[:n, None]


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
def test_bytes_of_written_rows_are_golden_and_all_others_untouched(name, data):
    """Pages inside a larger buffer of the engine: tails, gaps between pages and both ends are canaries too."""
    page_rows = data.draw(st.integers(1, 5)) * FORMATS[name].tile
    pages = data.draw(st.integers(1, 4))
    template = allocate(name, pages, page_rows)
    size = template.data.shape[1]
    gap, front = 4 * data.draw(st.integers(0, 3)), 4 * data.draw(st.integers(0, 5))
    buffer = torch.full((front + pages * (size + gap) + 9,), CANARY, dtype=torch.uint8)
    data_view = buffer.as_strided((pages, size), (size + gap, 1), front)
    cache = replace(template, data=data_view)
    capacity = pages * page_rows
    slots = data.draw(st.lists(st.integers(0, capacity - 1), unique=True, max_size=capacity))
    slots = torch.tensor([s if data.draw(st.booleans()) else -1 for s in slots], dtype=torch.int64)
    rows = random_rows(cache, slots.shape[0])
    written = {s: row for s, row in zip(slots.tolist(), rows, strict=True) if s >= 0}
    expected = golden_bytes(replace(cache, data=data_view.clone()), written)
    store(rows, slots, cache)
    assert torch.equal(all_bytes(cache), expected)
    guard = torch.ones_like(buffer, dtype=torch.bool)
    guard.as_strided((pages, size), (size + gap, 1), front)[:] = False
    assert guard.any()
    assert (buffer[guard] == CANARY).all()
    back = cache.decode_rows(slots)
    assert torch.equal(back[slots < 0], torch.zeros(int((slots < 0).sum()), cache.head_dim))
    bound = cache.format.error_bound(rows, cache.format.encode(rows, cache.tensor_scale), cache.tensor_scale)
    assert ((back - rows).abs() <= bound + rows.abs() * 2.0**-8)[slots >= 0].all()


@pytest.mark.parametrize("name", FORMATS)
def test_fields_are_views_of_the_pages(name):
    page_rows = 4 * FORMATS[name].tile
    cache = allocate(name, 3, page_rows)
    begin, end = cache.data.data_ptr(), cache.data.data_ptr() + cache.data.numel()
    for f in cache.format.fields(cache.head_dim):
        view = cache.field(f.name)
        assert list(view.shape) == ([3, 4, f.count // 16, 16, 16] if f.tile > 1 else [3, page_rows, f.count])
        assert begin <= view.data_ptr() < end
        byte = cache.data[2, f.byte(page_rows, 3)]
        before = int(byte)
        (view[2, 0, :, 3, 0] if f.tile > 1 else view[2, 3].view(torch.uint8))[0] = 77
        assert (before, int(byte)) == (0, 77)


def test_views_of_model1_are_what_flashmla_documents():
    """Row i: 448 e4m3 bytes at 576 i, 64 bf16 at 576 i + 448; all scales behind all rows; pages of 576 bytes."""
    cache = allocate("fp8_model1", 2, 64)
    rows = random_rows(cache, 128)
    store(rows, torch.arange(128), cache)
    page = cache.data[1]
    assert page.shape[0] % 576 == 0
    for i in (0, 5, 63):
        x = rows[64 + i].bfloat16()
        scales = page[576 * 64 + 8 * i :][:7]
        codes = page[576 * i :][:448].view(torch.float8_e4m3fn).float().view(7, 64)
        exact = codes * torch.exp2(scales.float() - 127)[:, None]
        assert ((exact.flatten() - x[:448].float()).abs() <= x[:448].abs().float() / 16 + 2**-30).all()
        assert torch.equal(page[576 * i + 448 :][:128].view(torch.bfloat16), x[448:])
        assert page[576 * 64 + 8 * i + 7] == 0


def test_an_engines_own_tensors_are_written_in_place():
    """As vLLM shapes its caches: [num_blocks, block_size, 584] at a padded stride; int8 with a tensor of scales."""
    own = allocate("fp8_model1", 3, 64)
    buffer = torch.full((3, 37440), CANARY, dtype=torch.uint8)
    engine = buffer.as_strided((3, 64, 584), (37440, 584, 1))
    cache = PagedCache.wrap(engine, format="fp8_model1")
    rows, slots = random_rows(own, 5), torch.tensor([3, 64, 127, 191, 0])
    for c in (own, cache):
        store(rows, slots, c)
    for field in ("nope", "rope", "scales", "pad"):
        a, b = (c.field(field)[slots // 64, slots % 64] for c in (own, cache))
        assert torch.equal(a, b)
    assert (buffer[:, 37376:] == CANARY).all()
    values, scales = torch.zeros(2, 8, 128, dtype=torch.int8), torch.zeros(2, 8)
    cache = PagedCache.wrap(values, format="int8_indexer", scales=scales)
    row = torch.randn(1, 128)
    store(row, torch.tensor([9]), cache)
    assert values[1, 1].abs().max() == 127
    assert (values[1, 1] * scales[1, 1] - row[0]).abs().max() <= scales[1, 1] * 0.51 + 0.01
    assert values.view(-1, 128).any(-1).nonzero().tolist() == [[9]]


@pytest.mark.parametrize("name", ["bf16", "fp8_model1", "mxfp4_indexer", "fp4_v41"])
def test_rows_beyond_two_to_the_31_bytes(name):
    """Untouched pages of the buffer cost no memory."""
    fmt, d = FORMATS[name], FORMATS[name].head_dim or 512
    page = fmt.page_bytes(d, 64)
    pages = (1 << 31) // page + 3
    data = torch.empty(pages * page, dtype=torch.uint8).view(pages, page)
    cache = PagedCache(data, fmt, d, 64)
    last = torch.tensor([cache.num_rows - 1, cache.num_rows - 64, 5])
    neighbours = torch.tensor([cache.num_rows - 2, 4])
    untouched = {k: v.clone() for k, v in cache.get(neighbours).items()}
    rows = torch.randn(3, d)
    store(rows, last, cache)
    assert (pages - 1) * page > 1 << 31
    assert torch.equal(cache.decode_rows(last), fmt.decode(fmt.encode(rows)))
    assert torch.equal(cache.decode_rows(last.flip(0)), fmt.decode(fmt.encode(rows)).flip(0))
    for key, before in cache.get(neighbours).items():
        assert torch.equal(before, untouched[key])


def test_decode_rows_in_any_order_with_int32_and_holes():
    cache = allocate("mxfp4_indexer", 2, 3)
    rows = random_rows(cache, 6)
    store(rows, torch.tensor([4, 1, 0, 5, 2, 3]), cache)
    slots = torch.tensor([5, -1, 4, 4], dtype=torch.int32)
    back = cache.decode_rows(slots)
    stored = cache.format.decode(cache.format.encode(rows))
    assert torch.equal(back[[0, 2, 3]], stored[[3, 0, 0]])
    assert not back[1].any()
    assert cache.decode_rows(slots[:0]).shape == (0, 128)
    for bad in (torch.tensor([6]), torch.tensor([-2]), torch.tensor([0.0]), torch.tensor([[0]])):
        with pytest.raises(KvCondenseError, match="slot_mapping"):
            cache.decode_rows(bad)


FP8, INT8 = FORMATS["fp8_model1"], FORMATS["int8_indexer"]
TWO = PagedCache.allocate(512, 2, 4, format="fp8_model1_two_buffers")
REFUSED = {
    "head_dim of the format": ("format", lambda: PagedCache.allocate(128, 1, 4, format="fp8_model1")),
    "unknown format": ("format", lambda: PagedCache.allocate(128, 1, 4, format="fp5")),
    "tensor scale missing": ("tensor_scale", lambda: PagedCache.allocate(64, 1, 4, format="fp8_tensor")),
    "tensor scale unwanted": ("tensor_scale", lambda: PagedCache.allocate(64, 1, 4, tensor_scale=1.0)),
    "tensor scale 0": ("tensor_scale", lambda: PagedCache.allocate(64, 1, 4, format="fp8_tensor", tensor_scale=0.0)),
    "tensor scale nan": (
        "tensor_scale",
        lambda: PagedCache.allocate(64, 1, 4, format="fp8_tensor", tensor_scale=float("nan")),
    ),
    "page rows": ("page_rows", lambda: PagedCache(torch.zeros(1, 584, dtype=torch.uint8), FP8, 512, 0)),
    "page size": ("cache data", lambda: PagedCache(torch.zeros(1, 584, dtype=torch.uint8), FP8, 512, 2)),
    "page dtype": ("cache data", lambda: PagedCache(torch.zeros(1, 1152, dtype=torch.int8), FP8, 512, 1)),
    "page order": (
        "cache data",
        lambda: PagedCache(torch.zeros(1152, 3, dtype=torch.uint8).t(), FP8, 512, 1),
    ),
    **{
        f"second {what}": ("second", lambda second=second: replace(TWO, second=second))
        for what, second in (
            ("missing", None),
            ("shape", torch.zeros(2, 4, 32, dtype=torch.bfloat16)),
            ("pages", torch.zeros(1, 4, 64, dtype=torch.bfloat16)),
            ("rows", torch.zeros(2, 4, 128, dtype=torch.bfloat16)[..., :64]),
            ("dtype", torch.zeros(2, 4, 64, dtype=torch.float16)),
            ("device", torch.zeros(2, 4, 64, dtype=torch.bfloat16, device="meta")),
        )
    },
    "second unwanted": (
        "second",
        lambda: PagedCache(torch.zeros(1, 1152, dtype=torch.uint8), FP8, 512, 1, second=torch.zeros(1, 1, 64)),
    ),
    "scales missing": ("scales", lambda: PagedCache(torch.zeros(1, 256, dtype=torch.uint8), INT8, 128, 2)),
    "scales unwanted": (
        "scales",
        lambda: PagedCache(torch.zeros(1, 1152, dtype=torch.uint8), FP8, 512, 1, torch.ones(1, 1)),
    ),
    "scales shape": (
        "scales",
        lambda: PagedCache(torch.zeros(1, 256, dtype=torch.uint8), INT8, 128, 2, torch.ones(1)),
    ),
    "scales dtype": (
        "scales",
        lambda: PagedCache(torch.zeros(1, 256, dtype=torch.uint8), INT8, 128, 2, torch.ones(1, 2).double()),
    ),
    "scales device": (
        "scales",
        lambda: PagedCache(torch.zeros(1, 256, dtype=torch.uint8), INT8, 128, 2, torch.ones(1, 2, device="meta")),
    ),
    **{
        f"{dtype} as {name}": (
            "rows",
            lambda dtype=dtype, name=name, n=n: PagedCache.wrap(
                torch.zeros(1, 4, n).to(dtype), format=name, scales=None
            ),
        )
        for name, n, dtypes in (
            ("fp8_tensor", 64, (torch.float8_e4m3fnuz, torch.float8_e5m2, torch.int8, torch.bool)),
            ("fp8_tensor_fnuz", 64, (torch.float8_e4m3fn,)),
            ("bf16", 64, (torch.float16, torch.int16)),
            ("fp32", 64, (torch.int32,)),
            ("fp8_model1", 584, (torch.int8, torch.float8_e5m2)),
            ("fp8_model1", 146, (torch.int32, torch.float32)),
            ("mxfp4_indexer", 68, (torch.int8, torch.float8_e4m3fn)),
        )
        for dtype in dtypes
    },
    "wrap dims": ("rows", lambda: PagedCache.wrap(torch.zeros(4, 16, dtype=torch.bfloat16))),
    "wrap dtype": ("rows", lambda: PagedCache.wrap(torch.zeros(1, 4, 16, dtype=torch.float16))),
    "wrap row bytes": (
        "rows",
        lambda: PagedCache.wrap(torch.zeros(1, 4, 583, dtype=torch.uint8), format="fp8_model1"),
    ),
    "wrap inner stride": ("rows", lambda: PagedCache.wrap(torch.zeros(1, 4, 32, dtype=torch.bfloat16)[:, :, :16])),
    "field name": ("field", lambda: PagedCache.allocate(512, 1, 4, format="fp8_model1").field("values")),
    "rows of a quantised cache": ("rows", lambda: PagedCache.allocate(512, 1, 4, format="fp8_model1").rows),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_caches_are_refused(case):
    name, make = REFUSED[case]
    with pytest.raises(KvCondenseError, match=f"^{name}: expected") as caught:
        make()
    assert caught.value.got


def model1_call(head_dim=512, rope_dim=64, **options):
    """A decode step that finishes a window, and its state, cache and arguments."""
    spec = CompressorSpec(ratio=2, head_dim=head_dim, eps=1e-6, rope_dim=rope_dim, has_ape=False)
    state, cache = StatePool.ring(spec, 1), PagedCache.allocate(512, 1, 4, format="fp8_model1", **options)
    weights = CompressorWeights(norm=torch.ones(head_dim))
    rope = RopeTable.build(replace(ModelConfig.FLASH, rope_dim=rope_dim), 8)
    batch = RaggedBatch.build([0, 2], start_positions=[0], state_slots=[0], slot_mapping=[-1, 1])
    return spec, torch.randn(2, spec.projected), weights, rope, batch, state, cache


def test_a_spec_that_does_not_fit_the_cache_is_refused():
    *call, state, cache = model1_call(rope_dim=32)
    with pytest.raises(KvCondenseError, match="its last 64 channels stay bf16"):
        condense(*call, state=state, cache=cache)
    assert not cache.data.any()


def test_validation_mode_raises_before_anything_is_written():
    spec, kv_score, weights, rope, batch, state, cache = model1_call(strict=True)
    gamma = torch.ones(512)
    gamma[7] = float("inf")  # one infinite channel in an otherwise finite row
    wrong = CompressorWeights(norm=gamma)
    before = state.data.view(torch.int32).clone(), state.tags.clone()  # bits: the state is poisoned with NaN
    with pytest.raises(
        KvCondenseError, match=r"row 0: expected values that fp8_model1 can hold, got -?inf in channel 7"
    ):
        condense(spec, kv_score, wrong, rope, batch, state=state, cache=cache)
    assert not cache.data.any()
    for old, new in zip(before, (state.data.view(torch.int32), state.tags), strict=True):
        assert torch.equal(old, new)
    condense(spec, kv_score, weights, rope, batch, state=state, cache=cache)
    assert cache.decode_rows(torch.tensor([1])).any()
    # NaN is stored as NaN: nothing is lost, nothing raises.
    store(torch.full((1, 512), float("nan")), torch.tensor([2]), cache)
    assert cache.decode_rows(torch.tensor([2])).isnan().all()


def test_without_validation_values_saturate():
    values = torch.tensor([[100.0, -1e4, 1.0] + [0.0] * 61])
    cache = allocate("fp8_tensor", 1, 1)
    store(values, torch.tensor([0]), cache)
    back = cache.decode_rows(torch.tensor([0]))
    assert back[0, :3].tolist() == pytest.approx([448 * 0.05, -448 * 0.05, 1.0], rel=1 / 16)
    strict = allocate("fp8_tensor", 1, 1, strict=True)
    with pytest.raises(KvCondenseError, match="100.0 in channel 0, and 1 more"):
        store(values, torch.tensor([0]), strict)
    assert not strict.data.any()
