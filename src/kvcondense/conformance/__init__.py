"""Does an implementation do the right thing, and would we notice if it did not: adapters, invariants, mutants, soak."""

from kvcondense.conformance.adapter import Adapter, Capabilities, Setup, load_factory

__all__ = ["Adapter", "Capabilities", "Setup", "load_factory"]
