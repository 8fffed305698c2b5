"""What the parts of a strategy need to know of it.

`Strategy` is the facade that imports all of its parts; they know of it what stands here.
"""

from __future__ import annotations

import abc
from typing import Any

from paramserver.client.client import ParameterClient
from paramserver.distribute.core.input_context import InputContext
from paramserver.layout.blocks import Range
from paramserver.layout.variables import VariableSpec


class Worker(abc.ABC):
    """A task that trains: its replicas and devices, its part of the input, and where its variables go."""

    @property
    @abc.abstractmethod
    def is_chief(self) -> bool:
        """Whether this task initializes, checkpoints and writes summaries."""

    @property
    @abc.abstractmethod
    def worker_devices(self) -> tuple[str, ...]:
        """The devices of this worker that compute, one for each replica."""

    @property
    @abc.abstractmethod
    def parameter_devices(self) -> tuple[str, ...]:
        """The devices that hold variables, in the order in which they are filled."""

    @property
    def num_replicas_in_sync(self) -> int:
        """The replicas of this worker, whose gradients become one update."""
        return len(self.worker_devices)

    @property
    @abc.abstractmethod
    def input_context(self) -> InputContext:
        """Which part of the input this task reads.

        Raises:
            ValueError: On a task that does not train.
        """

    @property
    @abc.abstractmethod
    def session_creation_timeout(self) -> float:
        """Seconds to wait for the ps tasks to come up, and for the chief to initialize."""

    @abc.abstractmethod
    def activate(self, replica: int) -> None:
        """Called before a replica has its turn: what a model holds is that replica's from now on."""

    @abc.abstractmethod
    def connect(self) -> ParameterClient:
        """The client of the ps tasks; connects to them when it is first asked for. Blocks for as long as that takes.

        Raises:
            RuntimeError: If the strategy has no ps tasks.
            DeadlineError: If a ps is not up in time.
        """

    @abc.abstractmethod
    def place(self, variable: VariableSpec) -> int:
        """The index of the ps for the next variable that is created; every call counts as a creation."""

    @abc.abstractmethod
    def row_ranges(self, variable: VariableSpec) -> list[Range]:
        """The rows of a variable that lie apart; none for one that stays whole."""

    @abc.abstractmethod
    def create_variable(self, options: Any) -> Any:
        """Create a variable of a program's own by its `VariableOptions`."""
