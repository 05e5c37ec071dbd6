"""Test vectors, the kit without Python: schema (a vector), made (which there are), played, compared. In this order."""
