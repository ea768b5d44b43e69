"""Tables, plots and the HTML page about finished runs.

Not here: running anything. Needs the extra `report`.
"""

from importlib.util import find_spec

from ist.errors import ConfigError


def check_installed(*others: str) -> None:
    """Check that the libraries of the extra `report` are there, and others of the extra `theory`.

    Raises:
        ConfigError: One is missing.
    """
    missing = [name for name in ("jinja2", "matplotlib", *others) if find_spec(name) is None]
    if missing:
        extra = "theory" if others else "report"
        raise ConfigError(f"a report needs {' and '.join(missing)}: pip install 'ist[{extra}]'")
