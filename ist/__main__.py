"""`python -m ist` is the `ist` command."""

from ist.cli import main

main()
