"""Nested structures: lists, tuples, named tuples and dicts, with anything else as their leaves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any


def is_nest(structure: object) -> bool:
    """Return whether a structure is taken apart. Everything else is a leaf, also a ``torch.Size``.

    >>> is_nest({"a": 1}), is_nest((1, 2)), is_nest("text")
    (True, True, False)
    """
    return isinstance(structure, (list, dict)) or type(structure) is tuple or _is_named_tuple(structure)


def map_leaves(fn: Callable[..., Any], *structures: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """Return a structure like the first one, whose leaves are ``fn`` of the corresponding leaves of all structures.

    A structure in which no leaf changes is returned as the same object.

    Args:
        fn: Takes as many leaves as there are structures.
        structures: Structures of the same form.
        is_leaf: Returns whether a part of the first structure is a leaf although it could be taken apart.

    >>> map_leaves(lambda a, b: a + b, {"x": [1, 2]}, {"x": [10, 20]})
    {'x': [11, 22]}

    Raises:
        AssertionError: If the structures differ, naming both.
    """
    first = structures[0]
    if is_leaf is not None and is_leaf(first):
        return fn(*structures)
    if not is_nest(first):
        for other in structures[1:]:
            if is_nest(other):
                raise AssertionError(_differ("a leaf and a structure", first, other))
        return fn(*structures)
    for other in structures[1:]:
        _check_alike(first, other)
    if isinstance(first, dict):
        changed = {key: map_leaves(fn, *(each[key] for each in structures), is_leaf=is_leaf) for key in first}
        return _rebuilt(first, changed)
    return _rebuilt(first, [map_leaves(fn, *each, is_leaf=is_leaf) for each in zip(*structures, strict=True)])


def leaves(structure: Any) -> list[Any]:
    """Return all leaves, in order.

    >>> leaves([1, {"a": 2, "b": (3,)}])
    [1, 2, 3]
    """
    found: list[Any] = []
    map_leaves(found.append, structure)
    return found


def _rebuilt(like: Any, values: Any) -> Any:
    if isinstance(like, dict):
        if all(values[key] is like[key] for key in like):
            return like
        rebuilt = copy.copy(like)  # keeps the order of the keys, and a subclass's own attributes
        rebuilt.update(values)
        return rebuilt
    if all(value is old for value, old in zip(values, like, strict=True)):
        return like
    return type(like)(*values) if _is_named_tuple(like) else type(like)(values)


def _check_alike(one: Any, other: Any) -> None:
    if type(one) is not type(other):
        raise AssertionError(_differ("different types", one, other))
    if len(one) != len(other):
        raise AssertionError(_differ("different lengths", one, other))
    if isinstance(one, dict) and one.keys() != other.keys():
        raise AssertionError(_differ("different keys", one, other))


def _differ(how: str, one: Any, other: Any) -> str:
    return f"structures of replicas have {how}: {described(one)} and {described(other)}"


def described(value: object) -> str:
    """Return a short text of any value, for messages.

    >>> import torch
    >>> [described(value) for value in ({"a": 1}, (1, 2), torch.zeros(2, 3), "a", {1})]
    ["a dict with keys ['a']", 'a tuple of length 2', 'a Tensor of shape [2, 3]', "'a'", 'a set']
    """
    if value is None or isinstance(value, (str, int, float)):
        return repr(value)
    kind = f"a {type(value).__name__}"
    if isinstance(value, dict):
        return f"{kind} with keys {sorted(map(str, value))}"
    if isinstance(value, (tuple, list)):
        return f"{kind} of length {len(value)}"
    shape = getattr(value, "shape", None)  # of a tensor or an array
    return f"{kind} of shape {list(shape)}" if isinstance(shape, tuple) else kind


def _is_named_tuple(structure: object) -> bool:
    return isinstance(structure, tuple) and isinstance(getattr(structure, "_fields", None), Sequence)
