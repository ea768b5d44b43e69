"""The secret of a run, and how two ranks prove to each other that they hold it.

Where it sits: `ist/launch/start.py` makes a secret for every run that it starts; under another launcher it comes from
the user. `ist/distributed/process_group.py` carries challenges and proofs, before anything else moves.
Law: a proof is good for one prover, one verifier, one number of ranks and one pair of challenges. So it cannot be
reflected, replayed, or used by another rank.
Not here: encryption; see SECURITY.md.

Reference: M. Bellare and P. Rogaway, "Entity Authentication and Key Distribution", CRYPTO 1993.
"""

import hmac
import os
import secrets
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
_MAKE_ONE = "(make one with: openssl rand -hex 32)"


def new_secret() -> str:
    """Return a new secret, 64 hexadecimal digits."""
    return secrets.token_hex(_SECRET_BYTES)


def run_secret() -> bytes:
    """Return this run's secret: from IST_SECRET, else the file IST_SECRET_FILE, else ~/.ist/secret.

    The last is made where it does not exist: processes of one user on one machine, or on machines that share their
    homes, then have the same one.

    Returns:
        32 bytes.

    Raises:
        ConfigError: There is none, it is malformed, or others can read its file.
    """
    text = os.environ.get(SECRET_VARIABLE)
    if text is not None:
        return _parsed(text, SECRET_VARIABLE)
    given = os.environ.get(FILE_VARIABLE)
    path = Path(given) if given is not None else _home_file()
    return _parsed(_private_text(path), str(path) if given is None else f"{path} ({FILE_VARIABLE})")


def new_challenge() -> bytes:
    """Return 32 bytes that were never sent before."""
    return secrets.token_bytes(CHALLENGE_BYTES)


def prove(secret: bytes, prover: int, verifier: int, world_size: int, answered: bytes, posed: bytes) -> bytes:
    """Return the proof that rank `prover` owes to rank `verifier`.

    Args:
        secret: The run's secret.
        prover: The rank that proves.
        verifier: The rank that is to be convinced.
        world_size: Number of ranks.
        answered: The challenge that the verifier posed.
        posed: The challenge that the prover posed.

    Returns:
        32 bytes.
    """
    ranks = struct.pack(">III", prover, verifier, world_size)
    return hmac.digest(secret, b"ist handshake 1" + ranks + answered + posed, "sha256")


def is_proven(
    secret: bytes, prover: int, verifier: int, world_size: int, answered: bytes, posed: bytes, proof: bytes
) -> bool:
    """Return whether `proof` is what `prove` returns for the same arguments; in constant time."""
    return hmac.compare_digest(prove(secret, prover, verifier, world_size, answered, posed), proof)


def seal(secret: bytes, name: str, text: str) -> str:
    """Return a text and a proof that a holder of the secret wrote it under this name, for public stores."""
    text = text.encode(errors="replace").decode()
    return hmac.digest(secret, f"ist text 1 {name}\n{text}".encode(), "sha256").hex() + text


def opened(secret: bytes, name: str, sealed: str) -> str | None:
    """Return the text that was sealed under this name; None: it was not, or somebody changed it."""
    text = sealed[2 * PROOF_BYTES :]
    return text if hmac.compare_digest(seal(secret, name, text).encode(), sealed.encode()) else None


def _parsed(text: str, where: str) -> bytes:
    try:
        secret = bytes.fromhex(text.strip())
    except ValueError:
        secret = b""
    if len(secret) != _SECRET_BYTES:  # what was found instead may be another secret: it is not shown
        raise ConfigError(f"{where}: a run secret is {2 * _SECRET_BYTES} hexadecimal digits {_MAKE_ONE}")
    return secret


def _private_text(path: Path) -> str:
    try:
        with path.open(encoding="ascii", errors="replace") as file:
            status = os.fstat(file.fileno())
            text = file.read(1024)
    except OSError as error:
        raise ConfigError(
            f"{path}: the run secret cannot be read ({error.strerror}): give all ranks the same file, in "
            f"{FILE_VARIABLE} {_MAKE_ONE}"
        ) from error
    if status.st_uid not in (os.getuid(), 0):
        raise ConfigError(f"{path}: this run secret belongs to another user ({status.st_uid}): use a copy of your own")
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        mode = stat.S_IMODE(status.st_mode)
        raise ConfigError(f"{path}: others than its owner have access to this run secret (mode {mode:o}): chmod 600 it")
    return text


def _home_file() -> Path:
    try:
        path = Path.home() / ".ist" / "secret"
        if not path.exists():
            _make(path)
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"a run secret cannot be kept in ~/.ist/secret ({error}): give all ranks one in {FILE_VARIABLE} or "
            f"{SECRET_VARIABLE} {_MAKE_ONE}"
        ) from error
    return path


def _make(path: Path) -> None:
    """Write a new secret; of several processes that do so at the same time, the first one's stays."""
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
