"""Many networks: their neuron groups are found, a subnet is the masked full network, and cuts round-trip."""

import dataclasses
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ist.checks.verify import verify_cut, verify_cuts
from ist.data.nested import call_model, mapped, tensors_in
from ist.errors import ModelError
from ist.runs.build import make_job
from ist.subnet.cut import cut_specs, extract, reassemble
from ist.subnet.job import Job, assignments
from ist.subnet.module import bind
from ist.tensors import named_tensors
from tests.conftest import assert_same, clone, small_config, whole_state
from tests.networks import seeded
from tests.neurons.networks import CASES, IMAGE, Case, Flipped, Heads, rand

by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
ANY = TensorDataset(torch.zeros(64, 1), torch.zeros(64, dtype=torch.int64))


def job_of(model: nn.Module, example: Any, workers: int = 2, **changes: Any) -> Job:
    config = small_config(train__workers=workers, **changes)
    return make_job(config, model, lambda: model, ANY, None, nn.functional.cross_entropy, example)


def case_job(case: Case, **changes: Any) -> Job:
    return job_of(seeded(case.build), case.example, partition__residual=case.residual, **changes)


@by_case
def test_the_groups_are_the_expected_ones(case: Case) -> None:
    job = case_job(case)

    assert not job.split.found.unknown
    sizes = [group.size for group in job.split.groups]
    assert sizes == list(case.groups.values())
    for group, name in zip(job.split.groups, case.groups, strict=True):
        assert name.isdigit() or group.name == name


@by_case
@pytest.mark.parametrize("scale", ["none", "width"])
def test_a_subnet_is_the_masked_full_network(case: Case, scale: str) -> None:
    # Checks outputs and gradients in float64: the first share, the last (uneven), and one neuron of each group.
    verify_cuts(case_job(case, train__activation_scale=scale))


@by_case
def test_subnets_written_back_untouched_change_nothing(case: Case) -> None:
    model = seeded(case.build)
    job = case_job(case)
    model = job.task.build()
    for tensor in model.parameters():
        tensor.data = tensor.data.contiguous()
    state = whole_state(job, model)
    before = clone(state)
    cuts = assignments(job).cuts(3)
    parts = []
    for cut in cuts:
        part = {name: torch.full(s.shape, 7, dtype=s.dtype) for name, s in cut_specs(job.split.specs, cut).items()}
        extract(state, cut, part)
        parts.append(part)

    reassemble(state, cuts, list(enumerate(parts)), assignments(job).exclusive(0))

    assert_same(state, before)
    for group in job.split.groups:
        for slot in group.slots:
            held = [cut[slot.tensor][slot.dim] for cut in cuts if slot.tensor in cut]
            covered = np.concatenate([part for part in held if part is not None]) if held else np.arange(0)
            assert set(slot.positions(np.arange(group.size))) <= set(covered) or not held


@by_case
def test_the_submodel_of_a_single_worker_trains_like_the_full_network_bit_for_bit(case: Case) -> None:
    whole = seeded(case.build).double()
    example = mapped(case.example, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    job = job_of(whole, example, workers=1)
    single = job.split.module(assignments(job).of(0)[0], torch.device("cpu")).double()
    bind(single, clone(named_tensors(whole)))

    for model in (whole, single):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        for step in range(3):
            torch.manual_seed(step)  # dropout
            outputs = [t for t in tensors_in(call_model(model.train(), example)) if t.is_floating_point()]
            optimizer.zero_grad()
            sum(tensor.square().mean() for tensor in outputs).backward()
            optimizer.step()

    assert_same(dict(single.named_parameters()), dict(whole.named_parameters()))


class ReadsValues(nn.Module):
    """Reads values of its inputs, so it can be traced only with values."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Any, **named: Any) -> Any:
        assert all(float(tensor.sum()) < 1e9 for tensor in tensors_in((inputs, named)))
        return self.inner(*inputs, **named)


@pytest.mark.parametrize("case", [CASES[name] for name in ("fused", "dense", "oddities")])
def test_a_network_that_reads_values_is_traced_with_values(case: Case) -> None:
    model = seeded(case.build)
    job = job_of(ReadsValues(model), case.example)

    assert not job.split.found.on_meta
    assert [group.size for group in job.split.groups] == list(case.groups.values())
    verify_cuts(job)


class UnknownOperator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(12, 8), nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(torch.linalg.qr(self.first(x).T).Q.T).relu())


def test_neurons_that_reach_an_operator_without_a_rule_are_not_split_and_a_warning_names_it() -> None:
    with pytest.warns(UserWarning, match=r"aten\.linalg_qr.*test_neurons\.py:\d+"):
        job = job_of(seeded(UnknownOperator), rand(3, 12))

    assert [group.name for group in job.split.groups] == ["second"]
    verify_cuts(job)


class WithLoss(nn.Module):
    """Computes its loss itself, as models of transformers do if they get labels."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.first, self.second, self.loss = nn.Linear(12, 8), nn.Linear(8, 5), loss

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.second(nn.functional.logsigmoid(self.first(x)))
        return self.loss(scores, labels), scores


CLASSES, SHARES = torch.tensor([0, 2, 4]), torch.tensor([[0.0, 1.0, 0.0, 1.0, 1.0]] * 3)


@pytest.mark.parametrize(
    ("loss", "labels"),
    [
        (nn.functional.cross_entropy, CLASSES),
        (nn.functional.multi_margin_loss, CLASSES),
        (nn.functional.mse_loss, SHARES),
        (nn.functional.huber_loss, SHARES),
        (nn.functional.smooth_l1_loss, SHARES),
        (nn.functional.binary_cross_entropy_with_logits, SHARES),
        (nn.functional.soft_margin_loss, SHARES),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_network_that_computes_its_loss_is_split_without_a_warning(loss: Any, labels: Tensor) -> None:
    job = job_of(seeded(lambda: WithLoss(loss)), {"x": rand(3, 12), "labels": labels})

    assert not job.split.found.unknown
    assert {group.name: group.size for group in job.split.groups} == {"first": 8}
    verify_cuts(job)


class Mixing(nn.Module):
    """Mixes along the hidden axis, so its first layer cannot be split."""

    def __init__(self, mix: Any) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(12, 8), nn.Linear(8, 6), nn.Linear(6, 5)
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.mix(self.first(x))).relu())


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x.softmax(1),
        lambda x: x - x.mean(1, keepdim=True),
        lambda x: x.cumsum(1),
        lambda x: nn.functional.layer_norm(x, (8,)),
        lambda x: x * torch.arange(8),
        lambda x: x.sort(1).values,
        lambda x: nn.functional.normalize(x),
        lambda x: x[:, torch.tensor([1, 0, 2, 3, 4, 5, 7, 6])],
        lambda x: x @ torch.eye(8),
        lambda x: torch.nn.functional.pad(x, (1, -1)),
    ],
    ids=["softmax", "mean", "cumsum", "layer norm", "numbered", "sort", "normalize", "index", "constant", "pad"],
)
def test_neurons_that_an_operator_mixes_are_not_split(mix: Any) -> None:
    job = job_of(seeded(lambda: Mixing(mix)), rand(3, 12))

    assert [group.name for group in job.split.groups] == ["second"]
    verify_cuts(job)


def test_a_wrong_cut_is_refused_by_the_check() -> None:
    # The groups of a network that flips an axis, without the order that the flip needs.
    job = job_of(seeded(Flipped), IMAGE)
    wrong = [
        dataclasses.replace(group, slots=tuple(dataclasses.replace(s, order=None) for s in group.slots))
        for group in job.split.groups
    ]
    assert wrong != list(job.split.groups)

    with pytest.raises(ModelError, match="masked"):
        verify_cuts(dataclasses.replace(job, split=dataclasses.replace(job.split, groups=tuple(wrong))))


def test_a_missing_attribute_size_is_refused_by_the_check() -> None:
    job = job_of(seeded(Heads), rand(2, 5, 20))
    blind = dataclasses.replace(
        job, split=dataclasses.replace(job.split, found=dataclasses.replace(job.split.found, sizes=()))
    )

    with pytest.raises(ModelError, match=r"'q'.*\[2, 5, 6, 4\].*partition\.sizes.*partition\.exclude"):
        verify_cuts(blind)


class FixedWidth(Heads):
    """Its forward compares a shape with a number that no attribute gives."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.q(x).shape[2] == 24, "expected a width of 24"
        return super().forward(x)


class PartlySplittable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.feed, self.back, self.attention = nn.Linear(20, 11), nn.Linear(11, 20), FixedWidth()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.back(self.feed(x).relu()))


def test_a_group_that_makes_submodels_fail_is_not_split_and_a_warning_names_it() -> None:
    with pytest.warns(UserWarning, match=r"'attention.*width of 24 \(test_neurons.py, line \d+.*partition\.exclude"):
        job = job_of(seeded(PartlySplittable), rand(2, 5, 20))

    assert "feed" in [group.name for group in job.split.groups]
    assert not any(group.name.startswith("attention") for group in job.split.groups)
    verify_cuts(job)


def test_a_network_without_a_splittable_group_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ModelError, match=r"width of 24 \(test_neurons.py, line \d+.*docs/groups\.md"):
            job_of(seeded(FixedWidth), rand(2, 5, 20))


def test_a_cut_of_chosen_neurons_can_be_checked() -> None:
    case = CASES["fused"]
    job = case_job(case)
    whole = job.task.build_copy()

    verify_cut(job.split, whole, case.example, [np.array([0, 3]), np.array([2])])


def test_training_moves_every_tensor_of_an_attention_network_and_keeps_ties() -> None:
    import ist

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.decode = nn.Embedding(13, 12), nn.Linear(12, 13, bias=False)
            self.layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)
            self.decode.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.decode(self.layer(self.embed(tokens))).transpose(1, 2)

    model = seeded(Tagger)
    before = clone(dict(model.named_parameters()))
    tokens = torch.randint(0, 13, (48, 5), generator=torch.Generator().manual_seed(0))

    result = ist.train(
        model, TensorDataset(tokens, tokens), workers=3, local_steps=4, rounds=6, batch_size=8,
        optimizer="AdamW", optimizer_args={"lr": 0.01}, test_data=TensorDataset(tokens, tokens),
        evaluate_options={"metric": "none"}, progress=False,
    )  # fmt: skip

    assert result.history[-1]["test_loss"] < 0.8 * result.history[0]["test_loss"]
    assert model.decode.weight is model.embed.weight
    assert all(not torch.equal(before[name], tensor) for name, tensor in model.named_parameters())
