"""The command line, `ist`: the only code that prints errors and sets exit codes."""
