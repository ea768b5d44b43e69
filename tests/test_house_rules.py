"""The rules that keep the code pointing one way; how long files and functions are is reported, by `tests/sizes.py`."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

# From the ground up, a line for each floor: a room imports only from rooms above its own line; rooms of a line do not
# know each other. A room is a folder of `ist/`, or a file beside them. The front door and the pages stand above all.
ROOMS = (
    "_version errors measurements redact tensors rng models",
    "config data",
    "network optimization",
    "initialization",
    "neurons evaluation distributed",
    "subnet storage",
    "loops",
    "transport checks launch monitoring export",
    "training report callbacks",
    "baselines pools",
    "runs",
    "api own_loop plan",
    "__init__ theory",
    "cli",
    "__main__",
)
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms.split()}
MAX_FILES = 9

PUBLIC_NAMES = {
    "__version__", "train", "TrainResult", "split", "Split",
    "Optimizer", "ParameterGroup", "Schedule", "Partition", "Exchange", "Recipe", "Stage", "Outer", "MergeScale", "Average",
    "Evaluate", "Checkpoint", "Loader", "Pool", "Ray", "Watch",
    "BatchedDataset", "Metric", "scaled_blocks", "dirichlet_split", "Skew",
    "join", "Joined", "Part", "Callback", "RunStart", "Stop",
    "ISTError", "CallbackError", "ConfigError", "DataError", "ModelError", "DivergedError", "PoolError", "WorkerLostError",
    "LoopError", "RunFolderError", "CheckpointError",
}  # fmt: skip
"""What `import ist` promises: a name more is a decision, a name less breaks somebody's script."""

SOURCES = sorted((ROOT / "ist").rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in SOURCES}


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room_of(module: str) -> str:
    """The room of a module: its folder below `ist`, or the file itself."""
    return module.split(".")[1] if "." in module else "__init__"


def imports(path: Path) -> Iterator[str]:
    """First-party modules that a file imports, wherever in the file it does."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in names]
        yield from (name for name in names if name.split(".")[0] == "ist")


@pytest.mark.parametrize("path", SOURCES, ids=shown)
def test_imports_between_rooms_point_one_way(path: Path) -> None:
    here = room_of(name_of(path))
    assert here in FLOOR, f"give {here} a place in ROOMS"
    for imported in imports(path):
        there = room_of(imported)
        if there == here or here == "__init__":  # the package's front door opens on what is inside
            continue
        assert FLOOR[there] < FLOOR[here], f"{name_of(path)} imports {imported}"


def test_files_of_a_room_do_not_import_in_a_circle() -> None:
    graph = {name_of(path): set(imports(path)) & MODULES.keys() for path in SOURCES}
    graph.pop("ist")  # see above

    order = list(TopologicalSorter(graph).static_order())  # CycleError otherwise

    assert set(graph) <= set(order)


def test_every_room_has_few_files_and_every_floor_names_rooms_that_exist() -> None:
    crowded = {
        str(folder.relative_to(ROOT)): len(files)
        for folder in {path.parent for path in SOURCES} - {ROOT / "ist"}
        if len(files := [f for f in folder.glob("*.py") if f.name != "__init__.py"]) > MAX_FILES
    }

    assert crowded.keys() <= {"ist/theory/experiments"}, crowded  # a file for each experiment
    assert {room_of(name) for name in MODULES} == set(FLOOR)


def test_the_public_names_are_the_ones_promised() -> None:
    import ist

    assert set(ist.__all__) == PUBLIC_NAMES
    assert all(hasattr(ist, name) for name in PUBLIC_NAMES)
    assert set(dir(ist)) >= PUBLIC_NAMES


def test_headers_and_comments_name_files_that_exist() -> None:
    """A path of ours in backticks is one, from the repository's root, from `ist/`, or beside the file."""
    wrong = []
    for path in SOURCES:
        for found in re.findall(r"`((?:[\w.]+/)*\w+\.py)`", path.read_text()):
            if not any((folder / found).exists() for folder in (ROOT, ROOT / "ist", path.parent)):
                wrong.append(f"{shown(path)}: {found}")

    assert wrong == []


def test_no_duration_is_taken_of_the_clock_of_the_day() -> None:
    """It may jump. Two places ask it, for a point in time that Prometheus or MLflow shows."""
    asks = {
        f"{path.stem}: {ast.unparse(node)}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("time.time", "time.time_ns")
    }

    assert asks == {"exporters: time.time()", "mlflow: time.time()"}


def test_the_command_line_and_the_configuration_do_without_torch() -> None:
    script = """
import sys, ist, ist.cli.main, ist.config.load
ist.Partition(strategy="rolling"), ist.Pool(kind="ray"), ist.ISTError
sys.exit("torch" in sys.modules)
"""

    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize("path", SOURCES, ids=shown)
def test_nothing_reads_a_pickle_and_only_the_command_line_exits(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("pickle.load", "pickle.loads", "torch.load", "dist.broadcast_object_list")
            assert called != "sys.exit" or name_of(path) == "ist.cli.main"
