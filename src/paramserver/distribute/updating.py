"""Updates of variables from the cross-replica context: a function runs on the worker, its assignments on the ps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paramserver.distribute.strategy import Strategy
    from paramserver.distribute.variable import Variable


def update(
    strategy: Strategy, variable: Any, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], group: bool
) -> Any:
    raise NotImplementedError


def update_non_slot(
    strategy: Strategy, colocate_with: Any, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], group: bool
) -> Any:
    raise NotImplementedError


def colocate_vars_with(strategy: Strategy, variable: Any) -> contextlib.AbstractContextManager[None]:
    raise NotImplementedError


def non_slot_devices(variables: Iterable[Variable]) -> Variable:
    raise NotImplementedError


def read_var(variable: Variable) -> Any:
    raise NotImplementedError


def value_container(value: Any) -> Any:
    raise NotImplementedError
