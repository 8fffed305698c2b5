"""The choice of a ps for each variable. Pure functions of the order in which variables are created.

Every worker creates the same variables in the same order, so every worker computes the same ps for each without asking.
A partitioner (`FixedShards`, `MinSize`, `MaxSize`) divides large variables by rows; each part then has a ps of its own.
"""

from __future__ import annotations

import abc
import hashlib
import itertools
import math
import numbers
import operator
from collections.abc import Callable

from paramserver.errors import ConfigError
from paramserver.layout.partition import item_bytes
from paramserver.layout.variables import VariableSpec

Place = Callable[[VariableSpec], int]
"""Function that returns the ps for the next variable. Called once for each, in creation order; it may keep state."""

Policy = Callable[[VariableSpec, int], int]
"""A program's own placement: a function from a variable and the number of ps tasks to the index of one of them.

It must return the same in every process.
"""


class Placement(abc.ABC):
    """A policy that chooses a ps for each variable."""

    @abc.abstractmethod
    def start(self, num_ps: int) -> Place:
        """Begin to place the variables of one strategy.

        Deterministic: the same variables in the same order get the same ps tasks in every process.

        Args:
            num_ps: Number of ps tasks, at least 1.

        Raises:
            ConfigError: If ``num_ps`` is less than 1.
        """


class RoundRobin(Placement):
    """Each variable goes to the next ps, as in TensorFlow. Balances the number of variables, not their bytes.

    >>> place = RoundRobin().start(num_ps=2)
    >>> [place(VariableSpec(name, (), "float32")) for name in "nxz"]
    [0, 1, 0]
    """

    def start(self, num_ps: int) -> Place:
        turns = itertools.cycle(_indices(num_ps))
        return lambda variable: next(turns)


def byte_size(variable: VariableSpec) -> int:
    """Return the size in bytes of a variable, or of a part of one.

    Raises:
        ConfigError: If its shape or dtype is not known.

    >>> byte_size(VariableSpec("w", (2, 3), "float32")), byte_size(VariableSpec("step", (), "int64"))
    (24, 8)
    """
    if not all(isinstance(size, int) and size >= 0 for size in variable.shape):
        raise ConfigError(
            f"variable {variable.name!r} has the shape {list(variable.shape)}; expected known sizes, to count its bytes"
        )
    return variable.size * item_bytes(variable.dtype)


class Greedy(Placement):
    """Each variable goes to the ps with the least load so far, or to the first of several such ps tasks.

    Balances best when large variables are created first, or are divided by a partitioner.

    Args:
        load_fn: Returns the load that a variable adds; its size in bytes by default.

    >>> place = Greedy().start(num_ps=2)
    >>> [place(VariableSpec("v", shape, "float32")) for shape in ((2, 2), (2, 1), (2, 2), (1, 3))]
    [0, 1, 1, 0]
    """

    def __init__(self, load_fn: Callable[[VariableSpec], float] = byte_size) -> None:
        self._load_fn = load_fn

    def start(self, num_ps: int) -> Place:
        loads: list[float] = [0 for _ in _indices(num_ps)]

        def place(variable: VariableSpec) -> int:
            ps = loads.index(min(loads))
            loads[ps] += self._load(variable)
            return ps

        return place

    def _load(self, variable: VariableSpec) -> float:
        load: object = self._load_fn(variable)
        if not isinstance(load, numbers.Real) or not 0 <= float(load) < math.inf:
            raise ConfigError(f"Greedy: load_fn of {variable.name!r}: expected a number from 0 on, got {load!r}")
        return float(load)


class Random(Placement):
    """Each variable goes to a ps that its name and a seed determine, independent of earlier variables.

    The same in every process and run. Balances a large number of variables.

    Args:
        seed: Another seed gives another placement.

    >>> place = Random(seed=0).start(num_ps=4)
    >>> [place(VariableSpec(name, (), "float32")) for name in ("weight", "bias", "größe", "weight")]
    [2, 1, 2, 2]
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def start(self, num_ps: int) -> Place:
        indices = _indices(num_ps)
        return lambda variable: indices[self._hash(variable.name) % num_ps]

    def _hash(self, name: str) -> int:
        # Not Python's own hash, which differs between processes. The key is TensorFlow's, so the placement is, too.
        digest = hashlib.md5(f"{name}_{self._seed}".encode(), usedforsecurity=False).digest()
        return int.from_bytes(digest, "big")


class _Own(Placement):
    """A program's own policy, whose answers are checked."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def start(self, num_ps: int) -> Place:
        indices = _indices(num_ps)

        def place(variable: VariableSpec) -> int:
            ps = self._policy(variable, num_ps)
            if not _is_index(ps) or ps not in indices:
                raise ConfigError(
                    f"placing variable {variable.name!r}: expected the index of a ps, 0 to {num_ps - 1}, "
                    f"got {ps!r} from {self._policy!r}"
                )
            return operator.index(ps)

        return place


def as_placement(policy: Placement | Policy | None) -> Placement:
    """Return a `Placement` for the ``variable_placement`` of a program: None means `RoundRobin`.

    Raises:
        TypeError: If ``policy`` is neither a placement nor a function.

    >>> place = as_placement(lambda variable, num_ps: num_ps - 1).start(num_ps=3)
    >>> place(VariableSpec("table", (1000, 64), "float32"))
    2
    """
    if policy is None:
        return RoundRobin()
    if isinstance(policy, Placement):
        return policy
    if isinstance(policy, type) or not callable(policy):
        raise TypeError(
            f"variable_placement: expected a placement such as RoundRobin(), or a function of a variable and the "
            f"number of ps tasks, got {policy!r}"
        )
    return _Own(policy)


def _indices(num_ps: int) -> range:
    if num_ps < 1:
        raise ConfigError(f"placing variables: expected at least one ps, got {num_ps}")
    return range(num_ps)


def _is_index(answer: object) -> bool:
    return hasattr(answer, "__index__") and not isinstance(answer, bool)
