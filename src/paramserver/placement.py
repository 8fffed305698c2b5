"""Which ps holds a variable. Pure functions of the order in which variables are created.

Every worker creates the same variables in the same order, so every worker finds the same place for each
without asking anybody.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable

from paramserver.arena import VariableSpec
from paramserver.errors import ConfigError

Place = Callable[[VariableSpec], int]
"""The ps for the next variable. Called once for each, in creation order; it may remember what it was called with."""


class Placement(abc.ABC):
    """A policy that chooses a ps for each variable."""

    @abc.abstractmethod
    def start(self, num_ps: int) -> Place:
        """Begin to place variables, for one strategy.

        Deterministic: the same variables in the same order go to the same places in every process.

        Args:
            num_ps: How many ps tasks there are, at least 1.
        """


class RoundRobin(Placement):
    """Each variable goes to the next ps, as in the original. Balances the number of variables, not their bytes.

    >>> place = RoundRobin().start(num_ps=2)
    >>> [place(VariableSpec(name, (), "float32")) for name in "nxz"]
    [0, 1, 0]
    """

    def start(self, num_ps: int) -> Place:
        if num_ps < 1:
            raise ConfigError(f"placing variables: expected at least one ps, got {num_ps}")
        turns = itertools.cycle(range(num_ps))
        return lambda variable: next(turns)
