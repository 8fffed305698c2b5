"""The part of a strategy that its own parts may use.

`Strategy` is a facade that imports all of its parts. They are typed on this class instead, so that imports form no
circle.
"""

from __future__ import annotations

import abc
from typing import Any

from paramserver.client.client import ParameterClient
from paramserver.distribute.core.input_context import InputContext
from paramserver.layout.blocks import Range
from paramserver.layout.variables import VariableSpec


class Worker(abc.ABC):
    """A task that trains: its replicas and devices, its part of the input, and the placement of its variables."""

    @property
    @abc.abstractmethod
    def is_chief(self) -> bool:
        """Whether this task initializes, checkpoints and writes summaries."""

    @property
    @abc.abstractmethod
    def worker_devices(self) -> tuple[str, ...]:
        """The compute devices of this worker, one for each replica."""

    @property
    @abc.abstractmethod
    def parameter_devices(self) -> tuple[str, ...]:
        """The devices that hold variables, in the order in which they are filled."""

    @property
    def num_replicas_in_sync(self) -> int:
        """Number of replicas of this worker, whose gradients are combined into one update."""
        return len(self.worker_devices)

    @property
    @abc.abstractmethod
    def input_context(self) -> InputContext:
        """The part of the input that this task reads.

        Raises:
            ValueError: On a task that does not train.
        """

    @property
    @abc.abstractmethod
    def session_creation_timeout(self) -> float:
        """Seconds to wait for the ps tasks to come up and for the chief to initialize the variables."""

    @abc.abstractmethod
    def activate(self, replica: int) -> None:
        """Put a replica's tensors into the prepared models. Called before the replica's turn.

        :meta private:
        """

    @abc.abstractmethod
    def connect(self) -> ParameterClient:
        """Return the client of the ps tasks; the first call connects. Blocks until all ps tasks are up.

        Raises:
            RuntimeError: If the strategy has no ps tasks.
            DeadlineError: If a ps is not up in time.
        """

    @abc.abstractmethod
    def place(self, variable: VariableSpec) -> int:
        """Return the index of the ps for the next variable that is created; every call counts as a creation.

        :meta private:
        """

    @abc.abstractmethod
    def row_ranges(self, variable: VariableSpec) -> list[Range]:
        """Return the row ranges that a variable is divided into; empty for one that stays whole.

        :meta private:
        """

    @abc.abstractmethod
    def create_variable(self, options: Any) -> Any:
        """Create a program's own variable from its `VariableOptions`."""
