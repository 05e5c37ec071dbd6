"""What compiled kernels are: tiles that wait little and read x once for 256 columns; few instructions and rounds."""

import json

import pytest

from compiling import compiling

pytest.importorskip("triton")
from kvcondense.bench.fused import LAYERS

COUNTED = """
import json, sys
from collections import Counter
from kvcondense.bench.fused import LAYERS
from kvcondense.bench.predict import code, work

arch, found = sys.argv[1], {}
for name in sys.argv[2:]:
    tiles = work.work_of(LAYERS[name], arch, work.TILES)[0]
    built, flow = code.compiled(tiles, arch)
    looping = frozenset().union(*(loop.body for loop in flow.loops if not loop.polls))
    ways = []
    for way in tiles.ways:
        times, count = flow.times(way), Counter()
        for number in flow.order:
            for i in flow.blocks[number].code:
                if times[number] and way.of(i.chain):
                    where = "loop" if number in looping else "product" if "project_tile" in i.chain else "else"
                    count[f"{i.name.split('.')[0]} {where}"] += 1
        ways.append(count)
    found[name] = {"programs": tiles.programs, "cache": tiles.cache, "spills": built.spills, "ways": ways}
print(json.dumps(found))
"""
ROUNDS = """
import json, sys
from dataclasses import replace
from kvcondense.bench.fused import LAYERS
from kvcondense.bench.predict import code, work
from kvcondense.bench.predict.flow import Runs
from kvcondense.bench.predict.machines import MACHINES
from kvcondense.bench.predict.warp import alone

found = {}
for name in sys.argv[1:]:
    kernel = work.work_of(LAYERS[name], "sm_90", work.ONE_LAUNCH)[0]
    machine = MACHINES["sm_90"]
    _, flow = code.compiled(kernel, "sm_90")
    loads = dict.fromkeys(machine.latencies, 0.0) | {"cache": 1.0, "memory": 1.0}
    behind = ("windows_all", "keeps_all")
    once = {name: 1.0 for way in kernel.ways for name in way.trips}

    def rounds(way, *parts):
        without = dict.fromkeys({*behind} - {*parts}, 0.0)
        trips = once | {name: min(turns, 1.0) for name, turns in way.trips.items() if name.startswith(behind)}
        runs = Runs({**way.times, **without}, trips | without)
        return alone(flow, runs, replace(machine, latencies=loads, issue=0.0), 0)

    found[name] = {part: max(rounds(way, part) - rounds(way) for way in kernel.ways) for part in behind}
print(json.dumps(found))
"""
TWO = """
import json, sys
from dataclasses import replace
from kvcondense.bench.predict import model, table, work
from kvcondense.bench.predict.machines import MACHINES

arch, name = sys.argv[1:]
real, found = work._variant, []
for windows in (1, 2):
    work._variant = lambda part, form: replace(real(part, form), windows=windows)
    answer = model.predict(table.CASES[name], arch, MACHINES[arch])
    found.append({**answer.kernels[0].as_dict(), "us": answer.us})
print(json.dumps(found))
"""
NAMES = ("HCA, prefill 8192", "CSA, prefill 8192")
HIDDEN, BF16, TILE, COLUMNS = 4096, 2, 128, 256


def counted(arch):
    """By layer: programs, bytes, spills, and by kind of program instructions by where they are."""
    return json.loads(compiling("-c", COUNTED, arch, *NAMES))


def test_tiles_of_sm_90():
    found = counted("sm_90")
    assert tuple(found) == NAMES
    for name, tiles in found.items():
        case = LAYERS[name].cases[0]
        once = case.tokens // TILE * (case.spec.projected // COLUMNS) * BF16 * HIDDEN * (TILE + COLUMNS)
        assert once <= tiles["cache"] <= 1.3 * once, name
        assert tiles["spills"] == 0
        pooling, *keeping = tiles["ways"]
        assert len(keeping) == (name.startswith("CSA")), "a state of HCA keeps none of whole windows"
        for way in tiles["ways"]:
            boxes, sums = {"H": (3, 2), "C": (5, 4)}[name[0]]
            assert way["UTMALDG loop"] == boxes, "of x, and of each part of the weights"
            assert way["HGMMA loop"] == 4 * sums, "16 of 64 hidden channels at a time"
            assert not any(key.startswith("LDGSTS") for key in way), "tokens lie side by side"
            assert 0 < way["BAR else"] <= 16, "barriers of a tile beside those of its product"
        assert pooling["BAR else"] <= (12 if name.startswith("HCA") else 16)
        # Of 128 rows that wait in eight warps, none is another warp's: what shuffles is a row's own four lanes.
        assert pooling["SHFL else"] <= (24 if name.startswith("HCA") else 180)


def test_tiles_of_amd_read_x_once_for_256_columns():
    found = counted("gfx942")
    assert [tiles["programs"] for tiles in found.values()] == [64 * 1024 // COLUMNS, 67 * 2048 // COLUMNS + 8]


def test_a_window_of_ratio_4_takes_few_instructions(tmp_path):
    case = "prefill 1 x 65536, ratio 4"
    compiling("-m", "kvcondense", "bench", "--predict", "sm_90", "--case", case, "--json", tmp_path / "j")
    _, record = map(json.loads, (tmp_path / "j").read_text().splitlines())
    (step,) = record["kernels"]
    assert 700 < sum(step["instructions"].values()) <= 900, "of a warp; four do a window"


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_two_windows_of_ratio_4_in_a_program_take_less_code_and_no_less_time(arch):
    """Of registers there are fewer for each, and memory is the bound: the table has one until somebody measures."""
    one, two = json.loads(compiling("-c", TWO, arch, "prefill 1 x 65536, ratio 4"))
    assert two["programs"] == -(-65536 // 4 // 2) + one["programs"] - 65536 // 4, "kept rows are programs, too"
    assert 0.9 < sum(two["instructions"].values()) / 2 / sum(one["instructions"].values()) < 0.99
    assert two["cache_bytes"] < 0.9 * one["cache_bytes"], "ape is read once for both"
    assert one["us"] < two["us"] < 1.06 * one["us"]


def test_loads_behind_the_barrier_of_a_decode_step_wait_for_few_others():
    """The state's page, rows, stores that others are to see, the counter, the row: a wait for each round. What the
    plan and the batch say, and the norm's weights, was asked for earlier.
    """
    names = ("HCA, decode 16 on a boundary", "CSA, decode 16 on a boundary")
    rounds = json.loads(compiling("-c", ROUNDS, *names))
    assert tuple(rounds) == names
    for name in names:
        assert 4 <= rounds[name]["windows_all"] <= 6, "of a window"
        assert 1 <= rounds[name]["keeps_all"] <= 2, "of a kept row"
