"""Sequences that go on, on several ranks, from states of earlier calls: bits of one process, and what is refused."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import over_ranks
from kvcondense import PagedCache, RaggedBatch, StatePool, condense
from kvcondense.errors import DeviceError, DtypeError, RangeError, RankError, ShapeError, UnsupportedError
from kvcondense.layout.snapshot import export_live
from kvcondense.parallel import Segment, Shards, condense_shard, round_robin, traffic, train_shard, zigzag
from kvcondense.parallel.shards import Hold
from kvcondense.spec import Rounding
from machine import SPECS, rope, tokens, weights


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
def test_chunks_dealt_in_any_way_give_the_bits_of_one_process(tmp_path):
    found = over_ranks.play("chunks_over_ranks.py", 4, tmp_path)
    assert [code for _, code in found] == [0] * 4, "\n".join(text for text, _ in found)
    assert all(f"rank {rank}: chunks ok" in text for rank, (text, _) in enumerate(found))


def alone(*segments, holds=(), decoders=()):
    """Where a single rank has everything; nobody is asked."""
    return Shards((segments,), 0, None, None, tuple(Hold(q, p, 0) for q, p in holds), decoders).checked()


def test_rows_that_are_held_lie_behind_the_tokens():
    one, two = Segment(4, 10, 5), Segment(4, 15, 4)
    shards = Shards(((two,), (Segment(9, 0, 2), one)), 1, None, None, (Hold(4, 10, 0), Hold(7, 9, 1))).checked()
    assert (shards.tokens, shards.total) == (7, 11)
    assert shards.lengths == {4: 19, 7: 9, 9: 2}
    assert shards.last_ranks == shards.decoders == {4: 0, 7: 1, 9: 1}
    assert shards.held_after == {7: 9, 9: 2}
    assert shards.pieces(4, 4, 12) == [(10, 12, 1, 2)], "no spec, no rows"
    csa = shards.with_states(SPECS["csa"])  # 4 .. 9 of sequence 4, 4 .. 8 of sequence 7
    assert csa.pieces(4, 4, 12) == [(4, 10, 0, 4), (10, 12, 1, 2)]
    assert csa.pieces(7, 5, 9) == [(5, 9, 1, 8)]
    assert (csa.tokens, csa.lengths, csa.held_after) == (7, shards.lengths, shards.held_after)
    hca = shards.with_states(SPECS["hca"])  # 0 .. 9 and 0 .. 8
    assert hca.pieces(4, 0, 10) == [(0, 10, 0, 4)]


def test_deals_of_chunks():
    assert zigzag([8, 3], 2, starts=[5, 0]) == [
        [(0, 5, 2), (0, 11, 2), (1, 2, 1)], [(0, 7, 4), (1, 0, 2)],
    ]  # fmt: skip
    assert round_robin([5, 2], 2, 2, starts=[3, 8]) == [[(0, 4, 2), (1, 8, 2)], [(0, 3, 1), (0, 6, 2)]]
    for block in (1, 3, 4):  # a token lies where it would lie without chunks
        whole = {(s.sequence, p): k for k, mine in enumerate(round_robin([50], 3, block)) for s in mine
                 for p in range(s.start, s.end)}  # fmt: skip
        for k, mine in enumerate(round_robin([31], 3, block, starts=[19])):
            assert all(whole[s.sequence, p] == k for s in mine for p in range(s.start, s.end))
    for deal in (zigzag, round_robin):
        with pytest.raises(ShapeError, match="starts: expected 2 positions"):
            deal([1, 2], 2, starts=[0])
        with pytest.raises(RangeError, match="starts"):
            deal([1], 2, starts=[-1])


@pytest.mark.parametrize(
    ("holds", "rank", "word"),
    [
        ((), 1, "from position 0 on, or a rank that holds its state at 10, got one from 10 on"),
        (
            (Hold(0, 10, 0), Hold(0, 10, 1)),
            1,
            "one rank that holds sequence 0, got its state at 10, and rank 0's at 10",
        ),
        ((Hold(0, 10, 0), Hold(5, 3, 1), Hold(5, 4, 0)), 0, "its state at 4, and rank 1's at 3"),
        ((Hold(0, 9, 0),), 0, "the state of sequence 0 at position 10, where its tokens begin, got its state at pos"),
        ((Hold(0, 11, 1),), 1, "the state of sequence 0 at position 10"),
    ],
)
def test_states_that_do_not_fit_are_named_with_their_rank(holds, rank, word):
    with pytest.raises(RankError, match=word) as caught:
        Shards(((Segment(0, 14, 4),), (Segment(0, 10, 4),)), 0, None, None, holds).checked()
    assert caught.value.argument == f"rank {rank}"


def test_a_gap_behind_a_state_names_the_rank_behind_it():
    with pytest.raises(RankError, match="sequence 0 from position 14 on, got one from 15 on") as caught:
        Shards(((Segment(0, 15, 4),), (Segment(0, 10, 4),)), 0, None, None, (Hold(0, 10, 0),)).checked()
    assert caught.value.argument == "rank 0"


def test_held_rows_that_do_not_fit_are_refused_before_anything_is_written():
    spec = SPECS["csa"]
    shards, good = alone(Segment(3, 10, 4), holds=[(3, 10)]), torch.zeros(6, spec.state_dim)  # of 4 .. 9
    cache = PagedCache.allocate(spec.head_dim, 1, 8)
    cache.data.fill_(7)
    for held, error, word in (
        (None, RangeError, r"held: expected rows of the sequences that this rank holds, \[3\], got \[\]"),
        ({3: good, 4: good}, RangeError, r"got \[3, 4\]"),
        ([good], DtypeError, "held: expected a Mapping"),
        ({3: None}, DtypeError, r"held\[3\]: expected a Tensor"),
        ({3: good[1:]}, ShapeError, rf"held\[3\]: expected \[6, {spec.state_dim}\] at position 10, got \[5, "),
        ({3: good[:, 1:]}, ShapeError, r"held\[3\]"),
        ({3: good.bfloat16()}, DtypeError, r"held\[3\]: expected torch.float32 for torch.float32 tokens"),
        ({3: good.double()}, DtypeError, "got torch.float64"),
        ({3: good.to("meta")}, DeviceError, r"held\[3\]: expected device cpu as kv_score, got meta"),
        ({3: good.to_sparse()}, DtypeError, r"held\[3\]: expected a strided tensor"),
    ):
        with pytest.raises(error, match=word):
            condense_shard(
                spec, tokens(spec, 4), weights(spec), rope(spec, 64), shards, cache=cache,
                slot_mapping=torch.zeros(4, dtype=torch.int64), held=held,
            )  # fmt: skip
    assert bool((cache.data == 7).all())
    for holds, word in (({3: -1}, r"holds\[3\]"), ({-1: 3}, "holds: expected at least 0")):
        with pytest.raises(RangeError, match=word):
            Shards.agree_on([], holds=holds)
    with pytest.raises(DtypeError, match="holds: expected a Mapping"):
        Shards.agree_on([], holds=[3])


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_every_cut_chains_on_one_rank(name, statistics):
    """Token by token, and whatever the phase: a chunk without a window's end carries the state on."""
    spec = replace(SPECS[name], rounding=Rounding.FUSED)
    total = 3 * spec.ratio + 2
    w, x, pool = weights(spec), tokens(spec, total), StatePool.ring(spec, 1)
    batch = RaggedBatch.build([0, total], start_positions=[0], state_slots=[0])
    whole = condense(spec, x, w, rope(spec, 512), batch, state=pool)
    cuts = range(1, total) if spec.ratio < 9 else (1, 126, 127, 128, 129, 130, 255, 256, 385)
    begun, live, rows = 0, {}, []
    for end in (*cuts, total):
        shards = alone(Segment(0, begun, end - begun), holds=[(0, begun)] if begun else [])
        done = condense_shard(spec, x[begun:end], w, rope(spec, 512), shards, held=live, statistics=statistics)
        begun, live = end, done.live
        assert live[0].shape == (spec.seed_rows(end), spec.state_dim)
        assert done.sent == done.received == done.all_gather == 0
        rows.append(done.rows)
    values, within = torch.cat([r.values for r in rows]), 2e-5 if statistics else 0
    torch.testing.assert_close(values, whole.values, rtol=0, atol=within)
    assert torch.cat([r.window for r in rows]).tolist() == whole.window.tolist()
    assert torch.equal(live[0], export_live(spec, pool, RaggedBatch.at(total, state_slot=0)))


def test_traffic_counts_rows_that_are_held():
    """Ratio 4 with overlap, from 10 on: rank 1 holds 4 .. 9, rank 0 ends the window 8 .. 11, and gets the state."""
    spec, segments = SPECS["csa"], [[Segment(0, 10, 4)], []]
    row = 4 * spec.state_dim
    assert traffic(spec, segments, holds=[{}, {0: 10}])[0] == (6 + 2) * row  # 4 .. 9 to go on; 8, 9 of the state at 14
    assert traffic(spec, segments, holds=[{0: 10}])[0] == 0
    assert traffic(spec, segments, holds=[{}, {0: 10}], statistics=True)[0] == 2 * row + 3 * 4 * spec.head_dim
    assert traffic(spec, segments, {0: 1}, holds=[{}, {0: 10}])[0] == (6 + 4) * row
    assert traffic(spec, [[], []], {0: 0}, holds=[{}, {0: 10}])[0] == 6 * row, "a state without tokens moves, too"
    with pytest.raises(RankError, match="holds its state at 10"):
        traffic(spec, segments)
    with pytest.raises(ShapeError, match="holds"):
        traffic(spec, segments, holds=[{}, {}, {0: 10}])


def test_training_begins_at_0():
    spec = SPECS["csa"]
    shards = alone(Segment(3, 10, 4), holds=[(3, 10)])
    with pytest.raises(UnsupportedError, match="sequences that begin at position 0, got sequence 3 from position 10"):
        train_shard(spec, tokens(spec, 4), weights(spec), rope(spec, 64), shards)
