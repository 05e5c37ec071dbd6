"""A page that plays a sequence through the compressor: what each step reads, keeps, emits and writes, by Plan."""

from kvcondense.visualiser.page import page
from kvcondense.visualiser.trace import SCHEMA, Scenario, trace

__all__ = ["SCHEMA", "Scenario", "page", "trace"]
