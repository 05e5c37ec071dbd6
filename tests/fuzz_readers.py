"""Altered files and bytes into every reader, by a seed: a documented error or what was written, in bounded memory.

``python tests/fuzz_readers.py --inputs 300000 --seconds 1500`` runs longer than the suite does (``make fuzz``).
"""

import argparse
import contextlib
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

import foreign_files as files
import foreign_requests as requests
import foreign_texts as texts
import foreign_vectors as vectors
from kvcondense.errors import IntegrityWarning, KvCondenseError

READERS = (
    files.Config, files.Weights, files.Index, files.Gguf, files.Hidden, requests.Caches, requests.OldCaches,
    requests.Resumed, requests.Snapshots, requests.OldSnapshots, requests.Bundles, requests.UncheckedBundles,
    requests.RecoveredBundles, texts.Cases, texts.Records, texts.Tuned, texts.Kept,
    vectors.Vectors, vectors.VectorIndex, vectors.VectorOutputs,
)  # fmt: skip
MOST_BYTES = 256 << 20
"""How much larger the process may become while one input is read."""
MOST_SECONDS = 4.0
"""Of the processor, for one input."""
_STOP_SECONDS, _MOST_ADDRESSES = 30.0, 8 << 30
"""When a reader that does not come to an end is broken off; how much more than it has a process may ask for."""


class ReaderError(AssertionError):
    """What a reader did that it must not do."""


@dataclass
class Tally:
    """Of one reader."""

    inputs: int = 0
    accepted: int = 0
    seconds: float = 0.0
    longest: float = 0.0
    peak: int = 0


def run(inputs, seed, seconds=float("inf"), *, readers=READERS, say=lambda text: None, failed=None):
    """Reader's name -> Tally. Raises ReaderError at the first input that one fails on; ``failed``: where it is kept."""
    begun, place = time.perf_counter(), Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=place if place.is_dir() else None) as folder, _bounded() as noted:
        held = [reader(Path(folder)) for reader in readers]
        order = [h for h in held for _ in range(h.weight)]
        tallies = {type(h).__name__: Tally() for h in held}
        for number in range(inputs):
            if time.perf_counter() - begun > seconds:
                break
            reader = order[number % len(order)]
            name = type(reader).__name__
            chance = random.Random(f"{seed} {name} {number}")
            which = chance.randrange(len(reader.seeds))
            data, same_digests = reader.alter(chance, which)
            noted.clear()
            try:
                _one(reader, data, which, same_digests, noted, tallies[name])
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                where = _keep(failed, f"{name}-{seed}-{number}-{which}", data)
                raise ReaderError(
                    f"{name}, seed {seed}, input {number}{where}: {type(error).__name__}: {error}"
                ) from error
            if number % 10_000 == 9_999:
                say(f"{number + 1} inputs, {time.perf_counter() - begun:.0f} s")
    return tallies


def _one(reader, data, which, same_digests, noted, tally):
    base, begun = _forget_peak(), time.process_time()
    words = None
    try:
        words = reader.read(data, which)
    except (KvCondenseError, OSError) as error:
        str(error).encode("utf-8", "backslashreplace")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    took, grown = time.process_time() - begun, _peak() - base
    tally.inputs, tally.accepted = tally.inputs + 1, tally.accepted + (words is not None)
    tally.seconds, tally.longest, tally.peak = tally.seconds + took, max(tally.longest, took), max(tally.peak, grown)
    if grown > MOST_BYTES:
        raise ReaderError(f"the process grew by {grown >> 20} MiB")
    if took > MOST_SECONDS:
        raise ReaderError(f"it took {took:.1f} s")
    if noted and reader.quiet:
        raise ReaderError(f"it warned: {noted[0].message}")
    # A warning says that something is not compared, or not of now.
    if words and reader.sealed and same_digests and not noted and data not in reader.seeds and words - reader.whole:
        raise ReaderError("damage was not noticed")


@contextlib.contextmanager
def _bounded():
    """Warnings other than IntegrityWarning are errors; what asks for more memory than there may be gets none."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if _PROC else 1 << 36
    old = signal.signal(signal.SIGPROF, _stopped)
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("error")
        warnings.simplefilter("always", IntegrityWarning)
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # matplotlib's: a name that no font can draw
        most = size + _MOST_ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (most if limits[1] < 0 else min(most, limits[1]), limits[1]))
        try:
            yield noted
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, old)
            resource.setrlimit(resource.RLIMIT_AS, limits)


_PROC = Path("/proc/self/clear_refs").exists()


def _stopped(*_):
    raise ReaderError(f"no end after {_STOP_SECONDS:.0f} s")


def _forget_peak():
    """Bytes that the process has; its peak is measured from here on."""
    signal.setitimer(signal.ITIMER_PROF, _STOP_SECONDS)
    if not _PROC:
        return _peak()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _status("VmRSS:")


def _peak():
    return _status("VmHWM:") if _PROC else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024


def _keep(folder, name, data):
    if folder is None:
        return ""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    return f" ({folder / name})"


def table(tallies):
    """Lines for people."""
    lines = [f"{'reader':<18}{'inputs':>8}{'accepted':>10}{'a second':>10}{'longest, ms':>13}{'peak, MiB':>11}"]
    for name, t in tallies.items():
        rate = t.inputs / t.seconds if t.seconds else 0.0
        lines.append(
            f"{name:<18}{t.inputs:>8}{t.accepted:>10}{rate:>10.0f}{1e3 * t.longest:>13.0f}{t.peak / 2**20:>11.1f}"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=300_000)
    parser.add_argument("--seconds", type=float, default=1500.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="a reader's name")
    parser.add_argument(
        "--failed", type=Path, default=Path("build/fuzz"), help="where an input goes that a reader fails on"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    readers = [r for r in READERS if given.only in ("", r.__name__)]
    print(f"seed {given.seed}", flush=True)
    found = run(
        given.inputs,
        given.seed,
        given.seconds,
        readers=readers,
        failed=given.failed,
        say=lambda t: print(t, flush=True),
    )
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
