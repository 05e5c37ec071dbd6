"""Files: written whole or not at all, read with bounds, typed, and sealed by digests. All of it passes through here."""

from kvcondense.files.reading import absent, read_bytes, read_text, require_file, same
from kvcondense.files.whole import replacing, why_not_written, write

__all__ = ["absent", "read_bytes", "read_text", "replacing", "require_file", "same", "why_not_written", "write"]
