"""Remove passwords from text that others may read.

Where it sits: called wherever a URL may be quoted: error messages, warnings, reports, checkpoints.
Not here: file permissions (`ist/storage/backend.py` writes files with mode 600 on request).
"""

import re
from urllib.parse import unquote

_HIDDEN = "***"
_USER = re.compile(r"(?<=://)\S*@")  # up to the last @: a password may contain / and @
_QUERY = re.compile(
    r"([?&][^=&\s]*(?:key|token|secret|sig|password|passwd|pwd|credential|auth)[^=&\s]*=)[^&\s'\"]+", re.IGNORECASE
)
_SHORTEST = 3
"""Passwords below this length are not replaced on their own: ordinary text contains the same letters."""


def redacted(text: str, url: str = "") -> str:
    """Replace user names and passwords before the @ of a URL, and secrets in its query, by `***`.

    Args:
        text: A URL, or text that may quote one.
        url: A URL whose password is also replaced where it appears alone, since libraries quote it so.
    """
    for secret in _secrets(url):
        text = text.replace(secret, _HIDDEN)
    return _QUERY.sub(rf"\1{_HIDDEN}", _USER.sub(f"{_HIDDEN}@", text))


def holds_secret(text: str) -> bool:
    """Return whether a text contains a secret that `redacted` would replace."""
    return redacted(text) != text


def _secrets(url: str) -> list[str]:
    found = []
    for match in _USER.finditer(url):
        user = match[0].removesuffix("@")
        found += [user, user.partition(":")[2]]
    found += [match[0].removeprefix(match[1]) for match in _QUERY.finditer(url)]
    found += [unquote(secret) for secret in found]
    return sorted({secret for secret in found if len(secret) >= _SHORTEST}, key=len, reverse=True)
