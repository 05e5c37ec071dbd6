"""``--junit FILE.xml``: a conformance run as the XML that continuous integration systems show, a test per invariant."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from kvcondense import files
from kvcondense.conformance.invariants import Outcome

# What XML 1.0 has no spelling for: an adapter's error may hold anything.
_UNSPEAKABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write(path: Path, adapter: str, outcomes: list[Outcome]) -> None:
    """One test suite; a failure holds what is wrong and the smallest history."""
    failed, skipped = sum(not o.passed for o in outcomes), sum(bool(o.skipped) for o in outcomes)
    facts = {"tests": len(outcomes), "failures": failed, "skipped": skipped, "errors": 0}
    suite = _element("testsuite", {"name": f"kvcondense conformance of {adapter}", **facts})
    for o in outcomes:
        case = _element("testcase", {"classname": "kvcondense.conformance", "name": f"{o.invariant}: {o.promise}"})
        if o.skipped:
            case.append(_element("skipped", {"message": o.skipped}))
        elif not o.passed:
            failure = _element("failure", {"message": o.detail, "type": o.raised or "wrong"})
            failure.text = _clean("" if o.case is None else o.case.to_json())
            case.append(failure)
        suite.append(case)
    root = _element("testsuites", {})
    root.append(suite)
    ElementTree.indent(root)
    files.write(path, ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n")


def _element(name: str, facts: dict[str, Any]) -> ElementTree.Element:
    return ElementTree.Element(name, {key: _clean(str(value)) for key, value in facts.items()})


def _clean(text: str) -> str:
    return _UNSPEAKABLE.sub("\ufffd", text)
