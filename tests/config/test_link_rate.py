"""Links as they are written, and whatever is wrong with them before anything starts."""

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ist.cli import main as cli
from ist.config.link_rate import Link, parse_link
from ist.errors import ConfigError
from ist.launch import lab_hosts as lab
from ist.report.table import link_text, table_columns, table_rows
from tests.conftest import config_tree, small_config

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
def test_what_is_no_link_is_told_what_one_looks_like(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_link(text)

    assert str(caught.value) == (
        f"a link is '100mbit', '1gbit', or up/down as a host sees it, such as '20mbit/100mbit', not '{text}'"
    )


@pytest.mark.parametrize("text", ["9.9mbit", "0mbit", "10.1gbit", "100mbit/11gbit"])
def test_a_link_that_cannot_be_made_is_told_the_limits(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot be made: from 10mbit to 10gbit"):
        parse_link(text)


def test_a_configuration_holds_one_spelling_of_a_link_and_names_the_key_of_a_wrong_one() -> None:
    assert small_config(pool={**TORCHRUN, "link": "1000mbit/20mbit"}).pool.link == "1gbit/20mbit"

    with pytest.raises(ConfigError, match=r"^test: 'pool.link': a link is '100mbit'.* not 'slow'$"):
        small_config(pool={**TORCHRUN, "link": "slow"})


@pytest.mark.parametrize("kind", ["inline", "ray"])
def test_only_processes_can_be_put_on_links(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"'pool.link' is '100mbit', which needs 'pool.kind' torchrun, not {kind}"):
        small_config(pool={"kind": kind, "link": "100mbit"})


def refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    """Run a command that must stop as bad input; return what it said."""
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
        said = refused([command, config, "--link", "100mbit"], monkeypatch, capfd)
        assert said == "error: 'pool.link' (--link) is '100mbit', but the kernel has no tbf\n"
    assert not (tmp_path / "runs").exists()


def test_a_link_under_torchrun_is_refused(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("ist.cli.main.end_with_launcher", lambda: None)  # the tests have no launcher

    said = refused(["train", config, "--link", "100mbit"], monkeypatch, capfd)

    assert "'pool.link' (--link) is '100mbit', but torchrun, or a launcher like it, started this process" in said
    assert not (tmp_path / "runs").exists()


def test_missing_programs_are_named_with_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab.shutil, "which", lambda tool, **_: None if tool in ("tc", "nsenter") else f"/bin/{tool}")
    monkeypatch.setattr(lab.sys, "platform", "linux")

    assert lab.why_not() == "network namespaces need tc, nsenter: install iproute2, util-linux"


def test_another_system_than_linux_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab.sys, "platform", "darwin")

    assert lab.why_not() == "hosts are network namespaces of Linux, and this is darwin"


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
