"""Write a network of transformers as the folder that its `from_pretrained` loads, with a tokenizer if one is given.

Where it sits: `ist export --to hf` calls `write_pretrained`.
Law: the loaded network computes the same logits, bit for bit.
Not here: the weights of a run (`weights.py`). Imports transformers only if it is called.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ist.config.schema import Model
from ist.errors import ConfigError, error_with_line
from ist.storage.checkpoint import stream_tensors
from ist.tensors import tensor_specs


def write_pretrained(network: nn.Module, settings: Model, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a network in the format of transformers.

    Args:
        network: The network, with any values; it gets those of `tensors`. On the `meta` device it gets none: then the
            tensors are written one at a time, so that no more than one is held.
        settings: The section `model` from which it was built.
        tensors: The tensors of its state dict.
        path: The folder to create.

    Raises:
        ConfigError: It is not a network of transformers.
    """
    if not _is_of_transformers(network):
        raise ConfigError(
            f"--to hf: 'model.name' is '{settings.name}', which is a {type(network).__name__}, not a model of "
            "transformers: use --to safetensors"
        )
    model: Any = network
    if not (is_streamed := any(parameter.is_meta for parameter in network.parameters())):
        model.load_state_dict(tensors)
    if settings.name.rpartition(":")[2] == type(network).__name__:  # made of a config, not by a user's function
        _restore_cache_setting(model, settings.args)
    if not is_streamed:
        model.save_pretrained(path)
        return
    model.save_pretrained(path, state_dict={})  # all files but the weights
    first = tensor_specs(network, with_statistics=True)  # one name of tied tensors, which transformers ties again
    stream_tensors(path / "model.safetensors", first, tensors.__getitem__, {"format": "pt"})


def _is_of_transformers(network: nn.Module) -> bool:
    if find_spec("transformers") is None:
        return False
    from transformers import PreTrainedModel

    return isinstance(network, PreTrainedModel)


def _restore_cache_setting(model: Any, args: Mapping[str, Any]) -> None:
    """Restore the key-value cache, which training switches off but generation uses, to the class's own setting."""
    if "use_cache" in args or "config" in args or not hasattr(model.config, "use_cache"):
        return
    model.config.use_cache = getattr(type(model.config)(**args), "use_cache", False)


def write_tokenizer(tokenizer: str, path: Path) -> None:
    """Write a tokenizer into the folder of a network.

    Args:
        tokenizer: The name of a tokenizer on the Hugging Face hub, or a folder with one.
        path: The folder.

    Raises:
        ConfigError: It cannot be loaded.
    """
    _loaded_tokenizer(tokenizer).save_pretrained(path)


def check_tokenizer(tokenizer: str) -> None:
    """Check that a tokenizer can be loaded, before anything is written.

    Raises:
        ConfigError: It cannot be loaded.
    """
    _loaded_tokenizer(tokenizer)


def _loaded_tokenizer(tokenizer: str) -> Any:
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(tokenizer)
    except Exception as error:  # transformers raises errors of many classes here
        raise ConfigError(f"--tokenizer is '{tokenizer}', which cannot be loaded: {error_with_line(error)}") from error
