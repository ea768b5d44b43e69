"""`ist theory`: files, resumption, settings, errors, and that the real system is Algorithm 1."""

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from ist.cli.main import app
from ist.errors import ConfigError, DataError, DivergedError
from ist.theory import EXPERIMENTS, runner
from ist.theory.algorithm import Rest, Run, train
from ist.theory.experiments import figure2b, figure2c
from ist.theory.page import write_theory_page
from ist.theory.practice import system_masks, train_with_system
from ist.theory.quantities.masks import Law
from ist.theory.quantities.problem import sphere
from tests.conftest import ROOT, wait_for
from tests.conftest import Run as Command
from tests.theory.test_quantities import write_crime

QUIET = Console(quiet=True)


@pytest.mark.filterwarnings("ignore:'partition.rest' is 'frozen' and 'recipe.merge_scale' is 1")
@pytest.mark.parametrize(
    ("xi", "tau", "rest", "gamma"),
    [(None, 1, "absent", 1.0), (None, 4, "frozen", 0.4), (0.5, 4, "absent", 0.6), (0.5, 2, "frozen", 1.0)],
)
def test_the_system_is_algorithm_1(xi: float | None, tau: int, rest: Rest, gamma: float) -> None:
    problem = sphere(8, 12)
    law = Law(40, 3, xi)
    run = Run(law, tau, 5, 0.2, seed=7, draw=system_masks(law, 7), rest=rest, merge_scale=gamma)

    theory = train(problem, [run], "weights").weights[0]
    system = train_with_system(problem, run)

    torch.testing.assert_close(system, theory, rtol=0, atol=1e-14)
    assert not torch.equal(theory, train(problem, [Run(law, tau, 5, 0.2, seed=7)], "weights").weights[0])  # other masks


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_measures_and_describes(name: str, tmp_path: Path) -> None:
    write_crime(tmp_path / "crime.csv", 60)
    module = runner.experiment(name)
    settings = runner.make_settings(name, True, str(tmp_path), TINY.get(name, []))

    points = module.points(settings)
    rows = [row for point in points for row in module.measure(settings, point)]
    section = module.section(settings, rows)

    assert len({runner.key_of(point) for point in points}) == len(points)
    assert all(set(row) == set(rows[0]) for row in rows)
    assert all((section.title, section.claim, section.method, section.found, section.figures, section.tables))
    for table in section.tables.values():
        assert all(len(row) == len(table.columns) for row in table.rows)


TINY = {
    "figure2a": ["m=100", "K=4"],
    "figure2b": ["m=100", "K=20"],
    "figure2c": ["m=100", "K=20"],
    "calibrate": ["m=100", "K=8"],
    "rates": ["m=200", "p=[1,2]", "xi=[0.5]", "until=0.8"],
    "floors": ["K=20", "m=[64,128]", "m_fixed=64", "seeds=2"],
    "relatives": ["m=100", "trainings=10"],
    "frozen": ["m=64", "K=6", "tau=[1,5]", "p=[2]", "p_data=[2]", "scales=3"],
    "inputs": ["steps=30"],
    "bias": ["rounds=50"],
}


def test_an_interrupted_run_continues(tmp_path: Path) -> None:
    chosen = {"bias": runner.make_settings("bias", True, None, ["rounds=20"])}
    list(runner.run_experiments(chosen, tmp_path, 1, False, QUIET))
    complete = (tmp_path / "bias.jsonl").read_text()
    lines = complete.splitlines(keepends=True)
    marked = json.loads(lines[1])
    marked["rows"][0]["bias"] = 123.0
    (tmp_path / "bias.jsonl").write_text(lines[0] + json.dumps(marked) + "\n" + lines[2][: len(lines[2]) // 2])

    list(runner.run_experiments(chosen, tmp_path, 1, False, QUIET))

    rows = list(csv.DictReader((tmp_path / "bias.csv").read_text().splitlines()))
    assert rows[0]["bias"] == "123.0"  # read from the file, not measured again
    assert (tmp_path / "bias.jsonl").read_text().splitlines()[2:] == complete.splitlines()[2:]


def test_results_with_other_settings_are_refused(tmp_path: Path) -> None:
    for number, fresh in ((20, False), (30, True)):
        chosen = {"bias": runner.make_settings("bias", True, None, [f"rounds={number}"])}
        list(runner.run_experiments(chosen, tmp_path, 1, fresh, QUIET))

    with pytest.raises(ConfigError, match=r"bias\.jsonl .*\(rounds\).*--out.*--fresh"):
        list(runner.run_experiments({"bias": runner.make_settings("bias", True, None, [])}, tmp_path, 1, False, QUIET))


def test_bad_input_ends_before_anything_is_measured(tmp_path: Path) -> None:
    for make, kind, words in [
        (lambda: runner.make_settings("figure9", True, None, []), ConfigError, "'figure9'.*figure2a"),
        (lambda: runner.make_settings("bias", True, None, ["eta"]), ConfigError, "--set 'eta'.*KEY=VALUE"),
        (lambda: runner.make_settings("bias", True, None, ["eta=1"]), ConfigError, "'eta=1'.*n, d, step_sizes"),
        (lambda: runner.make_settings("figure2b", True, None, ["m=-1"]), ConfigError, "figure2b: 'm'.*-1"),
        (lambda: _run("figure2b", tmp_path, ["xi=[0.0,0.5]"]), ConfigError, r"'xi\.0'.*0\.0.*greater than 0"),
        (lambda: _run("rates", tmp_path, ["xi=[0]"]), ConfigError, r"'xi\.0'.*greater than 0"),
        (lambda: _run("rates", tmp_path, ["p=[1]", "xi=[0.5]", "tau=[1]"]), ConfigError, "'p', 'xi' and 'tau'.*two"),
        (lambda: _run("floors", tmp_path, ["p=[1,2]"]), ConfigError, r"'categorical, p .*'.*\b1 value.*two"),
        (lambda: _run("inputs", tmp_path, ["eta=5000"]), DivergedError, r"eta=5000\b"),
        (lambda: _run("bias", tmp_path, ["step_sizes=[50]"]), DivergedError, "eta="),
        (lambda: _run("kernels", tmp_path, ["m=[]"]), ConfigError, "kernels: 'm'"),
        (lambda: _run("calibrate", tmp_path, ["scalings=[standardized]"]), ConfigError, r"scalings\.0"),
        (lambda: _run("figure2c", tmp_path, ["m=5"]), ConfigError, r"'m'.*\b5\b.*\b10\b"),
        (lambda: _run("figure2b", tmp_path, [], str(tmp_path / "no.csv")), DataError, r"figure2b: .*no\.csv.*sphere"),
        (lambda: _run("bias", tmp_path, ["two=[1,4,3]"]), ConfigError, "not positive definite"),
    ]:
        with pytest.raises(kind, match=words):
            make()


def _run(name: str, out: Path, assignments: list[str], data: str = "sphere") -> None:
    settings = runner.make_settings(name, True, data, assignments)
    list(runner.run_experiments({name: settings}, out, 1, False, QUIET))


def test_the_page_has_all_finished_experiments_of_a_folder(tmp_path: Path) -> None:
    tiny = {"bias": ["rounds=20"], "inputs": ["steps=20"]}
    for name, assignments in tiny.items():
        chosen = {name: runner.make_settings(name, True, None, assignments)}
        list(runner.run_experiments(chosen, tmp_path, 1, False, QUIET))
    (tmp_path / "rates.jsonl").write_text('{"experiment": "rates", "settings": {}}\n')  # not finished

    done = runner.with_measured_before([], tmp_path)
    page = write_theory_page(done, tmp_path).read_text()

    assert [one.name for one in done] == ["inputs", "bias"]
    assert page.count("<img") == 2


def test_random_inputs_are_not_compared_with_published_values() -> None:
    for name in ("figure2b", "figure2c", "calibrate"):
        module = runner.experiment(name)
        settings = runner.make_settings(name, True, "sphere", TINY[name])
        rows = [row for point in module.points(settings) for row in module.measure(settings, point)]
        section = module.section(settings, rows)
        assert not any("ublished map" in text for text in section.found)
        assert "Communities" not in section.method


def test_published_cells_are_found_by_their_coordinates() -> None:
    assert figure2b.published((1, 10), (0.1, 1.0)).tolist() == [[0.0545, 0.0161], [0.0433, 0.0163]]
    assert figure2c.published((2,), (1, 10)).tolist() == [[0.0094, 0.0126]]
    assert figure2b.published((11,), (0.1,)) is None
    assert figure2c.published((1,), (20,)) is None


@pytest.mark.system
def test_the_command_writes_everything(tmp_path: Path, ist_command: Command) -> None:
    done = ist_command(
        "theory", "figure2b", "--quick", "--data", "sphere", "--out", tmp_path, "--set", "K=20", "--processes", "1"
    )

    assert done.returncode == 0, done.stderr
    assert "figure2b: From p = 1 to p = 10" in done.stdout
    assert f"report: {tmp_path}/theory.html" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {
        "figure2b.jsonl", "figure2b.csv", "figure2b.png", "theory.html",
    }  # fmt: skip
    page = (tmp_path / "theory.html").read_text()
    assert page.count('<img src="data:image/png;base64,') == 1
    assert "<script" not in page
    assert "--set &#39;K=20&#39;" in page or "--set 'K=20'" in page


def test_settings_are_described() -> None:
    result = CliRunner().invoke(app, ["theory", "figure2b", "--knobs"])

    assert "m=4000  hidden neurons" in result.stdout
    assert result.exit_code == 0


def test_settings_for_all_experiments_are_refused() -> None:
    result = CliRunner().invoke(app, ["theory", "all", "--set", "m=3"])

    assert isinstance(result.exception, ConfigError)
    assert "--set" in str(result.exception)


@pytest.mark.system
@pytest.mark.procs
def test_an_interrupt_ends_all_processes_and_preserves_results(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "ist", "theory", "figure2b", "--quick", "--data", "sphere", "--out", str(tmp_path),
        "--processes", "2", "--set", "K=2000", "--set", "seeds=20",
    ]  # fmt: skip
    store = tmp_path / "figure2b.jsonl"
    with psutil.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: store.exists() and store.read_text().count("\n") > 2, 90, "two points")
        children = process.children(recursive=True)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)

    assert process.returncode == 130, err
    errors = [line for line in err.splitlines() if "rror" in line]
    assert len(errors) == 1
    assert errors[0].startswith("error: interrupted")
    wait_for(lambda: not any(child.is_running() for child in children), 10, "the end of all processes")
    assert store.read_text().count("\n") > 2
