"""Take passwords out of what is shown or written where others may read it.

Where it sits: whatever may quote a URL asks here: error lines, warnings, reports, checkpoints.
Not here: keeping files private (`ist/storage/backend.py` writes them, with mode 600 where asked).
"""

import re
from urllib.parse import unquote

_HIDDEN = "***"
_USER = re.compile(r"(?<=://)\S*@")  # up to the last @: a password may have slashes, and an @ of its own
_QUERY = re.compile(
    r"([?&][^=&\s]*(?:key|token|secret|sig|password|passwd|pwd|credential|auth)[^=&\s]*=)[^&\s'\"]+", re.IGNORECASE
)
_SHORTEST = 3
"""Shorter passwords are no secret, and their letters stand everywhere."""


def redacted(text: str, url: str = "") -> str:
    """Return a text without what stands before the @ of a URL in it, and without keys in a URL's query.

    Args:
        text: A URL, or whatever may quote one.
        url: A URL whose password is also taken out where it stands alone, as libraries quote it.
    """
    for secret in _secrets(url):
        text = text.replace(secret, _HIDDEN)
    return _QUERY.sub(rf"\1{_HIDDEN}", _USER.sub(f"{_HIDDEN}@", text))


def holds_secret(text: str) -> bool:
    """Return whether there is something in a text that `redacted` takes out."""
    return redacted(text) != text


def _secrets(url: str) -> list[str]:
    found = []
    for match in _USER.finditer(url):
        user = match[0].removesuffix("@")
        found += [user, user.partition(":")[2]]
    found += [match[0].removeprefix(match[1]) for match in _QUERY.finditer(url)]
    found += [unquote(secret) for secret in found]
    return sorted({secret for secret in found if len(secret) >= _SHORTEST}, key=len, reverse=True)
