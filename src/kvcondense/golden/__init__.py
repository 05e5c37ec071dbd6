"""The golden run: pypto-lib's decode compressor (PR 270) as inputs, reference, comparators and a runner."""
