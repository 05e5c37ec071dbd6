"""Test vectors: the kit without Python. Read schema (a vector), made (which there are), played, compared, in this order."""
