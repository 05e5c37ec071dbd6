"""What commands do: ``run`` of a module here is the work of the command of that name, and may import anything.

It returns whether what the command checks holds; None where there is nothing that may not hold.
"""
