"""The scale of merged updates: old + factor * (merged - old)."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ist
from ist.config.base import run_fingerprint
from ist.config.recipe import MergeScale, Outer, Recipe, Stage
from ist.errors import ConfigError
from ist.loops.part import completed
from ist.subnet.cut import UpdateScale, reassemble
from ist.subnet.job import assignments
from ist.training.coordinator import Coordinator
from ist.training.scale_search import tried_factors
from tests.augmented import Stream
from tests.conftest import assert_same, clone, data, job_for, naming, small_config
from tests.networks import NETWORKS, seeded
from tests.training.test_recipe import coordinator, entry_by_entry, held

OVERLAPPING = {"partition__strategy": "bernoulli", "partition__keep": 0.5, "train__optimizer_state": "carried"}


def started(scale: Any, recipe: Mapping[str, Any] | None = None, **changes: Any) -> tuple[Coordinator, nn.Module]:
    model = seeded(NETWORKS["no batch norm"])
    job = job_for(model, recipe={**(recipe or {}), **({} if scale is None else {"merge_scale": scale})}, **changes)
    return coordinator(job, model), model


def holders(made: Coordinator, round_number: int) -> dict[str, Tensor]:
    """Return how many workers hold each entry of the network in a round."""
    cuts = assignments(made.job).cuts(round_number)
    parameters = dict(made.model.named_parameters())
    masks = [held(parameters, [cut], [0]) for cut in cuts]
    return {name: torch.stack([mask[name] for mask in masks]).sum(dim=0) for name in parameters}


@pytest.mark.parametrize("shares", [{}, OVERLAPPING], ids=["disjoint", "overlapping"])
def test_own_and_shared_weights_move_by_their_factors_of_the_merged_update(shares: dict[str, Any]) -> None:
    (made, model), (plain, reference) = started({"own": 0.5, "shared": 0.25}, **shares), started(None, **shares)

    for round_number in range(2):
        before = clone(model.state_dict())
        plain.model.load_state_dict(before)
        for name, tensor in made.checkpoint_state().items():
            if name not in before:  # carried momentum
                plain.checkpoint_state()[name].copy_(tensor)
        completed(plain.train_round(round_number))
        completed(made.train_round(round_number))

        counts = holders(made, round_number)
        for name, merged in reference.state_dict().items():
            found, old = model.state_dict()[name], before[name]
            one, several = counts[name] == 1, counts[name] > 1
            assert torch.equal(found[one], (old + 0.5 * (merged - old))[one])
            # Of a mean, merged - old is rounded again here: a few ulp of 1.
            torch.testing.assert_close(found[several], (old + 0.25 * (merged - old))[several], rtol=0, atol=1e-6)
            assert torch.equal(found[counts[name] == 0], old[counts[name] == 0])
        assert any((count == 1).any() for count in counts.values())
        assert any((count > 1).any() for count in counts.values())
        carried = {name: tensor for name, tensor in made.checkpoint_state().items() if name not in before}
        assert_same(carried, {name: plain.checkpoint_state()[name] for name in carried})  # a momentum is no update


def test_a_factor_of_one_leaves_the_other_kind_of_weights_as_published_bit_for_bit() -> None:
    (own, own_model), (shared, shared_model) = (
        started(scale, **OVERLAPPING) for scale in ({"own": 0.5}, {"shared": 0.5})
    )
    plain, reference = started(None, **OVERLAPPING)
    for made in (own, shared, plain):
        completed(made.train_round(0))

    for name, count in holders(plain, 0).items():
        merged = reference.state_dict()[name]
        assert torch.equal(own_model.state_dict()[name][count > 1], merged[count > 1])
        assert torch.equal(shared_model.state_dict()[name][count == 1], merged[count == 1])


def test_the_outer_optimizer_steps_along_the_scaled_update() -> None:
    settings = Outer(lr=0.7, momentum=0.6)
    made, model = started(0.5, {"outer": settings.model_dump()})
    plain, reference = started(0.5)
    momentum = {name: torch.zeros_like(tensor) for name, tensor in model.named_parameters()}

    for round_number in range(2):
        reference.load_state_dict(model.state_dict())
        before = clone(model.state_dict())
        completed(plain.train_round(round_number))
        completed(made.train_round(round_number))

        masks = held(dict(model.named_parameters()), assignments(plain.job).cuts(round_number), [0, 1, 2, 3])
        for name, scaled in reference.state_dict().items():
            moved, momentum[name] = entry_by_entry(settings, before[name], scaled, momentum[name], masks[name])
            torch.testing.assert_close(model.state_dict()[name], moved, rtol=0, atol=1e-5)


# A scale that the coordinator chooses


def test_the_chosen_factor_has_the_lowest_loss_and_is_that_factor_as_a_number_bit_for_bit() -> None:
    kinds = {"own": "auto", "shared": 0.5}
    settings: dict[str, Any] = {
        **OVERLAPPING, "exchange": {"down": "int8", "up": "int8", "values": "deltas"}, "evaluate__batch_size": 50,
        "train__optimizer": {"name": "SGD", "args": {"lr": 3.0, "momentum": 0.5}}, "train__local_steps": 6,
    }  # fmt: skip
    auto, model = started(kinds, **settings)
    task = auto.job.task
    chosen = []

    for round_number in range(2):
        before = {name: tensor.clone() for name, tensor in auto.checkpoint_state().items()}
        report = completed(auto.train_round(round_number))
        states, losses = {}, {}
        for factor in tried_factors(4):
            by_number, network = started({**kinds, "own": factor}, **settings)
            for name, tensor in by_number.checkpoint_state().items():
                tensor.copy_(before[name])
            completed(by_number.train_round(round_number))
            states[factor] = clone(network.state_dict())
            inputs, targets = whole_batches(task.train_data, auto._search._samples(round_number))  # type: ignore[union-attr]
            with torch.no_grad():
                losses[factor] = float(task.loss(network.eval()(inputs), targets))

        best = min(losses, key=losses.__getitem__)
        assert report.merge_scale == best
        assert_same(clone(model.state_dict()), states[best])
        chosen.append(best)
    assert min(chosen) < 1
    assert MergeScale(own="auto", shared="auto").factors(0.25) == (0.25, 0.25)


def whole_batches(dataset: Any, samples: Any) -> tuple[Tensor, Tensor]:
    return tuple(torch.stack(column) for column in zip(*(dataset[int(n)] for n in samples), strict=True))  # type: ignore[return-value]


def test_the_factors_go_from_the_sum_of_all_updates_to_their_mean() -> None:
    assert [round(1 / factor**2, 6) for factor in tried_factors(8)] == [1, 2, 4, 8, 16, 32, 64]
    assert tried_factors(1) == [1.0]
    assert tried_factors(3)[-1] == pytest.approx(1 / 3, rel=0.1)


def test_a_chosen_scale_uses_the_users_step_and_is_recorded() -> None:
    network = seeded(NETWORKS["two hidden layers, batch norm"])
    seen: list[tuple[bool, int]] = []

    def step(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        seen.append((torch.is_grad_enabled(), len(batch[0])))
        return nn.functional.cross_entropy(net(batch[0]), batch[1])

    result = ist.train(
        network, data(), step=step, workers=2, local_steps=2, rounds=2, batch_size=20, recipe={"merge_scale": "auto"},
        evaluate={"batch_size": 31}, progress=False,
    )  # fmt: skip

    assert all(record["merge_scale"] in tried_factors(2) for record in result.history)
    assert seen.count((False, 31)) >= 2 * 2 * len(tried_factors(2))  # once for statistics, once for the loss


REFUSED = {
    "shards": ({"pool": {"kind": "torchrun", "coordinator": "trains", "store": "sharded"}}, ("pool.store", "sharded")),
    "own data": ({"data__shard": "own", "train__epochs": None, "train__rounds": 2}, ("data.shard", "own")),
    "shards, in a stage": (
        {"pool": {"kind": "torchrun", "coordinator": "trains", "store": "sharded"},
         "recipe": {"stages": [{}, {"rounds": 1, "merge_scale": {"own": "auto"}}]}}, ("pool.store", "sharded"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "named"), REFUSED.values(), ids=REFUSED.keys())
def test_where_no_process_can_choose_the_scale_auto_is_refused(changes: dict[str, Any], named: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=naming("recipe.merge_scale", "auto", *named, "0.5")):
        small_config(**{"recipe": {"merge_scale": "auto"}, **changes})

    small_config(**{**changes, "recipe": {"merge_scale": 0.5}})  # a number is not


def test_auto_is_refused_for_a_stream_and_for_an_own_loop() -> None:
    network, auto = seeded(NETWORKS["no batch norm"]), {"merge_scale": "auto"}

    with pytest.raises(ConfigError, match=naming("recipe.merge_scale", "auto", "stream", "0.5")):
        ist.train(network, Stream(data()), workers=2, local_steps=2, rounds=2, recipe=auto, progress=False)
    with pytest.raises(ConfigError, match=naming("recipe.merge_scale", "auto", "own loop", "0.5")):
        ist.join(network, example=data()[:2][0], workers=1, local_steps=2, rounds=2, recipe=auto, progress=False)


def test_if_no_factor_has_a_finite_loss_the_shortest_step_is_made() -> None:
    auto, _ = started("auto")
    search = auto._search
    assert search is not None
    merged: list[float] = []
    search._losses = lambda *_: [math.inf, math.inf]  # type: ignore[method-assign]

    search.choose(0, [1.0, 0.5], merged.append)

    assert merged == [search.chosen] == [0.5]


def test_what_is_not_finite_or_not_a_float_is_merged_as_without_a_scale() -> None:
    mask = torch.tensor([-torch.inf, 0.0, 2.0])
    state = {
        "mask": mask.clone(),
        "count": torch.tensor([4, 6]),
        "half": torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
    }
    trained = {"mask": mask + 1, "count": torch.tensor([6, 8]), "half": torch.tensor([2.0, 2.0], dtype=torch.bfloat16)}
    whole: dict[str, Any] = {"mask": (None,), "count": (None,), "half": (None,)}
    scale = UpdateScale(frozenset({"mask", "half"}), own=0.5)

    reassemble(state, [whole], [(0, trained)], frozenset({"half"}), scale)

    assert state["mask"].tolist() == [-torch.inf, 0.5, 2.5]
    assert state["count"].tolist() == [6, 8]
    assert state["half"].tolist() == [1.5, 2.0]


def test_only_a_stages_own_scale_applies_to_a_full_width_phase() -> None:
    recipe = Recipe(
        merge_scale=0.5, stages=[{}, {"rounds": 1, "keep": 1}, {"rounds": 1, "keep": 1, "merge_scale": 0.7}]
    )
    made, _ = started(0.5, {"stages": recipe.model_dump()["stages"]})
    rounds = made.job.schedule.num_rounds

    of_stages = [recipe.merge_scale_of(stage, stage.keep == 1) for stage in recipe.stages]
    of_rounds = [made._scale(number, 2) for number in (0, rounds - 2, rounds - 1)]

    assert of_stages == [MergeScale(own=0.5, shared=0.5), MergeScale(), MergeScale(own=0.7, shared=0.7)]
    assert [(scale.own, scale.shared) for scale in of_rounds] == [(s.own, s.shared) for s in of_stages]


@pytest.mark.parametrize(
    "value", [0, -0.5, 2.5, float("nan"), True, "half", [0.5], {"own": 3}, {"shared": 0}, {"all": 1}]
)
def test_a_scale_that_cannot_be_is_refused_by_name(value: object) -> None:
    with pytest.raises(ConfigError, match=naming("merge_scale")):
        Recipe(merge_scale=value)


def test_a_number_is_the_scale_of_all_weights_and_is_read_back_from_a_file() -> None:
    config = small_config(recipe={"merge_scale": 0.5, "stages": [{}, {"rounds": 1, "merge_scale": {"own": 0.25}}]})

    assert config.recipe == Recipe.model_validate(config.recipe.model_dump())
    assert config.recipe.merge_scale == ist.MergeScale(own=0.5, shared=0.5)
    assert config.recipe.stages[1] == Stage(rounds=1, merge_scale=MergeScale(own=0.25))


def test_a_run_without_a_scale_keeps_the_number_of_its_configuration() -> None:
    """`ist.join(state=)` compares it with that of an earlier version's state."""
    stages = {"stages": [{}, {"rounds": 1, "keep": 1}]}

    numbers = [
        run_fingerprint(small_config(recipe={**stages, **key}))
        for key in ({}, {"merge_scale": 1}, {"merge_scale": 0.5})
    ]

    assert numbers[0] == numbers[1] == NUMBER_BEFORE
    assert numbers[2] != NUMBER_BEFORE


NUMBER_BEFORE = 256543800
"""Of this configuration, before there were scales."""
