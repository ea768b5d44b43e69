"""The HTML page about the theory's experiments: one self-contained file, and its pictures as PNG files.

Where it sits: `ist theory` calls `write_theory_page`.
Not here: the experiments (`ist/theory/runner.py`).
"""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ist._version import VERSION
from ist.report.page import render, write_bytes, write_page
from ist.theory.runner import Done


def write_theory_page(experiments: Sequence[Done], out: Path) -> Path:
    """Write the pictures as PNG files, and the page that contains them; return its path.

    Raises:
        RunFolderError: A file cannot be written.
    """
    parts: list[dict[str, Any]] = []
    for done in experiments:
        pictures = []
        for name, (figure, caption) in done.section.figures.items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
            write_bytes(out / f"{name}.png", buffer.getvalue())
            encoded = base64.b64encode(buffer.getvalue()).decode()
            pictures.append({"data": encoded, "caption": caption, "file": f"{name}.png"})
        parts.append({"name": done.name, "settings": done.settings, "section": done.section, "pictures": pictures})
    return write_page(out / "theory.html", render("theory.html", parts=parts, version=VERSION))
