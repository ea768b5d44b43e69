"""The notation of links, and errors about links before anything starts."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ist.cli import main as cli
from ist.config.runtime import Link, parse_link
from ist.errors import ConfigError
from ist.launch import lab_hosts as lab
from ist.report.table import link_text, table_columns, table_rows
from tests.conftest import config_tree, naming, small_config

TORCHRUN = {"kind": "torchrun", "device": "cpu"}


@pytest.mark.parametrize(
    ("text", "link"),
    [
        ("100mbit", Link(100, 100)),
        ("1gbit", Link(1000, 1000)),
        ("2.5gbit", Link(2500, 2500)),
        ("20mbit/100mbit", Link(20, 100)),
        ("10mbit/10gbit", Link(10, 10_000)),
        ("12.5mbit", Link(12.5, 12.5)),
    ],
)
def test_a_link_is_read_and_written_alike(text: str, link: Link) -> None:
    assert parse_link(text) == link
    assert str(link) == text


@pytest.mark.parametrize("text", ["100", "100mbps", "fast", "", "100mbit/", "1mbit/2mbit/3mbit", "-5mbit", "1e3mbit"])
def test_an_error_about_a_malformed_link_shows_the_text_and_examples(text: str) -> None:
    with pytest.raises(ConfigError, match=naming(f"'{text}'", "'100mbit'", "'1gbit'", "'20mbit/100mbit'")):
        parse_link(text)


@pytest.mark.parametrize("text", ["9.9mbit", "0mbit", "10.1gbit", "100mbit/11gbit"])
def test_an_error_about_a_rate_out_of_range_names_the_limits(text: str) -> None:
    with pytest.raises(ConfigError, match=naming(text.split("/")[-1], "10mbit to 10gbit")):
        parse_link(text)


def test_a_configuration_holds_one_spelling_of_a_link_and_names_the_key_of_a_wrong_one() -> None:
    assert small_config(pool={**TORCHRUN, "link": "1000mbit/20mbit"}).pool.link == "1gbit/20mbit"

    with pytest.raises(ConfigError, match=naming("test: 'pool.link'", "'slow'", "'100mbit'")):
        small_config(pool={**TORCHRUN, "link": "slow"})


@pytest.mark.parametrize("kind", ["inline", "ray"])
def test_only_processes_can_be_put_on_links(kind: str) -> None:
    with pytest.raises(ConfigError, match=naming("'pool.link' is '100mbit'", "'pool.kind' torchrun", kind)):
        small_config(pool={"kind": kind, "link": "100mbit"})


def refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    """Run a command that must end as bad input; return its stderr."""
    monkeypatch.setattr(sys, "argv", ["ist", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    return capfd.readouterr().err


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(config_tree(output=str(tmp_path / "runs"), pool=TORCHRUN)))
    return str(path)


def test_hosts_that_cannot_be_made_end_the_command_before_anything_starts(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ist.launch.lab_run.why_not", lambda: "the kernel has no tbf")

    for command in ("train", "compare"):
        stderr = refused([command, config, "--link", "100mbit"], monkeypatch, capfd)
        assert re.search(naming("error: 'pool.link' (--link) is '100mbit'", "the kernel has no tbf"), stderr)
        assert stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_link_under_torchrun_is_refused(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("ist.cli.main.end_with_launcher", lambda: None)  # the tests have no launcher

    stderr = refused(["train", config, "--link", "100mbit"], monkeypatch, capfd)

    assert re.search(naming("'pool.link' (--link) is '100mbit'", "torchrun"), stderr)
    assert not (tmp_path / "runs").exists()


def test_missing_programs_are_named_with_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab.shutil, "which", lambda tool, **_: None if tool in ("tc", "nsenter") else f"/bin/{tool}")
    monkeypatch.setattr(lab.sys, "platform", "linux")

    assert re.search(naming("tc, nsenter", "iproute2, util-linux"), lab.why_not() or "")


def test_a_system_other_than_linux_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab.sys, "platform", "darwin")

    assert re.search(naming("Linux", "darwin"), lab.why_not() or "")


BASE: dict[str, Any] = {"seed": 0, "accuracy": 0.9, "test_loss": 0.1, "train_s": 2.0, "memory_bytes": 2_000_000}


def test_a_table_has_a_column_for_the_wire_and_names_the_link_where_runs_had_one() -> None:
    plain = {**BASE, "method": "ddp", "sent_bytes": 60_000}
    linked = {**BASE, "method": "ist", "sent_bytes": 1000, "wire_bytes": 1100, "link": "100mbit"}

    assert "on the wire" not in table_columns([plain])
    assert link_text([plain]) == ""
    assert table_columns([linked, plain])[2:5] == ("bytes sent", "on the wire", "ratio")
    assert [row[3] for row in table_rows([linked, plain])] == ["1.1 kB", "not counted"]
    assert link_text([linked, plain]) == "ist 100mbit, ddp none"
    assert link_text([linked, {**linked, "method": "ddp"}]) == "100mbit"
