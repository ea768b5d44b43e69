"""The command line: parse arguments, load the configuration, start the run.

Where it sits: the entry point of `ist` and `python -m ist`. Only this file prints errors and ends the process. Progress
goes to stderr, results to stdout.
Not here: algorithms, exit codes (`ist/launch/signals.py`), the commands `ist theory` (`ist/cli/theory.py`) and `ist
export` (`ist/cli/export.py`). Each command imports torch only if it needs it, so that `--help` is fast.
"""

import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, Optional

import typer

from ist._version import VERSION
from ist.cli.export import export
from ist.cli.theory import theory
from ist.config.base import describe_keys
from ist.config.load import config_for_method, load_config, overridden_keys, with_methods
from ist.config.methods import users_of
from ist.config.schema import FROM_PYTHON, Config, num_processes
from ist.distributed.environment import START_LIMIT, end_with_launcher, is_launched, is_rank_zero, is_repeated_elsewhere
from ist.errors import (
    ConfigError,
    InterruptedRunError,
    ISTError,
    MemoryLimitError,
    PoolError,
    RunFolderError,
    StartFailedError,
    first_line,
    is_out_of_memory,
    printable,
)
from ist.launch.signals import Stopped, exit_code, ignore_stop_signals, stop_signals, stopped_text
from ist.redact import redacted

if TYPE_CHECKING:
    from ist.storage.run_folder import RunFolder
    from ist.subnet.job import Job

app = typer.Typer(
    help="Independent Subnet Training: train a network over slow links by splitting its hidden neurons.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigFile = Annotated[Path, typer.Argument(help="Configuration of the run (YAML); 'ist keys' lists its keys.")]
Overrides = Annotated[
    Optional[list[str]],
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as --set train.local_steps=20; repeatable."),
]
Workers = Annotated[Optional[int], typer.Option("--workers", min=1, help="Number of workers (train.workers).")]
PoolKind = Annotated[
    Optional[str],
    typer.Option("--pool", metavar="inline|torchrun|ray", help="How workers run (pool.kind)."),
]
RunDir = Annotated[
    Optional[Path],
    typer.Option("--run-dir", help="Run folder to write; default: a new folder under 'output'."),
]
Address = Annotated[
    Optional[str], typer.Option(metavar="auto|HOST:PORT", help="Ray cluster to use (pool.ray.address).")
]
MetricsPort = Annotated[
    Optional[int], typer.Option(help="Serve metrics for Prometheus on this port (watch.metrics_port).")
]
Link = Annotated[
    Optional[str],
    typer.Option(
        metavar="RATE",
        help="Run every process on its own simulated host on this machine, with a link of this rate: 100mbit, 1gbit, "
        "or up/down from the host's view, such as 20mbit/100mbit (pool.link).",
    ),
]
AllowInsecure = Annotated[
    bool,
    typer.Option("--allow-insecure", help="Allow listening on a public network interface (pool.allow_insecure)."),
]
AutoResume = Annotated[
    bool,
    typer.Option("--auto-resume", help="Resume the run in --run-dir if there is one; for jobs that are restarted."),
]


@app.command()
def train(
    config_file: Annotated[
        Optional[Path], typer.Argument(metavar="CONFIG", help="Configuration of the run (YAML).")
    ] = None,
    overrides: Overrides = None,
    workers: Workers = None,
    pool: PoolKind = None,
    method: Annotated[Optional[str], typer.Option(help="'ist' or a baseline, such as 'ddp' (method).")] = None,
    address: Address = None,
    metrics_port: MetricsPort = None,
    allow_insecure: AllowInsecure = False,
    link: Link = None,
    run_dir: RunDir = None,
    auto_resume: AutoResume = False,
    resume: Annotated[
        Optional[Path],
        typer.Option(
            metavar="RUN",
            help="Resume the run in this folder. Options such as --set train.rounds=50 or --workers 8 change its "
            "configuration from then on.",
        ),
    ] = None,
) -> None:
    """Train a network by independent subnet training.

    Starts the worker processes or Ray actors. Under torchrun, joins the processes that torchrun started. 'ist keys'
    explains every key of CONFIG.
    """
    if (config_file is None) == (resume is None):
        raise ConfigError("give either CONFIG or --resume RUN")
    flags = _flags(
        workers=workers, pool=pool, method=method, address=address, metrics_port=metrics_port, link=link,
        allow_insecure=allow_insecure or None,
    )  # fmt: skip
    if resume is not None:
        if run_dir or auto_resume:
            raise ConfigError(f"--resume {resume} names the run folder: leave --run-dir and --auto-resume out")
        _resume(resume, [*(overrides or []), *flags])
        return
    assert config_file is not None
    if auto_resume and run_dir is None:
        raise ConfigError("--auto-resume needs --run-dir, the folder in which the restarted job finds its run")
    config = load_config(config_file, [*(overrides or []), *flags])

    from ist.runs.preflight import checked_job, with_pool_of_launcher
    from ist.storage.run_folder import create_run_folder

    config = with_pool_of_launcher(config)
    job = checked_job(config)
    folder, resumes = None, False
    if is_rank_zero():
        if auto_resume and run_dir is not None:
            from ist.storage.reopen import open_or_create

            folder, resumes = open_or_create(config, run_dir)
        else:
            folder = create_run_folder(config, run_dir)
    if folder is not None and folder.is_finished() and not is_launched():
        _say(f"{folder.path}: this run has already finished", err=True)
    else:  # under torchrun the other ranks wait for this one, even if no round is left
        _start(job, folder, resume=resumes)
    _print_result(folder)


@app.command()
def compare(
    config_file: ConfigFile,
    methods: Annotated[
        Optional[str], typer.Option(metavar="NAME,NAME", help="Methods to run, in order (compare.methods).")
    ] = None,
    overrides: Overrides = None,
    workers: Workers = None,
    link: Link = None,
    run_dir: RunDir = None,
) -> None:
    """Train the same network by several methods, one after the other, and write a report.

    All methods use the same number of worker processes, the same data in the same order, and the same initial weights.
    """
    config = load_config(config_file, [*(overrides or []), *_flags(workers=workers, link=link)])
    if methods:
        config = with_methods(config, methods.split(","), "--methods")

    from ist.report import check_installed
    from ist.report.page import write_report
    from ist.runs.preflight import checked_job, with_storage_for
    from ist.storage.run_folder import create_run_folder, new_folder

    if is_launched():
        raise ConfigError(
            "'ist compare' starts its own processes: under torchrun, run 'ist train --method NAME' for each method and "
            "then 'ist report RUN...'"
        )
    check_installed()
    runs = {method: config_for_method(config, method, str(config_file)) for method in config.compare.methods}
    jobs = {method: checked_job(method_config) for method, method_config in runs.items()}
    parent = run_dir or new_folder(config.output, config.name)
    folders = {method: create_run_folder(with_storage_for(runs[method], parent), parent / method) for method in runs}
    for method, folder in folders.items():
        _start(jobs[method], folder, resume=False)
    page = write_report(list(folders.values()), parent / "report.html")
    _print_table(list(folders.values()))
    _say(f"report: {page}")


@app.command()
def inspect(
    config_file: ConfigFile,
    overrides: Overrides = None,
    workers: Workers = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show the neuron groups, each worker's share, its memory, and the bytes of a round."""
    config = load_config(config_file, [*(overrides or []), *_flags(workers=workers, method="ist")])

    from ist.monitoring.display import PlainConsole
    from ist.runs.build import build_job
    from ist.runs.split import split_of

    split = split_of(build_job(config), with_memory=True)
    if as_json:
        typer.echo(json.dumps(split.as_dict(), indent=2))
    else:
        split.print(PlainConsole())


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs, or folders that contain such folders.")],
    output: Annotated[
        Optional[Path],
        typer.Option("--output", "-o", help="Page to write; default: report.html in the first folder."),
    ] = None,
) -> None:
    """Write a page with tables and plots of finished runs, and print the table."""
    from ist.report import check_installed
    from ist.report.page import find_runs, write_report

    check_installed()
    folders = find_runs(runs)
    for unfinished in [folder for folder in folders if not folder.is_finished() and folder.path not in runs]:
        _say(f"{unfinished.path}: skipped, because the run has not finished", err=True)
        folders.remove(unfinished)
    if not folders:
        raise ConfigError(f"no finished run in {', '.join(map(str, runs))}")
    page = write_report(folders, output or runs[0] / "report.html")
    _print_table(folders)
    _say(f"report: {page}")


@app.command()
def plan(
    config_file: ConfigFile,
    link: Annotated[str, typer.Option(metavar="UP[/DOWN]", help="Link of every host: 1gbit, 100mbit, 20mbit/100mbit.")],
    workers: Annotated[
        Optional[str], typer.Option(metavar="N,N", help="Numbers of workers to plan for; default: train.workers.")
    ] = None,
    methods: Annotated[Optional[str], typer.Option(metavar="NAME,NAME", help="Methods to plan; default: all.")] = None,
    overrides: Overrides = None,
    cores: Annotated[
        Optional[int], typer.Option(min=1, help="Cores shared by all workers; default: one per worker.")
    ] = None,
    latency_ms: Annotated[
        Optional[float], typer.Option(min=0, help="One-way latency between two hosts, in milliseconds.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    page: Annotated[
        Optional[Path], typer.Option("--report", help="Also write a page with plots for up to 1,024 workers.")
    ] = None,
) -> None:
    """Predict bytes, memory and seconds per round for each method, without starting a run."""
    from ist.monitoring.display import PlainConsole
    from ist.plan.predict import make_plan
    from ist.plan.request import parse_request
    from ist.plan.show import print_plan
    from ist.report import check_installed

    if page is not None:
        check_installed()
    asked = parse_request(link, workers, methods, cores, latency_ms, simulate=page is not None)
    config = load_config(config_file, [*(overrides or []), *_flags(workers=max(asked.workers, default=None))])
    found = make_plan(config, asked)
    print_plan(found, PlainConsole(), as_json)
    if page is not None:
        from ist.plan.page import write_plan_page

        _say(f"report: {write_plan_page(found, page)}", err=True)


app.command()(export)
app.command()(theory)


@app.command()
def keys() -> None:
    """List every key of a configuration file with its type, default and meaning."""
    for key, kind, default, meaning in describe_keys(Config):
        users = users_of(key)
        meaning = f"{', '.join(users)}: {meaning}" if users else meaning
        typer.echo(f"{typer.style(key, bold=True)}  ({kind}; {default})\n    {meaning}")


def _say(text: str, err: bool = False) -> None:
    typer.echo(printable(text), err=err)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(VERSION)
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Independent Subnet Training: train a network over slow links by splitting its hidden neurons."""


@app.command(hidden=True)
def process(folder: Path, resume: bool = False) -> None:
    """Run one of the processes that `ist train` started."""
    from ist.runs.build import build_job
    from ist.storage.run_folder import RunFolder

    run_folder = RunFolder(folder)
    _run_here(build_job(run_folder.load_config()), run_folder, resume)


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Show warnings of this package as 'warning: ...', without the line of our code that gives them."""
    package, before = Path(__file__).parents[1], warnings.formatwarning

    def formatted(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if not Path(filename).is_relative_to(package):
            return before(message, category, filename, lineno, line)
        return f"warning: {printable(redacted(str(message)))}\n"

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = before


def main() -> None:
    """Run the command line; the entry point of `ist` and `python -m ist`."""
    if (here := str(Path.cwd())) not in sys.path:  # like `python -m`: networks and data may be in a file there
        sys.path.append(here)
    with stop_signals() as received, _warnings_as_lines():
        try:
            end_with_launcher()
            app()
        except ISTError as error:
            _fail(error, received)
        except Stopped as stopped:
            _fail(InterruptedRunError(stopped_text(stopped, None)), received)
        except OSError as error:  # a path from the user: too long, no permission, a folder instead of a file
            if error.filename is None:
                _tell_launcher(error)
                raise
            _fail(RunFolderError(f"{os.fsdecode(error.filename)}: {error.strerror or error}"), received)
        except Exception as error:  # a bug: the launcher reports it as the cause, below the traceback
            if is_out_of_memory(error):
                _fail(MemoryLimitError(_out_of_memory(first_line(error))), received)
            _tell_launcher(error)
            raise


def _out_of_memory(cause: str) -> str:
    limit = os.environ.get(START_LIMIT)
    if limit is not None:  # training raises its own error: see ist/distributed/memory_limit.py
        return (
            f"a worker needs more memory at its start than 'pool.memory_limit' ({limit}) allows, in addition to "
            f"interpreter, libraries and data ({cause}): raise it, or use a narrower network"
        )
    return f"{_NO_MEMORY} ({cause})"


_NO_MEMORY = (
    "this process is out of memory: use a narrower network, a smaller train.batch_size, fewer processes on this "
    "machine, or more machines"
)


def _tell_launcher(error: Exception) -> None:
    if "torch" in sys.modules:
        from ist.launch.start import report_to_launcher

        report_to_launcher(error)


def _fail(error: ISTError, received: list[signal.Signals]) -> NoReturn:
    if received:
        ignore_stop_signals()
    reported = False
    if "torch" in sys.modules:
        from ist.launch.start import report_to_launcher

        reported = report_to_launcher(error)
    # Under torchrun every rank finds the same mistake or gets the same signal: one rank per machine prints it.
    is_echo = isinstance(error, ConfigError | InterruptedRunError | StartFailedError) and is_repeated_elsewhere()
    if not reported and not is_echo:
        for line in str(error).splitlines():
            # In one call: `print` may write the end of the line apart, after the line of another rank.
            sys.stderr.write(f"error: {printable(redacted(line))}\n")
    code = exit_code(error, received)
    if reported or ("RANK" in os.environ and isinstance(error, PoolError | InterruptedRunError)):
        # Destroying the process group would wait once more for the peer that does not answer.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _run_here(job: "Job", folder: "RunFolder | None", resume: bool) -> None:
    """Run this process's part: lead the rounds, or follow them as a worker."""
    from ist.runs.execute import execute

    try:
        execute(job, folder, resume)
    except (Stopped, KeyboardInterrupt) as error:
        raise InterruptedRunError(stopped_text(error, folder.path if folder else None)) from error


def _start(job: "Job", folder: "RunFolder | None", resume: bool) -> None:
    """Run in this process if it is the whole run or one of its ranks; else start the processes."""
    config = job.config
    if not config.pool.spec.is_launched or is_launched():
        _run_here(job, folder, resume)
        return
    from ist.launch.lab_run import launch_on_hosts
    from ist.launch.start import launch
    from ist.storage.run_lock import sole_writer

    assert folder is not None
    with sole_writer(folder.path):  # rank 0 locks the folder once it has started
        if resume:
            folder.check_checkpoint()
    each = "each" if config.pool.ranks_per_worker == 1 else f"each {config.pool.ranks_per_worker}"
    on_links = f", {each} on a link of {config.pool.link}" if config.pool.link else ""
    _say(f"{config.method}: starting {num_processes(config)} processes{on_links}", err=True)
    if config.pool.link is None:
        launch(config, folder.path, resume)
    else:
        launch_on_hosts(config, folder, resume)


def _resume(path: Path, overrides: list[str]) -> None:
    """Resume a run, with changed keys if there are overrides."""
    from ist.runs.preflight import checked_job, resumed_folder, with_pool_of_launcher
    from ist.storage.reopen import refuse_changes
    from ist.storage.run_folder import RunFolder

    folder = RunFolder(path)
    new = load_config(folder.config_path, overrides, is_saved=True)
    config = with_pool_of_launcher(new)
    if config.model.name.startswith(FROM_PYTHON):
        raise ConfigError(
            f"{path}: the run was started from Python: resume it by ist.train(..., run_dir=..., resume=True)"
        )
    refuse_changes(folder.load_config(), new, path)  # on every rank, and before the job is built
    if not folder.is_finished() and not folder.has_checkpoint():
        _say(f"{path}: has no checkpoint: starting from round 1", err=True)
    has_ended = folder.is_finished() and not folder.stopped_early()
    job = checked_job(config) if overrides or not has_ended else None
    if overrides and job is not None and is_rank_zero():
        folder = resumed_folder(job, new, path, overridden_keys(overrides))
        has_ended = folder.is_finished() and not folder.stopped_early()
    if job is None or (has_ended and not is_launched()):
        _say(f"{path}: this run has already finished", err=True)
    else:
        _start(job, folder, resume=True)
    _print_result(folder if is_rank_zero() else None)


def _print_result(folder: "RunFolder | None") -> None:
    if folder is not None and folder.is_finished():
        _print_table([folder])
        _say(f"run folder: {folder.path}")


def _print_table(folders: "list[RunFolder]") -> None:
    from ist.monitoring.display import PlainConsole
    from ist.report.names import run_names
    from ist.report.table import change_texts, end_text, rich_table

    names = run_names(folders)
    PlainConsole().print(rich_table([folder.result() for folder in folders], names))
    for name, folder in zip(names, folders, strict=True):
        for text in change_texts(folder):
            _say(f"{name}: changed {text}")
        if text := end_text(folder.result()):
            _say(f"{name}: {text}")


_KEYS = {
    "workers": "train.workers",
    "pool": "pool.kind",
    "method": "method",
    "address": "pool.ray.address",
    "link": "pool.link",
    "metrics_port": "watch.metrics_port",
    "allow_insecure": "pool.allow_insecure",
}


def _flags(**values: object) -> list[str]:
    """Turn options that set a configuration key into overrides."""
    return [
        f"{_KEYS[name]}={json.dumps(value, ensure_ascii=False)}" for name, value in values.items() if value is not None
    ]
