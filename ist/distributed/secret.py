"""The secret of a run, and a protocol by which two ranks prove to each other that they hold it.

Where it sits: `ist/launch/start.py` creates a secret for every run that it starts; under another launcher the user
provides it. `ist/distributed/process_group.py` exchanges challenges and proofs before any other data.
Law: a proof is valid for one prover, one verifier, one number of ranks and one pair of challenges. It cannot be
reflected, replayed, or used by another rank.
Not here: encryption (see SECURITY.md).

Reference: M. Bellare and P. Rogaway, "Entity Authentication and Key Distribution", CRYPTO 1993.
"""

import hmac
import os
import secrets
import shlex
import stat
import struct
import tempfile
from pathlib import Path

from ist.errors import ConfigError

SECRET_VARIABLE = "IST_SECRET"
FILE_VARIABLE = "IST_SECRET_FILE"
CHALLENGE_BYTES = 32
PROOF_BYTES = 32

_SECRET_BYTES = 32
_MAKE_ONE = "(create one by: openssl rand -hex 32)"


def new_secret() -> str:
    """Return a new secret, 64 hexadecimal digits."""
    return secrets.token_hex(_SECRET_BYTES)


def run_secret() -> bytes:
    """Return this run's secret: from IST_SECRET, else from the file IST_SECRET_FILE, else from ~/.ist/secret.

    If ~/.ist/secret does not exist, it is created. So all processes of a user have the same secret, on one machine or
    on machines with a shared home.

    Returns:
        32 bytes.

    Raises:
        ConfigError: The secret is missing or malformed, or other users can read its file.
    """
    text = os.environ.get(SECRET_VARIABLE)
    if text is not None:
        return _parsed(text, SECRET_VARIABLE)
    given = os.environ.get(FILE_VARIABLE)
    path = Path(given) if given is not None else _home_file()
    return _parsed(_private_text(path), str(path) if given is None else f"{path} ({FILE_VARIABLE})")


def new_challenge() -> bytes:
    """Return 32 new random bytes."""
    return secrets.token_bytes(CHALLENGE_BYTES)


def prove(secret: bytes, prover: int, verifier: int, world_size: int, answered: bytes, posed: bytes) -> bytes:
    """Return the proof that rank `prover` sends to rank `verifier`.

    Args:
        secret: The run's secret.
        prover: The rank that proves that it holds the secret.
        verifier: The rank that checks the proof.
        world_size: Number of ranks.
        answered: The verifier's challenge.
        posed: The prover's challenge.

    Returns:
        32 bytes.
    """
    ranks = struct.pack(">III", prover, verifier, world_size)
    return hmac.digest(secret, b"ist handshake 1" + ranks + answered + posed, "sha256")


def is_proven(
    secret: bytes, prover: int, verifier: int, world_size: int, answered: bytes, posed: bytes, proof: bytes
) -> bool:
    """Return whether `proof` equals the result of `prove` for the same arguments; compares in constant time."""
    return hmac.compare_digest(prove(secret, prover, verifier, world_size, answered, posed), proof)


def seal(secret: bytes, name: str, text: str) -> str:
    """Return a text with a proof that a holder of the secret wrote it under this name, for a public store."""
    text = text.encode(errors="replace").decode()
    return hmac.digest(secret, f"ist text 1 {name}\n{text}".encode(), "sha256").hex() + text


def unseal(secret: bytes, name: str, sealed: str) -> str | None:
    """Return the text that was sealed under this name, or None if the proof is not valid."""
    text = sealed[2 * PROOF_BYTES :]
    return text if hmac.compare_digest(seal(secret, name, text).encode(), sealed.encode()) else None


def _parsed(text: str, where: str) -> bytes:
    try:
        secret = bytes.fromhex(text.strip())
    except ValueError:
        secret = b""
    if len(secret) != _SECRET_BYTES:  # the message does not show the text, which may be another secret
        raise ConfigError(f"{where}: a run secret must be {2 * _SECRET_BYTES} hexadecimal digits {_MAKE_ONE}")
    return secret


def _private_text(path: Path) -> str:
    try:
        with path.open(encoding="ascii", errors="replace") as file:
            status = os.fstat(file.fileno())
            text = file.read(1024)
    except OSError as error:
        raise ConfigError(
            f"{path}: the run secret cannot be read ({error.strerror}): set {FILE_VARIABLE} to the same file on all "
            f"ranks {_MAKE_ONE}"
        ) from error
    if status.st_uid not in (os.getuid(), 0):
        raise ConfigError(f"{path}: this run secret belongs to another user ({status.st_uid}): use your own copy")
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        mode = stat.S_IMODE(status.st_mode)
        raise ConfigError(
            f"{path}: this run secret is readable by other users (mode {mode:o}): run chmod 600 "
            f"{shlex.quote(str(path))}"
        )
    return text


def _home_file() -> Path:
    try:
        path = Path.home() / ".ist" / "secret"
        if not path.exists():
            _make(path)
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"~/.ist/secret cannot be created or read ({error}): set {FILE_VARIABLE} or {SECRET_VARIABLE} to the same "
            f"secret on all ranks {_MAKE_ONE}"
        ) from error
    return path


def _make(path: Path) -> None:
    """Write a new secret; if several processes do so at the same time, the first secret stays."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)  # readable by its owner only
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(new_secret() + "\n")
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        Path(temporary).unlink()
