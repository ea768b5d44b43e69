"""Build a network whose large tensors are in temporary files, so that it needs memory for one of them at a time.

The files are mapped into memory, so all operators work on them as on any tensor, with the same bits. After each
operator the pages that it has used are given back to the operating system, which writes them to the file when it needs
memory.

Where it sits: `ist/initialization/` uses it for networks that must be built whole.
Law: the network has the values that it has without files, bit for bit.
Not here: networks that need no values (`constants.py`).
"""

import errno
import mmap
import os
import tempfile
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ist.data.nested import mapped, tensors_in
from ist.errors import ModelError
from ist.tensors import memory_key, named_tensors

_LARGE_BYTES, _CHUNK_BYTES = 2**20, 2**24

_SMALL_BYTES = 64 * 2**20
"""There is no warning of a full network that takes at most so many bytes: torch itself takes more."""


def built_whole(make: Callable[[], nn.Module], reason: str, remedy: str) -> nn.Module:
    """Build a full network, with its large tensors in files; warn of it if the network is large.

    Args:
        make: Builds the network.
        reason: Why it is built.
        remedy: How to avoid that.

    Raises:
        ModelError: There is not enough space for the files.
    """
    with large_tensors_in_files():
        made = make()
    warn_if_large(made, reason, remedy)
    return made


def warn_if_large(network: nn.Module, reason: str, remedy: str) -> None:
    """Warn that this process builds a full network in files, if it is a large one; arguments as in `built_whole`."""
    if (num_bytes := _num_bytes(network)) > _SMALL_BYTES:
        warnings.warn(
            f"{reason}, so this process builds the full network, in temporary files of {num_bytes / 2**20:,.0f} MiB: "
            f"{remedy}",
            stacklevel=2,
        )


def files_if_large(template: nn.Module) -> AbstractContextManager[object]:
    """Return a context in which large tensors are put into files, if the network is large."""
    return large_tensors_in_files() if _num_bytes(template) > _SMALL_BYTES else nullcontext()


def _num_bytes(network: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in named_tensors(network).values())


@contextmanager
def large_tensors_in_files() -> Iterator["FileTensors"]:
    """Put the large tensors that are made within the context on the CPU into temporary files (see `TMPDIR`).

    A file has no name, and is deleted when its tensor is.

    Raises:
        ModelError: There is not enough space for the files.
    """
    files = FileTensors()
    with files:
        yield files


class FileTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Puts the large results of operators into files."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._files: dict[Hashable, weakref.ref[mmap.mmap]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator."""
        kwargs = kwargs or {}
        if func is torch.ops.aten.empty.memory_format:
            size, device = args[0] if args else kwargs["size"], kwargs.get("device")
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            is_large = torch.Size(size).numel() * dtype.itemsize >= _LARGE_BYTES
            if is_large and torch.device(device or "cpu").type == "cpu" and not kwargs.get("memory_format"):
                return self._empty(size, torch.empty(size, device="meta").stride(), dtype)
        if func in _COPIES and args and _is_large(args[0]) and (copy := self._copied(func, args, kwargs)) is not None:
            return copy
        inputs = list(tensors_in((args, kwargs)))
        known = {memory_key(tensor) for tensor in inputs if _is_large(tensor)}

        def filed(result: Tensor) -> Tensor:
            is_new = _is_large(result) and memory_key(result) not in known and memory_key(result) not in self._files
            return self._in_file(result, result) if is_new and _is_dense(result) else result

        result = mapped(func(*args, **kwargs), filed)
        for tensor in [*inputs, *tensors_in(result)]:
            self.release(tensor)
        return result

    def holds(self, tensor: Tensor) -> bool:
        """Return whether the values of a tensor are in a file."""
        return _is_large(tensor) and memory_key(tensor) in self._files

    def release(self, tensor: Tensor) -> None:
        """Give back the memory of a tensor, if its values are in a file."""
        if _is_large(tensor) and (found := self._files.get(memory_key(tensor))) and (memory := found()):
            memory.madvise(mmap.MADV_DONTNEED)

    def _empty(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a dense tensor in a file, with values 0."""
        num_bytes = torch.Size(size).numel() * dtype.itemsize
        with tempfile.TemporaryFile() as file:
            try:
                os.posix_fallocate(file.fileno(), 0, num_bytes)  # else the process is killed when the disk is full
            except OSError as error:
                if error.errno == errno.EFBIG:  # no file is that large: torch's own error says so
                    return torch.empty(size, dtype=dtype)
                raise ModelError(
                    f"a temporary file of {num_bytes:,} bytes for a tensor of the network cannot be written in "
                    f"{tempfile.gettempdir()} ({error.strerror}): set TMPDIR to a folder with space for the network"
                ) from error
            memory = mmap.mmap(file.fileno(), num_bytes)
        storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
        made = torch.empty(0, dtype=dtype).set_(storage, 0, size, stride)
        self._files[memory_key(made)] = weakref.ref(memory)
        return made

    def _copied(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """Return the result of an operator that copies a tensor, without other memory for it; None if it is another."""
        on_meta = func(args[0].to("meta"), *args[1:], **{name: v for name, v in kwargs.items() if name != "device"})
        is_plain = torch.device(kwargs.get("device") or "cpu").type == "cpu" and not kwargs.get("pin_memory")
        return self._in_file(args[0], on_meta) if is_plain and _is_dense(on_meta) else None

    def _in_file(self, tensor: Tensor, like: Tensor) -> Tensor:
        """Return a copy of a tensor in a file, with the strides and the dtype of another."""
        made = self._empty(like.shape, like.stride(), like.dtype)
        order = _outer_first(like)
        target, source = made.permute(order), tensor.detach().permute(order)
        rows = max(1, _CHUNK_BYTES * target.shape[0] // made.nbytes)
        for start in range(0, target.shape[0], rows):
            target[start : start + rows] = source[start : start + rows]
            self.release(made)
            self.release(tensor)
        return made


class OneAtATime(Mapping[str, Tensor]):
    """Tensors in files by name, of which only the one that was asked for last is in memory.

    Args:
        tensors: The tensors.
        files: The context in which they were made.
    """

    def __init__(self, tensors: Mapping[str, Tensor], files: FileTensors) -> None:
        self._tensors = tensors
        self._files = files

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor, and give back the memory of the others."""
        for tensor in self._tensors.values():
            self._files.release(tensor)
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        """Yield the names."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Return the number of names."""
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        """Return whether there is a tensor of that name."""
        return name in self._tensors


def _outer_first(tensor: Tensor) -> list[int]:
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)


def _is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor's elements fill its memory, without gaps and overlaps, in any order of the dims."""
    return tensor.permute(_outer_first(tensor)).is_contiguous()


_COPIES = (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default)


def _is_large(tensor: Tensor) -> bool:
    return (
        tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and tensor.untyped_storage().nbytes() >= _LARGE_BYTES
    )
