"""kvcondense inside other programs: transformers' models."""
