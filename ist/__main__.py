"""`python -m ist` is the `ist` command."""

from ist.cli.main import main

main()
