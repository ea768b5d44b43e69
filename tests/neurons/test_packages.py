"""Networks of other packages, imported unchanged."""

import logging
from typing import Any

import pytest
import torch
from torch import nn

from ist.checks.verify import verify_cuts
from ist.runs.inspection import title
from ist.subnet.job import assignments
from tests.networks import seeded
from tests.neurons.test_neurons import job_of

transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed")
TOKENS = {"input_ids": torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))}


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def gpt2(layers: int = 2) -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_positions=9, n_embd=18, n_layer=layers, n_head=3, use_cache=False)
    )


def llama(**changes: Any) -> nn.Module:
    settings = {
        "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 3, "use_cache": False,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings | changes))


def test_gpt2_is_split_into_heads_and_feed_forward_units_and_its_embedding_stays_tied() -> None:
    job = job_of(seeded(gpt2), TOKENS, workers=3)

    assert [title(group) for group in job.split.groups] == [
        "layer 0 attention: 3 heads, 6 wide",
        "layer 0 feed-forward: 72 hidden units",
        "layer 1 attention: 3 heads, 6 wide",
        "layer 1 feed-forward: 72 hidden units",
    ]
    verify_cuts(job)
    submodel = job.split.module(assignments(job).of(0)[0], torch.device("cpu"))
    assert type(submodel) is type(job.split.template)
    assert submodel.get_parameter("lm_head.weight") is submodel.get_parameter("transformer.wte.weight")


def test_llama_is_split_into_key_value_heads_with_their_queries() -> None:
    job = job_of(seeded(llama), TOKENS, workers=3)

    assert [group.size for group in job.split.groups] == [3, 40, 3, 40]
    verify_cuts(job)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_llama_of_a_billion_parameters_needs_no_memory() -> None:
    with torch.device("meta"):
        whole = llama(
            vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
            num_key_value_heads=4,
        )  # fmt: skip

    from ist.neurons.find import find_neurons

    found = find_neurons(whole, {"input_ids": torch.zeros(2, 16, dtype=torch.int64)})

    assert sum(parameter.numel() for parameter in whole.parameters()) > 1e9
    assert [group.size for group in found.groups] == [4, 5632] * 22
    assert all(parameter.is_meta for parameter in whole.parameters())
