"""What compiled tiles are: copies by descriptor, windows within a warp, x read once for 256 columns, no spills."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
from kvcondense.bench.fused import LAYERS

COUNTED = """
import json, sys
from collections import Counter
from kvcondense.bench.fused import LAYERS
from kvcondense.bench.predict import code, work
from kvcondense.bench.predict.machines import MACHINES

arch, found = sys.argv[1], {}
for name in sys.argv[2:]:
    tiles = work.work_of(LAYERS[name], arch, work.TILES)[0]
    code.of(tiles, arch, MACHINES[arch])
    built, flow = code._kept[tiles.variant, tiles.launch.name, arch]
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
NAMES = ("HCA, prefill 8192", "CSA, prefill 8192")
HIDDEN, BF16, TILE, COLUMNS = 4096, 2, 128, 256


def counted(arch):
    """By layer: programs, bytes, spills, and by kind of program instructions by where they are: this one interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    words = [sys.executable, "-c", COUNTED, arch, *NAMES]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


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
        # Of 128 rows that wait in eight warps, none is another warp's: what shuffles is a row's own four lanes.
        assert pooling["SHFL else"] <= (24 if name.startswith("HCA") else 180)


def test_tiles_of_amd_read_x_once_for_256_columns():
    found = counted("gfx942")
    assert [tiles["programs"] for tiles in found.values()] == [64 * 1024 // COLUMNS, 67 * 2048 // COLUMNS + 8]
