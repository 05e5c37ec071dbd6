"""Bundles: rows and live state of all compressors of one request, in one file that grows without being rewritten."""

from kvcondense.bundle.cutting import cut
from kvcondense.bundle.held import Held
from kvcondense.bundle.reader import Bundle, Restored
from kvcondense.bundle.writer import Writer, append, create

__all__ = ["Bundle", "Held", "Restored", "Writer", "append", "create", "cut"]
