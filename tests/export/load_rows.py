"""Load a checkpoint of torch.distributed.checkpoint as the ranks of a group do, each its rows of every tensor.

python -m tests.forked_ranks N tests/export/load_rows.py CHECKPOINT EXPECTED.safetensors   (or under torchrun)
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, zeros

if __name__ == "__main__":
    checkpoint, expected = Path(sys.argv[1]), load_file(sys.argv[2])
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state: dict[str, DTensor] = {
        name: zeros(*tensor.shape, dtype=tensor.dtype, device_mesh=mesh, placements=[Shard(0)])
        for name, tensor in expected.items()
        if tensor.dim()
    }

    load(state, checkpoint_id=checkpoint)

    for name, found in state.items():
        parts = torch.chunk(expected[name], dist.get_world_size())
        rank = dist.get_rank()
        assert torch.equal(found.to_local(), parts[rank] if rank < len(parts) else expected[name][:0]), name
