"""Tensors whose values are made when an operator needs them: the same bits, and no values in between."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ist.data.nested import tensors_in
from ist.network.lazy_tensor import LazyTensor, make_lazy


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.decode = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.embed(x).relu())


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(6, 12)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Any:
        left, right = self.w.chunk(2, 1)
        mixed = torch.einsum("bi,oi->bo", x, left) + self.b.expand(4, 6) + x @ right.t()
        return mixed, self.w[2:4].T.unsqueeze(0) * 2, self.w.view(3, 24).sum(0), self.w.data.sum() * self.b, self.w[1]


class Recomputed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 7)), reentrant

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.inner, x.requires_grad_(), use_reentrant=self.reentrant)


class Functional(nn.Module):
    """Calls a module with other parameters, over rows, and differentiates in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(7, 9)

    def forward(self, x: Tensor) -> Any:
        held = dict(self.inner.named_parameters())
        rows = torch.func.vmap(lambda row: torch.func.functional_call(self.inner, held, (row,)))(x)
        whole = torch.func.functional_call(self.inner, held, (x,))
        (again,) = torch.autograd.grad(self.inner(x).tanh().sum(), self.inner.weight, create_graph=True)
        return rows, whole, again, torch.func.grad(lambda weight: (x @ weight.t()).tanh().sum())(self.inner.weight)


class Replacing(nn.Module):
    """Writes to its parameters in its forward, in two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.first.weight[0].clamp_(-0.1, 0.1)
        self.second.weight.data = self.second.weight.data * 2
        return self.second(self.first(x))


IMAGE, WORDS, ROWS = (2, 3, 9, 9), (3, 5, 12), (4, 7)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...] | None]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 3, bias=False), nn.PReLU(3)), ROWS),
    "convolution and batch norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3)), IMAGE,
    ),
    "norms": (lambda: nn.Sequential(nn.LayerNorm(12), nn.GroupNorm(1, 5), nn.RMSNorm(12)), WORDS),
    "rnn": (lambda: nn.RNN(12, 9, 2, bidirectional=True, batch_first=True), WORDS),
    "lstm": (lambda: nn.LSTM(12, 9, 2), WORDS),
    "gru": (lambda: nn.GRU(12, 9), WORDS),
    "lstm cell": (lambda: nn.LSTMCell(7, 9), ROWS),
    "attention": (lambda: nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, dropout=0.0), WORDS),
    "tied": (Tied, None),
    "views": (Views, (4, 6)),
    "checkpoint": (lambda: Recomputed(False), ROWS),
    "reentrant checkpoint": (lambda: Recomputed(True), ROWS),
    "functional": (Functional, ROWS),
    "weight norm": (lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(7, 9)), ROWS),
    "replacing": (Replacing, ROWS),
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A network, the same one with lazy parameters, and inputs."""
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    plain = build()
    values = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    lazy = make_lazy(copy.deepcopy(plain), lambda name: values[name].clone())
    return plain, lazy, torch.randint(11, (3, 4)) if shape is None else torch.randn(shape)


def results(network: nn.Module, x: Tensor) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    outputs = list(tensors_in(network(x)))
    torch.stack([output.square().sum() for output in outputs]).sum().backward()
    return [output.detach() for output in outputs], {name: p.grad for name, p in network.named_parameters()}


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_gradients_and_buffers_are_those_of_ordinary_parameters_bit_for_bit(name: str) -> None:
    plain, lazy, x = made(name)

    outputs, gradients = results(lazy, x.clone())

    expected, expected_gradients = results(plain, x.clone())
    assert len(outputs) == len(expected)
    assert all(torch.equal(mine, other) for mine, other in zip(outputs, expected, strict=True))
    assert gradients.keys() == expected_gradients.keys()
    for key, gradient in expected_gradients.items():
        mine = gradients[key]
        assert (mine is None) == (gradient is None)
        assert mine is None or gradient is None or (type(mine) is Tensor and torch.equal(mine, gradient)), key
    assert all(torch.equal(mine, dict(plain.named_buffers())[key]) for key, mine in lazy.named_buffers())


def test_the_fused_path_of_attention_in_evaluation_gives_the_same_bits() -> None:
    plain, lazy, x = made("attention")

    with torch.no_grad():
        assert torch.equal(lazy.eval()(x), plain.eval()(x))


def test_only_one_layer_has_values_at_a_time_forward_and_backward() -> None:
    network = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)])
    alive = weakref.WeakSet[Tensor]()
    most = 0

    def values(name: str) -> Tensor:
        nonlocal most
        made = torch.full((8, 8) if name.endswith("weight") else (8,), 0.1)
        alive.add(made)
        most = max(most, len(alive))
        return made

    make_lazy(network, values)(torch.ones(2, 8)).sum().backward()

    assert most == 2  # weight and bias of one layer
    assert not alive


def test_a_tensor_that_is_written_keeps_its_values_and_says_how_many_bytes() -> None:
    lazy = LazyTensor(lambda: torch.arange(6.0).view(2, 3), (2, 3), torch.float32)
    row = lazy[0]
    assert lazy.kept_bytes == 0

    row.fill_(9)

    assert torch.equal(lazy + 0, torch.tensor([[9.0, 9, 9], [3, 4, 5]]))
    assert torch.equal(lazy.t() + 0, torch.tensor([[9.0, 3], [9, 4], [9, 5]]))
    assert lazy.kept_bytes == 24
    assert torch.equal(copy.deepcopy(lazy) + 0, lazy + 0)


@pytest.mark.parametrize(
    "use",
    [
        lambda lazy: lazy.numpy(),
        lambda lazy: lazy.tolist(),
        lambda lazy: lazy.data_ptr(),
        torch.from_dlpack,
        lambda lazy: lazy.t_(),
        lambda lazy: setattr(lazy, "data", torch.ones(3)),
    ],
    ids=["numpy", "tolist", "data_ptr", "dlpack", "in-place view", "data of another shape"],
)
def test_access_that_passes_no_operator_is_refused(use: Callable[[Tensor], Any]) -> None:
    lazy = LazyTensor(lambda: torch.ones(2, 3), (2, 3), torch.float32)

    with pytest.raises((RuntimeError, NotImplementedError)):
        use(lazy)


def test_parameters_stay_parameters_with_their_attributes_ties_and_dtypes_on_request() -> None:
    with torch.device("meta"):
        network = Tied()
    network.embed.weight.rate = 3  # type: ignore[attr-defined]

    make_lazy(network, lambda _: torch.ones(11, 6, dtype=torch.float64), lambda _: torch.float64)

    weight = network.embed.weight
    assert isinstance(weight, nn.Parameter)
    assert weight is network.decode.weight
    assert weight.rate == 3  # type: ignore[attr-defined]
    assert network(torch.tensor([1])).dtype == torch.float64
    assert [name for name, _ in network.named_parameters()] == ["embed.weight"]
