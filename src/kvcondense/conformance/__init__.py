"""Does an implementation do the right thing, and would we notice if it did not: adapters, invariants, mutants, soak."""

from kvcondense.conformance.adapter import Adapter, Capabilities, Engine, Setup
from kvcondense.conformance.own import load_factory

__all__ = ["Adapter", "Capabilities", "Engine", "Setup", "load_factory"]
