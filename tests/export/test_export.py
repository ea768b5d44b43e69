"""`ist export`: other libraries load the network of a run, and compute the same."""

import pickle
import re
import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_saver import save
from torch.utils.data import TensorDataset

from ist.config.schema import Model
from ist.errors import CheckpointError, ConfigError
from ist.export.distributed_checkpoint import read_distributed
from ist.export.distributed_checkpoint import write_distributed as write_read
from ist.export.hugging_face import write_pretrained
from ist.runs.build import build_job, build_network
from ist.storage.checkpoint import Progress, write_tensors
from ist.storage.run_folder import RunFolder, create_run_folder
from ist.storage.shards.read import SavedTensors
from ist.tensors import TensorSpec
from tests.cli.test_cli import ist
from tests.conftest import assert_same, naming, run_forked_ranks, small_config
from tests.runs.test_resume import PowerCutError, run
from tests.storage.test_shards import saved

__all__ = ["ist"]

GPT2: dict[str, Any] = {
    "model": {
        "name": "transformers:GPT2LMHeadModel",
        "args": {
            "vocab_size": 32, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 4, "bos_token_id": 0,
            "eos_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        },
    },
    "data": {"name": f"{__name__}:tokens"},
    "train__loss": "next_token",
    "train__rounds": 2,
    "evaluate": {"metric": "none"},
    "checkpoint": {"every": 1},
}  # fmt: skip


def tokens(root: Path | None) -> tuple[TensorDataset, None]:  # noqa: ARG001
    """Random texts; the name of the function stands in GPT2."""
    texts = torch.randint(32, (64, 8), generator=torch.Generator().manual_seed(1))
    return TensorDataset(texts, texts), None


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = create_run_folder(small_config(**GPT2), tmp_path_factory.mktemp("gpt2") / "run")
    run(folder, resume=False)
    return folder


def logits(model: nn.Module) -> Tensor:
    texts = tokens(None)[0].tensors[0]
    found: Tensor = model.eval()(texts).logits
    return found.detach()


def of_run(folder: RunFolder) -> nn.Module:
    """The trained network as the run has built it."""
    model = build_network(folder.load_config())
    model.load_state_dict(load_file(folder.path / "model.safetensors"))
    return model


def test_transformers_loads_an_exported_network_with_the_same_logits(ist: Any, gpt2: RunFolder, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    outcome = ist("export", gpt2.path, tmp_path / "hf", "--to", "hf")

    assert outcome.code == 0, outcome.err
    assert str(tmp_path / "hf") in outcome.out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(logits(model), logits(of_run(gpt2)))
    assert model.config.use_cache  # training has switched it off
    assert model.transformer.wte.weight.data_ptr() == model.lm_head.weight.data_ptr()


def test_a_given_tokenizer_is_exported_too(ist: Any, gpt2: RunFolder, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"in": 0, "the": 1, "beginning": 2, "?": 3}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path / "words")

    outcome = ist("export", gpt2.path, tmp_path / "hf", "--to", "hf", "--tokenizer", tmp_path / "words")

    assert outcome.code == 0, outcome.err
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")("beginning")["input_ids"] == [2]
    assert (tmp_path / "hf" / "config.json").exists()


def test_a_network_that_a_users_function_made_keeps_its_own_cache_setting(tmp_path: Path) -> None:
    from transformers import AutoConfig

    network = build_network(small_config(**GPT2))

    write_pretrained(network, Model(name="mine:net", args={"hidden": 4}), network.state_dict(), tmp_path / "hf")

    assert not AutoConfig.from_pretrained(tmp_path / "hf").use_cache


def test_an_unfinished_run_with_batch_norm_says_how_old_its_statistics_are(ist: Any, tmp_path: Path) -> None:
    folder = create_run_folder(small_config(checkpoint={"every": 1}), tmp_path / "run")
    with pytest.raises(PowerCutError):
        run(folder, resume=False, stop_after=2)

    outcome = ist("export", folder.path, tmp_path / "out", "--to", "dcp")

    assert re.search(naming("round 2", "batch norm", "last evaluation"), outcome.err)


@pytest.mark.parametrize("to", ["safetensors", "dcp"])
def test_a_run_starts_from_the_exported_weights(ist: Any, gpt2: RunFolder, tmp_path: Path, to: str) -> None:
    assert ist("export", gpt2.path, tmp_path / "out", "--to", to).code == 0

    weights = tmp_path / "out" / ("model.safetensors" if to == "safetensors" else "")
    model = {**GPT2["model"], "weights": str(weights)}
    job = build_job(small_config(**{**GPT2, "model": model}))

    assert_same(job.task.build().state_dict(), of_run(gpt2).state_dict())


def test_an_unfinished_run_exports_its_newest_checkpoint_and_says_so(ist: Any, tmp_path: Path) -> None:
    folder = create_run_folder(
        small_config(train__rounds=5, checkpoint={"every": 1}, recipe={"average": {"kind": "ema"}}), tmp_path / "run"
    )
    with pytest.raises(PowerCutError):
        run(folder, resume=False, stop_after=3)

    outcome = ist("export", folder.path, tmp_path / "out", "--to", "safetensors")

    assert outcome.code == 0
    assert re.search(naming(str(folder.path), "not finished", "round 3"), outcome.err)
    saved = load_file(folder.path / "checkpoints" / "round-00000003.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert_same(found, {name: saved[f"average/module.{name}"] for name in found})  # what a finished run would save
    assert set(found) == set(build_network(folder.load_config()).state_dict())


@pytest.fixture(scope="module")
def in_shards(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of GPT2 that was interrupted, with a checkpoint in shards."""
    config = small_config(**GPT2, pool={"kind": "torchrun", "store": "sharded", "device": "cpu"})
    folder = create_run_folder(config, tmp_path_factory.mktemp("shards") / "run")
    saved([folder.storage] * 3, Progress(1), network=build_network(config).state_dict(), others={})
    return folder


@pytest.mark.parametrize("to", ["hf", "safetensors", "dcp"])
def test_a_checkpoint_in_shards_is_exported_without_holding_the_network(
    ist: Any, in_shards: RunFolder, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = build_network(in_shards.load_config())
    held: weakref.WeakSet[Tensor] = weakref.WeakSet()
    read = SavedTensors.__getitem__

    def noted(self: SavedTensors, name: str) -> Tensor:
        assert len(held) <= 1
        found = read(self, name)
        held.add(found)
        return found

    monkeypatch.setattr(SavedTensors, "__getitem__", noted)

    outcome = ist("export", in_shards.path, tmp_path / "out", "--to", to)

    assert outcome.code == 0, outcome.err
    if to == "hf":
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(logits(model), logits(expected))
        assert model.transformer.wte.weight.data_ptr() == model.lm_head.weight.data_ptr()
        assert model.config.use_cache
    elif to == "dcp":
        assert_same(read_distributed(tmp_path / "out", expected.state_dict()), expected.state_dict())
    else:
        assert_same(load_file(tmp_path / "out" / "model.safetensors"), expected.state_dict())


@pytest.mark.system
def test_other_numbers_of_ranks_load_their_rows_of_an_exported_checkpoint(
    ist: Any, in_shards: RunFolder, tmp_path: Path
) -> None:
    assert ist("export", in_shards.path, tmp_path / "dcp", "--to", "dcp").code == 0
    write_tensors(tmp_path / "expected.safetensors", build_network(in_shards.load_config()).state_dict(), {})

    run_forked_ranks(
        *((ranks, "tests/export/load_rows.py", tmp_path / "dcp", tmp_path / "expected.safetensors") for ranks in (2, 5))
    )


def test_transformers_loads_the_network_from_a_checkpoint_in_shards(in_shards: RunFolder, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    expected: Any = build_network(in_shards.load_config())
    shutil.copytree(in_shards.path / "checkpoints" / "round-00000001", tmp_path / "checkpoint")
    expected.config.save_pretrained(tmp_path / "checkpoint")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")

    assert torch.equal(logits(model), logits(expected))


def test_what_cannot_be_exported_is_refused_by_name_and_nothing_is_written(
    ist: Any, gpt2: RunFolder, tmp_path: Path
) -> None:
    mlp = create_run_folder(small_config(), tmp_path / "mlp")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    cases: dict[tuple[Any, ...], tuple[str, ...]] = {
        (gpt2.path, tmp_path / "out", "--to", "onnx"): ("--to is 'onnx'", "hf, safetensors, dcp"),
        (gpt2.path, tmp_path / "full", "--to", "dcp"): (f"{tmp_path / 'full'}: ", "empty"),
        (gpt2.path, tmp_path / "out", "--to", "dcp", "--tokenizer", "gpt2"): ("--tokenizer is 'gpt2'", "--to hf"),
        (gpt2.path, tmp_path / "out", "--to", "hf", "--tokenizer", tmp_path): ("--tokenizer is", str(tmp_path)),
        (tmp_path / "none", tmp_path / "out", "--to", "hf"): (f"{tmp_path / 'none'}: ", "run folder"),
        (mlp.path, tmp_path / "out", "--to", "dcp"): (f"{mlp.path}: ", "no checkpoint"),
    }

    for arguments, parts in cases.items():
        outcome = ist("export", *arguments)
        assert outcome.code in (1, 2)
        assert re.search(naming(*parts), outcome.err)

    run(mlp, resume=False)
    outcome = ist("export", mlp.path, tmp_path / "out", "--to", "hf")
    assert re.search(naming("'model.name' is 'mlp'", "MLP", "--to safetensors"), outcome.err)
    assert not (tmp_path / "out").exists()


def write_distributed(tensors: Mapping[str, Tensor], path: Path) -> None:
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    write_read(specs, tensors.__getitem__, path)


TENSORS = {"weight": torch.randn(5, 3), "half": torch.randn(4).bfloat16(), "steps": torch.tensor(7)}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # of `save` itself
@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_checkpoint_of_pytorch_returns_what_was_written(tmp_path: Path, prefix: str) -> None:
    if prefix:  # as a training script saves it, with an optimizer
        save({"model": dict(TENSORS), "optimizer": {"step": 3}}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    else:
        write_distributed(TENSORS, tmp_path / "dcp")

    found = read_distributed(tmp_path / "dcp", {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()})

    assert_same(found, TENSORS)


class Shell:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return (exec, ("import pathlib; pathlib.Path('unpickled').touch()",))


def test_a_foreign_checkpoint_is_refused_and_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "dcp"
    write_distributed(TENSORS, path)
    good = (path / ".metadata").read_bytes()

    with pytest.raises(CheckpointError, match=naming("'bias'", "weight")):
        read_distributed(path, {**TENSORS, "bias": torch.ones(1)})
    with pytest.raises(CheckpointError, match=naming("'weight'", "(5, 3)", "(5, 4)")):
        read_distributed(path, {"weight": torch.ones(5, 4)})
    for content, part in ((pickle.dumps(Shell()), "builtins.exec"), (good[:50], ".metadata"), (b"", ".metadata")):
        (path / ".metadata").write_bytes(content)
        with pytest.raises(CheckpointError, match=naming(str(path / ".metadata"), part)):
            read_distributed(path, TENSORS)
    assert not Path("unpickled").exists()
    (path / ".metadata").write_bytes(good)
    data = max(path.glob("*.distcp"), key=lambda file: file.stat().st_size)
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=naming(str(path), "cannot be read")):
        read_distributed(path, TENSORS)


def test_weights_of_another_network_are_refused_with_the_key(tmp_path: Path) -> None:
    write_distributed(TENSORS, tmp_path / "dcp")
    (tmp_path / "empty").mkdir()

    for folder, part in (("dcp", "'linear_1.weight'"), ("empty", "torch.distributed.checkpoint")):
        config = small_config(model__weights=str(tmp_path / folder))
        with pytest.raises(ConfigError, match=naming("'model.weights' is", str(tmp_path / folder), part)):
            build_job(config).task.build()
