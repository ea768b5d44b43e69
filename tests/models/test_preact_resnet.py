"""The pre-activation ResNet: channels inside blocks are split, or whole blocks are assigned to workers."""

import pytest
import torch
from torch.utils.data import TensorDataset

import ist
from ist.checks.verify import verify_cuts
from ist.errors import ModelError
from ist.models.preact_resnet import PreActResNet
from ist.subnet.residual_blocks import scaled_blocks
from tests.conftest import clone
from tests.networks import seeded
from tests.neurons.networks import rand
from tests.neurons.test_neurons import job_of

IMAGES = rand(2, 1, 8, 8)
BLOCKS = {"strategy": "blocks", "blocks": ["sections.?.[1-9]"]}


def small(depths: tuple[int, int, int] = (2, 2, 2)) -> PreActResNet:
    model = seeded(lambda: PreActResNet(depths, width=4, num_classes=3))
    assert isinstance(model, PreActResNet)
    return model


def stripes(size: int, seed: int = 0) -> TensorDataset:
    """Return noisy images with a bright stripe in one of three positions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(size) % 3
    images = 0.3 * torch.randn(size, 1, 8, 8, generator=generator)
    for label in range(3):
        images[labels == label, :, :, label::3] += 1
    return TensorDataset(images, labels)


@pytest.mark.parametrize(("stride", "sides"), [(1, (28, 14, 7)), (2, (14, 7, 4))])
def test_each_section_has_half_the_resolution_and_twice_the_channels(stride: int, sides: tuple[int, ...]) -> None:
    model = PreActResNet((1, 1, 1), width=4, in_channels=3, num_classes=7, stem_stride=stride)
    x = rand(2, 3, 28, 28)

    assert model(x).shape == (2, 7)
    x = model.stem(x)
    for section, side, channels in zip(model.sections, sides, (4, 8, 16), strict=True):
        x = section(x)
        assert x.shape == (2, channels, side, side)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"depths \[1, 0, 1\].*>= 1"):
        PreActResNet((1, 0, 1))
    with pytest.raises(ValueError, match="width.*>= 1"):
        PreActResNet(width=0)


@pytest.mark.parametrize("depths", [(1, 1, 1), (2, 1, 2)])
def test_only_the_channels_between_the_convolutions_of_a_block_are_split(depths: tuple[int, int, int]) -> None:
    job = job_of(small(depths), IMAGES)

    blocks = {f"sections.{s}.{b}": 4 * 2**s for s, depth in enumerate(depths) for b in range(depth)}
    assert {group.name: group.size for group in job.split.groups} == blocks
    assert {group.size for group in job.split.found.groups if group.residual} == {4, 8, 16}
    cut = {name for group in job.split.groups for name in (slot.tensor for slot in group.slots)}
    assert {name.rsplit(".", 2)[1] for name in cut} == {"conv_1", "norm_2", "conv_2"}
    verify_cuts(job)


def test_the_stem_and_the_streams_of_the_sections_are_split_on_request() -> None:
    job = job_of(small(), IMAGES, partition__residual=True)

    assert sorted(group.size for group in job.split.groups) == [4, 4, 4, 8, 8, 8, 16, 16, 16]
    assert "stem" in [group.name for group in job.split.groups]
    verify_cuts(job)


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("sections.?.[1-9]", ["sections.0.1", "sections.1.1", "sections.2.1"]),
        ("sections.0.*", ["sections.0.0", "sections.0.1"]),
    ],
)
def test_blocks_that_preserve_the_shape_can_be_assigned_to_workers(pattern: str, paths: list[str]) -> None:
    job = job_of(small(), IMAGES, partition__strategy="blocks", partition__blocks=[pattern])

    assert list(job.split.groups[0].modules) == paths
    verify_cuts(job)


def test_a_block_that_changes_the_shape_cannot_be_assigned() -> None:
    job = job_of(small(), IMAGES, partition__strategy="blocks", partition__blocks=["sections.1.*"])

    with pytest.raises(ModelError, match=r"sections\.1\.0"):
        verify_cuts(job)


def test_split_channels_learn() -> None:
    history = ist.train(
        small((1, 1, 1)), stripes(96), workers=2, local_steps=4, rounds=4, batch_size=16,
        test_data=stripes(48, seed=1), progress=False,
    ).history  # fmt: skip

    assert history[-1]["test_loss"] < 0.8 * history[0]["test_loss"]


def test_assigned_blocks_learn_and_every_tensor_changes() -> None:
    model = small()
    before = clone(dict(model.named_parameters()))

    history = ist.train(
        model, stripes(96), workers=2, local_steps=4, rounds=5, batch_size=16, test_data=stripes(48, seed=1),
        partition=BLOCKS | {"min_depth": 1}, progress=False,
    ).history  # fmt: skip

    assert history[-1]["test_loss"] < 0.8 * history[0]["test_loss"]
    assert all(not torch.equal(before[name], tensor) for name, tensor in model.named_parameters())
    with scaled_blocks(model.eval(), {f"sections.{section}.1": 1 / 2 for section in range(3)}):
        assert model(IMAGES).shape == (2, 3)
