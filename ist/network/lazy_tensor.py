"""Tensors whose values are made when an operator needs them, and dropped afterwards.

A network with such parameters runs forward and backward while only one parameter has values: autograd keeps the lazy
tensor (or a lazy view of it, such as a transposed weight), not its values, and backward makes them again. So a network
larger than memory can run, if its values can be computed or fetched one tensor at a time.

Where it sits: for checks and evaluation of a network that no process holds whole.
Law: with values that do not change, a network with lazy parameters computes the same bits as one with ordinary ones.
Not here: where values come from.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

Values = Callable[[], Tensor]
"""Makes the values of a tensor: a tensor of its shape and dtype on the CPU, the same in each call."""


class NoValuesError(NotImplementedError):
    """Code uses a lazy tensor in a way that needs values in memory."""


class _Source:
    """Makes the values of a tensor, or keeps them once an operator has written to them."""

    def __init__(self, make: Values, kept: Tensor | None = None) -> None:
        self._make = make
        self.kept = kept

    def values(self) -> Tensor:
        return self._make() if self.kept is None else self.kept

    def keep(self) -> None:
        if self.kept is None:
            self.kept = self._make().clone()  # the maker may return a tensor of its own


class LazyTensor(Tensor):
    """A tensor on the CPU that holds no values; operators make them from a function.

    A view of a lazy tensor is a lazy tensor. All other results are ordinary tensors. If an operator writes to a lazy
    tensor, it keeps its values from then on.

    Args:
        make: Makes the values.
        shape: Their shape.
        dtype: Their dtype.
        requires_grad: Whether autograd computes its gradient, which is an ordinary tensor.

    Example:
        >>> weight = LazyTensor(lambda: torch.ones(2, 3), (2, 3), torch.float32)
        >>> weight.t() @ torch.ones(2)
        tensor([2., 2., 2.])
    """

    _source: _Source
    _path: tuple[Callable[[Tensor], Tensor], ...]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls: type["LazyTensor"],
        make: Values,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        requires_grad: bool = False,
    ) -> "LazyTensor":
        """Make a tensor without values."""
        like = torch.empty(shape, dtype=dtype, device="meta")
        return _wrapped(like, _Source(make), (), requires_grad)

    def __init__(self, *_args: Any, **_named: Any) -> None:
        super().__init__()

    def __deepcopy__(self, memo: dict[int, Any]) -> "LazyTensor":
        """Return a tensor that makes its values by the same function; what has been written to this one is copied."""
        if id(self) not in memo:
            kept = self._source.kept
            source = _Source(self._source.values, None if kept is None else kept.clone())
            like = torch.empty_strided(self.size(), self.stride(), dtype=self.dtype, device="meta")
            memo[id(self)] = made = _wrapped(like, source, self._path, self.requires_grad)
            vars(made).update({name: value for name, value in vars(self).items() if name not in vars(made)})
        found: LazyTensor = memo[id(self)]
        return found

    def __repr__(self, **_named: Any) -> str:  # type: ignore[override]
        """Describe the tensor without making its values."""
        return f"LazyTensor(shape={tuple(self.shape)}, dtype={self.dtype})"

    @property
    def data(self) -> Tensor:
        """The tensor without its history, as in the base class; an assignment gives it new values, which it keeps."""
        return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        if (new.shape, new.dtype, new.device) != (self.shape, self.dtype, self.device):
            raise NoValuesError("a tensor without values gets data of another shape, dtype or device")
        kept = new.detach()
        self._source, self._path = _Source(lambda: kept, kept), ()

    def data_ptr(self) -> int:
        """Refuse the address of the values, which have none."""
        raise NoValuesError("code asks for the address of a tensor without values (data_ptr)")

    def __dlpack__(self, *_args: Any, **_named: Any) -> Any:
        """Refuse access to the values that does not pass through an operator of torch."""
        raise NoValuesError("code exports a tensor without values (dlpack)")

    @property
    def kept_bytes(self) -> int:
        """Bytes of the values that the tensor keeps because an operator has written to them; usually 0."""
        return 0 if self._source.kept is None else self._source.kept.nbytes

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        """Run an operator on values that are made for it, or record a view."""
        kwargs = kwargs or {}
        if torch.Tag.inplace_view in getattr(func, "tags", ()):
            raise NoValuesError(f"{func} changes the shape of a tensor without values in place")
        if getattr(func, "is_view", False) and args and isinstance(args[0], LazyTensor):
            return _viewed(func, args, kwargs)
        written = _written(func, args, kwargs)
        for tensor in written:
            tensor._source.keep()
        made: dict[int, Tensor] = {}

        def values(tensor: LazyTensor) -> Tensor:
            if id(tensor) not in made:
                made[id(tensor)] = _values(tensor)
            return made[id(tensor)]

        result = func(*tree_map_only(LazyTensor, values, args), **tree_map_only(LazyTensor, values, kwargs))
        if not written:
            return result
        lazy = {id(made[id(tensor)]): tensor for tensor in written}
        return tree_map_only(Tensor, lambda tensor: lazy.get(id(tensor), tensor), result)


def needs_values(error: BaseException | None) -> bool:
    """Return whether an error, or one of its causes, is a `NoValuesError`."""
    while error is not None and not isinstance(error, NoValuesError):
        error = error.__cause__ or error.__context__
    return error is not None


def with_values(tensor: Tensor) -> Tensor:
    """Return a tensor's values as an ordinary tensor; an ordinary tensor itself."""
    return tensor.clone() if isinstance(tensor, LazyTensor) else tensor


def make_lazy(
    network: nn.Module, values: Callable[[str], Tensor], dtypes: Callable[[torch.dtype], torch.dtype] = lambda it: it
) -> nn.Module:
    """Replace every parameter of a network, in place, by a lazy one; tied parameters stay tied.

    Buffers and other tensors stay as they are: they need values, and the device of the CPU.

    Args:
        network: The network, on any device, such as `meta`.
        values: Makes the values of a parameter, by the first of its names.
        dtypes: The dtype of the values, by that of the parameter.

    Returns:
        The network.
    """
    made: dict[int, LazyTensor] = {}
    for prefix, module in network.named_modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in made:
                name = f"{prefix}.{key}" if prefix else key
                made[id(parameter)] = _lazy_parameter(parameter, name, values, dtypes(parameter.dtype))
            setattr(module, key, made[id(parameter)])  # recurrent layers record it
    return network


def _lazy_parameter(
    parameter: nn.Parameter, name: str, values: Callable[[str], Tensor], dtype: torch.dtype
) -> LazyTensor:
    made = LazyTensor(lambda: values(name), tuple(parameter.shape), dtype, parameter.requires_grad)
    vars(made).update(vars(parameter), _is_param=True)  # torch takes it for an `nn.Parameter`
    return made


def _wrapped(like: Tensor, source: _Source, path: tuple[Any, ...], requires_grad: bool = False) -> LazyTensor:
    """Return a lazy tensor with the shape, strides and dtype of a tensor on `meta`."""
    made: LazyTensor = torch.Tensor._make_wrapper_subclass(
        LazyTensor,
        like.size(),
        strides=like.stride(),
        storage_offset=like.storage_offset(),
        dtype=like.dtype,
        device=torch.device("cpu"),
        requires_grad=requires_grad,
    )
    made._source, made._path = source, path
    return made


def _values(tensor: LazyTensor) -> Tensor:
    found = tensor._source.values()
    for view in tensor._path:
        found = view(found)
    return found


def _viewed(func: Any, args: Any, kwargs: Any) -> Any:
    """Return lazy tensors for the results of an operator that only makes views of its first argument."""
    base, rest = args[0], args[1:]
    like = torch.empty_strided(base.size(), base.stride(), dtype=base.dtype, device="meta")
    found = func(like, *rest, **kwargs)
    if isinstance(found, Tensor):
        return _wrapped(found, base._source, (*base._path, lambda values: func(values, *rest, **kwargs)))

    def part(number: int) -> Callable[[Tensor], Tensor]:
        return lambda values: func(values, *rest, **kwargs)[number]

    return type(found)(_wrapped(view, base._source, (*base._path, part(number))) for number, view in enumerate(found))


def _written(func: Any, args: Any, kwargs: Any) -> list[LazyTensor]:
    """Return the lazy tensors to which an operator writes."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    given = dict(zip([argument.name for argument in schema.arguments], args, strict=False)) | kwargs
    written: list[LazyTensor] = []
    for argument in schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            tree_map_only(LazyTensor, written.append, given.get(argument.name))
    return written
