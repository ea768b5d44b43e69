"""A network on `meta` that gets its weights from files is trained like the network that has them."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ist
from ist.initialization.on_meta import is_on_meta, restore_constants
from ist.runs.opening import process as opening
from tests.conftest import assert_same, data, naming, run_forked_ranks

transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed")


class Angles(nn.Module):
    """Sets its buffer as torch's own modules do."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("angles", torch.empty(size), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.get_buffer("angles").copy_(torch.arange(len(self.get_buffer("angles"))) / 7)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.get_buffer("angles").cos()


class NotAgain(Angles):
    def reset_parameters(self) -> None:
        self.get_buffer("angles")[1:] = 3.0


class Drawn(Angles):
    def reset_parameters(self) -> None:
        nn.init.normal_(self.get_buffer("angles"))


def network(kind: type[Angles] = Angles) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 16), kind(16), nn.ReLU(), nn.Linear(16, 5))


def meta_network(kind: type[Angles] = Angles) -> nn.Module:
    with torch.device("meta"):
        return network(kind)


def saved(folder: Path) -> Path:
    save_file(network().state_dict(), folder / "model.safetensors")
    return folder / "model.safetensors"


TRAINING: dict[str, Any] = {"workers": 2, "local_steps": 2, "rounds": 2, "batch_size": 5, "progress": False}


def test_a_network_on_meta_is_trained_like_the_network_with_these_weights(tmp_path: Path) -> None:
    expected = ist.train(network(), data(), **TRAINING)

    given = meta_network()
    weight = given.get_parameter("0.weight")
    result = ist.train(given, data(), weights=saved(tmp_path), **TRAINING)

    assert result.model is given
    assert given.get_parameter("0.weight") is weight
    assert_same(given.state_dict(), expected.model.state_dict())
    assert torch.equal(given(torch.ones(1, 12)), expected.model(torch.ones(1, 12)))


def test_weights_replace_the_values_that_a_network_has(tmp_path: Path) -> None:
    expected = ist.train(network(), data(), **TRAINING)
    given = network()
    for parameter in given.parameters():
        parameter.data.zero_()

    result = ist.train(given, data(), weights=saved(tmp_path), **TRAINING)

    assert_same(result.model.state_dict(), expected.model.state_dict())


def test_an_own_loop_trains_a_network_on_meta(tmp_path: Path) -> None:
    batches = [(torch.randn(4, 12), torch.randint(5, (4,))) for _ in range(2)]
    trained = []
    for model, weights in ((network(), None), (meta_network(), saved(tmp_path))):
        run = ist.join(
            model, example=batches[0][0], workers=1, local_steps=2, rounds=1, weights=weights, progress=False
        )
        for part in run:
            for inputs, targets in part.take(batches):
                loss = nn.functional.cross_entropy(part.model(inputs), targets)
                loss.backward()  # type: ignore[no-untyped-call]
                part.optimizer.step()
                part.optimizer.zero_grad()
                part.log(loss, len(inputs))
        trained.append(run.model.state_dict())

    assert_same(trained[0], trained[1])


def test_a_network_on_meta_is_split_without_values_until_a_module_needs_them(tmp_path: Path) -> None:
    expected, example = ist.split(network(), torch.ones(2, 12), workers=2), torch.ones(2, 12)

    without = ist.split(meta_network(), example, workers=2)
    with_weights = ist.split(meta_network(), example, workers=2, weights=saved(tmp_path))

    assert str(without) == str(expected) == str(with_weights)
    assert_same(with_weights.module(0).state_dict(), expected.module(0).state_dict())
    with pytest.raises(ist.ModelError, match=naming("0.weight", "meta", "weights=")):
        without.module(0)


def test_a_network_on_meta_without_weights_is_refused_by_name() -> None:
    with pytest.raises(ist.ModelError, match=naming("'0.weight'", "meta", "weights=")):
        ist.train(meta_network(), data(), **TRAINING)


@pytest.mark.parametrize("kind", [NotAgain, Drawn])
def test_a_constant_that_its_class_does_not_compute_again_is_refused_by_name(
    kind: type[Angles], tmp_path: Path
) -> None:
    given = meta_network(kind)

    with pytest.raises(ist.ModelError, match=naming("'1.angles'", "meta", kind.__name__, "reset_parameters")):
        ist.train(given, data(), weights=saved(tmp_path), **TRAINING)
    assert given.get_buffer("1.angles").is_meta


def test_networks_of_transformers_compute_their_frequencies_again() -> None:
    settings = transformers.LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    with torch.device("meta"):
        given = transformers.LlamaForCausalLM(settings)

    restore_constants(given)

    built = transformers.LlamaForCausalLM(settings)
    assert torch.equal(given.model.rotary_emb.inv_freq, built.model.rotary_emb.inv_freq)
    assert {name for name, buffer in given.named_buffers() if buffer.is_meta} == set()
    assert is_on_meta(given)  # its parameters are


def test_a_network_that_no_process_holds_needs_a_folder_for_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ist.runs.arguments.is_launched", lambda: True)

    with pytest.raises(ist.ConfigError, match=naming("sharded", "run_dir")):
        ist.train(meta_network(), data(), weights=saved(tmp_path), pool=ist.Pool(store="sharded"), **TRAINING)


@pytest.mark.system
def test_only_the_rank_that_coordinates_gives_values_to_a_network_on_meta(tmp_path: Path) -> None:
    saved(tmp_path)

    run_forked_ranks((2, __file__, tmp_path))

    given, on_meta = (load_file(tmp_path / f"{name}.safetensors") for name in ("given", "on meta"))
    assert_same(on_meta, given)
    in_shards = sorted((tmp_path / "run").glob("model*.safetensors"))
    assert_same({name: tensor for file in in_shards for name, tensor in load_file(file).items()}, given)


def run_rank(folder: Path) -> None:
    """Train as a rank: the given network, one on meta, and one on meta in a sharded store."""
    generator = torch.Generator().manual_seed(int(os.environ["RANK"]))
    batches = [(torch.randn(4, 12, generator=generator), torch.randint(5, (4,), generator=generator)) for _ in range(2)]
    for name, model, options in (
        ("given", network(), {}),
        ("on meta", meta_network(), {"weights": folder / "model.safetensors"}),
        (
            "sharded",
            meta_network(),
            {
                "weights": folder / "model.safetensors",
                "run_dir": folder / "run",
                "pool": ist.Pool(store="sharded", device="cpu"),
            },
        ),
    ):
        run = ist.join(
            model, example=batches[0][0], local_steps=2, rounds=1, progress=False,
            **{"pool": ist.Pool(device="cpu"), **options},
        )  # fmt: skip
        for part in run:
            for inputs, targets in part.take(batches):
                loss = nn.functional.cross_entropy(part.model(inputs), targets)
                loss.backward()  # type: ignore[no-untyped-call]
                part.optimizer.step()
                part.optimizer.zero_grad()
                part.log(loss, len(inputs))
        if run.is_coordinator and name != "sharded":
            save_file(model.state_dict(), folder / f"{name}.safetensors")
        elif name != "given":
            assert run.is_coordinator or all(parameter.is_meta for parameter in model.parameters()), name


def test_constants_that_differ_each_time_are_an_error_before_the_first_round(monkeypatch: pytest.MonkeyPatch) -> None:
    before = opening.check_constants
    given = network()

    def changed(made: Any, built: nn.Module) -> None:
        built.get_buffer("1.angles")[2] = 1e9
        before(made, built)

    monkeypatch.setattr(opening, "check_constants", changed)

    with pytest.raises(ist.ModelError, match=naming("'1.angles'", "persistent buffer")):
        ist.train(given, data(), **TRAINING)


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
