"""An interrupt at a chosen line of the library."""

import contextlib
import sys
from pathlib import Path

import kvcondense

HOME = str(Path(kvcondense.__file__).parent)


@contextlib.contextmanager
def interrupted_at(line):
    """KeyboardInterrupt before the ``line``-th line of the library that runs within; yields how many have run."""
    seen = [0]

    def trace(frame, event, _):
        if not frame.f_code.co_filename.startswith(HOME):
            return None
        if event == "line":
            seen[0] += 1
            if seen[0] == line:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield seen
    finally:
        sys.settrace(before)
