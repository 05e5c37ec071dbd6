"""SGLang's step beside stand-ins of its classes, by the names of 0.5.23: every byte of states and pages."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from engine_tensors import CSA, HCA, INDEXER, ROPE, tokens, weights
from kvcondense import PagedCache, RaggedBatch, StatePool, condense
from kvcondense.errors import ShapeError, UnsupportedError
from kvcondense.integrations import sglang
from kvcondense.integrations.sglang_forward import forward_unified

SWA_PAGE, MOST = 256, 1024
# (mode, starts, lengths): a prefill of two, a chunk, decode over a boundary, a verify step, half of it rejected.
HISTORY = (
    ("extend", [0, 0], [253, 9]), ("extend", [253, 9], [4, 119]), ("decode", [257, 128], [1, 1]),
    ("verify", [258, 129], [5, 5]), ("decode", [261, 132], [1, 1]),
)  # fmt: skip


class Compressor(nn.Module):
    """Of srt/layers/attention/dsv4/compressor.py, with its states and without its projection."""

    def __init__(self, spec, states):
        super().__init__()
        w = weights(spec)
        self.ratio, self.head_dim, self.is_in_indexer = spec.ratio, spec.head_dim, spec.head_dim == 128
        self.ape = nn.Parameter(sglang.to_ape(w.ape, spec.overlap).clone(), requires_grad=False)
        self.norm = SimpleNamespace(weight=w.norm, variance_epsilon=spec.eps)
        self.freqs_cis = torch.complex(ROPE.cos, ROPE.sin)
        self.states = states

    def compute_kv_score(self, x, forward_batch):  # noqa: ARG002 - its signature
        return x

    def get_state_pool(self, backend):  # noqa: ARG002
        return SimpleNamespace(kv_score_buffer=SimpleNamespace(kv_score=self.states))


def attention(spec, pages, ring, tables, out_loc):
    """The backend, of which a step reads its pool, its tables and its metadata."""
    pool = SimpleNamespace(
        uniform_fp8=False, swa_page_size=SWA_PAGE, full_to_swa_index_mapping=torch.arange(4 * MOST) - SWA_PAGE,
        get_ring_size=lambda compress_ratio: ring,
        get_extra_key_buffer=lambda layer_id: pages,
        get_index_k_with_scale_buffer=lambda layer_id: pages,
        get_extra_key_page_size=lambda layer_id: 256 // spec.ratio,
        get_index_k_page_size=lambda ratio: 256 // ratio,
    )  # fmt: skip
    metadata = SimpleNamespace(core_metadata=SimpleNamespace(**{f"c{spec.ratio}_out_loc": out_loc}))
    return SimpleNamespace(token_to_kv_pool=pool, req_to_token=tables, forward_metadata=metadata)


def locations():
    """req_to_token [3, 512]: pages of 256 positions, out of order; row 0 is nobody's."""
    tables = torch.zeros(3, 512, dtype=torch.int32)
    for q, pages in ((1, (7, 2)), (2, (5, 9))):
        tables[q] = torch.cat([torch.arange(256 * p, 256 * p + 256) for p in pages])
    return tables


@pytest.mark.parametrize("spec", [CSA, HCA, INDEXER], ids=["csa", "hca", "indexer"])
def test_every_byte_of_states_and_pages(spec):
    ring, size = 16 if spec.overlap else 256, 132 if spec.head_dim == 128 else 584
    page_bytes = 256 // spec.ratio * size
    page_bytes += 0 if size == 132 else -page_bytes % 576
    states, pages = torch.zeros(12 * ring, spec.state_dim), torch.zeros(12, page_bytes, dtype=torch.uint8)
    compressor, tables, w = Compressor(spec, states), locations(), weights(spec)
    pool = StatePool.paged(spec, 12 * SWA_PAGE, 1)  # a row for every location
    name = "fp8_indexer_plain" if size == 132 else "fp8_model1"
    own = PagedCache(torch.zeros_like(pages), sglang.get_format(name), spec.head_dim, 256 // spec.ratio)
    for i, (mode, starts, lengths) in enumerate(HISTORY):
        x = tokens(spec, sum(lengths), i)
        at = [torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]
        where = torch.cat([tables[q + 1][p] for q, p in enumerate(at)]).to(torch.int64)
        positions = torch.cat(at)
        ends = (positions + 1) % spec.ratio == 0
        out_loc = torch.where(ends, where // spec.ratio, 0)  # 0 where no window ends, as SGLang has it in decode
        forward_batch = SimpleNamespace(
            forward_mode=SimpleNamespace(is_idle=lambda: False), req_pool_indices=torch.tensor([1, 2]),
            extend_seq_lens=torch.tensor(lengths, dtype=torch.int32) if mode == "extend" else None, positions=positions,
        )  # fmt: skip
        forward_unified(attention(spec, pages, ring, tables, out_loc), x, forward_batch, 3, compressor)
        batch = RaggedBatch.build(
            torch.tensor([0, *lengths]).cumsum(0), positions=positions, slot_mapping=out_loc,
            state_block_table=tables[1:].to(torch.int64),
        )  # fmt: skip
        condense(spec, x, w, ROPE, batch, state=pool, cache=own, impl="reference")
    differ = int((pages != own.data).sum())
    assert differ <= max(1, int((own.data != 0).sum()) // 8192)
    assert int((own.data != 0).sum()) > 1000
    for q, length in ((1, 262), (2, 133)):  # the last window and what is open, without ape
        for p in range(spec.live_start(length), length):
            row = int(tables[q, p])
            kept = states[(row - SWA_PAGE) // SWA_PAGE * ring + p % ring]
            kv, score = pool.data[row].split(spec.width)
            raw = torch.cat([kv, score - w.ape[p % spec.ratio]])
            assert torch.allclose(kept, raw, atol=1e-5), (q, p)


def test_one_plan_for_layers_of_a_kind_and_none_for_idle_steps():
    forward_batch = SimpleNamespace(forward_mode=SimpleNamespace(is_idle=lambda: True))
    forward_unified(None, None, forward_batch, 0, None)
    tables, ring = locations(), 16
    pages = [torch.zeros(12, 64 * 584 + -64 * 584 % 576, dtype=torch.uint8) for _ in range(2)]
    x, out_loc = tokens(CSA, 8), tables[1, :8].to(torch.int64) // 4
    forward_batch = SimpleNamespace(
        forward_mode=SimpleNamespace(is_idle=lambda: False), req_pool_indices=torch.tensor([1]), extend_seq_lens=None,
        positions=torch.arange(8),
    )  # fmt: skip
    for layer, memory in enumerate(pages):
        backend = attention(CSA, memory, ring, tables, out_loc)
        forward_unified(backend, x, forward_batch, layer, Compressor(CSA, torch.zeros(12 * ring, CSA.state_dim)))
    assert len(forward_batch.kvcondense) == 1
    assert torch.equal(*pages)
    ((_, plan),) = forward_batch.kvcondense.values()
    forward_batch.positions += 8  # the same object, filled anew
    forward_unified(backend, x, forward_batch, 1, Compressor(CSA, torch.zeros(12 * ring, CSA.state_dim)))
    assert next(iter(forward_batch.kvcondense.values()))[1] is not plan
    forward_batch.req_pool_indices = torch.tensor([1, 2, 0])
    with pytest.raises(ShapeError, match="3 requests"):
        forward_unified(backend, x, forward_batch, 1, Compressor(CSA, torch.zeros(12 * ring, CSA.state_dim)))
    assert bool(pages[0].any())


def test_weights_that_are_loaded_anew_in_place():
    """Whatever a module held when it was bound, a step takes what it holds now."""
    tables, ring, x = locations(), 16, tokens(CSA, 8)
    written = []
    for bound_before in (False, True):
        pages = torch.zeros(12, 64 * 584 + -64 * 584 % 576, dtype=torch.uint8)
        compressor = Compressor(CSA, torch.zeros(12 * ring, CSA.state_dim))
        compressor.norm.weight = compressor.norm.weight.bfloat16()
        backend = attention(CSA, pages, ring, tables, tables[1, :8].to(torch.int64) // 4)
        forward_batch = SimpleNamespace(
            forward_mode=SimpleNamespace(is_idle=lambda: False), req_pool_indices=torch.tensor([1]),
            extend_seq_lens=None, positions=torch.arange(8),
        )  # fmt: skip
        if bound_before:
            forward_unified(backend, x, forward_batch, 0, compressor)
        compressor.ape.data.neg_()
        compressor.norm.weight.mul_(2)
        compressor.freqs_cis.copy_(compressor.freqs_cis.flip(0))
        forward_unified(backend, x, forward_batch, 0, compressor)
        written.append(pages)
    assert torch.equal(*written)
    assert bool(written[0].any())


@pytest.mark.parametrize("flag", ["uniform_fp8", "_unified_kv"])
def test_pools_of_another_kind_are_refused(flag):
    backend = attention(CSA, None, 16, locations(), torch.zeros(4, dtype=torch.int64))
    setattr(backend.token_to_kv_pool, flag, True)
    forward_batch = SimpleNamespace(
        forward_mode=SimpleNamespace(is_idle=lambda: False), req_pool_indices=torch.tensor([1]), extend_seq_lens=None,
        positions=torch.arange(4),
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="584 bytes"):
        forward_unified(backend, tokens(CSA, 4), forward_batch, 0, Compressor(CSA, None))
