"""pytest plugin: a JSON line for each test as soon as it ended, in the file that ON_GPU_RECORDS names."""

from __future__ import annotations

import json
import os
from typing import Any

_workers: list[Any] = []


def pytest_configure(config: Any) -> None:
    """Workers tell their controller, which writes."""
    if hasattr(config, "workerinput"):
        _workers.append(config)


def pytest_runtest_logreport(report: Any) -> None:
    """Of a test's call, or of a setup that failed or skipped it."""
    if _workers or not (report.when == "call" or (report.when == "setup" and not report.passed)):
        return
    record = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
    if report.failed:
        record["why"] = report.longreprtext[-600:]
    if os.environ.get("ON_GPU_STAND_IN"):
        record["stand_in"] = True
    with open(os.environ["ON_GPU_RECORDS"], "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
