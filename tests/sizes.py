"""How long files and functions are: reported after the tests, so that a reviewer sees it, and no test's business.

A limit would be met by shorter names and denser lines; a file that grows wants another home for half of it.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

FILE_LINES = 400
FUNCTION_LINES = 60


def longer_than_the_guide(root: Path) -> Iterator[str]:
    """Yield a line for each file of `ist`, `benchmarks` and `tests` over 400 lines, and each function over 60."""
    for path in sorted(path for folder in ("ist", "benchmarks", "tests") for path in (root / folder).rglob("*.py")):
        text, shown = path.read_text(), path.relative_to(root)
        if (lines := len(text.splitlines())) > FILE_LINES:
            yield f"{shown}: {lines} lines (guide: {FILE_LINES})"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > FUNCTION_LINES:
                    yield f"{shown}: {node.name} has {length} lines (guide: {FUNCTION_LINES})"
