"""Stand-ins for tensors: operators, torch functions and conversions work on the present value."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from paramserver.distribute.core.nest import map_leaves


def _forwarded(name: str) -> Callable[..., Any]:
    def operator(self: TensorLike, *others: Any) -> Any:
        return getattr(torch.Tensor, name)(self.value(), *others)

    operator.__name__ = name
    return operator


def _one(name: str) -> Callable[[Any], torch.Tensor]:
    return _forwarded(name)


def _two(name: str) -> Callable[[Any, Any], torch.Tensor]:
    return _forwarded(name)


class TensorLike(abc.ABC):
    """A value that is read anew for every operation on it.

    Comparisons are element by element, like a tensor's. As the key of a dict, an object equals only itself.
    """

    @abc.abstractmethod
    def value(self) -> torch.Tensor:
        """Return the present value."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        inputs: tuple[tuple[Any, ...], Mapping[str, Any]] = map_leaves(_value_of, (args, kwargs or {}))
        return func(*inputs[0], **inputs[1])

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.asarray(self.value().numpy(force=True), dtype=dtype)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name.endswith("_"):
            raise AttributeError(f"{name!r} would change a copy of the value of {self!r}; assign to it instead")
        return getattr(self.value(), name)

    __add__ = _two("__add__")
    __radd__ = _two("__radd__")
    __sub__ = _two("__sub__")
    __rsub__ = _two("__rsub__")
    __mul__ = _two("__mul__")
    __rmul__ = _two("__rmul__")
    __truediv__ = _two("__truediv__")
    __rtruediv__ = _two("__rtruediv__")
    __floordiv__ = _two("__floordiv__")
    __rfloordiv__ = _two("__rfloordiv__")
    __mod__ = _two("__mod__")
    __rmod__ = _two("__rmod__")
    __pow__ = _two("__pow__")
    __rpow__ = _two("__rpow__")
    __matmul__ = _two("__matmul__")
    __rmatmul__ = _two("__rmatmul__")
    __and__ = _two("__and__")
    __rand__ = _two("__rand__")
    __or__ = _two("__or__")
    __ror__ = _two("__ror__")
    __xor__ = _two("__xor__")
    __rxor__ = _two("__rxor__")
    __lshift__ = _two("__lshift__")
    __rshift__ = _two("__rshift__")
    __lt__ = _two("__lt__")
    __le__ = _two("__le__")
    __gt__ = _two("__gt__")
    __ge__ = _two("__ge__")
    __getitem__ = _two("__getitem__")
    __eq__ = _two("__eq__")  # type: ignore[assignment]  # element by element
    __ne__ = _two("__ne__")  # type: ignore[assignment]
    __hash__ = object.__hash__

    __neg__ = _one("__neg__")
    __pos__ = _one("__pos__")
    __abs__ = _one("__abs__")
    __invert__ = _one("__invert__")

    def __iter__(self) -> Any:
        return iter(self.value())

    def __contains__(self, element: Any) -> bool:
        return element in self.value()

    def __len__(self) -> int:
        return len(self.value())

    def __bool__(self) -> bool:
        return bool(self.value())

    def __int__(self) -> int:
        return int(self.value())

    def __index__(self) -> int:
        return self.value().__index__()

    def __float__(self) -> float:
        return float(self.value())

    def __complex__(self) -> complex:
        return complex(self.value())

    def __format__(self, spec: str) -> str:
        return format(self.value(), spec)


def _value_of(leaf: Any) -> Any:
    return leaf.value() if isinstance(leaf, TensorLike) else leaf
