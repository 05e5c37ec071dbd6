"""Bundles of the tests' machines: where a request is held, and a small bundle on disk."""

from kvcondense.bundle import Held, append, create
from machine import SPECS, Machine, tokens


def held(machine, q=0):
    return Held(
        machine.spec,
        machine.state,
        machine.at(q),
        machine.cache,
        machine.table[q],
        machine.weights.ape,
        machine.impl,
    )


class Small:
    """One compressor with few channels, so that its bundle is small."""

    def __init__(self, folder, spec=SPECS["csa"], stops=(6, 9), **options):
        self.machine = Machine(spec, [tokens(spec, 40)], **options)
        self.path = folder / "small.bundle"
        for number, stop in enumerate(stops):
            self.machine.feed([stop - self.machine.done[0]])
            with (append if number else create)(self.path, {"model": "small", "stop": str(stop)}) as file:
                file.add(0, "main", held(self.machine))
