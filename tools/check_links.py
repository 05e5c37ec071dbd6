"""Check every link inside a built site: ``python tools/check_links.py build/site``. Exit status 1 if one is broken.

The site is served on the loopback interface for as long as that takes. Links that lead out of it are not followed, and
anchors are left to mkdocs, which has checked those of its pages.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Quiet(SimpleHTTPRequestHandler):
    """Serves files without a line for each."""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def main() -> None:
    """Serve the folder and send linkchecker through it."""
    folder = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    linkchecker = Path(sys.executable).with_name("linkchecker")
    words = ["--no-status", "--threads", "2"]
    address = f"http://127.0.0.1:{server.server_port}/index.html"
    status = subprocess.run([linkchecker, *words, address], check=False).returncode
    server.shutdown()
    sys.exit(status)


if __name__ == "__main__":
    main()
