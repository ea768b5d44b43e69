"""Fine-tune low-rank adapters (LoRA, by peft) of a small GPT-2 on several workers, and count what they send.

python examples/lora.py                                  # three seeds, 4 workers in one process; about fifteen minutes
python examples/lora.py --seeds 1 --rounds 4             # a quick look

A GPT-2 is trained on the sources of Python's standard library. Then its adapters are fine-tuned on the help topics of
Python, byte by byte, in four ways, with the same steps on the same samples:

- local SGD of the adapters: every worker trains all adapters, and rank 0 averages them every round, in float32;
- the same with coded messages: int8 down, and differences in int4 with error feedback up;
- independent subnets: every worker trains the adapters of its own attention heads and hidden units;
- the same against the frozen rest: every worker also has all other heads and units, frozen and in four bits.

Frozen weights are sent once to a worker, and again if its part of them changes. `docs/lora.md` has the result: which of
them to use, and when to use none. Needs `pip install transformers peft`; nothing to download.

Reference: Hu et al., arXiv 2106.09685 (LoRA).
"""

import argparse
import statistics
import sys
import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import ist
from ist.data.registry import Splits
from ist.data.text import text

FULL_WIDTH = {"stages": [{"keep": 1}]}
CODED = {"down": "int8", "up": "int4", "values": "deltas", "error_feedback": True}
WAYS: dict[str, dict[str, Any]] = {
    "local SGD of the adapters": {"recipe": FULL_WIDTH},
    "the same, coded": {"recipe": FULL_WIDTH, "exchange": CODED},
    "independent subnets, coded": {"exchange": {**CODED, "error_feedback": False}},
    "against the frozen rest, coded": {
        "partition": {"rest": "frozen"}, "recipe": {"merge_scale": {"own": 0.5}},
        "exchange": {**CODED, "error_feedback": False, "rest": "int4"},
    },
}  # fmt: skip


def gpt2() -> GPT2LMHeadModel:
    """Return a GPT-2 of 120,576 parameters, with random weights."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        )
    )  # fmt: skip


def pretrained(steps: int, seed: int) -> dict[str, Tensor]:
    """Return the weights of a GPT-2 that was trained on source code."""
    torch.manual_seed(seed)
    model = gpt2()
    windows: Tensor = text(source="stdlib", max_bytes=2_000_000).train.tensors[0]  # type: ignore[attr-defined]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = windows[torch.randint(len(windows), (32,))]
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def with_adapters(weights: dict[str, Tensor], seed: int) -> nn.Module:
    """Return the network with new adapters of rank 8, which are all that is trained."""
    model = gpt2()
    model.load_state_dict(weights)
    torch.manual_seed(seed)
    targets = ["c_attn", "c_proj", "c_fc"]
    settings = LoraConfig(r=8, lora_alpha=16, target_modules=targets, fan_in_fan_out=True, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, for a property that peft reads
        return get_peft_model(model, settings).train()


def fine_tuned(
    model: nn.Module, data: Splits, rounds: int, local_steps: int, seed: int, settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Fine-tune the adapters on four workers, and return the records of the rounds."""
    result = ist.train(
        model, data.train, test_data=data.test, loss="next_token", workers=4, local_steps=local_steps, rounds=rounds,
        batch_size=16,
        optimizer=ist.Optimizer(name="AdamW", args={"lr": 3e-3}), seed=seed, progress=False,
        evaluate=ist.Evaluate(every=rounds, metric="none"), **settings,
    )  # fmt: skip
    return result.history


def main() -> None:
    """Fine-tune in all ways, and print the losses and the bytes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--local-steps", type=int, default=20)
    parser.add_argument("--base-steps", type=int, default=300)
    parser.add_argument("--max-bytes", type=int, help="use only so many bytes of the text")
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = text(max_bytes=given.max_bytes)
    found: dict[str, list[tuple[float, int, int]]] = {way: [] for way in WAYS}
    for seed in range(given.seeds):
        weights = pretrained(given.base_steps, seed)
        for way, settings in WAYS.items():
            model = with_adapters(weights, seed)
            records = fine_tuned(model, data, given.rounds, given.local_steps, seed, settings)
            first, total = records[0]["sent_bytes"], records[-1]["sent_bytes"]
            later = (total - first) / max(1, given.rounds - 1)
            found[way].append((records[-1]["test_loss"], round(later), total))
            print(f"seed {seed}, {way}: test loss {records[-1]['test_loss']:.4f}", file=sys.stderr)
    print(f"{'':32}test loss (nats a byte)   bytes a round   bytes of {given.rounds} rounds")
    for way, runs in found.items():
        losses, later, totals = zip(*runs, strict=True)
        spread = f" +- {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        print(f"{way:32}{statistics.mean(losses):.4f}{spread:19}{later[0]:>14,}{totals[0]:>20,}")


if __name__ == "__main__":
    main()
