"""Words that only this project's authors would understand do not come back; the field has a word for each.

Not here: CHANGELOG.md and DECISIONS.md, which quote the past, and keys of stored results, which stay as they are.
"""

import re
from pathlib import Path

from tests.conftest import ROOT

FIELD_WORDS = {
    r"in vain": "without success, or say what timed out",
    r"anew": "again, or: from the start",
    r"nonsense": "invalid results, or: non-finite values",
    r"whoever": "the process, rank or worker that ...",
    r"(left|kept)\s+whole": "not split",
    r"spoil(s|t|ed)?": "damaged, or: invalid",
    r"goes? on without": "continues without",
    r"stands? twice": "is duplicated",
    r"(is|are) told": "receives ..., or: knows",
    r"optimisers?": "optimizer",
    r"normalise[ds]?": "normalize",
    r"dealt|dealing": "assigned, or: sharded",
    r"narrow networks?": "submodel, or: subnet",
    r"whole networks?": "full network",
}
"""A pattern of words, and what to write in its place."""

STORED = {"benchmarks/recipes.py"}
"""Files whose old words are keys of stored results."""

PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "pyproject.toml", "Makefile")
PATTERNS = ("ist/**/*.py", "ist/**/*.html", "tests/**/*.py", "benchmarks/**/*.py", "benchmarks/*.md", "docs/*.py",
            "docs/*.md", "examples/**/*.py", "examples/*.md", "configs/*.yaml", "launch/*")  # fmt: skip


def texts() -> list[Path]:
    found = [ROOT / page for page in PAGES] + [path for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))]
    return [path for path in found if path.is_file() and path != Path(__file__) and name_of(path) not in STORED]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def private_words(text: str) -> list[tuple[int, str, str]]:
    """The line, the words and their remedy, also where words are parts of a name or on two lines."""
    return [
        (text.count("\n", 0, match.start()) + 1, match.group(), remedy)
        for pattern, remedy in FIELD_WORDS.items()
        for match in re.finditer(r"(?<![a-z])(?:" + pattern.replace(" ", r"[\s_#]+") + r")(?![a-z])", text.lower())
    ]


def test_texts_and_names_use_the_words_of_the_field() -> None:
    found = [
        f"{name_of(path)}:{line}: '{words}': write {remedy}"
        for path in texts()
        for line, words, remedy in private_words(path.read_text())
    ]

    assert found == [], "\n".join(found)


def test_words_are_found_in_names_and_across_lines() -> None:
    text = (
        "a word\ndef test_a_run_goes_on_without_it():\n    # it waits in\n    # vain for an Optimiser; disappointed\n"
    )

    assert [(line, remedy) for line, _, remedy in private_words(text)] == [
        (3, FIELD_WORDS["in vain"]), (2, "continues without"), (4, "optimizer"),
    ]  # fmt: skip
