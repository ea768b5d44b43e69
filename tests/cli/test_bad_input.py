"""Whatever a configuration holds, `ist train` accepts it or ends with one kind of line, exit code 2, and no folder."""

import copy
import json
import os
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
from tests.conftest import ROOT, config_tree

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
LONGEST_S = 10.0  # of processor time: others may use this machine

Tree = dict[str, Any]
Try = Callable[..., str]


@pytest.fixture
def attempt(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Try:
    """Give `ist train` a text, up to where processes start; return what it says, once that is checked."""
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
        begun, code = time.process_time(), 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        seconds, said = time.process_time() - begun, capfd.readouterr().err
        told = [line for line in said.splitlines() if line.startswith("error: ")]
        assert seconds < longest_s
        assert "Traceback" not in said
        assert said == printable(said)
        if started:
            assert (code, told) == (0, [])
            assert started[0].absolute().is_relative_to(place)
        else:
            assert code in (1, 2)
            assert told
            assert sorted(place.iterdir()) == [path], "something is left"
        return said

    return run


LAUGHTER = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
TEXTS = {
    "a number of 5,000 digits": ("seed: " + "9" * 5000, "a number of 5,000 digits: at most 100"),
    "a tagged number that is none": ("seed: !!int abc", "'abc' is not a whole number"),
    "a tagged boolean that is none": ("seed: !!bool maybe", "'maybe' is not true or false"),
    "a tagged time": ("seed: !!timestamp nope", "tag '!!timestamp' is not of YAML 1.2's core"),
    "a tag on something else": ("seed: !!int [1]", "tag '!!int' does not fit here"),
    "nested brackets": ("[" * 5000, f"more than {MAX_DEPTH} levels"),
    "nested braces": ("{a: " * 5000, f"more than {MAX_DEPTH} levels"),
    "aliases of aliases": (LAUGHTER, "more than 50,000 values, aliases written out"),
    "a chain of aliases": ("- &a0 []\n" + "".join(f"- &a{n + 1} [*a{n}]\n" for n in range(99)), f"more than {MAX_DEPTH} levels"),
    "an alias of itself": ("a: &a [*a]", "an alias inside the value that it stands for"),
    "a key twice": ("train: {workers: 2, workers: 3}", "key 'workers' stands twice"),
    "a merge key": ("a: &a {x: 1}\nb: {<<: *a}", "merge keys (<<) are not YAML 1.2"),
    "a tab": ("train:\n\tworkers: 2", "cannot start any token"),
    "two documents": ("a: 1\n---\nb: 2", "not valid YAML"),
    "a raw NUL": ("name: a\0b", "special characters are not allowed"),
    "an escaped NUL": ('output: "a\\0b"', "a NUL or half a surrogate pair"),
    "half a surrogate pair": ('label: "\\ud800"', "a NUL or half a surrogate pair"),
    "a character that does not exist": ('label: "\\U00110000"', "not valid YAML"),
    "a version of many digits": (f"%YAML {'9' * 5000}.1\n---\na: 1", "not valid YAML"),
    "a key that is a number": ("1: 2", "1"),
    "too much": ("#" * MAX_BYTES + "\n", "holds more than 256 KiB"),
}  # fmt: skip


@pytest.mark.parametrize("case", TEXTS)
def test_a_text_that_is_no_configuration_is_one_line(attempt: Try, case: str) -> None:
    text, message = TEXTS[case]

    said = attempt(text)

    assert message in said
    assert case == "a key that is a number" or said.count("error: ") == 1


VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "betas of one number": (
        {"train__optimizer": {"name": "Adam", "args": {"betas": [0.9]}}}, "'train.optimizer.args': Adam raises IndexError",
    ),
    "an argument that the second step uses": (
        {"train__optimizer": {"name": "SGD", "args": {"lr": 0.1, "momentum": 0.9, "dampening": "x"}}},
        "a step of SGD raises TypeError",
    ),
    "a period of nothing": (
        {"train__schedule": {"name": "CosineAnnealingLR", "args": {"T_max": 0}}},
        "'train.schedule.args' {'T_max': 0}: step 1 of CosineAnnealingLR raises ZeroDivisionError",
    ),
    "a step size that is text": (
        {"train__schedule": {"name": "StepLR", "args": {"step_size": "x"}}}, "of StepLR raises TypeError",
    ),
    "a schedule's hidden argument": (
        {"train__schedule": {"name": "StepLR", "args": {"step_size": 1, "last_epoch": 5}}}, "StepLR raises KeyError",
    ),
    "a name of something that is not called": ({"model__name": "os:sep"}, "'model.name' is 'os:sep', which is a str"),
    "a loss that is not called": ({"train__loss": "os:sep"}, "'train.loss' is 'os:sep', which is a str"),
    "a data set that is not called": ({"data": {"name": "os:sep"}}, "'data.name' is 'os:sep', which is a str"),
    "a method that is not called": ({"method": "os:sep"}, "'method' is 'os:sep', which is a str"),
    "a relative name": ({"model__name": "..:x"}, "'model.name' is '..:x': expected 'package.module:Name'"),
    "a model that exits": ({"model__name": "sys:exit", "model__args": {}}, "'model.args': exit raises SystemExit"),
    "a host that is no name": (
        {"watch": {"metrics_port": 0, "metrics_host": "a..b"}}, "'watch.metrics_host' is 'a..b', which is not a host",
    ),
    "threads without end": ({"pool__threads": 10**11}, "'pool.threads' is 100000000000"),
    "rounds without end": ({"train__rounds": 10**12}, "'train.rounds' is 1000000000000"),
    "more rounds than are planned": ({"train__rounds": 10**9}, "the run has more than 1,000,000 rounds"),
    "a long schedule": (
        {"train__rounds": 10**6, "train__local_steps": 10**6, "train__schedule": {"name": "ConstantLR", "args": {}}},
        "'train.schedule' is worked out for every local step beforehand, at most 3,000,000",
    ),
    "a long stage of another rate": (
        {"train__rounds": 10**6, "train__local_steps": 10**6, "recipe": {"stages": [{"lr_scale": 2.0}]}},
        "'lr_scale' of a stage is worked out for every local step beforehand",
    ),
    "a wait without end": ({"pool__timeout_s": 1e300}, "'pool.timeout_s' is 1e+300"),
    "memory without end": ({"pool": {"kind": "torchrun", "memory_limit": "9" * 30 + "GB"}}, "'pool.memory_limit' is '999"),
    "a long name": ({"name": "a" * 300}, "'name' is 'aaa"),
    "what steers a terminal": ({"model__name": "\x1b[31mred"}, "'model.name' is 'red'"),
}  # fmt: skip


@pytest.mark.parametrize("case", VALUES)
def test_a_value_that_cannot_be_used_is_one_line(attempt: Try, case: str) -> None:
    changes, message = VALUES[case]

    said = attempt(yaml.safe_dump(config_tree(**changes)))

    assert message in said
    assert said.count("error: ") == 1


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
    "model.name": ("fails", "'model.args': fails raises KeyError: 'missing' (theirs.py, line 4)"),
    "data.name": ("dataset", "'data.args': dataset raises AssertionError: no root (theirs.py, line 6)"),
    "train.loss": ("fails", "a step on a batch of 15 fails: KeyError"),
    "method": ("lazy", "'method' is 'theirs:lazy': 'lazy' of module 'theirs' raises OSError: not built"),
    "evaluate.metric": ("fails", "'evaluate.metric' is 'theirs:fails', which is a function"),
    "train.optimizer.name": (
        "leaves",
        "'train.optimizer.name' is 'theirs:leaves', which is not a torch.optim.Optimizer",
    ),
    "train.schedule.name": ("leaves", "'train.schedule.name' is 'theirs:leaves', which is not an LRScheduler"),
}


@pytest.mark.parametrize("key", NAMED)
def test_what_a_named_function_raises_is_one_line_with_its_place(
    attempt: Try, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "theirs", raising=False)
    name, message = NAMED[key]
    args = {"model__args": {}} if key == "model.name" else {}

    said = attempt(yaml.safe_dump(config_tree(**args, **{key.replace(".", "__"): f"theirs:{name}"})))

    assert message in said
    assert said.count("error: ") == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import sys; sys.exit('bye')", "which does not import: SystemExit: bye (broken.py, line 1)"),
        ("1 / 0", "which does not import: ZeroDivisionError: division by zero (broken.py, line 1)"),
        ("def (", "which does not import: SyntaxError"),
        ("raise ImportError", "which does not import: "),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_line(
    attempt: Try, body: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)

    said = attempt(yaml.safe_dump(config_tree(model__name="broken:Net")))

    assert f"'model.name' is 'broken:Net', {message}" in said
    assert said.count("error: ") == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "is a folder: give a YAML file"),
        (lambda path: os.mkfifo(path), "is not a file: give a YAML file"),
        (lambda path: path.write_bytes(b"name: \xff"), "is not UTF-8 text"),
        (lambda path: path.write_text("#" * MAX_BYTES + "#"), "holds more than 256 KiB"),
        (lambda path: path.symlink_to(path), "cannot be read: Too many levels of symbolic links"),
    ],
    ids=["folder", "pipe", "binary", "huge", "loop"],
)
@pytest.mark.parametrize(
    "command", [["train"], ["compare"], ["inspect"], ["plan", "--link", "1gbit"]], ids=lambda c: c[0]
)
def test_what_is_no_text_file_is_refused_by_every_command(
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

    said = capfd.readouterr().err
    assert stop.value.code == 2
    assert said.count("error: ") == 1
    assert message in said


def test_control_sequences_are_not_printed() -> None:
    text = "a\x1b[31mb\x1b]0;title\x07c\x1bcd\x00\x08\x7f\x9b1m\u202ee\tf\n\udc80"

    assert printable(text) == "abcd1me\tf\n?"
    assert printable("Grüße, 世界 😀") == "Grüße, 世界 😀"


LINES: dict[str, tuple[list[str], str]] = {
    "a key of many parts": (["inspect", "JOB", "--set", ".".join("a" * 3000) + "=1"], "has 3000 parts"),
    "a value of many digits": (["inspect", "JOB", "--set", f"seed={'9' * 5000}"], "a number of 5,000 digits"),
    "a value that is not UTF-8": (["inspect", "JOB", "--set", "label=\udcff"], "special characters are not allowed"),
    "a number of workers of many digits": (["plan", "JOB", "--link", "1gbit", "--workers", "9" * 5000], "expected numbers of workers"),
    "a link that steers a terminal": (["plan", "JOB", "--link", "\x1b[31m"], "a link is '100mbit'"),
    "methods without a name": (["plan", "JOB", "--link", "1gbit", "--methods", ","], "'' cannot be planned"),
    "a path that is too long to resume": (["train", "--resume", "x" * 5000], "File name too long"),
    "a path that is too long to report": (["report", "x" * 5000], "File name too long"),
    "a path that is not UTF-8": (["report", "\udcff"], "?: is no run folder"),
    "an experiment that is none": (["theory", "[/b]"], "'[/b]' is no experiment"),
    "a knob's value that is no YAML": (["theory", "bias", "--set", "n=!!int z"], "'z' is not a whole number"),
    "a knob's value that is too deep": (["theory", "bias", "--set", "n=" + "[" * 5000], f"more than {MAX_DEPTH} levels"),
}  # fmt: skip


@pytest.mark.parametrize("case", LINES)
def test_arguments_that_cannot_be_used_are_one_short_line(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments, message = LINES[case]
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(config_tree()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ist", *(str(path) if word == "JOB" else word for word in arguments)])

    with pytest.raises(SystemExit) as stop:
        cli.main()

    said = capfd.readouterr().err
    assert stop.value.code in (1, 2)
    assert said.count("error: ") == 1
    assert message in said
    assert said == printable(said)
    assert len(said) < 6000
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
HUGE = [10**9, 10**12, 10**30]  # not as arguments of a network, which may take as long as it likes to be made
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
    """A configuration in which one or two keys have another value, another name, or are gone, or are new."""
    tree = copy.deepcopy(draw(st.sampled_from(trees)))
    for _ in range(draw(st.integers(1, 2))):
        *parents, last = draw(st.sampled_from(list(places(tree))))
        node: Any = tree
        for parent in parents:
            node = node[parent]
        values = ODD if "args" in parents else ODD + HUGE
        # A copy: the second change may be within it.
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
    """The text of a configuration in which something is put in, or cut out."""
    text = draw(st.sampled_from(texts))
    first = draw(st.integers(0, len(text)))
    last = min(len(text), first + draw(st.integers(0, 20)))
    return text[:first] + draw(st.sampled_from([*SNIPPETS, ""]) | st.text(max_size=3)) + text[last:]


def read_or_refused(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    begun = time.process_time()
    told = ""
    try:
        load_config(path)
    except ConfigError as error:
        told = str(error)
    assert time.process_time() - begun < LONGEST_S
    assert all(line.startswith(str(path)) for line in told.splitlines())


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
