"""`python -m temper.cli` is `temper`."""

from temper.cli import main

main()
