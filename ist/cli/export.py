"""The command `ist export`: the network of a run in the format of another library.

Where it sits: `ist/cli/main.py` registers it, prints its errors and sets exit codes.
Not here: the formats (`ist/export/`).
"""

from pathlib import Path
from typing import Annotated, Optional

import typer

from ist.config.schema import FROM_PYTHON
from ist.errors import ConfigError

FORMATS = ("hf", "safetensors", "dcp")


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    target: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to create.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="hf|safetensors|dcp",
            help="hf: what from_pretrained of transformers loads; safetensors: the state dict; dcp: the state dict as "
            "a checkpoint of torch.distributed.checkpoint.",
        ),
    ],
    tokenizer: Annotated[
        Optional[str],
        typer.Option(metavar="NAME|DIR", help="hf: also write this tokenizer, from the hub or from a folder."),
    ] = None,
) -> None:
    """Write the trained network of a run in the format of another library.

    If the run has not finished, the newest checkpoint is exported.
    """
    if to not in FORMATS:
        raise ConfigError(f"--to is '{to}': expected {', '.join(FORMATS)}")
    if tokenizer is not None and to != "hf":
        raise ConfigError(f"--tokenizer is '{tokenizer}', but only --to hf writes a tokenizer, not --to {to}")

    from ist.export.distributed_checkpoint import write_distributed
    from ist.export.hugging_face import check_tokenizer, write_pretrained, write_tokenizer
    from ist.export.weights import check_target, run_weights
    from ist.runs.build import build_network, network_template
    from ist.storage.checkpoint import stream_tensors
    from ist.storage.run_folder import RunFolder

    folder = RunFolder(run)
    check_target(target)
    config = folder.load_config()
    is_from_python = config.model.name.startswith(FROM_PYTHON)
    if is_from_python and to == "hf":
        raise ConfigError(
            f"{run}: its network was passed from Python, so it cannot be built here: use --to safetensors, or "
            "model.save_pretrained(...) in the program after ist.train"
        )
    is_whole = to == "hf" and not config.store_is_sharded  # then transformers writes it, with values
    network = None if is_from_python else (build_network if is_whole else network_template)(config)
    weights = run_weights(folder, None if network is None else network.state_dict().keys())
    if tokenizer is not None:
        check_tokenizer(tokenizer)
    if to == "hf":
        assert network is not None
        write_pretrained(network, config.model, weights.tensors, target)
    elif to == "dcp":
        write_distributed(weights.tensors.specs(), weights.tensors.__getitem__, target)
    else:
        target.mkdir(parents=True, exist_ok=True)
        stream_tensors(
            target / "model.safetensors", weights.tensors.specs(), weights.tensors.__getitem__, {"format": "pt"}
        )
    if tokenizer is not None:
        write_tokenizer(tokenizer, target)
    if weights.rounds_done is not None:
        has_statistics = any(name.endswith("running_mean") for name in weights.tensors)
        old = ". Its batch norm statistics are those of the last evaluation before it" if has_statistics else ""
        typer.echo(
            f"{run}: the run has not finished: exported its checkpoint after round {weights.rounds_done}{old}", err=True
        )
    typer.echo(f"exported: {target}")
