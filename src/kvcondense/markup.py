"""What pages are made of without a template engine: text, JSON inside a script element, and who may run or style."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from typing import Any

# No string of JSON can end its element or begin another; U+2028 and U+2029 end a line of older JavaScript.
_HARMLESS = str.maketrans({c: f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"})


def text(value: Any) -> str:
    """Any value as text of an element, or of an attribute in quotes; half a surrogate pair becomes a question mark."""
    return html.escape(str(value).encode("utf-8", "replace").decode("utf-8"))


def json_block(value: Any) -> str:
    """JSON for a script element: whatever strings it has, they are neither markup nor the end of the element.

    Raises ValueError for NaN and infinities, which JSON.parse does not take.
    """
    return json.dumps(value, separators=(",", ":"), allow_nan=False).translate(_HARMLESS)


def policy(*, styles: Sequence[str], scripts: Sequence[str] = ()) -> str:
    """A content security policy as a meta element: these style and script elements, and nothing from elsewhere.

    Give the elements' contents, to the last blank: they are named by their digests. Style attributes are not among
    them, so a page must have none; a script may set ``element.style``.
    """
    rules = ["default-src 'none'"]
    for name, contents in (("script-src", scripts), ("style-src", styles)):
        if contents:
            rules.append(f"{name} {' '.join(map(_digest, contents))}")
    rules += ["base-uri 'none'", "form-action 'none'"]
    return f'<meta http-equiv="Content-Security-Policy" content="{"; ".join(rules)}">'


def _digest(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
