"""Which ps holds a variable. Pure functions of the order in which variables are created.

Every worker creates the same variables in the same order, so every worker finds the same place for each
without asking anybody.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

from paramserver.arena import VariableSpec
from paramserver.errors import ConfigError


class Placement(abc.ABC):
    """Chooses a ps for each variable of a model."""

    @abc.abstractmethod
    def place(self, variables: Sequence[VariableSpec], num_ps: int) -> list[int]:
        """The index of a ps for each variable, in order.

        Deterministic: the same variables in the same order give the same places in every process.

        Args:
            variables: The variables in creation order.
            num_ps: How many ps tasks there are, at least 1.
        """


class RoundRobin(Placement):
    """Each variable goes to the next ps, as in the original. Balances the number of variables, not their bytes.

    >>> variables = [VariableSpec(name, (), "float32") for name in "nxz"]
    >>> RoundRobin().place(variables, num_ps=2)
    [0, 1, 0]
    """

    def place(self, variables: Sequence[VariableSpec], num_ps: int) -> list[int]:
        if num_ps < 1:
            raise ConfigError(f"placing {len(variables)} variables: expected at least one ps, got {num_ps}")
        return [index % num_ps for index in range(len(variables))]
