"""``python -m kvcondense`` is the ``kvcondense`` command."""

from kvcondense.cli import main

main()
