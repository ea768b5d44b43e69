"""The report in a real browser, without a network."""

import shutil
import subprocess
from pathlib import Path

import pytest

from ist.report.page import find_runs, write_report
from tests.report.test_report import finished

BROWSER = shutil.which("chromium")

pytestmark = [pytest.mark.system, pytest.mark.skipif(BROWSER is None, reason="chromium is not installed")]

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-quic", "--host-resolver-rules=MAP * ~NOTFOUND",
]  # fmt: skip


def test_the_page_renders_with_its_table_and_curves(tmp_path: Path) -> None:
    for seed in (1, 2):
        finished(tmp_path / "runs" / str(seed), seed=seed)
    page = write_report(find_runs([tmp_path / "runs"]), tmp_path / "report.html")
    picture = tmp_path / "report.png"
    common = [str(BROWSER), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,1500"]

    dump = subprocess.run(
        [*common, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    subprocess.run([*common, f"--screenshot={picture}", page.as_uri()], capture_output=True, timeout=60, check=True)

    assert dump.stdout.count("<svg") == page.read_text().count("<svg") >= 4
    assert "ist (seed 2)" in dump.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 50_000  # a blank page of this size has about 10 kB
