"""The rules that keep the code pointing one way; how long files and functions are is reported, by `tests/sizes.py`."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

# From the ground up: a module may import only from lines above its own.
LAYERS = [
    ["ist.metrics_server", "ist._version", "ist.errors", "ist.redact", "ist.theory"],
    ["ist.lab", "ist.launched", "ist.signals", "ist.ranks"],
    ["ist.lab.link"],
    ["ist.rng", "ist.config_base", "ist.balance", "ist.finite", "ist.lab.hosts"],
    ["ist.config_method", "ist.config_recipe"],
    ["ist.config"],
    ["ist.yaml_text"],
    ["ist.config_file", "ist.registry", "ist.storage", "ist.run_files", "ist.run_lock", "ist.same_run"],
    ["ist.data", "ist.models"],
    ["ist.data.sparse", "ist.data.log_mel"],
    ["ist.data.wordnet", "ist.data.tfidf"],
    [
        "ist.data.batched",
        "ist.data.idx",
        "ist.data.nested",
        "ist.losses",
        "ist.attention",
        "ist.blocks",
        "ist.modes",
        "ist.compiled",
        "ist.copies",
    ],
    ["ist.models.mlp", "ist.models.preact_resnet", "ist.models.decoder", "ist.models.wide"],
    ["ist.data.digits", "ist.data.fashion_mnist", "ist.data.text", "ist.data.batches", "ist.data.crime"],
    ["ist.data.hypernyms", "ist.data.graphs", "ist.data.spoken_digits", "ist.data.speech_commands", "ist.data.content"],
    ["ist.data.cora", "ist.data.wordnet_graph"],
    ["ist.groups"],
    ["ist.groups.labels", "ist.groups.sizes", "ist.groups.places"],
    ["ist.groups.parameters", "ist.groups.draws", "ist.groups.tape", "ist.groups.sites"],
    ["ist.groups.combine", "ist.groups.detours", "ist.call_sizes"],
    ["ist.groups.reads"],
    ["ist.groups.call"],
    ["ist.groups.weights"],
    ["ist.groups.rules_layers", "ist.groups.rules_indexing"],
    ["ist.groups.rules"],
    ["ist.groups.trace"],
    ["ist.groups.neurons"],
    ["ist.stages", "ist.metrics", "ist.trial", "ist.network", "ist.failures", "ist.reach"],
    ["ist.groups.select", "ist.fit", "ist.partition", "ist.optim", "ist.narrow"],
    ["ist.subnet", "ist.pool.wire", "ist.quantize", "ist.schedule"],
    ["ist.pool.coding"],
    ["ist.pool"],
    ["ist.job", "ist.meter", "ist.outer", "ist.pool.limit"],
    ["ist.build"],
    ["ist.evaluate", "ist.checkpoint", "ist.verify", "ist.drift", "ist.exchange", "ist.frozen", "ist.start"],
    ["ist.kept", "ist.optimizer_trial"],
    ["ist.worker"],
    ["ist.pool.device", "ist.pool.secret", "ist.pool.ports", "ist.pool.ray_guard"],
    ["ist.pool.ray_worker"],
    ["ist.pool.group"],
    ["ist.pool.inline", "ist.pool.torchrun", "ist.pool.ray", "ist.pool.ray_cluster"],
    ["ist.rounds"],
    ["ist.coordinator", "ist.average"],
    ["ist.methods"],
    ["ist.methods.ranks", "ist.methods.quantized"],
    ["ist.methods.powersgd", "ist.methods.hooks"],
    ["ist.methods.ddp", "ist.methods.local", "ist.display", "ist.exporters", "ist.run_folder", "ist.launch"],
    ["ist.watch", "ist.lab.run"],
    ["ist.recorder", "ist.inspection"],
    ["ist.plan"],
    ["ist.plan.formulas"],
    ["ist.plan.measure", "ist.plan.request"],
    ["ist.plan.predict"],
    ["ist.plan.show"],
    ["ist.run"],
    ["ist.prepare"],
    ["ist.report", "ist.report.table", "ist.report.names", "ist.report.plots", "ist.api"],
    ["ist.report.page"],
    ["ist.report.plan_page"],
    ["ist.theory.kernels", "ist.theory.masks", "ist.theory.bounds", "ist.theory.published"],
    ["ist.theory.problem", "ist.theory.statistics"],
    ["ist.theory.algorithm", "ist.theory.experiment"],
    ["ist.theory.practice", "ist.theory.noisy_inputs", "ist.theory.quadratic", "ist.theory.experiments"],
    ["ist.theory.experiments.maps"],
    ["ist.theory.experiments.figure2b", "ist.theory.experiments.figure2c"],
    [
        f"ist.theory.experiments.{name}"
        for name in ("figure2a", "calibrate", "rates", "floors", "kernels", "relatives", "inputs", "bias", "system")
    ],
    ["ist.theory.runner"],
    ["ist.report.theory_page"],
    ["ist", "ist.cli_theory"],
    ["ist.cli"],
    ["ist.__main__"],
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}

SOURCES = sorted((ROOT / "ist").rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> Iterator[str]:
    """First-party modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in LEVEL else node.module for name in names]
        yield from (name for name in names if name.split(".")[0] == "ist")


@pytest.mark.parametrize("path", SOURCES, ids=shown)
def test_imports_point_one_way(path: Path) -> None:
    here = name_of(path)
    assert here in LEVEL, f"give {here} a place in LAYERS"
    for imported in imports(path):
        assert imported in LEVEL, imported
        if imported.startswith(f"{here}.") and here == "ist":
            continue  # the package's front door opens on what is inside
        assert LEVEL[imported] < LEVEL[here], f"{here} imports {imported}"


def test_no_duration_is_taken_of_the_clock_of_the_day() -> None:
    """It may jump. One place asks it, for a point in time that Prometheus shows."""
    asks = {
        f"{path.stem}: {ast.unparse(node)}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("time.time", "time.time_ns")
    }

    assert asks == {"exporters: time.time()"}


def test_every_layer_names_modules_that_exist() -> None:
    assert {name_of(path) for path in SOURCES} == set(LEVEL)


def test_the_command_line_and_the_configuration_do_without_torch() -> None:
    script = "import ist, ist.cli, ist.config, sys; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize("path", SOURCES, ids=shown)
def test_nothing_reads_a_pickle_and_only_the_command_line_exits(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("pickle.load", "pickle.loads", "torch.load", "dist.broadcast_object_list")
            assert called != "sys.exit" or name_of(path) == "ist.cli"
