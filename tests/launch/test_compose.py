"""Properties of every container in docker/compose.yaml, read from the file."""

import re
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

TEXT = (ROOT / "docker" / "compose.yaml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, Any] = COMPOSE["services"]
ALL = pytest.mark.parametrize("name", SERVICES)


@ALL
def test_a_service_has_no_privileges_and_few_writable_folders(name: str) -> None:
    service = SERVICES[name]

    assert service["user"] == "10001:10001"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "devices", "pid", "ipc", "userns_mode", "env_file", "group_add"} & set(service)
    assert {entry.split(":")[0] for entry in service["tmpfs"]} == {"/tmp", "/home/ist"}


@ALL
def test_a_service_publishes_nothing_but_the_dashboard_on_loopback(name: str) -> None:
    ports = [re.sub(r"\$\{[^}]*\}", "8265", port) for port in SERVICES[name].get("ports", [])]

    assert ports == (["127.0.0.1:8265:8265"] if name == "head" else [])


@ALL
def test_a_service_is_in_a_private_network(name: str) -> None:
    service = SERVICES[name]

    assert service.get("network_mode", "none") == "none"
    networks = set(service.get("networks", []))
    assert networks <= ({"cluster", "dashboard"} if name == "head" else {"cluster"})
    assert COMPOSE["networks"]["cluster"] == {"internal": True}


@ALL
def test_a_service_has_limits(name: str) -> None:
    assert SERVICES[name]["cpus"] > 0
    assert SERVICES[name]["mem_limit"]
    assert SERVICES[name]["pids_limit"] > 0
    assert SERVICES[name]["shm_size"]


@ALL
def test_a_service_reads_its_secrets_from_a_volume_that_only_one_service_writes(name: str) -> None:
    service = SERVICES[name]

    assert service["environment"]["RAY_AUTH_MODE"] == "token"
    assert service["environment"]["RAY_AUTH_TOKEN_PATH"].startswith("/secrets/")
    assert service["environment"]["IST_SECRET_FILE"].startswith("/secrets/")
    assert ("secrets:/secrets" if name == "secrets" else "secrets:/secrets:ro") in service["volumes"]
    assert not [volume for volume in service["volumes"] if "docker.sock" in volume or volume.startswith(("/", "~"))]


def test_no_secret_is_written_in_the_file() -> None:
    assert not re.search(r"[0-9a-f]{16}", TEXT)


def test_ray_starts_without_the_torchrun_profile_and_torchrun_only_with_it() -> None:
    profiled = {name for name, service in SERVICES.items() if "profiles" in service}

    assert profiled == {"torchrun-0", "torchrun-1"}
    for name in profiled:
        assert set(SERVICES[name]["depends_on"]) == {"secrets"}
