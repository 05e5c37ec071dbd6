"""Cache formats: which bytes a compressed row becomes. Read elements, scales, descriptor, catalog, in that order."""

from kvcondense.formats.catalog import FORMATS, format_of_dtype, get_format
from kvcondense.formats.descriptor import CacheFormat, Channels, Field

__all__ = ["FORMATS", "CacheFormat", "Channels", "Field", "format_of_dtype", "get_format"]
