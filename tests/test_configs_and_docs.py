"""Every shipped configuration loads and runs, and the documentation names only paths and commands that exist."""

import math
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ist.config.load import config_for_method, load_config, validate
from ist.config.schema import Config
from ist.config.yaml_text import parse_yaml
from ist.data.batches import length, take_shard
from ist.data.images.fashion_mnist import DEBIAN_ROOT as FASHION_MNIST
from ist.data.registry import Splits
from ist.data.wordnet.nouns import DEBIAN_ROOT as WORDNET
from ist.runs.build import build_job, metric_named
from ist.runs.execute import execute
from ist.runs.loading.load import load_data
from tests.conftest import ROOT, small_config

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
README = (ROOT / "README.md").read_text()
PAGES = [
    ROOT / name
    for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "docs/recipes.md", "docs/callbacks.md")
]

DEAR = ("wordnet_sage.yaml",)
"""Configurations that differ from another by little, and take a while to load."""

SHARED = ROOT.parent / "shared" / "data"
GIVEN = {"crime": ROOT / ".data" / "crime", "spoken_digits": SHARED / "fsdd.npz", "cora": SHARED / "cora.npz"}
"""Where the data sets are looked for that no package brings."""


def missing_data(config: Config) -> str | None:
    """Return what a configuration's data set needs and this machine lacks."""
    name = config.data.name
    packages = {
        "fashion_mnist": (FASHION_MNIST.exists(), "dataset-fashion-mnist"),
        "wordnet_graph": (WORDNET.exists(), "wordnet-base"),
        "wordnet_hypernyms": (WORDNET.exists(), "wordnet-base"),
        "text": (config.data.args.get("source") != "kjv" or shutil.which("bible") is not None, "bible-kjv"),
    }
    is_here, package = packages.get(name, (True, ""))
    if not is_here:
        return f"Debian's {package} is not installed"
    if name in GIVEN and not GIVEN[name].exists():
        return f"{GIVEN[name]} is not there"
    return None


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch_geometric's own
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.system) if path.name in DEAR else path for path in CONFIGS],
    ids=lambda path: path.name,
)
def test_every_configuration_trains_a_round_and_says_what_it_is(path: Path) -> None:
    for word in ("# What:", "# Hardware:", "# Duration:", "# Result:", "# Command:"):
        assert word in path.read_text()
    config, splits = loaded(path)
    for method in config.compare.methods:
        build_job(config_for_method(config, method), splits)

    last = train_a_round(config, splits, "cpu")

    metric = metric_named(config.evaluate.metric)
    assert last["test_loss"] > 0
    assert last["metric"] == (metric.names[0] if metric else None)
    assert all(math.isfinite(last[name]) for name in (metric.names if metric else ()))
    assert (last["accuracy"] is not None) == (config.evaluate.metric == "accuracy")


def loaded(path: Path) -> tuple[Config, Splits]:
    """Load a configuration and its data, with few test samples; skip if the data is not on this machine."""
    needed = GIVEN.get(load_config(path).data.name)
    config = load_config(path, [f"data.root={needed}"] if needed else [])
    if missing := missing_data(config):
        pytest.skip(missing)
    train, test = load_data(config)
    return config, Splits(train, take_shard(test, np.arange(min(64, length(test)))))


def train_a_round(config: Config, splits: Splits, device: str) -> dict[str, Any]:
    """Run a short round of every stage in this process; return the last record."""
    stages = [
        {**stage.model_dump(), "rounds": None if stage.is_open else 1, "share": None, "local_steps": 2}
        for stage in config.recipe.stages
    ]
    tree = config.model_dump()
    tree["train"] |= {"epochs": None, "rounds": max(1, len(stages)), "local_steps": 2}
    tree["recipe"]["stages"] = stages
    tree["evaluate"]["statistics_batches"] = 2
    tree["pool"] |= {"kind": "inline", "device": device}
    short = validate(tree, config.name)
    part = execute(build_job(short, splits), progress=False)
    last: dict[str, Any] = part.recorder.history[-1]
    return last


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

    from ist.cli.main import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    lines = [line.strip().removeprefix("$ ") for line in README.splitlines()]
    used = [shlex.split(line, comments=True) for line in lines if re.match(r"(ist|\$ ist) [a-z]", line.strip())]
    assert len(used) > 5
    for words in used:
        command = commands[words[1]]
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word.split("=")[0] for word in words if word.startswith("--")} <= options, words


def test_the_python_of_the_readme_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    ours = [block.replace("rounds=20", "rounds=5") for block in blocks if re.search(r"\bist\.\w+\(", block)]
    names: dict[str, Any] = {}

    for block in ours:
        exec(block.replace("threads=2", "threads=1").replace("local_steps=50", "local_steps=10"), names)

    assert len(ours) >= 3
    assert len(names["result"].history) == 5


def test_the_python_and_the_configuration_of_the_page_about_callbacks_work() -> None:
    page = (ROOT / "docs" / "callbacks.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (section,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    names: dict[str, Any] = {}

    exec(program.replace("rounds=200", "rounds=200, progress=False"), names)
    watch = small_config(**parse_yaml(section, "docs/callbacks.md")).watch

    assert "bytes are sent" in names["result"].stopped_early or "test_loss" in names["result"].stopped_early
    assert [callback.name for callback in watch.callbacks][:2] == ["wandb", "early_stopping"]


def test_the_tree_in_contributing_names_every_room() -> None:
    tree = (ROOT / "CONTRIBUTING.md").read_text()
    for path in [*(ROOT / "ist").glob("*.py"), *(p for p in (ROOT / "ist").iterdir() if p.is_dir())]:
        if not path.name.startswith("_"):
            assert path.name in tree, path.name
