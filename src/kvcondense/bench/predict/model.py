"""The predicted time of a launch: the longest of its bounds, a program's own time, and what a launch costs.

Of n programs, a processor has at most b = ceil(n / processors) to do, and runs r of them at once: as many as its
registers, its shared memory and its threads allow. Waves are w = ceil(n / (r processors)). With counts of a warp's
instructions, for the mean program of W warps, the bounds in seconds are

    memory      bytes / copy rate
    cache       bytes that all programs ask of the last cache / its rate
    port        b (those bytes / n) / (port bytes a cycle x clock)
    issue       b W (all instructions / instructions a cycle) / clock
    fp32, integer, special    b W (instructions of that kind x their cycles) / clock; on AMD one unit does all: vector
    shared      b W (lanes x bytes of a lane + operands of products) / (shared bytes a cycle x clock)
    product     b (flops of a program) / (product rate / processors): its tile's, or those of its instructions if they
                are more, as where two warps multiply the same

and a program alone on the chip takes its chain (``warp``): loads that wait for loads, barriers, arithmetic in order. Of
that, one turn of each loop comes before what a bound counts or after it ("once"); the other turns go on beside it. So

    predicted = launch + max(once + longest bound, w chain)

What decides is the longest bound; or "latency", where launch + once are longer than it, or w chains than both. A step
takes the sum of its launches.
The vendor's library has no chain: its product is launch + max(memory, product).

What a program does before it waits for earlier kernels is in the launch's time.

Left out: bank conflicts, lines that two programs of a processor share in its first cache, powers and clocks that fall
under load, overlap of launches. Masked lanes count as if they moved their bytes in ``shared``, nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from kvcondense.bench.cases import Case
from kvcondense.bench.fused import Layer
from kvcondense.bench.predict import code
from kvcondense.bench.predict.code import Launched
from kvcondense.bench.predict.flow import whole
from kvcondense.bench.predict.machines import Machine
from kvcondense.bench.predict.work import Kernel, floor, forms_of, work_of

LATENCY = "latency"


@dataclass(frozen=True)
class Predicted:
    """Of one launch, in microseconds: in all, each bound, the chain; what decides; programs, those that a processor
    runs at once, waves; bytes and flops as ``Kernel`` has them, and the flops of its instructions where those say
    theirs; instructions of a mean program's warp.
    """

    kernel: str
    us: float
    bound: str
    bounds: dict[str, float]
    chain_us: float = 0.0
    once_us: float = 0.0
    launch_us: float = 0.0
    programs: int = 0
    resident: int = 0
    waves: int = 0
    memory_bytes: float = 0.0
    cache_bytes: float = 0.0
    flops: float = 0.0
    code_flops: float = 0.0
    warps: int = 0
    registers: int = 0
    shared_bytes: int = 0
    instructions: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, numbers to four digits."""
        return {name: _short(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Answer:
    """A case's predicted time and floor in microseconds, what decides in its longest launch, and its launches."""

    case: str
    form: str
    us: float
    floor_us: float
    bound: str
    bytes: int
    flops: int
    kernels: tuple[Predicted, ...]


def predict(what: Case | Layer, arch: str, machine: Machine, form: str | None = None) -> Answer:
    """The times of a case's or a layer's step, in one of its forms (``forms_of``; None: the backend's).

    Raises UnsupportedError if one of its kernels does not compile.
    """
    form = form or forms_of(what, arch)[0]
    kernels = work_of(what, arch, form)
    found = tuple(of_kernel(kernel, code.of(kernel, arch, machine), machine) for kernel in kernels)
    longest = max(found, key=lambda k: k.us)
    least = floor(what, machine.copy_rate, machine.product_rate)
    return Answer(what.name, form, sum(k.us for k in found), 1e6 * least, longest.bound, what.bytes, what.flops, found)


def of_kernel(kernel: Kernel, launched: Launched | None, machine: Machine) -> Predicted:
    """The time of one launch; launched: None for the vendor's library."""
    if launched is None:
        bounds = {"memory": kernel.memory / machine.copy_rate, "product": kernel.flops / machine.product_rate}
        return _predicted(kernel, bounds, machine, Predicted(kernel.name, 0.0, "", {}))
    resident = residents(launched, machine)
    waves = whole(kernel.programs / (resident * machine.processors))
    about = Predicted(
        kernel.name, 0.0, "", {}, 1e6 * launched.chain / machine.clock, 1e6 * launched.once / machine.clock, 0.0,
        kernel.programs, resident, waves,
        warps=launched.warps, registers=launched.registers, shared_bytes=launched.shared,
        instructions=launched.counts.instructions,
        code_flops=kernel.programs * launched.warps * launched.counts.flops,
    )  # fmt: skip
    return _predicted(kernel, bounds_of(kernel, launched, machine), machine, about)


def residents(launched: Launched, machine: Machine) -> int:
    """Programs that a processor runs at once, at least one. Registers are given out by eights."""
    lanes = launched.warps * machine.lanes
    taken = launched.shared + machine.each
    most = (
        machine.registers // (lanes * -(-max(launched.registers, 1) // 8) * 8),
        machine.threads // lanes,
        machine.programs,
        machine.shared_bytes // taken if taken else machine.programs,
    )
    return max(1, min(most))


def bounds_of(kernel: Kernel, launched: Launched, machine: Machine) -> dict[str, float]:
    """Seconds that each part of the chip is busy, as the module's text has them."""
    busiest = whole(kernel.programs / machine.processors)
    counts, warps = launched.counts, launched.warps
    number = counts.instructions

    def seconds(cycles: float) -> float:
        return busiest * warps * cycles / machine.clock

    lanes = sum(moved for kind, moved in counts.lane_bytes.items() if kind.startswith("sh"))  # shared, shuffle
    units = {
        unit: seconds(sum(number.get(kind, 0.0) * machine.cycles(kind) for kind in kinds))
        for unit, kinds in machine.units.items()
    }
    return {
        "memory": kernel.memory / machine.copy_rate,
        "cache": kernel.cache / machine.cache_rate,
        "port": busiest * kernel.cache / kernel.programs / (machine.port * machine.clock),
        "issue": seconds(sum(number.values()) / machine.slots),
        **units,
        "shared": seconds((machine.lanes * lanes + counts.operands) / machine.shared),
        "product": busiest
        * max(kernel.flops / kernel.programs, warps * counts.flops)
        / (machine.product_rate / machine.processors),
    }


def _predicted(kernel: Kernel, bounds: Mapping[str, float], machine: Machine, about: Predicted) -> Predicted:
    chain, once = about.chain_us / 1e6, about.once_us / 1e6
    decides = max(bounds, key=lambda name: bounds[name])
    us = 1e6 * (machine.launch + max(once + bounds[decides], about.waves * chain))
    if once + machine.launch > bounds[decides] or about.waves * chain > once + bounds[decides]:
        decides = LATENCY
    return Predicted(**{
        **vars(about), "us": us, "bound": decides, "bounds": {name: 1e6 * s for name, s in bounds.items()},
        "launch_us": 1e6 * machine.launch, "memory_bytes": kernel.memory, "cache_bytes": kernel.cache,
        "flops": kernel.flops,
    })  # fmt: skip


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return {name: _short(v) for name, v in value.items()} if isinstance(value, dict) else value
