"""Networks that recompute activations in the backward pass train to the same weights as without."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from ist.api import train
from tests.conftest import assert_same, data
from tests.networks import seeded

CALLS: list[bool] = []
"""Of each call of an activation, whether its network recomputes activations."""


class Counted(nn.GELU):
    """An activation whose calls are counted."""

    def __init__(self, recomputes: bool) -> None:
        super().__init__()
        self.recomputes = recomputes

    def forward(self, inputs: Tensor) -> Tensor:
        CALLS.append(self.recomputes)
        return super().forward(inputs)


class Blocks(nn.Module):
    """Two blocks with dropout, which are recomputed or not."""

    def __init__(self, recomputes: bool) -> None:
        super().__init__()
        self.recomputes = recomputes
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 16), Counted(recomputes), nn.Dropout(0.2), nn.Linear(16, 12)) for _ in range(2)
        )
        self.last = nn.Linear(12, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        for block in self.blocks:
            inputs = inputs + (checkpoint(block, inputs, use_reentrant=False) if self.recomputes else block(inputs))
        return self.last(inputs)


@pytest.mark.parametrize("features", [{}, {"accumulate": 2, "clip_grad_norm": 0.5, "autocast": "bfloat16"}])
def test_a_network_that_recomputes_activations_trains_as_without(features: dict[str, object]) -> None:
    models = [seeded(lambda recomputes=recomputes: Blocks(recomputes)) for recomputes in (False, True)]

    CALLS.clear()
    for model in models:
        train(model, data(), workers=2, rounds=2, local_steps=3, progress=False, **features)  # type: ignore[arg-type]

    assert_same(models[0].state_dict(), models[1].state_dict())
    assert not torch.equal(models[1].last.weight, seeded(lambda: Blocks(True)).last.weight)
    assert CALLS.count(True) > CALLS.count(False) > 0


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # the name that people know
def test_a_transformer_with_gradient_checkpointing_trains_as_without() -> None:
    transformers = pytest.importorskip("transformers")
    settings = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=32, n_positions=8, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    models = [seeded(lambda: transformers.GPT2LMHeadModel(settings)) for _ in range(2)]
    models[1].gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tokens = torch.randint(32, (40, 8), generator=torch.Generator().manual_seed(0))

    for model in models:
        train(
            model, TensorDataset(tokens, tokens), loss="next_token", workers=2, rounds=2, local_steps=2, batch_size=4,
            progress=False,
        )  # fmt: skip

    assert_same(models[0].state_dict(), models[1].state_dict())
