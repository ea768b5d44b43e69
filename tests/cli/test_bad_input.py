"""Any configuration is either accepted by `ist train`, or ends in error lines, exit code 1 or 2, and leaves no files."""

import copy
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ist.cli import main as cli
from ist.config.base import describe_keys
from ist.config.load import load_config
from ist.config.schema import Config
from ist.config.yaml_text import MAX_BYTES, MAX_DEPTH
from ist.errors import ConfigError, printable
from tests.conftest import ROOT, config_tree, naming

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
LONGEST_S = 10.0  # of processor time, because the machine may be busy

Tree = dict[str, Any]
Try = Callable[..., str]


@pytest.fixture
def attempt(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Try:
    """Run `ist train` on a text, up to the start of processes; check and return its stderr."""
    started: list[Path] = []
    monkeypatch.setattr(cli, "_start", lambda _job, folder, resume: started.append(folder.path))  # noqa: ARG005

    def run(text: str, longest_s: float = LONGEST_S) -> str:
        place = tmp_path_factory.mktemp("attempt")
        monkeypatch.chdir(place)
        path = place / "job.yaml"
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        started.clear()
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["ist", "train", str(path)])
        before_s, code = time.process_time(), 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        seconds, stderr = time.process_time() - before_s, capfd.readouterr().err
        errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert seconds < longest_s
        assert "Traceback" not in stderr
        assert stderr == printable(stderr)
        if started:
            assert (code, errors) == (0, [])
            assert started[0].absolute().is_relative_to(place)
        else:
            assert code in (1, 2)
            assert errors
            assert sorted(place.iterdir()) == [path], "files are left behind"
        return stderr

    return run


LAUGHTER = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
TEXTS = {
    "a number of 5,000 digits": ("seed: " + "9" * 5000, ":1:7:", "5,000 digits", "100"),
    "a tagged number that is none": ("seed: !!int abc", ":1:7:", "'abc'", "whole number"),
    "a tagged boolean that is none": ("seed: !!bool maybe", ":1:7:", "'maybe'", "true or false"),
    "a tagged time": ("seed: !!timestamp nope", ":1:7:", "'!!timestamp'", "YAML 1.2"),
    "a tag on another type": ("seed: !!int [1]", ":1:7:", "'!!int'"),
    "nested brackets": ("[" * 5000, f"{MAX_DEPTH} levels"),
    "nested braces": ("{a: " * 5000, f"{MAX_DEPTH} levels"),
    "aliases of aliases": (LAUGHTER, "50,000 values", "aliases"),
    "a chain of aliases": ("- &a0 []\n" + "".join(f"- &a{n + 1} [*a{n}]\n" for n in range(99)), f"{MAX_DEPTH} levels"),
    "an alias of itself": ("a: &a [*a]", ":1:8:", "alias"),
    "a key twice": ("train: {workers: 2, workers: 3}", ":1:21:", "'workers'", "duplicate"),
    "a merge key": ("a: &a {x: 1}\nb: {<<: *a}", ":2:5:", "<<", "YAML 1.2"),
    "a tab": ("train:\n\tworkers: 2", ":2:1:"),
    "two documents": ("a: 1\n---\nb: 2", "YAML"),
    "a raw NUL": ("name: a\0b", "special characters"),
    "an escaped NUL": ('output: "a\\0b"', ":1:9:", "NUL"),
    "half a surrogate pair": ('label: "\\ud800"', ":1:8:", "surrogate"),
    "a character that does not exist": ('label: "\\U00110000"', "YAML"),
    "a version of many digits": (f"%YAML {'9' * 5000}.1\n---\na: 1", "YAML"),
    "a key that is a number": ("1: 2", "1"),
    "too much": ("#" * MAX_BYTES + "\n", "256 KiB"),
}  # fmt: skip


@pytest.mark.parametrize("case", TEXTS)
def test_a_text_that_is_not_a_configuration_gives_one_error_line(attempt: Try, case: str) -> None:
    text, *parts = TEXTS[case]

    stderr = attempt(text)

    assert re.search(naming(*parts), stderr)
    assert case == "a key that is a number" or stderr.count("error: ") == 1


VALUES: dict[str, tuple[Any, ...]] = {
    "betas of one number": (
        {"train__optimizer": {"name": "Adam", "args": {"betas": [0.9]}}}, "'train.optimizer.args'", "Adam", "IndexError",
    ),
    "an argument that the second step uses": (
        {"train__optimizer": {"name": "SGD", "args": {"lr": 0.1, "momentum": 0.9, "dampening": "x"}}},
        "'train.optimizer.args'", "SGD", "TypeError",
    ),
    "a period of zero": (
        {"train__schedule": {"name": "CosineAnnealingLR", "args": {"T_max": 0}}},
        "'train.schedule.args'", "{'T_max': 0}", "step 1", "CosineAnnealingLR", "ZeroDivisionError",
    ),
    "a step size that is text": (
        {"train__schedule": {"name": "StepLR", "args": {"step_size": "x"}}}, "'train.schedule.args'", "StepLR", "TypeError",
    ),
    "a schedule's hidden argument": (
        {"train__schedule": {"name": "StepLR", "args": {"step_size": 1, "last_epoch": 5}}},
        "'train.schedule.args'", "StepLR", "KeyError",
    ),
    "a model that cannot be called": ({"model__name": "os:sep"}, "'model.name' is 'os:sep'", "str", "function"),
    "a loss that cannot be called": ({"train__loss": "os:sep"}, "'train.loss' is 'os:sep'", "str", "function"),
    "a data set that cannot be called": ({"data": {"name": "os:sep"}}, "'data.name' is 'os:sep'", "str", "function"),
    "a method that cannot be called": ({"method": "os:sep"}, "'method' is 'os:sep'", "str"),
    "a relative name": ({"model__name": "..:x"}, "'model.name' is '..:x'", "'package.module:Name'"),
    "a model that exits": ({"model__name": "sys:exit", "model__args": {}}, "'model.args'", "exit", "SystemExit"),
    "an invalid host name": (
        {"watch": {"metrics_port": 0, "metrics_host": "a..b"}}, "'watch.metrics_host' is 'a..b'", "host",
    ),
    "too many threads": ({"pool__threads": 10**11}, "'pool.threads' is 100000000000"),
    "far too many rounds": ({"train__rounds": 10**12}, "'train.rounds' is 1000000000000"),
    "more rounds than are planned": ({"train__rounds": 10**9}, "1,000,000 rounds"),
    "a long schedule": (
        {"train__rounds": 10**6, "train__local_steps": 10**6, "train__schedule": {"name": "ConstantLR", "args": {}}},
        "'train.schedule'", "3,000,000",
    ),
    "a long stage with another rate": (
        {"train__rounds": 10**6, "train__local_steps": 10**6, "recipe": {"stages": [{"lr_scale": 2.0}]}},
        "'lr_scale'", "3,000,000",
    ),
    "an endless timeout": ({"pool__timeout_s": 1e300}, "'pool.timeout_s' is 1e+300"),
    "too much memory": ({"pool": {"kind": "torchrun", "memory_limit": "9" * 30 + "GB"}}, "'pool.memory_limit' is '999"),
    "a long name": ({"name": "a" * 300}, "'name' is 'aaa"),
    "terminal control sequences": ({"model__name": "\x1b[31mred"}, "'model.name' is 'red'"),
}  # fmt: skip


@pytest.mark.parametrize("case", VALUES)
def test_an_unusable_value_gives_one_error_line(attempt: Try, case: str) -> None:
    changes, *parts = VALUES[case]

    stderr = attempt(yaml.safe_dump(config_tree(**changes)))

    assert re.search(naming(*parts), stderr)
    assert stderr.count("error: ") == 1


USERS = """
import sys

def fails(*args, **kwargs): return {}["missing"]
def leaves(*args, **kwargs): sys.exit(3)
def dataset(root): assert root is not None, "no root\\nat all"
def __getattr__(name):
    if name == "lazy": raise OSError("not built")
    raise AttributeError(name)
"""
NAMED = {
    "model.name": ("fails", "'model.args'", "fails", "KeyError: 'missing'", "theirs.py, line 4"),
    "data.name": ("dataset", "'data.args'", "dataset", "AssertionError: no root", "theirs.py, line 6"),
    "train.loss": ("fails", "batch of 15", "KeyError"),
    "method": ("lazy", "'method' is 'theirs:lazy'", "OSError: not built"),
    "evaluate.metric": ("fails", "'evaluate.metric' is 'theirs:fails'", "function"),
    "train.optimizer.name": ("leaves", "'train.optimizer.name' is 'theirs:leaves'", "torch.optim.Optimizer"),
    "train.schedule.name": ("leaves", "'train.schedule.name' is 'theirs:leaves'", "LRScheduler"),
}


@pytest.mark.parametrize("key", NAMED)
def test_an_error_in_a_named_function_gives_one_line_with_its_position(
    attempt: Try, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "theirs", raising=False)
    name, *parts = NAMED[key]
    args = {"model__args": {}} if key == "model.name" else {}

    stderr = attempt(yaml.safe_dump(config_tree(**args, **{key.replace(".", "__"): f"theirs:{name}"})))

    assert re.search(naming(*parts), stderr)
    assert stderr.count("error: ") == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import sys; sys.exit('bye')", "SystemExit: bye (broken.py, line 1)"),
        ("1 / 0", "ZeroDivisionError: division by zero (broken.py, line 1)"),
        ("def (", "SyntaxError"),
        ("raise ImportError", "import"),
    ],
)
def test_a_module_that_cannot_be_imported_gives_one_error_line(
    attempt: Try, body: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)

    stderr = attempt(yaml.safe_dump(config_tree(model__name="broken:Net")))

    assert re.search(naming("'model.name' is 'broken:Net'", message), stderr)
    assert stderr.count("error: ") == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "folder"),
        (lambda path: os.mkfifo(path), "not a file"),
        (lambda path: path.write_bytes(b"name: \xff"), "UTF-8"),
        (lambda path: path.write_text("#" * MAX_BYTES + "#"), "256 KiB"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    ],
    ids=["folder", "pipe", "binary", "huge", "loop"],
)
@pytest.mark.parametrize(
    "command", [["train"], ["compare"], ["inspect"], ["plan", "--link", "1gbit"]], ids=lambda c: c[0]
)
def test_every_command_refuses_a_configuration_that_is_not_a_text_file(
    command: list[str],
    make: Callable[[Path], Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "job.yaml"
    make(path)
    monkeypatch.setattr(sys, "argv", ["ist", *command, str(path)])

    with pytest.raises(SystemExit) as stop:
        cli.main()

    stderr = capfd.readouterr().err
    assert stop.value.code == 2
    assert stderr.count("error: ") == 1
    assert re.search(naming(f"error: {path}: ", message), stderr)


def test_control_sequences_are_not_printed() -> None:
    text = "a\x1b[31mb\x1b]0;title\x07c\x1bcd\x00\x08\x7f\x9b1m\u202ee\tf\n\udc80"

    assert printable(text) == "abcd1me\tf\n?"
    assert printable("Grüße, 世界 😀") == "Grüße, 世界 😀"


LINES: dict[str, tuple[Any, ...]] = {
    "a key of many parts": (["inspect", "JOB", "--set", ".".join("a" * 3000) + "=1"], "3000 parts", str(MAX_DEPTH)),
    "a value of many digits": (["inspect", "JOB", "--set", f"seed={'9' * 5000}"], "5,000 digits"),
    "a value that is not UTF-8": (["inspect", "JOB", "--set", "label=\udcff"], "special characters"),
    "a number of workers of many digits": (["plan", "JOB", "--link", "1gbit", "--workers", "9" * 5000], "--workers"),
    "a link with control sequences": (["plan", "JOB", "--link", "\x1b[31m"], "'100mbit'"),
    "methods without a name": (["plan", "JOB", "--link", "1gbit", "--methods", ","], "''"),
    "a path that is too long to resume": (["train", "--resume", "x" * 5000], "File name too long"),
    "a path that is too long to report": (["report", "x" * 5000], "File name too long"),
    "a path that is not UTF-8": (["report", "\udcff"], "error: ?: ", "run folder"),
    "an unknown experiment": (["theory", "[/b]"], "'[/b]'", "experiment"),
    "a knob's value that is not YAML": (["theory", "bias", "--set", "n=!!int z"], "'z'", "whole number"),
    "a knob's value that is too deep": (["theory", "bias", "--set", "n=" + "[" * 5000], f"{MAX_DEPTH} levels"),
}  # fmt: skip


@pytest.mark.parametrize("case", LINES)
def test_unusable_arguments_give_one_short_error_line(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments, *parts = LINES[case]
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(config_tree()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ist", *(str(path) if word == "JOB" else word for word in arguments)])

    with pytest.raises(SystemExit) as stop:
        cli.main()

    stderr = capfd.readouterr().err
    assert stop.value.code in (1, 2)
    assert stderr.count("error: ") == 1
    assert re.search(naming(*parts), stderr)
    assert stderr == printable(stderr)
    assert len(stderr) < 6000
    assert [*tmp_path.iterdir()] == [path]


LABELS = ["[/bold]", r"$\frac$", "_hidden", "\x1b[31mred", ":smile: [bold]", "a$b$", "<b>&"]


def test_labels_are_shown_as_they_are_in_tables_and_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    record = {"round": 0, "loss": 1.0, "test_loss": 1.0, "metric": "[/bold] $x", "[/bold] $x": 0.5, "sent_bytes": 10}
    seconds = ("train_s", "virtual_s", "compute_s", "exchange_s", "cut_s", "merge_s", "idle_s", "evaluate_s")
    record |= dict.fromkeys(seconds, 1.0) | {"samples": 10, "workers": 4, "memory_bytes": 3}
    for number, label in enumerate(LABELS):
        folder = tmp_path / f"run-{number}"
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump(config_tree(label=label)))
        (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        metrics = {"metrics": {"[/bold] $x": 0.5}, "parameters": 7, "rounds": 1, "seed": 0, "name": "small"}
        (folder / "result.json").write_text(json.dumps({**record, **metrics, "method": "ist", "label": label}))
    monkeypatch.setattr(sys, "argv", ["ist", "report", str(tmp_path)])
    monkeypatch.setenv("COLUMNS", "300")

    with pytest.raises(SystemExit) as stop:
        cli.main()

    out, page = capfd.readouterr().out, (tmp_path / "report.html").read_text()
    assert stop.value.code == 0
    assert out == printable(out)
    for shown in ("[/bold]", r"$\frac$", "_hidden", " red ", ":smile: [bold]", "a$b$", "<b>&"):
        assert shown in out
    assert "<td>&lt;b&gt;&amp;</td>" in page
    assert page.count("<svg") == 5


ODD: list[Any] = [
    None, True, 0, -1, 1, 2, 0.5, 1e-300, 1e300, float("inf"), float("nan"), "", "x", "os:sep", "..:x", "sys:exit",
    "torch.nn:Linear", "a\nb", "[/bold]", r"$\frac$", "\x1b[31m", "total_steps", "nowhere/x", "9" * 300, "é😀",
    [], [0.9], [1, 2], ["x"], {}, {"name": "x"}, {"x": 1}, {"a": {"b": [1]}}, {"min": 1, "max": 2},
]  # fmt: skip
TEXT = st.text(st.characters(exclude_characters="/."), max_size=3)  # not a folder elsewhere
HUGE = [10**9, 10**12, 10**30]  # not as arguments of a network, which may take any time to build
SNIPPETS = [
    "[", "{", "]", "}", ":", "- ", "\t", "\n", "&a ", "*a", "!!int ", "!!timestamp ", "!x ", "<<: ", "'", '"', "|", "%", "#", "?",
    "\0", "\x1b[31m", "\ud800", "[" * 100, "{a: " * 100, "9" * 5000, "0x", "1e", ".inf", "~", "---\n", "...\n", "\ufeff",
]  # fmt: skip


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in inside:
        yield (*path, key)
        yield from places(value, (*path, key))


@st.composite
def mutated_trees(draw: st.DrawFn, trees: Sequence[Tree]) -> Tree:
    """A configuration with one or two keys changed, renamed, removed or added."""
    tree = copy.deepcopy(draw(st.sampled_from(trees)))
    for _ in range(draw(st.integers(1, 2))):
        *parents, last = draw(st.sampled_from(list(places(tree))))
        node: Any = tree
        for parent in parents:
            node = node[parent]
        values = ODD if "args" in parents else ODD + HUGE
        # A copy, because the second change may be inside it.
        value = copy.deepcopy(draw(st.sampled_from(values) | st.integers(-3, 3) | st.floats(-2, 2) | TEXT))
        kind = draw(st.sampled_from(["value", "value", "value", "key", "gone", "new"]))
        if kind in ("key", "gone") or kind == "new":
            moved = node.pop(last) if kind in ("key", "gone") else value
            if isinstance(node, dict) and kind != "gone":
                node[draw(st.sampled_from(KEYS) | TEXT)] = moved
        else:
            node[last] = value
        if not tree:
            break
    return tree


KEYS = sorted({part for key, *_ in describe_keys(Config) for part in key.split(".")})


def as_yaml(tree: Tree) -> str:
    return yaml.safe_dump(tree, allow_unicode=True)


@st.composite
def mutated_texts(draw: st.DrawFn, texts: Sequence[str]) -> str:
    """The text of a configuration with a part inserted or removed."""
    text = draw(st.sampled_from(texts))
    first = draw(st.integers(0, len(text)))
    last = min(len(text), first + draw(st.integers(0, 20)))
    return text[:first] + draw(st.sampled_from([*SNIPPETS, ""]) | st.text(max_size=3)) + text[last:]


def read_or_refused(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    before_s = time.process_time()
    message = ""
    try:
        load_config(path)
    except ConfigError as error:
        message = str(error)
    assert time.process_time() - before_s < LONGEST_S
    assert all(line.startswith(str(path)) for line in message.splitlines())


SHIPPED = [path.read_text() for path in CONFIGS]
TREES: list[Tree] = [yaml.safe_load(text) for text in SHIPPED]
FEW = settings(
    max_examples=150, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
MANY = settings(FEW, max_examples=1500)


@FEW
@given(tree=mutated_trees(TREES))
def test_every_configuration_with_other_values_is_read_or_refused_line_by_line(tmp_path: Path, tree: Tree) -> None:
    read_or_refused(tmp_path / "job.yaml", as_yaml(tree))


@FEW
@given(text=mutated_texts(SHIPPED))
def test_every_configuration_with_another_text_is_read_or_refused_line_by_line(tmp_path: Path, text: str) -> None:
    read_or_refused(tmp_path / "job.yaml", text)


@settings(FEW, max_examples=25)
@given(tree=mutated_trees([config_tree()]))
def test_a_job_with_other_values_starts_or_leaves_nothing(attempt: Try, tree: Tree) -> None:
    attempt(as_yaml(tree))


@pytest.mark.system
@pytest.mark.timeout(1200)
@MANY
@given(tree=mutated_trees(TREES), text=mutated_texts(SHIPPED))
def test_many_configurations_are_read_or_refused_line_by_line(tmp_path: Path, tree: Tree, text: str) -> None:
    read_or_refused(tmp_path / "job.yaml", as_yaml(tree))
    read_or_refused(tmp_path / "job.yaml", text)


@pytest.mark.system
@pytest.mark.timeout(1200)
@settings(MANY, max_examples=100)
@given(tree=mutated_trees([tree for tree in TREES if tree["data"]["name"] in ("digits", "text", "fashion_mnist")]))
def test_many_jobs_start_or_leave_nothing(attempt: Try, tree: Tree) -> None:
    attempt(as_yaml(tree), longest_s=60)
