"""The wide classifier: hidden units are split in both layers."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import ist
from ist.checks.verify import verify_cuts
from ist.models.wide import WideClassifier
from ist.subnet.job import Job, assignments
from tests.networks import seeded
from tests.neurons.test_neurons import job_of

WORDS, LABELS = 9, 7
EXAMPLE = (
    torch.tensor([[1, 2, 9], [3, 9, 9], [0, 5, 6]]),
    torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.3, 0.4, 0.3]]),
)


def wide_job(norm: bool, workers: int = 3) -> Job:
    return job_of(seeded(lambda: WideClassifier(WORDS, 12, LABELS, norm)), EXAMPLE, workers=workers)


class Sparse(Dataset[tuple[tuple[Tensor, Tensor], int]]):
    """Three words per class; an input has one or two words of its class."""

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, Tensor], int]:
        label = index % 3
        first, second = 3 * label + index // 3 % 3, 3 * label + index // 9 % 3
        if first == second:
            return (torch.tensor([first, WORDS]), torch.tensor([1.0, 0.0])), label
        return (torch.tensor([first, second]), torch.tensor([0.8, 0.6])), label


def test_the_first_layer_is_a_linear_layer_on_the_dense_input() -> None:
    model = WideClassifier(WORDS, 12, LABELS)
    nn.init.normal_(model.bias)
    words, weights = EXAMPLE
    dense = torch.zeros(3, WORDS + 1).scatter_add(1, words, weights)[:, :WORDS]

    hidden = (dense @ model.words.weight[:WORDS] + model.bias).relu()

    torch.testing.assert_close(model(*EXAMPLE), model.output(hidden))


def test_padding_does_not_change_outputs_and_has_no_gradient() -> None:
    model = WideClassifier(WORDS, 12, LABELS)
    words, weights = EXAMPLE
    longer = nn.functional.pad(words, (0, 4), value=WORDS), nn.functional.pad(weights, (0, 4))

    torch.testing.assert_close(model(*longer), model(*EXAMPLE))
    model(*longer).square().sum().backward()
    gradient = model.words.weight.grad
    assert gradient is not None
    assert not gradient[WORDS].any()


@pytest.mark.parametrize("norm", [False, True])
def test_initial_scores_are_small_for_any_number_of_words(norm: bool) -> None:
    torch.manual_seed(0)
    model = WideClassifier(1000, 64, 500, norm)
    words, weights = torch.randint(0, 1000, (50, 32)), torch.full((50, 32), 32**-0.5)

    loss = nn.functional.cross_entropy(model(words, weights).detach(), torch.randint(0, 500, (50,)))

    assert float(loss) == pytest.approx(torch.tensor(500.0).log().item(), abs=0.4)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="hidden.*>= 1"):
        WideClassifier(9, 0, 3)


@pytest.mark.parametrize("norm", [False, True])
def test_each_worker_gets_its_share_of_both_layers(norm: bool) -> None:
    job = wide_job(norm)

    assert not job.split.found.unknown
    assert [(group.name, group.size) for group in job.split.groups] == [("words", 12)]
    specs = job.split.submodel_plan(assignments(job).of(0)[0]).specs
    assert specs["words.weight"].shape == (WORDS + 1, 4)
    assert specs["bias"].shape == (4,)
    assert specs["output.weight"].shape == (LABELS, 4)
    assert specs["output.bias"].shape == (LABELS,)
    verify_cuts(job)


@pytest.mark.parametrize("norm", [False, True])
def test_split_units_learn(norm: bool) -> None:
    history = ist.train(
        WideClassifier(WORDS, 24, 3, norm), Sparse(), workers=2, local_steps=5, rounds=4, batch_size=10,
        test_data=Sparse(), progress=False,
    ).history  # fmt: skip

    assert history[-1]["test_loss"] < 0.7 * history[0]["test_loss"]
