"""Sequences on several ranks, over gloo: the bits of one rank, few bytes, errors that name the rank."""

import json
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

import over_ranks
from kvcondense import CompressorSpec, CompressorWeights, PagedCache, RaggedBatch, StatePool, condense
from kvcondense.bench import context_parallel as bench
from kvcondense.bench import measure
from kvcondense.bench.cases import Case
from kvcondense.cli import app
from kvcondense.config import ModelConfig
from kvcondense.errors import RangeError, ShapeError
from kvcondense.parallel import Segment, Shards, condense_shard, interleaved_slots, round_robin, zigzag
from machine import SPECS, rope, weights

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")


def play(scenario, ranks, tmp_path):
    """What every rank printed."""
    if scenario == "kit":
        return over_ranks.play("kit_over_ranks.py", ranks, tmp_path)
    return over_ranks.play("ranks.py", ranks, tmp_path, scenario)


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_cut_gives_the_bits_of_one_rank(ranks, tmp_path):
    for rank, (text, code) in enumerate(play("equal", ranks, tmp_path)):
        assert code == 0, text
        assert f"rank {rank}: equal ok" in text


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_packed_sequences_dealt_in_any_way_give_the_bits_of_one_rank(ranks, tmp_path):
    for rank, (text, code) in enumerate(play("packed", ranks, tmp_path)):
        assert code == 0, text
        assert f"rank {rank}: packed ok" in text


def test_statistics_of_windows_that_lie_on_several_ranks(tmp_path):
    for scenario, ranks in (("merged", 3), ("merged_slots", 2)):
        for rank, (text, code) in enumerate(play(scenario, ranks, tmp_path / scenario)):
            assert code == 0, text
            assert f"rank {rank}: {scenario} ok" in text


def test_the_kits_histories_with_prefills_over_ranks(tmp_path):
    for rank, (text, code) in enumerate(play("kit", 3, tmp_path)):
        assert code == 0, text
        assert f"rank {rank}: kit ok" in text


@pytest.mark.parametrize(
    ("scenario", "ranks"),
    [("train", 2), ("train", 4), ("train_fsdp", 2), ("train_packed", 2), ("train_packed", 3), ("train_mesh", 4)],
)
def test_wrapped_modules_train_on_shards(scenario, ranks, tmp_path):
    for rank, (text, code) in enumerate(play(scenario, ranks, tmp_path)):
        assert code == 0, text
        assert f"rank {rank}: {scenario} ok" in text


@pytest.mark.parametrize("scenario", ["silent", "dead", "gap", "overlap", "others", "silent_backward"])
def test_trouble_names_the_rank_and_ends(scenario, tmp_path):
    found = play(scenario, 2, tmp_path)
    assert found[0][1] == 0, found[0][0]
    assert f"rank 0: {scenario} ok" in found[0][0]
    assert found[1][1] == 0, found[1][0]


def test_pieces_say_who_has_what():
    one, two = Segment(4, 0, 5), Segment(4, 5, 4)
    shards = Shards(((), (Segment(9, 0, 2), two), (one,)), 1, None, None).checked()
    assert (shards.tokens, shards.total, shards.lengths, shards.last_ranks) == (6, 11, {4: 9, 9: 2}, {4: 1, 9: 1})
    assert shards.pieces(4, 3, 7) == [(3, 5, 2, 3), (5, 7, 1, 2)]
    assert shards.pieces(4, 5, 5) == shards.pieces(5, 0, 9) == []
    assert shards.positions().tolist() == [0, 1, 5, 6, 7, 8]


def test_deals_are_those_of_engines():
    assert zigzag([8, 3], 2) == [[(0, 0, 2), (0, 6, 2), (1, 2, 1)], [(0, 2, 4), (1, 0, 2)]]
    assert round_robin([5, 2], 2, 2) == [[(0, 0, 2), (0, 4, 1), (1, 0, 2)], [(0, 2, 2)]]
    assert round_robin([4], 1) == [[(0, 0, 4)]]
    with pytest.raises(RangeError, match="lengths"):
        zigzag([-1], 2)


def test_bad_input_is_an_error_before_anybody_is_asked():
    spec = CompressorSpec.csa(ModelConfig.FLASH)
    weights = CompressorWeights(norm=torch.ones(512), ape=torch.zeros(4, 1024))
    shards = Shards(((Segment(0, 0, 4),),), 0, None, None)
    with pytest.raises(ShapeError, match="kv_score"):
        condense_shard(spec, torch.zeros(3, spec.projected), weights, None, shards)
    for wrong in ((0, 1), (1, 0)):
        with pytest.raises(RangeError, match="decode_ranks"):
            replace(shards, decode_ranks=(wrong,)).checked()
    with pytest.raises(RangeError, match="start"):
        Shards.agree(-1, 4)


def test_the_bench_compares_and_prints(tmp_path, monkeypatch):
    case = Case("tiny", "csa", 64, 1, 0, format="bf16")
    monkeypatch.setattr("kvcondense.cli.work.bench.SPLITS", {"tiny": bench.Split(case, 2, 3)})
    monkeypatch.setattr(measure.Rates, "measure", lambda: measure.Rates(memory=1e9, cache=1e10, gemm=1e11))
    file = tmp_path / "t.jsonl"
    result = CliRunner().invoke(app, ["bench", "--context-parallel", "--json", str(file)])
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in file.read_text().splitlines()]
    split, one = (r for r in records if "runner" in r)
    assert (split["runner"], one["runner"]) == ("2 ranks", "one rank")
    row = 4 * case.spec.state_dim
    assert split["moved_bytes"] == (4 + 3) * row
    assert one["us"] > 0
    assert split["all_gather_bytes"] == 64 * case.spec.projected * 4
    assert "| tiny, 2 ranks, cut 3 beyond boundaries |" in result.output
    again = CliRunner().invoke(app, ["bench", "--context-parallel", "--from", str(file)])
    assert "| sequence | bytes moved |" in again.output
    result = CliRunner().invoke(app, ["bench", "--context-parallel", "--training"])
    assert result.exit_code == 2


@pytest.mark.parametrize("name", ["csa", "hca"])
@pytest.mark.parametrize(("ranks", "interleave"), [(1, 1), (2, 1), (3, 2)])
def test_rows_that_are_dealt_out_in_decode(name, ranks, interleave):
    """Every rank takes every token and keeps its rows: together, at vLLM's places, they are one rank's."""
    spec, page_rows, interleave = SPECS[name], 4, interleave * SPECS[name].ratio
    w, lengths = weights(spec), [6 * spec.ratio + 3, 3 * spec.ratio]
    x = torch.randn(sum(lengths), spec.projected, generator=torch.Generator().manual_seed(4))
    table = torch.tensor([[5, 2], [0, 3]])
    held = []
    for rank in range(ranks):
        state, cache = StatePool.ring(spec, 2), PagedCache.allocate(spec.head_dim, 6, page_rows, format="fp32")
        cache.data.zero_()
        begun = [0, 0]
        for step in ([2, spec.ratio], [lengths[0] - 2, lengths[1] - spec.ratio]):  # a prefill, then the rest
            bounds = torch.tensor([0, *step]).cumsum(0)
            given = [x[b : b + n] for b, n in zip((begun[0], lengths[0] + begun[1]), step, strict=True)]
            slots = interleaved_slots(
                spec, bounds, begun, table, page_rows, rank=rank, ranks=ranks, interleave=interleave
            )
            batch = RaggedBatch.build(bounds, start_positions=begun, state_slots=[0, 1], slot_mapping=slots)
            condense(spec, torch.cat(given), w, rope(spec, 1024), batch, state=state, cache=cache)
            begun = [a + b for a, b in zip(begun, step, strict=True)]
        held.append(cache.rows.flatten().view(-1, spec.head_dim))
    whole = RaggedBatch.build(torch.tensor([0, *lengths]).cumsum(0), start_positions=[0, 0])
    expected = condense(spec, x, w, rope(spec, 1024), whole)
    written = 0
    for q, c, row in zip(expected.request.tolist(), expected.window.tolist(), expected.values, strict=True):
        last = (c + 1) * spec.ratio - 1
        rank = last // interleave % ranks
        local = (last // (interleave * ranks) * interleave + last % interleave) // spec.ratio
        slot = int(table[q, local // page_rows]) * page_rows + local % page_rows
        assert torch.equal(held[rank][slot], row), (q, c)
        written += 1
    assert sum(int(rows.any(1).sum()) for rows in held) == written, "and nothing else"


def test_what_cannot_be_dealt_out():
    spec = SPECS["csa"]
    good = {"rank": 0, "ranks": 2, "interleave": 4}
    for change, error, word in (
        ({"rank": 2}, RangeError, "rank"),
        ({"interleave": 6}, RangeError, "multiple of the ratio, 4"),
        ({"ranks": 0}, RangeError, "ranks"),
    ):
        with pytest.raises(error, match=word):
            interleaved_slots(spec, [0, 8], [0], torch.zeros(1, 1, dtype=torch.int64), 4, **{**good, **change})
    for entry in (-1, 1 << 62):
        with pytest.raises(RangeError, match=r"block_table\[0, 0\]"):
            interleaved_slots(spec, [0, 8], [0], torch.tensor([[entry]]), 4, **good)
    with pytest.raises(ShapeError, match="at least 2 pages"):
        interleaved_slots(spec, [0, 80], [0], torch.zeros(1, 1, dtype=torch.int64), 8, **good)
