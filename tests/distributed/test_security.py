"""Unit tests of secrets, proofs and ports. Strangers at the ports of a run: tests/system/test_security.py."""

import ast
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from ist.config.runtime import Pool
from ist.distributed import ports
from ist.distributed import process_group as group
from ist.distributed.ports import addresses, closed_afterwards, is_public, listeners, refuse_public
from ist.distributed.secret import is_proven, new_challenge, new_secret, prove, run_secret
from ist.errors import ConfigError, PoolError
from ist.launch.start import _child_environment
from tests.conftest import ROOT, naming, small_config

OURS, THEIRS = bytes.fromhex(new_secret()), bytes.fromhex(new_secret())


@pytest.fixture(autouse=True)
def nothing_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (
        "IST_SECRET", "IST_SECRET_FILE", "IST_STORE", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "MASTER_ADDR",
        "MASTER_PORT", "TORCHELASTIC_RUN_ID", "GROUP_RANK", "LOCAL_WORLD_SIZE",
    ):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_a_proof_is_valid_for_the_rank_it_is_made_for() -> None:
    posed, answered = new_challenge(), new_challenge()

    proof = prove(OURS, 1, 0, 4, answered, posed)

    assert is_proven(OURS, 1, 0, 4, answered, posed, proof)


@pytest.mark.parametrize(
    "change", ["secret", "reflected", "prover", "verifier", "world", "replayed", "other challenge", "junk", "empty"]
)
def test_no_other_proof_is_valid(change: str) -> None:
    posed, answered, other = new_challenge(), new_challenge(), new_challenge()
    proofs = {
        "secret": prove(THEIRS, 1, 0, 4, answered, posed),
        "reflected": prove(OURS, 0, 1, 4, posed, answered),
        "prover": prove(OURS, 2, 0, 4, answered, posed),
        "verifier": prove(OURS, 1, 3, 4, answered, posed),
        "world": prove(OURS, 1, 0, 5, answered, posed),
        "replayed": prove(OURS, 1, 0, 4, other, posed),
        "other challenge": prove(OURS, 1, 0, 4, answered, other),
        "junk": os.urandom(32),
        "empty": b"",
    }

    assert not is_proven(OURS, 1, 0, 4, answered, posed, proofs[change])


def test_a_reflected_challenge_does_not_yield_a_valid_proof() -> None:
    posed = new_challenge()

    reply = prove(OURS, 0, 1, 2, posed, posed)  # a stranger sent rank 0's own challenge back to rank 0

    assert not is_proven(OURS, 1, 0, 2, posed, posed, reply)


def test_the_secret_comes_from_the_environment_before_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "of-the-cluster"
    file.write_text(THEIRS.hex() + "\n")
    file.chmod(0o600)
    monkeypatch.setenv("IST_SECRET_FILE", str(file))
    from_file = run_secret()
    monkeypatch.setenv("IST_SECRET", OURS.hex())

    assert from_file == THEIRS
    assert run_secret() == OURS


@pytest.mark.parametrize("text", ["", "password", "ab" * 31, "zz" * 32])
def test_a_secret_that_can_be_guessed_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("IST_SECRET", text)

    with pytest.raises(ConfigError, match=naming("IST_SECRET: ", "64 hexadecimal digits", "openssl rand")) as refused:
        run_secret()

    assert not text or text not in str(refused.value)


def test_a_file_without_a_secret_is_named_with_the_variable_that_names_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "short"
    file.write_text("of no use")
    file.chmod(0o600)
    monkeypatch.setenv("IST_SECRET_FILE", str(file))

    with pytest.raises(
        ConfigError, match=naming(str(file), "IST_SECRET_FILE", "64 hexadecimal digits", "openssl rand")
    ):
        run_secret()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_secret_that_others_can_read_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: int) -> None:
    file = tmp_path / "open"
    file.write_text(OURS.hex())
    file.chmod(mode)
    monkeypatch.setenv("IST_SECRET_FILE", str(file))

    with pytest.raises(ConfigError, match=naming(str(file), f"mode {mode:o}", f"chmod 600 {file}")):
        run_secret()


def test_a_secret_of_another_user_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "theirs"
    file.write_text(OURS.hex())
    file.chmod(0o600)
    monkeypatch.setenv("IST_SECRET_FILE", str(file))
    monkeypatch.setattr(os, "fstat", lambda _: os.stat_result((0o100600, 0, 0, 1, 65534, 0, 64, 0, 0, 0)))

    with pytest.raises(ConfigError, match=naming(str(file), "65534")):
        run_secret()


def test_a_secret_file_that_is_missing_is_an_error_and_not_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("IST_SECRET_FILE", str(tmp_path / "nowhere"))

    with pytest.raises(ConfigError, match=naming(str(tmp_path / "nowhere"), "IST_SECRET_FILE")):
        run_secret()

    assert list(tmp_path.iterdir()) == []


def test_processes_that_make_the_home_secret_at_the_same_time_end_with_one(tmp_path: Path) -> None:
    start, found = threading.Barrier(8), []

    def rank() -> None:
        start.wait()
        found.append(run_secret())

    ranks = [threading.Thread(target=rank) for _ in range(8)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()

    assert len(found) == 8
    assert len(set(found)) == 1
    assert [file.name for file in (tmp_path / ".ist").iterdir()] == ["secret"]
    assert (tmp_path / ".ist").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / ".ist" / "secret").stat().st_mode & 0o777 == 0o600


def test_without_a_home_the_error_says_how_to_give_a_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))

    with pytest.raises(ConfigError, match=naming("~/.ist/secret", "IST_SECRET_FILE or IST_SECRET")):
        run_secret()


@pytest.mark.parametrize("address", ["8.8.8.8", "11.0.0.1", "2a00:1450:4001::1"])
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.17.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "169.254.1.1",
        "::1",
        "fe80::1%eth0",
        "fd00::1",
    ],
)
def test_addresses_of_private_networks_are_not(address: str) -> None:
    assert not is_public(address)


HOME_AND_CLOUD = [("lo", "127.0.0.1"), ("eth0", "11.0.0.1"), ("eth1", "10.0.0.1"), ("eth1", "2a00:1450::1")]


@pytest.fixture
def public_machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(ports, "addresses", lambda: HOME_AND_CLOUD)
    monkeypatch.setattr(ports, "_is_here", lambda address: address in [here for _, here in HOME_AND_CLOUD])
    monkeypatch.setattr(ports, "_resolved", lambda host: {"node": ["11.0.0.1"]}.get(host, [host]))
    monkeypatch.setattr(socket, "gethostname", lambda: "node")
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_gloo_on_a_public_interface_is_refused_by_name_with_a_remedy(public_machine: pytest.MonkeyPatch) -> None:
    public_machine.setenv("GLOO_SOCKET_IFNAME", "eth0")

    with pytest.raises(
        ConfigError,
        match=naming("gloo", "eth0 (11.0.0.1)", "GLOO_SOCKET_IFNAME", "--allow-insecure", "pool.allow_insecure"),
    ):
        refuse_public("gloo")


def test_gloo_without_an_interface_listens_on_the_address_of_the_host_name(public_machine: pytest.MonkeyPatch) -> None:
    assert [listener.address for listener in listeners("gloo")] == ["11.0.0.1"]
    with pytest.raises(ConfigError, match=naming("gloo", "11.0.0.1")):
        refuse_public("gloo")
    public_machine.setattr(socket, "gethostname", lambda: "127.0.0.1")
    refuse_public("gloo")


def test_a_private_address_is_enough_if_the_interface_also_has_a_public_one(
    public_machine: pytest.MonkeyPatch,
) -> None:
    public_machine.setenv("GLOO_SOCKET_IFNAME", "eth1")

    refuse_public("gloo")  # gloo takes an interface's first address


@pytest.mark.parametrize(
    ("names", "refused"), [("", True), ("eth", True), ("=lo", False), ("lo", False), ("^lo", True)]
)
def test_nccl_interfaces_are_named_by_prefix(public_machine: pytest.MonkeyPatch, names: str, refused: bool) -> None:
    public_machine.setenv("NCCL_SOCKET_IFNAME", names)

    assert any(is_public(listener.address) for listener in listeners("nccl")) == refused


def test_torchruns_store_is_on_all_interfaces_of_the_first_machine(public_machine: pytest.MonkeyPatch) -> None:
    for name, value in {"GLOO_SOCKET_IFNAME": "eth1", "TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": "1"}.items():
        public_machine.setenv(name, value)
    refuse_public("gloo")  # the store is on another machine
    public_machine.setenv("GROUP_RANK", "0")

    with pytest.raises(ConfigError, match=naming("torchrun", "eth0 (11.0.0.1)", "--allow-insecure")):
        refuse_public("gloo")


def test_rank_zeros_own_store_listens_on_master_addr(public_machine: pytest.MonkeyPatch) -> None:
    for name, value in {"GLOO_SOCKET_IFNAME": "eth1", "RANK": "0", "MASTER_ADDR": "10.0.0.1"}.items():
        public_machine.setenv(name, value)
    refuse_public("gloo")
    public_machine.setenv("MASTER_ADDR", "11.0.0.1")

    with pytest.raises(ConfigError, match=naming("rendezvous store", "11.0.0.1", "MASTER_ADDR")):
        refuse_public("gloo")


def test_processes_that_ist_starts_have_no_store_to_refuse(public_machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    public_machine.setattr(ports, "addresses", addresses)
    public_machine.setenv("GLOO_SOCKET_IFNAME", "eth0")  # the user's; a run on one machine uses the loopback anyway
    inside = _child_environment(small_config(), tmp_path)

    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth0"
    for name, value in inside.items():
        public_machine.setenv(name, value)
    refuse_public("gloo")
    assert {listener.address for listener in listeners("gloo")} <= {"127.0.0.1"}
    assert inside["IST_SECRET"] != _child_environment(small_config(), tmp_path)["IST_SECRET"]


def test_the_addresses_of_this_machine_include_the_loopback() -> None:
    assert "127.0.0.1" in [address for _, address in addresses()]


def test_ports_that_are_closed_afterwards_keep_their_connections() -> None:
    with socket.create_server(("127.0.0.1", 0)) as before:
        with closed_afterwards():
            listener = socket.create_server(("127.0.0.1", 0))
            peer = socket.create_connection(listener.getsockname())
            accepted, _ = listener.accept()

        with listener, peer, accepted:
            with pytest.raises(TimeoutError):
                socket.create_connection(listener.getsockname(), timeout=0.2)
            peer.sendall(b"still here")
            assert accepted.recv(100) == b"still here"
        socket.create_connection(before.getsockname(), timeout=5).close()


def test_the_secret_is_checked_before_anything_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IST_SECRET", "too short")
    monkeypatch.setattr(group, "_form_group", lambda *_: pytest.fail("it continued"))

    with pytest.raises(ConfigError, match=naming("IST_SECRET", "64 hexadecimal digits")):
        group.join(Pool(device="cpu"), torch.device("cpu"))


def meet(store: Any, world_size: int, timeout_s: float = 20) -> list[str]:
    """All ranks rendezvous at a store; return the id of the incarnation from each."""
    with ThreadPoolExecutor(world_size) as executor:
        ranks = [group.Membership(rank, world_size, torch.device("cpu"), "gloo") for rank in range(world_size)]
        return list(executor.map(lambda rank: group._rendezvous(store, rank, timeout_s), ranks))


def test_restarted_ranks_ignore_keys_of_an_earlier_incarnation() -> None:
    store = torch.distributed.HashStore()

    starts = [set(meet(store, world_size)) for world_size in (3, 3, 2, 4)]

    assert all(len(start) == 1 for start in starts)
    assert len(set.union(*starts)) == 4


def test_a_missing_rank_is_named() -> None:
    membership = group.Membership(0, 3, torch.device("cpu"), "gloo")
    store = torch.distributed.HashStore()
    store.set("ist/word/1", "here")

    with pytest.raises(PoolError, match=naming("rank 0", "0.05 s", "pool.timeout_s", "rank 2")):
        group._rendezvous(store, membership, 0.05)


def test_no_module_imports_a_pickle_library() -> None:
    pickles = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
    # PyTorch's own format has a pickled index; this file reads it with the classes of an index alone.
    foreign = {ROOT / "ist" / "export" / "distributed_checkpoint.py"}
    for path in sorted({*(ROOT / "ist").rglob("*.py")} - foreign):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not {alias.name.partition(".")[0] for alias in node.names} & pickles, path
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] not in pickles, path
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "dist":
                assert "_object" not in node.attr, path  # broadcast_object_list, all_gather_object, ...
