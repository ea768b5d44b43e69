"""Tables, plots and HTML pages about finished runs, plans and the theory. Needs the extra `report`.

Where it sits: the command line calls it after runs have finished.
Not here: running anything.
"""

from importlib.util import find_spec

from ist.errors import ConfigError


def check_installed(*others: str) -> None:
    """Check that the libraries of the extra `report` are installed, and other libraries of the extra `theory`.

    Raises:
        ConfigError: A library is missing.
    """
    missing = [name for name in ("jinja2", "matplotlib", *others) if find_spec(name) is None]
    if missing:
        extra = "theory" if others else "report"
        raise ConfigError(f"a report needs {' and '.join(missing)}: pip install 'ist[{extra}]'")
