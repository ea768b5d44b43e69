"""The callbacks that every run may have, display, TensorBoard and Prometheus, receive the same numbers."""

import contextlib
import errno
import json
import re
import select
import socket
import struct
import sys
import threading
import time
import types
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

import ist.monitoring.observers
from ist.errors import ConfigError, PoolError, RunFolderError
from ist.evaluation.evaluate import Metrics
from ist.loops.part import completed
from ist.monitoring import metrics_server
from ist.monitoring.callback import Callback, RunStart
from ist.monitoring.display import Display
from ist.monitoring.exporters import Prometheus, TensorBoard, families, scalars
from ist.monitoring.meter import MemoryGauge, Meter
from ist.monitoring.observers import check_callbacks, make_callbacks, run_start, started
from ist.runs.build import build_job
from ist.runs.open import CoordinatorPart, open_run
from ist.runs.recorder import RunRecorder
from ist.storage.checkpoint import Progress
from ist.storage.run_folder import create_run_folder
from ist.subnet.job import Job
from ist.training.rounds import RoundReport, Seconds, run_rounds
from ist.transport.interfaces import Lost
from tests import conftest
from tests.conftest import ROOT, job_for, naming, small_config, wait_for
from tests.networks import NETWORKS, seeded

LOST, LATE, BAD = Lost(1, "the actor died"), Lost(2, "missed 5 s", "late"), Lost(3, "a loss of nan", "rejected")


def report(*lost: Lost, workers: int = 4) -> RoundReport:
    by_worker = [conftest.worker_numbers(steps=3, samples=64, memory_bytes=peak) for peak in (100, 300, 200)]
    return RoundReport(conftest.round_numbers(by_worker, workers=workers, loss=0.5), by_worker, lost)


@pytest.fixture(scope="module")
def job() -> Job:
    return job_for(seeded(NETWORKS["no batch norm"]))


def start(num_rounds: int = 100, first_round: int = 0, history: Any = (), run_dir: Path | None = None) -> RunStart:
    config = small_config().model_dump()
    return RunStart("run", config, run_dir, num_rounds, first_round, 10, 10, ("loss", "test_loss"), history)


def displayed(progress: Any = True) -> Display:
    display = Display(progress)
    display.on_start(start())
    return display


def exporter_for(num_rounds: int = 4, first_round: int = 0, history: Any = ()) -> Prometheus:
    """An exporter whose server is already closed."""
    exporter = Prometheus("127.0.0.1", 0)
    exporter.on_start(start(num_rounds, first_round, history))
    exporter.close()
    return exporter


def board_in(folder: Path, first_round: int = 0) -> TensorBoard:
    board = TensorBoard()
    board.on_start(start(first_round=first_round, run_dir=folder))
    return board


def recorder_for(job: Job, *callbacks: Callback, before: Progress | None = None, folder: Any = None) -> RunRecorder:
    return RunRecorder(job, folder, callbacks, before or Progress(), Meter(), MemoryGauge(torch.device("cpu")))


def a_record(*lost: Lost, round_number: int = 0, **changes: Any) -> dict[str, Any]:
    record = conftest.a_record(round_number)
    if lost:
        record["lost"] = [{"worker": fault.worker, "kind": fault.kind, "reason": fault.reason} for fault in lost]
    return record | changes


# Records


def test_a_record_lists_the_workers_that_were_left_out_with_reasons(job: Job) -> None:
    recorder = recorder_for(job)

    for number, lost in enumerate([(), (LOST, LATE), (BAD, LATE)]):
        recorder.round_done(number, report(*lost), None, Seconds(1.0, 0.0), 10)

    assert [record["workers"] for record in recorder.history] == [4, 4, 4]
    assert "lost" not in recorder.history[0]
    assert recorder.history[1]["lost"] == [
        {"worker": 1, "kind": "lost", "reason": "the actor died"},
        {"worker": 2, "kind": "late", "reason": "missed 5 s"},
    ]
    assert recorder.result()["faults"] == {"lost": 1, "late": 2, "rejected": 1}


def test_the_totals_of_a_run_survive_the_loss_of_its_records(job: Job, tmp_path: Path) -> None:
    folder = create_run_folder(small_config(), tmp_path / "run")
    first = recorder_for(job, folder=folder)
    first.round_done(0, report(LOST, LATE), Metrics(0.3, {"accuracy": 0.9}), Seconds(1.0, 0.5), 10)
    first.round_done(1, report(), Metrics(0.4, {"accuracy": 0.8}), Seconds(1.0, 0.5), 20)
    first.save(2, {"weight": torch.zeros(2)})
    (folder.path / "metrics.jsonl").unlink()

    _, before = folder.rewind()
    second = recorder_for(job, before=before, folder=folder)
    assert second.result() == first.result()
    second.round_done(2, report(LATE), Metrics(0.2, {"accuracy": 0.85}), Seconds(1.0, 0.5), 5)

    expected = {
        "rounds": 3, "faults": {"lost": 1, "late": 2, "rejected": 0}, "accuracy": 0.85, "best_accuracy": 0.9,
        "test_loss": 0.2, "sent_bytes": 25, "samples": 3 * 192, "train_s": 3.0,
    }  # fmt: skip
    assert {key: second.result()[key] for key in expected} == expected


# The display


def test_the_display_names_the_first_workers_that_were_left_out_and_counts_the_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    display = displayed()

    display.on_round(a_record(LOST, LATE, round_number=6))
    for number in range(7, 20):
        display.on_round(a_record(LATE, BAD, round_number=number))
    display.close()

    lines = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    expected = [
        ("ist: round 7: ", "worker 1", "lost", "the actor died"),
        ("ist: round 7: ", "worker 2", "late", "missed 5 s"),
        ("ist: ", "26"),
    ]
    assert len(lines) == len(expected)
    assert all(re.match(naming(*parts), line) for parts, line in zip(expected, lines, strict=True))


def test_the_display_names_the_round_of_a_metric_from_an_earlier_round(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ist.monitoring.display._LINE_EVERY_S", 0.0)
    display = displayed()

    for number, accuracy in enumerate([None, 0.875, None, 0.9]):
        display.on_round(a_record(round_number=number, accuracy=accuracy))

    shown = [
        line.partition("loss 0.5000")[2].partition("  sent")[0].strip() for line in capsys.readouterr().err.splitlines()
    ]
    assert shown == ["", "accuracy 87.50%", "accuracy 87.50% (round 2)", "accuracy 90.00%"]


def test_the_display_shows_the_number_of_workers_if_it_differs_from_the_configured_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for workers in (4, 3):
        displayed().on_round(a_record(workers=workers))

    first, second = capsys.readouterr().err.splitlines()
    assert "workers" not in first
    assert "3 of 4 workers" in second


def test_a_terminal_shows_faults_above_the_bar_literally(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    display = displayed()

    display.on_round(a_record(Lost(1, "gone [bold]\nand more"), workers=3))
    display.close()

    shown = capsys.readouterr().err
    assert re.search(naming("worker 1", "lost", "gone [bold]"), shown)
    assert "and more" not in shown
    assert "3 of 4 workers" in shown


def test_a_disabled_display_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    display = displayed(False)
    display.on_round(a_record(LOST))
    display.close()

    assert capsys.readouterr().err == ""


# Checks before a run


@pytest.mark.parametrize(
    ("watch", "package", "key"),
    [
        ({"tensorboard": True}, "tensorboard", "'watch.tensorboard' is true"),
        ({"metrics_port": 0}, "prometheus_client", "'watch.metrics_port' is 0"),
    ],
)
def test_a_missing_package_ends_the_run_before_it_starts(
    watch: dict[str, Any], package: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ist.monitoring.observers, "find_spec", lambda name: None if name == package else object())

    with pytest.raises(ConfigError, match=naming(key, package, "pip install 'ist[watch]'")):
        check_callbacks(small_config(watch=watch))

    check_callbacks(small_config())


def test_a_package_that_cannot_be_imported_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)

    with pytest.raises(ConfigError, match=naming("'watch.tensorboard'", "TensorBoard", "pip install 'ist[watch]'")):
        board_in(tmp_path)
    with pytest.raises(
        ConfigError, match=naming("'watch.metrics_port'", "prometheus_client", "pip install 'ist[watch]'")
    ):
        exporter_for()


def test_event_files_need_a_folder() -> None:
    with pytest.raises(ConfigError, match=naming("'watch.tensorboard' is true", "run_dir")):
        TensorBoard().on_start(start())


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_port_in_use_is_named_with_its_key(taken: int) -> None:
    config = small_config(watch={"metrics_port": taken})
    message = naming(f"'watch.metrics_port' is {taken}", "0 for a free one")

    with pytest.raises(PoolError, match=message):
        check_callbacks(config)
    with pytest.raises(PoolError, match=message):
        Prometheus("127.0.0.1", taken).on_start(start())


def test_a_rank_that_does_not_record_does_not_check_the_port(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")

    check_callbacks(small_config(watch={"metrics_port": taken}))


def test_an_address_of_another_machine_is_named_with_its_key() -> None:
    with pytest.raises(ConfigError, match=naming("'watch.metrics_host' is '192.0.2.1'", "0.0.0.0")):
        check_callbacks(small_config(watch={"metrics_port": 0, "metrics_host": "192.0.2.1"}))


def test_only_the_exporters_import_their_packages_and_are_imported_only_if_configured() -> None:
    packages = r"^(from|import) (\S*tensorboard|prometheus_client|fsspec|tqdm|wandb|mlflow)\b"
    for path in (ROOT / "ist").rglob("*.py"):
        assert not re.search(packages, path.read_text(), re.MULTILINE), path


# Prometheus


def test_clients_that_are_slow_disconnect_or_send_too_much_do_not_block_the_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics_server, "_REQUEST_S", 1.0)

    def application(_: Any, start: Any) -> list[bytes]:
        start("200 OK", [])
        return [b"here"]

    server, thread = metrics_server.start_server(application, "127.0.0.1", 0)
    where = ("127.0.0.1", server.server_port)

    def asked() -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{where[1]}/metrics", timeout=5) as answer:
            return bytes(answer.read())

    def connected() -> socket.socket:
        time.sleep(0.01)  # lets the server accept: if its backlog is full, a client retries only after seconds
        return stack.enter_context(socket.create_connection(where, timeout=5))

    with contextlib.ExitStack() as stack:
        slow = [connected() for _ in range(10)]
        for number, client in enumerate(slow):
            client.sendall(b"GET /metrics HTTP/1.1\r\nX: " if number else b"G")  # and never the remainder
        huge = connected()
        huge.sendall(b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n")
        refused = huge.recv(100)
        with socket.create_connection(where) as gone:
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # disconnect by a reset
            gone.sendall(b"GET /metrics HTTP/1.1\r\n")
        meanwhile = asked()
        ends = [client.recv(1) for client in slow]
        many = [connected() for _ in range(40)]
        # No client gets an answer, so a readable connection is a closed one.
        wait_for(lambda: len(select.select(many, [], [], 1)[0]) >= 40 - 16, 5, "most of many connections to be closed")
        ended = [client.recv(1) for client in select.select(many, [], [], 0)[0]]
    server.shutdown()
    server.server_close()
    thread.join()

    assert meanwhile == b"here"
    assert b"414" in refused
    assert set(ends) == {b""}
    assert set(ended) == {b""}
    assert capsys.readouterr() == ("", "")


Samples = dict[tuple[str, ...], float]


def samples_of(text: str) -> Samples:
    """(Name, label values) -> value, for all exported metrics."""
    families = text_string_to_metric_families(text)
    return {(sample.name, *sample.labels.values()): sample.value for f in families for sample in f.samples}


def scraped(url: str) -> Samples:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return samples_of(answer.read().decode())


def collected(exporter: Prometheus) -> Samples:
    from prometheus_client import generate_latest

    return samples_of(generate_latest(exporter.registry).decode())


def test_a_run_serves_its_metrics_until_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = create_run_folder(small_config(watch={"metrics_port": 0}), tmp_path / "run")
    with open_run(build_job(folder.load_config()), folder, resume=False, progress=False) as part:
        assert isinstance(part, CoordinatorPart)
        found = re.search(r"metrics: (http://127.0.0.1:\d+/metrics)", capsys.readouterr().err)
        assert found
        before = scraped(found[1])
        completed(run_rounds(part.job, part.method, part.recorder, part.first_round, part.device))
        after = scraped(found[1])
        last = part.recorder.history[-1]

    assert before["ist_rounds_total",] == 0
    assert before["ist_rounds_planned",] == after["ist_rounds_planned",] == after["ist_rounds_total",] == 4
    assert after["ist_checkpoint_rounds",] == 4
    assert after["ist_train_loss",] == last["loss"]
    assert after["ist_test_accuracy",] == after["ist_test_metric", "accuracy"] == last["accuracy"]
    directions = after["ist_bytes_total", "to_workers"], after["ist_bytes_total", "from_workers"]
    assert min(directions) > 0
    assert sum(directions) == last["sent_bytes"]
    assert after["ist_phase_seconds_total", "evaluate"] == last["evaluate_s"]
    with pytest.raises(OSError, match="refused"):
        scraped(found[1])


def test_metrics_count_faults_and_live_workers() -> None:
    exporter = exporter_for()

    exporter.on_round(a_record(LOST, LATE))
    exporter.on_round(a_record(BAD, LATE, round_number=1))

    found = collected(exporter)
    assert [found["ist_faults_total", kind] for kind in ("lost", "late", "rejected")] == [1, 2, 1]
    assert found["ist_workers",] == found["ist_workers_alive",] == found["ist_workers_configured",] == 4
    assert found["ist_memory_peak_bytes", "worker"] == 300
    exporter.on_round(a_record(LOST, round_number=2))
    assert collected(exporter)["ist_workers_alive",] == 3


def test_counters_of_a_resumed_run_continue() -> None:
    whole = exporter_for(9)
    history = [a_record(LATE, round_number=number) for number in range(3)]
    for record in history:
        whole.on_round(record)
    resumed = exporter_for(9, 2, history[:2])
    resumed.on_round(history[2])

    expected, found = collected(whole), collected(resumed)
    for changing in ("ist_last_round_timestamp_seconds", "ist_checkpoint_rounds"):
        expected.pop((changing,), None), found.pop((changing,), None)
    assert found == expected


def test_all_metrics_are_named_by_the_conventions() -> None:
    for family in families():
        assert re.fullmatch(r"ist_[a-z_]+", family.name)
        assert not family.name.endswith("_total")
        assert family.help.endswith(".")


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    exporter = exporter_for(history=[a_record(LOST)])
    exporter.on_round(a_record(round_number=1))
    exporter.on_checkpoint(2)
    exported = {name for name, *_ in collected(exporter)}

    dashboard = json.loads((ROOT / "docker" / "grafana-dashboard.json").read_text())

    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert {name for query in queries for name in re.findall(r"ist_\w+", query)} == exported
    assert variables["datasource"]["type"] == "datasource"
    assert variables["run"]["definition"] == "label_values(ist_run_info, run)"
    assert all(
        target["datasource"]["uid"] == "${datasource}" for panel in dashboard["panels"] for target in panel["targets"]
    )
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    labels = {f"{{{{{family.label}}}}}" for family in families() if family.label}
    legends = " ".join(target["legendFormat"] for panel in dashboard["panels"] for target in panel["targets"])
    assert labels <= set(re.findall(r"{{\w+}}", legends))


# TensorBoard


class FakeWriter:
    made: ClassVar[dict[str, Any]] = {}

    def __init__(self, folder: str, **options: Any) -> None:
        type(self).made = {"folder": folder, **options, "scalars": []}

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.made["scalars"].append((name, value, step))

    def flush(self) -> None:
        raise OSError(28, "No space left on device")

    def close(self) -> None:
        self.made["closed"] = True


def test_event_files_get_every_number_and_continue_where_the_run_does(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        sys.modules,
        "torch.utils.tensorboard",
        types.SimpleNamespace(SummaryWriter=FakeWriter),  # type: ignore[arg-type]
    )
    folder = create_run_folder(small_config(watch={"tensorboard": True}), tmp_path / "run")

    board, display = callbacks = make_callbacks(folder.load_config())
    assert isinstance(display, Display)
    with started(callbacks, run_start(folder.load_config(), job, folder, 5)):
        board.on_round(a_record(LATE, round_number=5))
        with pytest.raises(RunFolderError, match=naming("run/tensorboard: ", "No space left on device")):
            board.on_checkpoint(6)

    made = FakeWriter.made
    assert made["folder"] == str(folder.path / "tensorboard")
    assert made["purge_step"] == 5
    assert made["closed"]
    assert {("loss/train", 0.5, 5), ("accuracy/test", 0.875, 5), ("workers/late", 1, 5)} <= set(made["scalars"])
    assert "accuracy/test" not in scalars(a_record(accuracy=None))
    several = scalars(a_record(metric="precision_at_1", precision_at_1=0.5, precision_at_3=0.75, accuracy=None))
    assert (several["precision_at_1/test"], several["precision_at_3/test"]) == (0.5, 0.75)
    assert scalars(a_record(perplexity=9.0)).keys() - scalars(a_record()).keys() == {"perplexity/test"}


@pytest.mark.system
@pytest.mark.filterwarnings("default")  # TensorBoard's own
def test_tensorboard_shows_no_round_of_a_resumed_run_twice(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last in ((0, 7), (4, 6), (4, 10)):
        board = board_in(tmp_path, first)
        for number in range(first, last):
            board.on_round(a_record(round_number=number, loss=first + number / 100))
        board.on_checkpoint(last)
        board.close()

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = [(event.step, round(event.value, 2)) for event in events.Scalars("loss/train")]
    assert shown == [(number, round((0 if number < 4 else 4) + number / 100, 2)) for number in range(10)]
    assert events.Tags()["scalars"] == [*scalars(a_record()), "checkpoint/rounds"]


def test_a_full_disk_is_reported_once_and_not_by_the_thread_that_writes_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = threading.excepthook
    seen: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    board = board_in(tmp_path)
    events: Any = board._writer.file_writer
    thread = events.event_writer._async_writer._worker

    def full(_: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(events.event_writer._async_writer._writer, "write", full)
    with contextlib.suppress(RunFolderError):  # the thread may fail during this call
        board.on_round(conftest.a_record(0))
    thread.join(5)
    assert seen == []
    with pytest.raises(RunFolderError, match=naming(f"{tmp_path}/tensorboard: ", "No space left on device")):
        board.on_round(conftest.a_record(1))

    other = threading.Thread(target=full, args=(b"",))
    other.start()
    other.join()
    assert len(seen) == 1  # errors in other threads are still reported
    with contextlib.suppress(RunFolderError):
        board.close()
    assert threading.excepthook == seen.append
    monkeypatch.undo()
    assert threading.excepthook == hook
