"""What ``tools/demo.py`` does: a model, comparisons, a report of them, a picture."""
