"""Networks in many styles: their subnets are the masked full network."""

import pytest

from ist.checks.verify import verify_cuts
from tests.networks import seeded
from tests.neurons.styles import STYLES, Style
from tests.neurons.test_neurons import job_of


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES.keys())
def test_a_network_of_any_style_is_split_as_it_is(style: Style) -> None:
    job = job_of(seeded(style.build), style.example)

    verify_cuts(job)
    assert [group.size for group in job.split.groups] == style.sizes
