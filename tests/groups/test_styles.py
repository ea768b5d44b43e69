"""Any style of network: its subnets are the masked whole network."""

import pytest

from ist.verify import verify_cuts
from tests.groups.styles import STYLES, Style
from tests.groups.test_neurons import job_of
from tests.networks import seeded


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES.keys())
def test_a_network_of_any_style_is_split_as_it_is(style: Style) -> None:
    job = job_of(seeded(style.build), style.example)

    verify_cuts(job)
    assert [group.size for group in job.groups] == style.sizes
