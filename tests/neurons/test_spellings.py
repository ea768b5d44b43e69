"""Attention and recurrence as users write them: their heads and units are split, however the code computes sizes."""

# ruff: noqa: N806 (the letters that these programs give to sizes)

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import ist
from ist.checks.verify import verify_cuts
from ist.errors import ModelError
from ist.subnet.job import Job, assignments
from ist.subnet.module import bind
from ist.subnet.split_model import ShapeKeys
from ist.tensors import named_tensors
from tests.networks import seeded
from tests.neurons.networks import Case, rand
from tests.neurons.positions import POSITIONS
from tests.neurons.recurrences import RECURRENCES, SERIES, WithState
from tests.neurons.spellings import GPT, SPELLINGS, STATES, TOKENS, Inside, ViTAttention
from tests.neurons.test_neurons import ReadsValues, job_of

CASES: dict[str, Case] = SPELLINGS | RECURRENCES | POSITIONS


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_networks_as_users_write_them_are_split(case: Case) -> None:
    job = job_of(seeded(case.build), case.example)

    assert not job.split.found.unknown
    assert {group.name: group.size for group in job.split.groups} == case.groups
    verify_cuts(job)  # outputs and gradients are those of the masked full network, in float64


def submodel_with_values(job: Job, worker: int = 0) -> nn.Module:
    submodel = job.split.module(assignments(job).of(0)[worker], torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    bind(submodel, {n: torch.randn(t.shape, generator=generator) / 9 for n, t in named_tensors(submodel).items()})
    return submodel


class ByHand(ViTAttention):
    """The computation that a `ViTAttention` with 2 heads must make."""

    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, 2, 8).permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(-2, -1) * 8**-0.5).softmax(dim=-1) @ v
        return self.proj(y.transpose(1, 2).reshape(B, N, 16))


def test_a_submodel_computes_bit_for_bit_what_a_module_written_for_its_size_does() -> None:
    job = job_of(seeded(lambda: Inside(ViTAttention())), STATES)
    submodel = submodel_with_values(job)
    by_hand = copy.deepcopy(submodel)
    by_hand.block.attn.__class__ = ByHand
    batch = rand(5, 9, 32)  # a different number of samples and of positions than in the example

    for precision in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            outputs = []
            for module in (submodel, by_hand):
                torch.manual_seed(0)  # dropout
                outputs.append(module.train()(batch))
        for output in outputs:
            output.square().mean().backward()

        assert torch.equal(*outputs)
        for one, other in zip(submodel.parameters(), by_hand.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)


def test_sizes_of_calls_are_replaced_only_in_modules_that_need_it() -> None:
    plain = job_of(seeded(SPELLINGS["own width"].build), STATES)
    resized = job_of(seeded(SPELLINGS["DINO"].build), STATES)

    assert not plain.split.found.resized
    assert type(submodel_with_values(plain).block.attn) is type(plain.split.template.block.attn)
    assert list(resized.split.found.resized) == ["block.attn"]
    assert submodel_with_values(resized).block.attn.num_heads == 4  # the value of the full network


@pytest.mark.parametrize("name", ["vit-pytorch", "fused pattern", "layers of einops", "perceiver", "configured"])
def test_axes_of_einops_and_settings_objects_are_changed_as_attributes(name: str) -> None:
    job = job_of(seeded(SPELLINGS[name].build), SPELLINGS[name].example)

    assert not job.split.found.resized


def test_an_lstm_that_is_traced_with_values_is_split() -> None:
    # On the CPU torch runs the whole LSTM as one operator, unless oneDNN is switched off.
    one_dnn = torch.backends.mkldnn.enabled
    job = job_of(ReadsValues(seeded(lambda: WithState(nn.LSTM))), SERIES)

    assert not job.split.found.on_meta
    assert [group.size for group in job.split.groups] == [7]
    assert torch.backends.mkldnn.enabled == one_dnn
    verify_cuts(job)


class Numbered(nn.Module):
    """Multiplies each hidden unit by its index, which would be another one in a submodel."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.up, self.middle, self.down = 8, nn.Linear(6, 8), nn.Linear(8, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.middle(self.up(x) * torch.arange(self.width)).relu())


def test_units_that_are_numbered_are_not_split() -> None:
    job = job_of(seeded(Numbered), SERIES)

    assert [group.name for group in job.split.groups] == ["middle"]
    verify_cuts(job)


def test_the_sizes_of_calls_survive_pickling_for_other_processes() -> None:
    job = job_of(seeded(lambda: Inside(ViTAttention())), STATES)
    sent = pickle.loads(pickle.dumps(job.split.found))

    plan, received = (
        job.split.submodel_plan(assignments(job).of(0)[0]),
        job.split.submodel_plan(assignments(job).of(0)[1]),
    )
    object.__setattr__(job, "found", sent)

    assert job.split.submodel_plan(assignments(job).of(0)[0]).calls == plan.calls
    assert job.split.submodel_plan(assignments(job).of(0)[1]).calls == received.calls


class Branching(ViTAttention):
    """Runs other code on batches of more than three samples."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 3:
            return x + self.qkv(x).reshape(*x.shape[:2], 3, -1).sum(2).mean()
        return super().forward(x)


def test_code_that_the_example_did_not_reach_is_an_error_in_training() -> None:
    submodel = submodel_with_values(job_of(seeded(lambda: Inside(Branching())), STATES))

    submodel.train()(rand(3, 6, 32))
    with pytest.raises(ModelError, match=r"test_spellings\.py:\d+.*partition\.exclude"):
        submodel(rand(4, 6, 32))


class Repeating(nn.Module):
    """Runs one line once per position, each time with another number of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = [4, 2] * 4
        self.qkv, self.o = (nn.ModuleList([nn.Linear(32, out) for _ in range(8)]) for out in (96, 32))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        for layer in range(T):
            h = self.heads[layer]
            q, k, v = self.qkv[layer](x).view(B, T, 3, h, C // h).permute(2, 0, 3, 1, 4)
            x = x + self.o[layer](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, C))
        return x


def test_more_visits_of_a_line_than_on_the_example_are_an_error() -> None:
    submodel = submodel_with_values(job_of(seeded(lambda: Inside(Repeating())), STATES))

    submodel.train()(STATES)
    with pytest.raises(ModelError, match=r"spellings\.py:\d+ .*\b7\b.*\b6\b.*partition\.exclude"):
        submodel(rand(2, 7, 32))


class Comparing(ViTAttention):
    def forward(self, x: Tensor) -> Tensor:
        if self.qkv(x).shape[2] != 96:
            raise ValueError("expected a width of 96")
        return super().forward(x)


def test_attention_that_compares_a_width_with_a_number_is_not_split_and_the_line_is_named() -> None:
    with pytest.warns(
        UserWarning, match=r"'block.attn'.*width of 96 \(test_spellings.py, line \d+.*partition\.exclude"
    ):
        job = job_of(seeded(lambda: Inside(Comparing())), STATES)

    assert [group.name for group in job.split.groups] == ["block.mlp"]
    verify_cuts(job)


class Chosen(nn.Module):
    """The number of its first four units that a worker holds depends on the assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.few = nn.Linear(12, 8), nn.Linear(8, 5), 4

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(torch.cat([h[:, : self.few].relu(), h[:, self.few :].tanh()], dim=1))


def test_a_size_that_depends_on_which_units_are_held_is_set_for_each_assignment() -> None:
    job = job_of(seeded(Chosen), rand(2, 12))
    keys = ShapeKeys(job.split)

    looks = {keys.of(assignments(job).of(number)[0]) for number in range(20)}
    held = {tuple(assignments(job).of(number)[0][0].tolist()) for number in range(20)}

    assert len(looks) == len(held) > 1
    verify_cuts(job)


def test_nano_gpt_is_trained_and_its_embeddings_stay_tied() -> None:
    model = seeded(lambda: GPT(layers=1))
    tokens = TensorDataset(TOKENS.repeat(20, 1), TOKENS.repeat(20, 1))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    ist.train(
        model, tokens, loss=loss, workers=3, local_steps=3, rounds=3, batch_size=8, optimizer="AdamW", progress=False
    )

    assert model.wte.weight is model.lm_head.weight
    assert all(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
