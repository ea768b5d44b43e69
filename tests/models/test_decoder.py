"""The decoder: heads and feed-forward units are split, the residual stream is shared."""

import pytest
import torch
from torch.utils.data import TensorDataset

import ist
from ist.checks.verify import verify_cuts
from ist.models.decoder import Decoder
from ist.subnet.job import Job, assignments
from tests.networks import seeded
from tests.neurons.test_neurons import job_of


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 20, shape, generator=torch.Generator().manual_seed(5))


def small_job(tied: bool, dropout: float = 0.0, workers: int = 2) -> Job:
    build = lambda: Decoder(20, length=8, width=16, layers=2, heads=4, ffn=24, dropout=dropout, tied=tied)  # noqa: E731
    return job_of(seeded(build), tokens(2, 8), workers=workers)


def test_each_position_has_a_score_for_each_token() -> None:
    assert Decoder(20, length=8, width=16, heads=2, ffn=24)(tokens(3, 6)).shape == (3, 6, 20)


def test_a_position_does_not_depend_on_later_ones() -> None:
    model, text = Decoder(20, length=8, width=16, heads=4, ffn=24), tokens(1, 8)
    changed = text.clone()
    changed[0, 5] = (text[0, 5] + 1) % 20

    same = (model(text) == model(changed)).all(dim=2)[0]

    assert same.tolist() == [True] * 5 + [False] * 3


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_is_tied_to_the_embedding_on_request(tied: bool) -> None:
    model = Decoder(20, length=8, width=16, heads=2, ffn=24, tied=tied)

    assert (model.output.weight is model.tokens.weight) == tied


def test_initial_weights_are_small_and_smaller_before_the_residual_stream() -> None:
    model = Decoder(layers=8)
    block = model.blocks[3]

    assert float(model.tokens.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(block.attention.qkv.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(block.attention.projection.weight.detach().std()) == pytest.approx(0.02 / 4, rel=0.05)
    assert float(block.feed_forward[2].weight.detach().std()) == pytest.approx(0.02 / 4, rel=0.05)
    assert not block.attention.qkv.bias.any()


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="width 10.*4 heads"):
        Decoder(width=10)
    with pytest.raises(ValueError, match="9 tokens.*<= 8"):
        Decoder(20, length=8, width=16)(tokens(1, 9))
    with pytest.raises(ValueError, match="layers.*>= 1"):
        Decoder(layers=0)


@pytest.mark.parametrize("tied", [True, False])
def test_only_heads_and_feed_forward_units_are_split(tied: bool) -> None:
    job = small_job(tied)

    assert {group.name: group.size for group in job.split.found.groups} == {
        "blocks.0.attention": 4,
        "blocks.0.feed_forward": 24,
        "blocks.1.attention": 4,
        "blocks.1.feed_forward": 24,
    }
    assert job.split.groups == job.split.found.groups
    assert job.split.submodel_plan(assignments(job).of(0)[0]).specs["tokens.weight"].shape == (20, 16)


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_workers_get_equal_shares_of_the_heads_and_their_submodels_are_the_masked_network(workers: int) -> None:
    job = small_job(tied=True, dropout=0.1, workers=workers)

    verify_cuts(job)
    heads = [
        job.split.module(share, torch.device("meta")).get_submodule("blocks.1.attention").heads
        for share in assignments(job).of(0)
    ]
    assert sum(heads) == 4
    assert max(heads) - min(heads) <= 1


def test_split_decoders_learn() -> None:
    text = (tokens(48, 1) + torch.arange(8)) % 20  # consecutive numbers
    data = TensorDataset(text, text)

    history = ist.train(
        Decoder(20, length=8, width=16, layers=1, heads=4, ffn=24), data, loss="next_token", workers=2, local_steps=8,
        rounds=4, batch_size=12, optimizer="AdamW", optimizer_args={"lr": 0.02}, test_data=data,
        evaluate_options={"metric": "none"}, progress=False,
    ).history  # fmt: skip

    assert history[-1]["test_loss"] < 0.7 * history[0]["test_loss"]
