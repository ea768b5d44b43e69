"""Which networks are split, and which are refused by name."""

import pytest
import torch
from torch import Tensor, nn

from ist.errors import ModelError
from ist.groups import Group, Slot, check_groups, tensor_specs
from ist.groups.sequential import sequential_groups


class Residual(nn.Sequential):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + super().forward(inputs)


class NormalisedLinear(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) / self.weight.norm()


SHARED = nn.Linear(8, 8)

REFUSED = {
    "a norm over neurons": (nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)), "'1' is a LayerNorm"),
    "a softmax over neurons": (nn.Sequential(nn.Linear(4, 8), nn.Softmax(1), nn.Linear(8, 2)), "'1' is a Softmax"),
    "a convolution": (nn.Sequential(nn.Conv1d(4, 8, 1), nn.Linear(8, 2)), "'0' is a Conv1d"),
    "a subclass with its own forward": (
        nn.Sequential(nn.Linear(4, 8), Residual(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 2)), "'1' is a Residual",
    ),
    "a residual as a whole": (Residual(nn.Linear(4, 4), nn.Linear(4, 4)), "Residual is not an nn.Sequential"),
    "a subclass of a known layer": (nn.Sequential(NormalisedLinear(4, 8), nn.Linear(8, 2)), "'0' is a NormalisedLinear"),
    "a layer used twice": (nn.Sequential(nn.Linear(4, 8), SHARED, SHARED, nn.Linear(8, 2)), "tied weights"),
    "layers that do not fit": (nn.Sequential(nn.Linear(4, 8), nn.Linear(9, 2)), "'1' expects 9 inputs, but '0' gives 8"),
    "a batch norm that does not fit": (
        nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(9), nn.Linear(8, 2)), "'1.weight' holds 9 values, but 8 neurons",
    ),
    "flattening in between": (nn.Sequential(nn.Linear(4, 8), nn.Flatten(), nn.Linear(8, 2)), "'1' is a Flatten"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_split_is_refused_by_name(case: str) -> None:
    network, message = REFUSED[case]

    with pytest.raises(ModelError) as caught:
        sequential_groups(network)

    assert message in str(caught.value)


def test_inputs_and_outputs_are_never_split() -> None:
    network = nn.Sequential(
        nn.BatchNorm1d(4), nn.Linear(4, 8), nn.PReLU(), nn.Linear(8, 2), nn.BatchNorm1d(2), nn.LogSoftmax(1)
    )

    (group,) = sequential_groups(network)

    assert group == Group("1", 8, (Slot("1.weight", 0), Slot("1.bias", 0), Slot("3.weight", 1)))


def test_a_network_on_the_meta_device_has_the_same_groups() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    with torch.device("meta"):
        template = build()

    assert sequential_groups(template) == sequential_groups(build())


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([Group("g", 4, (Slot("no.weight", 0),))], "the network has no tensor 'no.weight'"),
        ([Group("g", 5, (Slot("weight", 0),))], "positions 0 to 5 of dim 0 are not within 'weight' of shape"),
        ([Group("g", 2, (Slot("weight", 0, 2, 1),))], "positions 1 to 5"),
        ([Group("g", 2, (Slot("weight", 0),)), Group("h", 2, (Slot("weight", 0, 1, 1),))], "'g' and 'h' overlap"),
        ([Group("g", 0, ())], "has 0 neurons"),
    ],
)
def test_declared_groups_are_checked_against_the_network(groups: list[Group], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        check_groups(groups, tensor_specs(nn.Linear(3, 4), with_statistics=True))
