"""Recurrent networks as users write them, with their expected groups."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.neurons.networks import Case, rand

SERIES, WORDS = rand(3, 5, 6), torch.randint(0, 50, (3, 4), generator=torch.Generator().manual_seed(3))


class Cell(nn.Module):
    """A cell in a loop, with an initial state that the forward makes."""

    def __init__(self, kind: type[nn.RNNCellBase], start: Callable[["Cell", Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.hidden_size, self.cell, self.out, self.start = 7, kind(6, 7), nn.Linear(7, 5), start

    def forward(self, x: Tensor) -> Tensor:
        h = self.start(self, x) if self.start else None
        is_lstm = isinstance(self.cell, nn.LSTMCell)
        state: Any = (h, torch.zeros_like(h)) if is_lstm and h is not None else h
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.out(state[0] if is_lstm else state)


STARTS: dict[str, Callable[[Cell, Tensor], Tensor] | None] = {
    "no state": None,
    "zeros": lambda net, x: torch.zeros(len(x), net.hidden_size, device=x.device, dtype=x.dtype),
    "new_zeros": lambda net, x: x.new_zeros(len(x), net.cell.hidden_size),
    "full": lambda net, x: torch.full((len(x), net.hidden_size), 0.5).to(x),
    "empty": lambda net, x: nn.init.zeros_(torch.empty(len(x), net.hidden_size)).to(x),
}


class WithState(nn.Module):
    """`h0 = torch.zeros(L, B, self.hidden_size)`: one tensor for all layers and directions."""

    def __init__(self, kind: type[nn.RNNBase], make: Callable[..., Tensor] = torch.zeros, **options: Any) -> None:
        super().__init__()
        self.num_layers, self.hidden_size, self.make = options.get("num_layers", 1), 7, make
        self.directions = 2 if options.get("bidirectional") else 1
        self.rnn = kind(6, 7, batch_first=True, **options)
        self.out = nn.Linear(7 * self.directions, 5)

    def forward(self, x: Tensor) -> Tensor:
        h0 = self.make(self.num_layers * self.directions, x.size(0), self.hidden_size).to(x)
        if isinstance(self.rnn, nn.LSTM):
            return self.out(self.rnn(x, (h0, torch.zeros_like(h0)))[0][:, -1])
        return self.out(self.rnn(x, h0)[0][:, -1])


class LanguageModel(nn.Module):
    """PyTorch's example of a language model: tied weights, a state from `init_hidden`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.hidden = 2, 12
        self.encoder, self.rnn = nn.Embedding(50, 12), nn.LSTM(12, 12, 2, dropout=0.2)
        self.decoder = nn.Linear(12, 50)
        self.decoder.weight = self.encoder.weight

    def init_hidden(self, size: int) -> tuple[Tensor, Tensor]:
        weight = next(self.parameters())
        return weight.new_zeros(self.layers, size, self.hidden), weight.new_zeros(self.layers, size, self.hidden)

    def forward(self, words: Tensor) -> Tensor:
        outputs, _ = self.rnn(self.encoder(words.t()), self.init_hidden(len(words)))
        return F.log_softmax(self.decoder(outputs).transpose(0, 1), dim=-1)


class Packed(nn.Module):
    """Sequences of several lengths, in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(50, 6), nn.Linear(14, 5)
        self.rnn = nn.LSTM(6, 7, batch_first=True, bidirectional=True)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embed(words), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        outputs, (h, _) = self.rnn(packed)
        outputs, _ = nn.utils.rnn.pad_packed_sequence(outputs, batch_first=True)
        return self.out(outputs.mean(1)) + self.out(torch.cat((h[-2], h[-1]), 1))


class Translation(nn.Module):
    """PyTorch's tutorial: a decoder that attends to an encoder's states, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.h, self.embed, self.target = 10, nn.Embedding(50, 8), nn.Embedding(50, 8)
        self.encode, self.decode = nn.GRU(8, 10, batch_first=True), nn.GRU(10, 10, batch_first=True)
        self.attend, self.combine, self.out = nn.Linear(18, 4), nn.Linear(18, 10), nn.Linear(10, 50)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        states, h = self.encode(self.embed(source), torch.zeros(1, len(source), self.h))
        outputs = []
        for word in target.unbind(1):
            embedded = self.target(word)
            weights = self.attend(torch.cat((embedded, h[0]), 1)).softmax(dim=1)
            context = torch.bmm(weights.unsqueeze(1), states)[:, 0]
            step, h = self.decode(self.combine(torch.cat((embedded, context), 1)).relu().unsqueeze(1), h)
            outputs.append(self.out(step[:, 0]))
        return torch.stack(outputs, 1)


class ByHand(nn.Module):
    """An LSTM written out, with gates that are slices of multiples of a size."""

    def __init__(self, hidden: int = 7) -> None:
        super().__init__()
        self.hidden, self.bias, self.out = hidden, nn.Parameter(torch.randn(4 * hidden)), nn.Linear(hidden, 5)
        self.W, self.U = nn.Parameter(torch.randn(6, 4 * hidden)), nn.Parameter(torch.randn(hidden, 4 * hidden))

    def forward(self, x: Tensor) -> Tensor:
        size = self.hidden
        h, c = torch.zeros(len(x), size), torch.zeros(len(x), size)
        for step in x.unbind(1):
            gates = step @ self.W + h @ self.U + self.bias
            i, f, g, o = gates[:, :size], gates[:, size : size * 2], gates[:, size * 2 : size * 3], gates[:, size * 3 :]
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.out(h)


class Joined(nn.Module):
    """PyTorch's character network: input and state in one row, states written into a preallocated tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.i2h, self.out = 7, nn.Linear(13, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        h, states = torch.zeros(len(x), self.hidden), torch.zeros(*x.shape[:2], self.hidden)
        for number in range(x.size(1)):
            h = self.i2h(torch.cat((x[:, number], h), 1)).tanh()
            states[:, number] = h
        return self.out(states).mean(1)


class Images(nn.Module):
    """A convolutional LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.conv, self.out = 6, nn.Conv2d(9, 24, 3, padding=1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = c = torch.zeros(len(x), self.hidden, *x.shape[-2:], device=self.conv.weight.device)
        for step in x.unbind(1):
            i, f, g, o = torch.split(self.conv(torch.cat([step, h], 1)), self.hidden, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.out(h).mean((2, 3))


class Filled(nn.Module):
    """Constants as wide as a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.up, self.down = 8, nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x) * torch.full((self.width,), 0.5) + torch.ones(len(x), 1, self.width)
        return self.down(hidden).mean(1)


LENGTHS = torch.tensor([2, 4, 3])

RECURRENCES: dict[str, Case] = {
    **{
        f"LSTMCell, {name}": Case(lambda start=start: Cell(nn.LSTMCell, start), SERIES, {"cell": 7})
        for name, start in STARTS.items()
    },
    "GRUCell": Case(lambda: Cell(nn.GRUCell, STARTS["zeros"]), SERIES, {"cell": 7}),
    "RNNCell": Case(lambda: Cell(nn.RNNCell), SERIES, {"cell": 7}),
    "LSTM": Case(lambda: WithState(nn.LSTM), SERIES, {"rnn": 7}),
    "LSTM, random state": Case(lambda: WithState(nn.LSTM, torch.randn), SERIES, {"rnn": 7}),
    "LSTM, two layers": Case(lambda: WithState(nn.LSTM, num_layers=2, dropout=0.1), SERIES, {"rnn": 7}),
    "LSTM, both ways": Case(lambda: WithState(nn.LSTM, bidirectional=True), SERIES, {"rnn": 7}),
    "GRU, two layers, both ways": Case(lambda: WithState(nn.GRU, num_layers=2, bidirectional=True), SERIES, {"rnn": 7}),
    "RNN": Case(lambda: WithState(nn.RNN), SERIES, {"rnn": 7}),
    "language model": Case(LanguageModel, WORDS, {"rnn": 12}),
    "packed": Case(Packed, (WORDS, LENGTHS), {"embed": 6, "rnn": 7, "rnn#2": 7}),
    "translation": Case(Translation, (WORDS, WORDS), {"embed": 8, "encode": 10, "target": 8, "combine": 10}),
    "by hand": Case(ByHand, SERIES, {"W": 7}),
    "joined": Case(Joined, SERIES, {"i2h": 7}),
    "images": Case(Images, rand(2, 3, 3, 6, 6), {"conv": 6}),
    "filled": Case(Filled, SERIES, {"up": 8}),
}
