"""The HTML page about the theory's experiments, and their pictures: readable without a network."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ist._version import VERSION
from ist.report.page import render, write_bytes, write_page
from ist.theory.runner import Done


def write_theory_page(experiments: Sequence[Done], out: Path) -> Path:
    """Write pictures as PNG files, and the page with all of them in it; return its path.

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
