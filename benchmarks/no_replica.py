"""A worker never holds the network: each worker runs under a limit that its parent sets before Python starts.

    python -m benchmarks.no_replica [--layers 24] [--dtype float32] [--optimizer SGD] [--workers 8]

Claim: a Llama-like network with 1.1 billion parameters trains with eight workers, each a process under a limit
(RLIMIT_DATA, `pool.memory_limit`) of what `ist plan` predicts for its share: weights, gradient, optimizer state and two
messages, and one layer as work space; interpreter, libraries and data come on top.

The limit is set before the interpreter starts, so it also holds while a worker imports, loads its data and makes its
module. A dedicated coordinator holds the network and two messages. The text is short: the run shows memory, not
learning.

Not here: a limit on the coordinator, which holds the network, and on the process that checks the configuration.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from benchmarks.common import ROOT, write_result
from ist.config.load import load_config
from ist.distributed.memory_limit import note_held
from ist.launch.start import launch
from ist.monitoring.display import format_bytes
from ist.runs.build import build_job
from ist.storage.run_folder import RunFolder, create_run_folder
from ist.subnet.job import Job
from ist.training.memory_budget import count_step, memory_budgets

ROUNDS = 3


def llama(layers: int, dtype: str, width: int = 2048, hidden: int = 5632, vocabulary: int = 4096) -> nn.Module:
    """Return a Llama of transformers: 45 million parameters a layer in the default width, as in TinyLlama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=8,
        max_position_embeddings=64,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    made: nn.Module = LlamaForCausalLM._from_config(config, dtype=getattr(torch, dtype))  # type: ignore[no-untyped-call]
    return made


def configuration(model: dict[str, Any], workers: int, optimizer: str, limit: str | None = None) -> dict[str, Any]:
    """Return the configuration of a short run on text, with or without a limit on the memory of a worker."""
    return {
        "name": "no_replica",
        "model": {"name": "benchmarks.no_replica:llama", "args": model},
        "data": {"name": "text", "args": {"length": 16, "max_bytes": 4000}},
        "train": {
            "workers": workers,
            "rounds": ROUNDS,
            "local_steps": 2,
            "batch_size": 1,
            "loss": "next_token",
            "optimizer": {"name": optimizer, "args": {"lr": 0.001}},
        },
        "evaluate": {"every": 10**6, "metric": "none"},
        "checkpoint": {"every": 10**6},
        "pool": {
            "kind": "torchrun",
            "device": "cpu",
            "coordinator": "dedicated",
            "message_buffers": 2,
            "memory_limit": limit,
        },
    }


def worker_limit(job: Job) -> int:
    """Return the limit on a worker: weights, gradient, optimizer state, two messages, and one layer as work space."""
    budget = memory_budgets(job, count_step(job, torch.device("cpu"), with_activations=False))["worker"]
    names = ("weights", "gradients", "optimizer state", "constants")
    share, layer = budget.parts["weights"], _largest_layer(job.split.template)
    return sum(budget.parts.get(name, 0) for name in names) + 2 * share + layer


def _largest_layer(template: nn.Module) -> int:
    """Bytes of the largest child of a list of layers: a decoder layer."""
    layers = (child for module in template.modules() if isinstance(module, nn.ModuleList) for child in module)
    return max(sum(parameter.nbytes for parameter in layer.parameters()) for layer in layers)


def start(file: Path, folder: Path) -> None:
    """Set the limit in a configuration, and train by it without the checks before a run.

    Args:
        file: The configuration.
        folder: The run folder to create.
    """
    config = load_config(file)
    job = build_job(config)
    note_held()
    limited = load_config(file, [f"pool.memory_limit={worker_limit(job) / 1e6:.1f}MB"])
    launch(limited, create_run_folder(limited, folder).path, resume=False)


def run(model: dict[str, Any], workers: int, optimizer: str, folder: Path, is_checked: bool = True) -> dict[str, Any]:
    """Train, and return the limit, the measured peaks and the seconds of each phase.

    Args:
        model: The arguments of `llama`.
        workers: The number of workers.
        optimizer: The name of the optimizer.
        folder: An empty folder for the configuration and the run.
        is_checked: Whether to run `ist train`, with its checks; if not, `start`.

    Raises:
        RuntimeError: The run fails; the message ends with what it printed.
    """
    file = folder / "config.yaml"
    file.write_text(json.dumps(configuration(model, workers, optimizer)))
    command = [sys.executable, "-m", "benchmarks.no_replica", "--start", str(file), str(folder / "run")]
    if is_checked:
        limit = worker_limit(build_job(load_config(file)))
        file.write_text(json.dumps(configuration(model, workers, optimizer, f"{limit / 1e6:.1f}MB")))
        command = [sys.executable, "-m", "ist", "train", str(file), "--run-dir", str(folder / "run")]
    started = time.monotonic()
    said: list[str] = []
    prepared: dict[str, float] = {}
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                print(line, end="", file=sys.stderr, flush=True)
                said.append(line)
                if "starting" in line:
                    prepared = {
                        "prepare_s": time.monotonic() - started,
                        "prepare_cpu_s": sum(psutil.Process(process.pid).cpu_times()[:2]),
                        "checking_process_memory_bytes": peak_bytes(process.pid),
                    }
        finally:
            process.terminate()  # it ends its ranks; nothing happens if it has ended
    if process.wait() != 0:
        raise RuntimeError(f"{' '.join(command)} failed: {''.join(said[-3:])}")
    total_s = time.monotonic() - started
    result = RunFolder(folder / "run").result()
    limit_bytes = RunFolder(folder / "run").load_config().pool.memory_limit_bytes
    return {
        "model": model,
        "workers": workers,
        "optimizer": optimizer,
        "parameters": result["parameters"],
        "rounds": result["rounds"],
        "network_bytes": result["memory_budget"]["coordinator"]["full network"],
        "limit_bytes": limit_bytes,
        "predicted": result["memory_budget"],
        **{name: result[name] for name in MEASURED},
        **prepared,
        "total_s": total_s,
        "loss": result["loss"],
    }


MEASURED = ("memory_bytes", "process_memory_bytes", "coordinator_process_memory_bytes")


def peak_bytes(pid: int) -> int:
    """Return the peak resident memory of a process since its start."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--optimizer", default="SGD")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=5632)
    parser.add_argument("--start", nargs=2, metavar=("CONFIG", "FOLDER"), help="train by CONFIG under the limit")
    asked = parser.parse_args()
    if asked.start:
        start(*map(Path, asked.start))
        return
    model = {"layers": asked.layers, "dtype": asked.dtype, "width": asked.width, "hidden": asked.hidden}
    with tempfile.TemporaryDirectory() as scratch:
        found = run(model, asked.workers, asked.optimizer, Path(scratch))
    shown = {name: format_bytes(value) for name, value in found.items() if name.endswith("_bytes")}
    print(
        f"{found['parameters']:,} parameters: {shown}; prepared in {found['prepare_s']:.0f} s, "
        f"{found['prepare_cpu_s']:.0f} s of a core"
    )
    name = f"{found['parameters'] / 1e9:.1f}B {asked.dtype} {asked.optimizer}"
    path = ROOT / "benchmarks" / "results" / "no_replica.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else {}
    print(write_result("no_replica", {"runs": {**runs, name: found}}))


if __name__ == "__main__":
    main()
