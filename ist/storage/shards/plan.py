"""Plan a checkpoint in shards: which file holds which whole tensors, and which rank writes it.

A file holds at most 1/n of the bytes with n ranks, or one tensor that is larger. Files have the names of Hugging Face:
`model-00001-of-00004.safetensors`. Every rank computes the same plan from the tensors' shapes.

Where it sits: `ist/storage/shards/write.py` writes the files of a plan.
Not here: the format of a file (`ist/storage/shards/layout.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ist.storage.shards.layout import in_file_order
from ist.tensors import TensorSpec

MODEL, STATE = "model", "state"
"""First words of the files of a checkpoint: of the network's tensors, and of all other tensors."""


@dataclass(frozen=True)
class ShardFile:
    """A file of a checkpoint.

    Attributes:
        name: Its name.
        writer: The rank that writes it.
        specs: Its tensors, in the order of the file.
    """

    name: str
    writer: int
    specs: Mapping[str, TensorSpec]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return sum(spec.nbytes for spec in self.specs.values())


def plan_shards(
    network: Mapping[str, TensorSpec], others: Mapping[str, TensorSpec], num_ranks: int
) -> tuple[ShardFile, ...]:
    """Return the files of a checkpoint.

    Args:
        network: The tensors of the network's state dict; they are in files of their own, in this order.
        others: All other tensors, such as carried optimizer state.
        num_ranks: The number of ranks that write.

    Example:
        >>> import torch
        >>> from ist.tensors import TensorSpec
        >>> weight = TensorSpec((4, 4), torch.float32)
        >>> [(file.name, file.writer, *file.specs) for file in plan_shards({"a": weight, "b": weight}, {}, 2)]
        [('model-00001-of-00002.safetensors', 0, 'a'), ('model-00002-of-00002.safetensors', 1, 'b')]
    """
    written = [0] * num_ranks
    files = []
    for stem, specs in ((MODEL, network), (STATE, others)):
        parts = _parts(specs, num_ranks)
        for number, part in enumerate(parts, start=1):
            name = f"{stem}-{number:05d}-of-{len(parts):05d}.safetensors"
            writer = min(range(num_ranks), key=written.__getitem__)  # the rank that has least to write so far
            files.append(ShardFile(name, writer, in_file_order(part)))
            written[writer] += files[-1].nbytes
    return tuple(files)


def waves(files: Sequence[ShardFile]) -> list[list[ShardFile]]:
    """Return the files in the order of writing: those of a wave have different writers, which write at once."""
    of_rank: dict[int, list[ShardFile]] = {}
    for file in files:
        of_rank.setdefault(file.writer, []).append(file)
    return [
        [mine[number] for _, mine in sorted(of_rank.items()) if number < len(mine)]
        for number in range(max(map(len, of_rank.values()), default=0))
    ]


def _parts(specs: Mapping[str, TensorSpec], num_ranks: int) -> list[dict[str, TensorSpec]]:
    """Split tensors into files, in their order; a file ends where the next tensor would exceed 1/n of the bytes."""
    most = -(-sum(spec.nbytes for spec in specs.values()) // num_ranks)
    parts: list[dict[str, TensorSpec]] = []
    size = 0
    for name, spec in specs.items():
        if not parts or size + spec.nbytes > most:
            parts.append({})
            size = 0
        parts[-1][name] = spec
        size += spec.nbytes
    return parts
