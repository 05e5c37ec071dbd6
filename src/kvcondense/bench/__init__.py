"""Timings beside floors and peers: cases are data, nobody's speed is printed before its rows were compared."""
