"""Run the conformance kit on engines' own compressors and write docs/findings.md from what it finds.

Each implementation runs in a process of its own, on files that its authors publish (examples/foreign says which), in
Triton's interpreter or on the CPU. Without --peers the page is made of committed results. Exit status 1 if something
came out otherwise than it is known. It takes some ten minutes on two cores. Examples:

    python tools/findings.py --peers PEERS --json benchmarks/baselines/findings.json --write docs/findings.md
    python tools/findings.py --peers PEERS --only rtp
    python tools/findings.py --json benchmarks/baselines/findings.json --write docs/findings.md
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from findings import page, registry, run, worker

from kvcondense.errors import KvCondenseError


def main() -> int:
    """Run what is asked for, or write the page of what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, metavar="DIR", help="a folder for each engine's files: run the kit")
    parser.add_argument("--only", default="", metavar="NAME", help="implementations whose name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="results: written with --peers, else read")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page there")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes at a time (%(default)s)")
    parser.add_argument("--minutes", type=float, default=15.0, help="for one implementation (%(default)s)")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        return _one(given.one)
    chosen = registry.chosen(given.only)
    if not chosen:
        parser.error(f"--only: expected a part of a name, got {given.only!r}")
    if given.write and given.only:
        parser.error("--write: the page needs every implementation, not --only some")
    if given.peers:
        report = run.run(chosen, given.peers.resolve(), given.jobs, given.minutes, _say)
        if given.json:
            given.json.parent.mkdir(parents=True, exist_ok=True)
            given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    elif given.json:
        report = json.loads(given.json.read_text(encoding="utf-8"))
    else:
        parser.error("--peers, to run, or --json, to read")
    if given.write:
        given.write.write_text(page.page(report), encoding="utf-8")
    wrong = run.unexpected(chosen, report)
    for sentence in wrong:
        print(sentence)
    print(f"{len(chosen) - len({s.split(':')[0] for s in wrong})} of {len(chosen)} implementations as they are known")
    return 1 if wrong else 0


def _one(name: str) -> int:
    """What a process of its own does."""
    try:
        if name == run.CASTS:
            worker.casts()
        else:
            worker.work(next(i for i in registry.IMPLEMENTATIONS if i.name == name))
    except (KvCondenseError, ImportError, OSError) as error:
        worker.say(kind="error", why=str(error))
        return 1
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
