"""Every public name has an example in its docstring, which runs."""

import doctest

import pytest

import ist

EXAMPLES = sorted(set(ist.__all__) - {"__version__"})


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_of_a_public_name_runs(name: str) -> None:
    found = doctest.DocTestFinder(recurse=False).find(getattr(ist, name), name, globs={"ist": ist})
    said: list[str] = []

    for example in found:
        doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS).run(example, out=said.append)

    assert sum(len(example.examples) for example in found) > 0, f"ist.{name} has no example"
    assert said == [], "".join(said)
