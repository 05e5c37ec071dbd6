"""The conformance kit on implementations that are not ours: what ``tools/findings.py`` runs and writes."""
