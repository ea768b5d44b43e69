"""A worker's module with the frozen rest computes the full network, and trains its own positions only."""

import copy
import gc
import re
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ist.errors import ConfigError, ModelError
from ist.loops.part import completed
from ist.models.mlp import MLP
from ist.monitoring.meter import Meter
from ist.pools.inline import InlinePool
from ist.runs.execute import execute
from ist.runs.open import CoordinatorPart
from ist.runs.rehearsal import rehearse
from ist.runs.split import split_of
from ist.subnet.cut import cut_specs, extract
from ist.subnet.frozen_rest import FullModule, Partly
from ist.subnet.job import Job, assignments
from ist.subnet.stores.shards import owned_rows, shard_of
from ist.tensors import TensorSpec, memory_key, named_tensors
from ist.training.coordinator import Coordinator
from ist.training.memory_budget import count_step, memory_budgets
from ist.transport.codec import GROUP, CodedTensor, coded_specs, encode
from ist.transport.frozen_parameters import FrozenCache, FrozenSender, rest_fraction
from ist.transport.pieces import Pieces
from ist.transport.quantize import dequantize, quantize
from tests.conftest import assert_same, config_tree, data, job_for, naming, whole_state
from tests.networks import NETWORKS, frozen_first, seeded
from tests.neurons.networks import stack
from tests.training.test_elastic import ChangingPool


class Recurrent(nn.Module):
    """An LSTM, of which hidden units are split."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.last = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.lstm(x.view(-1, 3, 4))[0][:, -1])


class Convolutions(nn.Module):
    """Convolutions with batch norms in both modes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 6, 2), nn.BatchNorm2d(6)
        self.second, self.fixed = nn.Conv2d(6, 8, 2), nn.BatchNorm2d(8).eval()
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x.view(-1, 1, 3, 4))).relu()
        return self.last(self.fixed(self.second(x)).relu().mean((2, 3)))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = GPT2Config(
        vocab_size=5, n_positions=12, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, resid_pdrop=0,
        embd_pdrop=0, attn_pdrop=0,
    )  # fmt: skip

    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = GPT2LMHeadModel(settings)

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.network(x.abs().mul(3).long().clamp(max=4)).logits[:, -1]
            return scores

    return Scores()


CASES: dict[str, Callable[[], nn.Module]] = {
    "perceptron, batch norm": NETWORKS["two hidden layers, batch norm"],
    "slopes of neurons": NETWORKS["nested, per-neuron slopes"],
    "attention": lambda: nn.Sequential(
        nn.Unflatten(1, (3, 4)),
        nn.Linear(4, 12),
        nn.TransformerEncoderLayer(12, 3, 20, 0.0, batch_first=True),
        nn.Flatten(),
        nn.Linear(36, 5),
    ),
    "convolutions": Convolutions,
    "lstm": Recurrent,
    "frozen parameters": frozen_first,
    "gpt-2": gpt2,
}


def made(model: nn.Module, worker: int, coding: Any, **changes: Any) -> tuple[Job, FullModule, nn.Module, Any]:
    """Return a job, a worker's module, the full network with the values that this module computes with, and its cut."""
    inputs, targets = data().tensors
    dataset = TensorDataset(inputs.to(next(model.parameters()).dtype), targets)
    changes |= {"partition__rest": "frozen", "exchange__rest": coding, "train__workers": 2}
    job = job_for(model, dataset, **changes)
    split, neurons = job.split, assignments(job).of(0)[worker]
    state = {name: tensor.detach().contiguous() for name, tensor in named_tensors(model).items()}
    cut = {name: dims for name, dims in split.cut(neurons).items() if name in split.model_specs}
    specs = cut_specs(split.model_specs, cut)
    own = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
    extract(state, cut, into=own)
    rest = {}
    for name in split.partly_held:
        spec = split.all_specs[name]
        coded = {key: torch.zeros(s.shape, dtype=s.dtype) for key, s in coded_specs({name: spec}, coding).items()}
        encode({name: state[name]}, coded, coding)
        rest[name] = CodedTensor(name, coded, spec, coding).decode
    full = split.full_module(neurons, torch.device("cpu"))
    full.bind(own, cut, rest)
    oracle = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in named_tensors(oracle).items():
            if name in full.parts:
                tensor.copy_(full.parts[name].value(own.get(name)))
    return job, full, oracle, cut


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("coding", ["exact", "int4"])
def test_gradients_of_own_positions_are_those_of_the_full_network(name: str, coding: str) -> None:
    model = seeded(CASES[name]).double()
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, full, oracle, cut = made(model, 1, coding)

    expected = oracle(x)
    expected.square().sum().backward()
    found = full.module(x)
    found.square().sum().backward()

    # Only the order of sums differs: 1e-12 is a few thousand roundings of float64.
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    theirs = dict(oracle.named_parameters())
    trained = dict(full.module.named_parameters())
    assert trained.keys() == {key for key, parameter in theirs.items() if parameter.requires_grad}
    for key, parameter in trained.items():
        whole, part = theirs[key].grad, torch.empty_like(parameter)
        assert whole is not None
        extract({key: whole.contiguous()}, cut, into={key: part})
        torch.testing.assert_close(parameter.grad, part, rtol=1e-11, atol=1e-12)
    assert any(parameter.numel() < theirs[key].numel() for key, parameter in trained.items())


def test_blocks_that_a_worker_does_not_hold_are_there_and_have_no_gradient() -> None:
    model = seeded(stack).double()
    x = torch.randn(7, 12, dtype=torch.float64)
    job, full, oracle, _ = made(model, 0, "int8", partition__strategy="blocks", partition__blocks=["1.*"])

    found = full.module(x)

    torch.testing.assert_close(found, oracle(x), rtol=1e-12, atol=1e-12)
    lacking = job.split.partly_held - {name for name, _ in full.module.named_parameters()}
    assert lacking
    assert assignments(job).block_scales() == {}  # all blocks are always computed


@pytest.mark.parametrize("name", ["perceptron, batch norm", "convolutions"])
def test_autograd_saves_no_full_weight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, full, _, _ = made(seeded(CASES[name]), 0, "int4")
    assembled, value = [], Partly.value

    def noted(part: Partly, *arguments: Any) -> Tensor:
        tensor = value(part, *arguments)
        if tensor.ndim > 1:
            assembled.append(memory_key(tensor))
        return tensor

    monkeypatch.setattr(Partly, "value", noted)
    loss = full.module(torch.randn(9, 12)).sum()

    assert assembled
    assert all(memory.expired() for memory in assembled)  # the weights are gone before the backward pass
    loss.backward()


def test_a_parameter_that_changes_before_the_backward_pass_is_noticed() -> None:
    _, full, _, _ = made(seeded(Convolutions), 0, "int4")
    loss = full.module(torch.randn(9, 12)).sum()

    with torch.no_grad():
        dict(full.module.named_parameters())["second.weight"].mul_(2)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autocast_gives_the_gradients_of_the_full_network() -> None:
    model = seeded(CASES["perceptron, batch norm"])
    x = torch.randn(7, 12)
    _, full, oracle, cut = made(model, 0, "int4")

    for network in (full.module, oracle):
        with torch.autocast("cpu", torch.bfloat16):
            loss = network(x).float().square().sum()
        loss.backward()

    for key, parameter in full.module.named_parameters():
        whole, part = dict(oracle.named_parameters())[key].grad, torch.empty_like(parameter)
        assert whole is not None
        extract({key: whole.contiguous()}, cut, into={key: part})
        assert parameter.dtype == torch.float32
        # bfloat16 has 8 bits: sums in another order differ by a few of its roundings.
        torch.testing.assert_close(parameter.grad, part, rtol=0.05, atol=0.05 * part.abs().max().item())


def test_every_round_sends_the_rest_of_its_own_weights_and_frozen_parameters_once() -> None:
    model = seeded(frozen_first)
    job = job_for(model, partition__rest="frozen", exchange__rest="exact", train__workers=2, partition__exclude=["0"])
    device, held = torch.device("cpu"), assignments(job)
    sender = FrozenSender(job.split, job.config.exchange, held, model.state_dict(), device)
    cache = FrozenCache(job.split, job.config.exchange, held)
    for round_number in range(2):
        sender.begin(["a", "b"])
        messages = [sender.write(name, w, round_number, held.of(round_number)[w]) for w, name in enumerate("ab")]
        message, reuses = messages[0]
        assert message is messages[1][0]  # one message for all workers
        assert message is not None
        assert message.layout == cache.layout(round_number, held.of(round_number)[0], reuses)
        cache.update(held.of(round_number)[0], 0, round_number, message, device)

        assert ("0.weight" in message.tensors) == (round_number == 0)
        assert torch.equal(cache.rest["4.weight"].decode(), model[4].weight)
        assert torch.equal(cache.rest["0.weight"].decode(), model[0].weight)
        for name in "ab":
            sender.returned(name)
        with torch.no_grad():
            model[4].weight.mul_(1.5)


@pytest.mark.parametrize("coding", ["int3", "bfloat16"])
def test_the_rows_of_all_owners_are_the_rest_that_one_coordinator_sends(coding: str) -> None:
    model = seeded(lambda: MLP([12, 64, 35, 5], batch_norm=True))  # rows of 64 numbers have two scales
    job = job_for(model, partition__rest="frozen", exchange__rest=coding, train__workers=2)
    held, device, exchange, owners = assignments(job), torch.device("cpu"), job.config.exchange, 3
    state = model.state_dict()
    star = FrozenSender(job.split, exchange, held, state, device)
    star.begin(["a"])
    expected, _ = star.write("a", 0, 0, held.of(0)[0])
    received = {}
    for owner in range(owners):
        shard = shard_of(job.split, owner, owners)
        rows = {n: t[owned_rows(len(t), owner, owners)].contiguous() if t.ndim else t for n, t in state.items()}
        sender = FrozenSender(shard, exchange, held, rows, device)
        sender.begin(["a"])
        message, _ = sender.write("a", 0, 0, held.of(0)[0])
        assert message is not None
        received[owner] = message
    cache, pieces = FrozenCache(job.split, exchange, held), Pieces(job.split, exchange, owners, 0)
    missing = cache.missing(0, held.of(0)[0], reuses_frozen=False)
    needed = cache.needed(0, held.of(0)[0])
    layouts = pieces.frozen_layouts(needed, missing)

    joined = pieces.join_frozen(received, needed, missing, 0)

    assert {owner: message.layout for owner, message in received.items()} == layouts
    assert expected is not None
    assert joined is not None
    assert torch.equal(joined.flat, expected.flat)


def test_one_worker_is_plain_training_whatever_the_rest() -> None:
    states = []
    for rest in ("absent", "frozen"):
        model = seeded(NETWORKS["two hidden layers, batch norm"])
        job = job_for(model, partition__rest=rest, train__workers=1)
        assert not assignments(job).has_rest(0)
        before = {name: tensor.clone() for name, tensor in whole_state(job, model).items()}
        part = execute(job, progress=False)
        assert isinstance(part, CoordinatorPart)
        states.append(whole_state(job, part.method.model))
        assert not torch.equal(states[-1]["output.weight"], before["output.weight"])

    assert_same(*states)


def test_inspect_names_the_rest_and_its_memory() -> None:
    model = seeded(NETWORKS["no batch norm"])
    job = job_for(model, partition__rest="frozen", exchange__rest="int8", train__workers=2)

    budget = memory_budgets(job, count_step(job, torch.device("cpu"), with_activations=True))["worker"]
    inspection = split_of(job).inspection

    codes = sum(p.numel() + 4 * len(p) for name, p in model.named_parameters() if p.ndim == 2)
    vectors = 4 * (16 + 8)
    assert budget.parts["frozen rest"] == codes + vectors
    assert budget.parts["gradients"] == sum(4 * n for n in (8 * 12, 8, 4 * 8, 4, 5 * 4, 5))
    assert budget.parts["activations"] > 0
    assert inspection.rest == "int8"
    assert rest_fraction(job.split, job.config.exchange) == pytest.approx((codes + vectors) / (4 * 389))


class Clipped(nn.Linear):
    """A linear layer that clips its weight in place, as critics do."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.clamp_(-0.01, 0.01)
        return super().forward(x)


class Target(nn.Module):
    """A network with a slow copy of a layer, which its forward moves."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.last = nn.Linear(12, 16), nn.Linear(16, 5)
        self.target = nn.Linear(12, 16).requires_grad_(requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), self.online.parameters(), strict=False):
                slow.mul_(0.9).add_(fast, alpha=0.1)
        return self.last(self.online(x).relu() + self.target(x).relu())


class Penalized(nn.Module):
    """A network that differentiates twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = NETWORKS["no batch norm"]()

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.layers(x)
        x = x.detach().requires_grad_()
        scores = self.layers(x)
        [slope] = torch.autograd.grad(scores.sum(), x, create_graph=True)
        return scores + slope.square().sum()


def clipped() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), Clipped(16, 16), nn.ReLU(), nn.Linear(16, 5))


LATER = {"recipe__stages": [{"rounds": 1}, {"rest": "frozen"}]}
SCALED = {"recipe__merge_scale": {"own": 0.5}}


@pytest.mark.parametrize(("scale", "warns"), [(None, True), ({"own": 0.7}, False), ({"own": "auto"}, False)])
def test_changes_that_are_added_up_unscaled_are_warned_of(scale: Any, *, warns: bool) -> None:
    changes = {"recipe__merge_scale": scale} if scale else {}
    job = job_for(seeded(NETWORKS["no batch norm"]), partition__rest="frozen", train__workers=4, **changes)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rehearse(job)

    assert any(re.search(naming("recipe.merge_scale", "{own: 0.5}"), str(w.message)) for w in caught) == warns


@pytest.mark.parametrize("changes", [{"partition__rest": "frozen"}, LATER], ids=["throughout", "later"])
@pytest.mark.parametrize(
    ("build", "named"),
    [(clipped, ("'2.weight'", "partition.rest")), (Target, ("'target.weight'", "frozen")), (Penalized, ("twice",))],
)
def test_what_the_frozen_rest_cannot_train_is_refused_before_a_run(
    build: Callable[[], nn.Module], named: tuple[str, ...], changes: dict[str, Any]
) -> None:
    job = job_for(seeded(build), train__workers=2, evaluate__metric="none", **SCALED, **changes)

    with pytest.raises((ModelError, ConfigError), match=naming(*named)):
        rehearse(job)


@pytest.mark.parametrize("stages", [[{"rounds": 2}, {"rest": "frozen"}], [{"rounds": 2, "rest": "frozen"}, {}]])
def test_kept_optimizer_state_continues_when_the_rest_comes_and_goes(stages: list[dict[str, Any]]) -> None:
    model = seeded(NETWORKS["no batch norm"])
    changes: dict[str, Any] = {
        "partition__strategy": "nested",
        "partition__keep": 0.5,
        "train__optimizer_state": "kept",
    }
    job = job_for(model, train__workers=2, train__rounds=4, recipe__stages=stages, **changes)
    meter, moved = Meter(), []
    coordinator = Coordinator(job, InlinePool(job, torch.device("cpu"), meter), model, meter)
    for number in range(4):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        completed(coordinator.train_round(number))
        moved.append(max(float((tensor - before[name]).abs().max()) for name, tensor in model.state_dict().items()))

    assert min(moved) > 0.05 * max(moved)


def test_a_repeated_round_is_sent_the_rest_again() -> None:
    model = seeded(NETWORKS["no batch norm"])
    job = job_for(model, partition__rest="frozen", exchange__rest="exact", train__workers=2)
    held, device = assignments(job), torch.device("cpu")
    sender = FrozenSender(job.split, job.config.exchange, held, model.state_dict(), device)
    cache = FrozenCache(job.split, job.config.exchange, held)
    name = next(name for name in job.split.partly_held if name.endswith("weight"))
    for _ in range(2):  # two attempts at round 0, the first of which merges a result
        sender.begin(["a"])
        message, reuses = sender.write("a", 0, 0, held.of(0)[0])
        assert message is not None
        assert message.layout == cache.layout(0, held.of(0)[0], reuses)
        cache.update(held.of(0)[0], 0, 0, message, device)
        assert torch.equal(cache.rest[name].decode(), model.state_dict()[name])
        sender.returned("a")
        with torch.no_grad():
            model.state_dict()[name].mul_(2)


def test_a_worker_that_is_alone_holds_no_rest_and_its_update_is_not_scaled() -> None:
    states = []
    for changes in ({}, {"recipe__merge_scale": 0.5, "partition__rest": "frozen"}):
        model, meter = seeded(NETWORKS["no batch norm"]), Meter()
        job = job_for(model, train__workers=2, train__min_workers=1, **changes)
        coordinator = Coordinator(job, ChangingPool(job, meter, {0: 1}), model, meter)
        report = completed(coordinator.train_round(0))
        assert report.held_fraction == 1
        states.append(whole_state(job, model))

    assert_same(*states)


def test_conjugated_weights_have_the_gradients_of_the_full_network() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(12, 16), nn.Linear(16, 5)
            self.mixed = nn.Parameter(torch.randn(16, 16, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x).relu().to(self.mixed.dtype) @ self.mixed.mH
            return self.last(hidden.abs())

    model = Complex()
    x = torch.randn(7, 12)
    _, full, oracle, cut = made(model, 0, "int4")

    for network in (full.module, oracle):
        network(x).square().sum().backward()

    assert any(dim is not None for dim in cut["mixed"])
    for key, parameter in full.module.named_parameters():
        whole, part = dict(oracle.named_parameters())[key].grad, torch.empty_like(parameter)
        assert whole is not None
        extract({key: whole.resolve_conj().contiguous()}, cut, into={key: part})
        torch.testing.assert_close(parameter.grad, part, rtol=1e-3, atol=1e-3 * float(part.abs().max()))


def test_a_module_is_freed_without_the_garbage_collector() -> None:
    _, full, _, _ = made(seeded(NETWORKS["no batch norm"]), 0, "int4")
    full.module(torch.randn(3, 12)).sum().backward()
    layer = weakref.ref(next(child for child in full.module.modules() if isinstance(child, nn.Linear)))

    gc.disable()
    try:
        del full
        assert layer() is None
    finally:
        gc.enable()


def test_sparse_gradients_are_refused_by_name() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.last = nn.Embedding(9, 8, sparse=True), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.words(x.abs().long().clamp(max=8)).mean(1).relu())

    with pytest.raises(ModelError, match=naming("'words'", "partition.rest")):
        made(seeded(Words), 0, "int4", partition__residual=True)

    later = job_for(seeded(Words), partition__residual=True, **LATER, **SCALED)
    with pytest.raises(ModelError, match=naming("'words'", "partition.rest")):
        rehearse(later)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"exchange": {"rest": "int8"}}, ("exchange.rest", "partition.rest")),
        ({"partition": {"rest": "frozen"}, "pool": {"kind": "torchrun", "ranks_per_worker": 2}}, ("ranks_per_worker",)),
        ({"recipe": {"stages": [{"rest": "frozen"}]}, "train": {"compile": "eager"}}, ("train.compile",)),
    ],
)
def test_what_cannot_be_combined_is_refused_before_a_run(changes: dict[str, Any], named: tuple[str, ...]) -> None:
    from ist.config.load import validate

    tree = config_tree()
    for section, keys in changes.items():
        tree[section] = {**tree.get(section, {}), **keys}

    with pytest.raises(ConfigError, match=naming(*named)):
        validate(tree, "")


@pytest.mark.parametrize("coding", ["int3", "int4", "int8"])
def test_every_32_numbers_of_the_rest_have_a_scale_of_their_own(coding: Any) -> None:
    weight = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(3)) * torch.logspace(0, 6, 4)[:, None]
    spec = TensorSpec((3, 4, 16), torch.float32)
    specs = coded_specs({"w": spec}, coding, GROUP)
    coded = {name: torch.zeros(s.shape, dtype=s.dtype) for name, s in specs.items()}

    encode({"w": weight}, coded, coding)
    back = CodedTensor("w", coded, spec, coding).decode()

    bits = int(coding[3:])
    assert sum(s.nbytes for s in specs.values()) == 192 * bits // 8 + 6 * 2
    groups = weight.view(-1, 32)
    # Half a level, and for the largest number what a bfloat16 scale is too small, 2^-9 of it.
    most = groups.abs().amax(1, keepdim=True) * (0.5 / (2 ** (bits - 1) - 1) + 2**-8)
    assert bool(((back - weight).view(-1, 32).abs() <= most).all())


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_matrix_survives_its_rounding(bits: int) -> None:
    matrix = torch.randn(5, 13, generator=torch.Generator().manual_seed(2))

    codes, scale = quantize(matrix, bits)
    back = dequantize(codes, scale, 13, bits)

    assert bool(((back - matrix).abs() <= scale[:, None] / 2 + 1e-6).all())
    assert all(torch.equal(a, b) for a, b in zip(quantize(back, bits), (codes, scale), strict=True))
