"""Every argument of the public functions, wrong in type, shape, dtype, device or range: named, and nothing written."""

from dataclasses import replace

import pytest
import torch

from kvcondense import (
    CompressorWeights,
    KvCondenseError,
    ModelConfig,
    PagedCache,
    Plan,
    RaggedBatch,
    RopeTable,
    StatePool,
    compress,
    condense,
    explain,
    project,
    store,
)
from kvcondense.layout.addresses import RingLayout
from kvcondense.layout.snapshot import export_live, import_live
from machine import SPECS, rope, tokens, weights

SPEC = SPECS["csa"]
HIDDEN = 32
META = torch.device("meta")


def good():
    """A valid condense call in two requests, one of them in the middle of its sequence."""
    state, cache = StatePool.ring(SPEC, 4, 9), PagedCache.allocate(16, 3, 4)
    state.data.fill_(3.0)
    cache.rows.fill_(5.0)
    import_live(SPEC, state, RaggedBatch.build([0, 0], start_positions=[6], state_slots=[2]), torch.ones(6, 64))
    return {
        "spec": SPEC,
        "kv_score": tokens(SPEC, 9),
        "weights": weights(SPEC, hidden=HIDDEN),
        "rope": rope(SPEC, 64),
        "batch": RaggedBatch.build(
            [0, 5, 9], start_positions=[0, 6], state_slots=[0, 2], slot_mapping=list(range(2, 11))
        ),
        "state": state,
        "cache": cache,
    }


def changed_weights(**kwargs):
    return lambda g: {"weights": replace(g["weights"], **kwargs)}


def changed_batch(**kwargs):
    def change(_):
        fields = {"start_positions": [0, 6], "state_slots": [0, 2], "slot_mapping": list(range(9)), **kwargs}
        return {"batch": RaggedBatch.build([0, 5, 9], **fields)}

    return change


CONDENSE = {
    "spec type": ("spec", lambda g: {"spec": "csa"}),
    "kv_score type": ("kv_score", lambda g: {"kv_score": g["kv_score"].numpy()}),
    "kv_score dims": ("kv_score", lambda g: {"kv_score": g["kv_score"][0]}),
    "kv_score width": ("kv_score", lambda g: {"kv_score": g["kv_score"][:, :-1]}),
    "kv_score rows": ("kv_score", lambda g: {"kv_score": g["kv_score"][:8]}),
    "kv_score dtype": ("kv_score", lambda g: {"kv_score": g["kv_score"].to(torch.int32)}),
    "kv_score device": ("kv_score", lambda g: {"kv_score": g["kv_score"].to(META)}),
    "weights type": ("weights", lambda g: {"weights": {}}),
    "norm shape": ("weights.norm", changed_weights(norm=torch.ones(15))),
    "norm dtype": ("weights.norm", changed_weights(norm=torch.ones(16, dtype=torch.int32))),
    "norm device": ("weights.norm", changed_weights(norm=torch.ones(16, device="meta"))),
    "ape missing": ("weights.ape", changed_weights(ape=None)),
    "ape shape": ("weights.ape", changed_weights(ape=torch.ones(3, 32))),
    "ape dtype": ("weights.ape", changed_weights(ape=torch.ones(4, 32, dtype=torch.int64))),
    "ape device": ("weights.ape", changed_weights(ape=torch.ones(4, 32, device="meta"))),
    "ape unwanted": ("weights.ape", lambda g: {"spec": replace(SPEC, has_ape=False)}),
    "rope missing": ("rope", lambda g: {"rope": None}),
    "rope type": ("rope", lambda g: {"rope": (1, 2)}),
    "rope width": ("rope.cos", lambda g: {"rope": rope(replace(SPEC, rope_dim=6), 64)}),
    "rope too short": ("rope", lambda g: {"rope": rope(SPEC, 4)}),
    "rope dtype": ("rope.cos", lambda g: {"rope": RopeTable(*(torch.ones(64, 4, dtype=torch.int64),) * 2)}),
    "rope device": ("rope.cos", lambda g: {"rope": RopeTable(*(torch.ones(64, 4, device="meta"),) * 2)}),
    "rope unwanted": ("rope", lambda g: {"spec": replace(SPEC, rope_dim=0)}),
    "batch type": ("batch", lambda g: {"batch": [0, 5, 9]}),
    "state missing": ("state", lambda g: {"state": None}),
    "state type": ("state", lambda g: {"state": g["state"].data}),
    "state width": ("state", lambda g: {"state": StatePool.ring(replace(SPEC, head_dim=8), 4, 9)}),
    "state device": ("state", lambda g: {"state": StatePool.ring(SPEC, 4, 9, device="meta")}),
    "state empty": ("state of request 1", lambda g: {"state": StatePool.ring(SPEC, 4, 9)}),
    "state elsewhere": ("state of request 1", changed_batch(state_slots=[0, 1])),
    "state at another position": ("state of request 1", changed_batch(start_positions=[0, 7])),
    "state slot too large": ("state_slots", changed_batch(state_slots=[0, 4])),
    "state slot shared": ("state_slots", changed_batch(state_slots=[2, 2])),
    "state slots missing": ("state_slots", changed_batch(state_slots=None)),
    "ring too short for drafts": ("ring_rows", changed_batch(draft_rows=[3, 3])),
    "paged state without table": ("state_block_table", lambda g: {"state": StatePool.paged(SPEC, 8, 4)}),
    "cache type": ("cache", lambda g: {"cache": g["cache"].data}),
    "cache width": ("cache", lambda g: {"cache": PagedCache.allocate(8, 3, 4)}),
    "cache device": ("cache", lambda g: {"cache": PagedCache.allocate(16, 3, 4, device="meta")}),
    "cache without slots": ("slot_mapping", changed_batch(slot_mapping=None)),
    "cache slot too large": ("slot_mapping", changed_batch(slot_mapping=[12] * 9)),
    "cache slot shared": ("slot_mapping", changed_batch(slot_mapping=[3] * 9)),
    "cache page missing": (r"block_table\[0, 0\]", changed_batch(slot_mapping=None, block_table=[[-1], [1]])),
    "cache page too large": ("block_table", changed_batch(slot_mapping=None, block_table=[[1], [3]])),
    "cache table too narrow": (
        "block_table",
        lambda g: {
            "batch": RaggedBatch.build([0, 5, 9], start_positions=[0, 18], state_slots=[0, 2], block_table=[[0], [1]]),
        },
    ),
    "plan type": ("plan", lambda g: {"plan": 3}),
    "plan of another batch": (
        "plan",
        lambda g: {"plan": Plan.build(SPEC, changed_batch()(g)["batch"], state_layout=g["state"].layout)},
    ),
    "plan of another ratio": (
        "plan",
        lambda g: {"plan": Plan.build(SPECS["r8"], g["batch"], state_layout=g["state"].layout)},
    ),
    "plan of another layout": ("plan", lambda g: {"plan": Plan.build(SPEC, g["batch"])}),
    "impl name": ("impl", lambda g: {"impl": "cuda"}),
    "impl type": ("impl", lambda g: {"impl": 7}),
}


# explain has no plan and no impl; compress takes x instead of kv_score.
ABSENT = {condense: (), explain: ("plan", "impl"), compress: ("kv_score",)}
CALLS = [(f, c) for f, absent in ABSENT.items() for c in CONDENSE if not c.startswith(absent or "-")]


@pytest.mark.parametrize(("function", "case"), CALLS, ids=[f"{f.__name__}-{c}" for f, c in CALLS])
def test_condense_names_the_argument_and_writes_nothing(function, case):
    name, change = CONDENSE[case]
    arguments = good()
    state, cache = arguments["state"], arguments["cache"]
    before = state.data.clone(), state.tags.clone(), cache.data.clone()
    if function is compress:
        arguments["x"] = torch.randn(arguments.pop("kv_score").shape[0], HIDDEN)
    with pytest.raises(KvCondenseError, match=name) as caught:
        function(**{**arguments, **change(good() if function is compress else arguments)})
    assert caught.value.expected
    assert caught.value.got
    for old, new in zip(before, (state.data, state.tags, cache.data), strict=True):
        assert torch.equal(old, new)


def test_the_good_call_is_good():
    arguments = good()
    rows = condense(**arguments)
    assert rows.window.tolist() == [0, 1]
    reasons = explain(**good())
    assert [name for name, reason in reasons.items() if reason is None and name != "pypto"] == [
        "cpu",
        "triton",
        "reference",
    ]
    assert (arguments["cache"].rows != 5.0).any()


PROJECT = {
    "spec": ("spec", {"spec": None}),
    "weights": ("weights", {"weights": None}),
    "no w": ("weights.w", {"weights": CompressorWeights(norm=torch.ones(16))}),
    "w shape": ("weights.w", {"weights": CompressorWeights(norm=torch.ones(16), w=torch.ones(63, HIDDEN))}),
    "w dtype": (
        "weights.w",
        {"weights": CompressorWeights(norm=torch.ones(16), w=torch.ones(64, HIDDEN, dtype=torch.int8))},
    ),
    "x type": ("x", {"x": [1.0]}),
    "x dims": ("x", {"x": torch.ones(HIDDEN)}),
    "x width": ("x", {"x": torch.ones(3, HIDDEN + 1)}),
    "x dtype": ("x", {"x": torch.ones(3, HIDDEN, dtype=torch.int64)}),
    "x device": ("x", {"x": torch.ones(3, HIDDEN, device="meta")}),
    "tile": ("tile", {"tile": 0}),
    "tile type": ("tile", {"tile": 1.5}),
}


@pytest.mark.parametrize("case", PROJECT)
def test_project_names_the_argument(case):
    name, change = PROJECT[case]
    arguments = {"spec": SPEC, "x": torch.ones(3, HIDDEN), "weights": weights(SPEC, hidden=HIDDEN)}
    with pytest.raises(KvCondenseError, match=f"^{name}: expected"):
        project(**{**arguments, **change})


STORE = {
    "rows type": ("rows", {"rows": 3}),
    "rows width": ("rows", {"rows": torch.ones(2, 15)}),
    "rows dtype": ("rows", {"rows": torch.ones(2, 16, dtype=torch.int32)}),
    "rows device": ("rows", {"rows": torch.ones(2, 16, device="meta")}),
    "slots length": ("slot_mapping", {"slot_mapping": torch.tensor([0, 1, 2])}),
    "slots dtype": ("slot_mapping", {"slot_mapping": torch.tensor([0.0, 1.0])}),
    "slots type": ("slot_mapping", {"slot_mapping": [0, 1]}),
    "slots too large": ("slot_mapping", {"slot_mapping": torch.tensor([0, 12])}),
    "slots too small": ("slot_mapping", {"slot_mapping": torch.tensor([0, -2])}),
    "slots shared": ("slot_mapping", {"slot_mapping": torch.tensor([4, 4])}),
    "cache": ("cache", {"cache": torch.zeros(3, 4, 16)}),
}


@pytest.mark.parametrize("case", STORE)
def test_store_names_the_argument_and_writes_nothing(case):
    name, change = STORE[case]
    cache = PagedCache.allocate(16, 3, 4)
    arguments = {"rows": torch.ones(2, 16), "slot_mapping": torch.tensor([0, 1]), "cache": cache}
    with pytest.raises(KvCondenseError, match=f"^{name}: expected"):
        store(**{**arguments, **change})
    assert not cache.data.any()
    store(**arguments)
    assert cache.rows[0, :2].eq(1).all()


BATCH = {
    "query_start_loc dtype": ("query_start_loc", {"query_start_loc": torch.tensor([0.0, 4.0])}),
    "query_start_loc dims": ("query_start_loc", {"query_start_loc": torch.zeros(1, 2, dtype=torch.int64)}),
    "query_start_loc empty": ("query_start_loc", {"query_start_loc": []}),
    "query_start_loc start": ("query_start_loc", {"query_start_loc": [1, 4]}),
    "query_start_loc falls": ("query_start_loc", {"query_start_loc": [0, 4, 3], "start_positions": [0, 0]}),
    "query_start_loc device": (
        "query_start_loc",
        {"query_start_loc": torch.zeros(2, dtype=torch.int64, device="meta")},
    ),
    "positions and starts": ("positions", {"positions": [0, 1, 2, 3]}),
    "neither": ("positions", {"start_positions": None}),
    "starts dtype": ("start_positions", {"start_positions": torch.tensor([0.5])}),
    "starts length": ("start_positions", {"start_positions": [0, 1]}),
    "starts range": ("start_positions", {"start_positions": [-2]}),
    "starts device": ("start_positions", {"start_positions": torch.zeros(1, dtype=torch.int64, device="meta")}),
    "positions short": ("positions", {"start_positions": None, "positions": [0, 1, 2]}),
    "positions gap": (r"positions\[2\]", {"start_positions": None, "positions": [7, 8, 10, 11]}),
    "drafts length": ("draft_rows", {"draft_rows": [1, 1]}),
    "drafts too many": ("draft_rows", {"draft_rows": [5]}),
    "drafts negative": ("draft_rows", {"draft_rows": -1}),
    "drafts bool": ("draft_rows", {"draft_rows": True}),
    "table ragged": (
        "block_table",
        {"query_start_loc": [0, 1, 2], "start_positions": [0, 0], "block_table": [[0], [1, 2]]},
    ),
    "slots text": ("state_slots", {"state_slots": "a"}),
    "slots dtype": ("state_slots", {"state_slots": torch.tensor([True])}),
    "slots length": ("state_slots", {"state_slots": [0, 1]}),
    "slots range": ("state_slots", {"state_slots": [-2]}),
    "two state addresses": ("state_slots", {"state_slots": [0], "state_block_table": [[0]]}),
    "state table dims": ("state_block_table", {"state_block_table": [0]}),
    "mapping short": ("slot_mapping", {"slot_mapping": [0, 1, 2]}),
    "mapping range": ("slot_mapping", {"slot_mapping": [0, 1, 2, -3]}),
    "two cache addresses": ("slot_mapping", {"slot_mapping": [0, 1, 2, 3], "block_table": [[0]]}),
    "table rows": ("block_table", {"block_table": [[0], [1]]}),
}


@pytest.mark.parametrize("case", BATCH)
def test_batch_names_the_argument(case):
    name, change = BATCH[case]
    arguments = {"query_start_loc": [0, 4], "start_positions": [0], **change}
    with pytest.raises(KvCondenseError, match=f"^{name}: expected"):
        RaggedBatch.build(**arguments)


CONSTRUCTORS = {
    "ring spec": ("spec", lambda: StatePool.ring(None, 1)),
    "paged spec": ("spec", lambda: StatePool.paged("csa", 1, 1)),
    "rope config": ("config", lambda: RopeTable.build({})),
    "plan spec": ("spec", lambda: Plan.build(None, good()["batch"])),
    "plan layout": ("state_layout", lambda: Plan.build(SPEC, good()["batch"], state_layout=4)),
    "load spec": ("spec", lambda: CompressorWeights.load(".", None, 1, hidden_size=1)),
    "load part": ("part", lambda: CompressorWeights.load(".", SPEC, 1, hidden_size=1, part="query")),
    "ring slots": ("num_slots", lambda: StatePool.ring(SPEC, 0)),
    "ring rows": ("ring_rows", lambda: StatePool.ring(SPEC, 1, 0)),
    "page rows": ("page_rows", lambda: StatePool.paged(SPEC, 1, -1)),
    "pages": ("num_pages", lambda: StatePool.paged(SPEC, 1.5, 1)),
    "state dtype": ("state dtype", lambda: StatePool.ring(SPEC, 1, dtype=torch.float16)),
    "state data": ("state data", lambda: StatePool(torch.ones(3, 4), RingLayout(1, 4))),
    "state data dtype": ("state data", lambda: StatePool(torch.ones(4, 4, dtype=torch.int32), RingLayout(1, 4))),
    "state tags": ("state tags", lambda: StatePool(torch.ones(4, 4), RingLayout(1, 4), torch.ones(3))),
    "cache format": ("format", lambda: PagedCache.allocate(16, 1, 1, format="int3")),
    "cache head_dim": ("head_dim", lambda: PagedCache.allocate(0, 1, 1)),
    "cache pages": ("num_pages", lambda: PagedCache.allocate(16, -1, 1)),
    "cache page rows": ("page_rows", lambda: PagedCache.allocate(16, 1, 0)),
    "cache wrap dtype": ("rows", lambda: PagedCache.wrap(torch.zeros(1, 2, 3, dtype=torch.int8))),
    "cache wrap dims": ("rows", lambda: PagedCache.wrap(torch.zeros(2, 3))),
    "cache wrap strided": ("rows", lambda: PagedCache.wrap(torch.zeros(1, 2, 6)[:, :, ::2])),
    "rope length": ("max_positions", lambda: RopeTable.build(ModelConfig.DEMO, -1)),
    "rope type": ("max_positions", lambda: RopeTable.build(ModelConfig.DEMO, 1.0)),
    "rope shapes": ("rope", lambda: RopeTable(torch.ones(3, 4), torch.ones(3, 5))),
    "plan batch": ("batch", lambda: Plan.build(SPEC, None)),
    "plan page_rows": ("page_rows", lambda: Plan.build(SPEC, good()["batch"], page_rows=0)),
    "plan capacity": ("capacity", lambda: Plan.build(SPEC, good()["batch"]).padded(0, 0)),
    "export of nothing": (
        "state of request 0",
        lambda: export_live(
            SPEC, StatePool.ring(SPEC, 1), RaggedBatch.build([0, 0], start_positions=[5], state_slots=[0])
        ),
    ),
    "export beyond the pool": (
        "batch",
        lambda: export_live(
            SPEC, StatePool.ring(SPEC, 1), RaggedBatch.build([0, 0], start_positions=[5], state_slots=[3])
        ),
    ),
    "drafts": ("max_draft", lambda: SPEC.required_ring_rows(-1)),
}


@pytest.mark.parametrize("case", CONSTRUCTORS)
def test_constructors_name_the_argument(case):
    name, build = CONSTRUCTORS[case]
    with pytest.raises(KvCondenseError, match=f"^{name}"):
        build()


def test_import_live_refuses_rows_of_another_spec_before_writing():
    state = StatePool.ring(SPEC, 2)
    state.data.fill_(3.0)
    at = RaggedBatch.build([0, 0], start_positions=[6], state_slots=[1])
    for rows in (torch.ones(5, 64), torch.ones(6, 63), torch.ones(6, 64, dtype=torch.bfloat16)):
        with pytest.raises(KvCondenseError, match="^rows: expected"):
            import_live(SPEC, state, at, rows)
    outside = replace(at, state_slots=torch.tensor([2]))
    with pytest.raises(KvCondenseError, match="^batch: expected"):
        import_live(SPEC, state, outside, torch.ones(6, 64))
    assert state.data.eq(3.0).all()
    assert state.tags.eq(-1).all()
