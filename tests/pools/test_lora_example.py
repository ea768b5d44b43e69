"""The example with adapters runs: coded messages send fewer bytes than local SGD of the adapters."""

import re
import runpy
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.system  # it loads peft, and trains four networks
def test_coded_adapters_send_fewer_bytes_than_local_sgd_of_the_adapters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = "--seeds 1 --rounds 2 --local-steps 2 --base-steps 2 --max-bytes 20000"
    monkeypatch.setattr(sys, "argv", ["lora.py", *small.split()])

    runpy.run_path(str(ROOT / "examples" / "lora.py"), run_name="__main__")

    rows = capsys.readouterr().out.splitlines()[1:]
    numbers = [[float(word.replace(",", "")) for word in re.findall(r"\d[\d,.]*", row)[-3:]] for row in rows]
    (_, full, full_total), (_, coded, coded_total), _, (_, frozen, _) = numbers
    # Adapters have 16,384 numbers of four bytes; three of the four workers get and return them over a link.
    assert 2 * 3 * 4 * 16384 <= full < 2 * 3 * 4 * 16384 * 1.01
    assert coded < full / 3.5
    assert coded_total < full_total / 3
    assert frozen < coded  # only own adapters are returned, and those of others are sent in four bits
