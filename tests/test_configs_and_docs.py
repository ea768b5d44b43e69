"""Every shipped configuration loads and runs, and the README names only what exists."""

import re
import shlex
from pathlib import Path

import pytest

from ist.config_file import config_for_method, load_config
from ist.coordinator import run_rounds
from ist.data.fashion_mnist import DEBIAN_ROOT
from ist.job import build_job
from ist.run import Leading, open_run
from tests.conftest import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_trains_a_round_and_says_what_it_is(path: Path) -> None:
    config = load_config(path)
    if config.data.name == "fashion_mnist" and not DEBIAN_ROOT.exists():
        pytest.skip("Debian's dataset-fashion-mnist is not installed")
    for word in ("# What:", "# Hardware:", "# Duration:", "# Result:", "# Command:"):
        assert word in path.read_text()
    for method in config.compare.methods:
        build_job(config_for_method(config, method))

    short = ["train.epochs=null", "train.rounds=1", "train.local_steps=2", "pool.kind=inline", "pool.device=cpu"]
    with open_run(build_job(load_config(path, short)), None, resume=False, progress=False) as part:
        assert isinstance(part, Leading)
        run_rounds(part.job, part.method, part.recorder, part.first_round, part.device)

    assert part.recorder.history[0]["test_loss"] > 0
    assert (part.recorder.history[0]["accuracy"] is not None) == (config.evaluate.metric == "accuracy")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_path_in_the_docs_exists(page: Path) -> None:
    named = set(
        re.findall(
            r"(?<![\w/.-])((?:ist|tests|configs|benchmarks|launch|examples|docker)/[\w./-]*\w/?)", page.read_text()
        )
    )

    assert named or page.name == "CONTRIBUTING.md"
    for name in named:
        assert (ROOT / name).exists(), name


def test_every_make_target_and_command_in_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^\s*make ([\w-]+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target

    from typer.main import get_command

    from ist.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    lines = [line.strip().removeprefix("$ ") for line in README.splitlines()]
    used = [shlex.split(line, comments=True) for line in lines if re.match(r"(ist|\$ ist) [a-z]", line.strip())]
    assert len(used) > 5
    for words in used:
        command = commands[words[1]]
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word.split("=")[0] for word in words if word.startswith("--")} <= options, words


def test_the_tree_in_the_readme_names_every_module() -> None:
    for path in [*(ROOT / "ist").glob("*.py"), *(p for p in (ROOT / "ist").iterdir() if p.is_dir())]:
        if not path.name.startswith("_"):
            assert path.name in README, path.name
