"""A variable in one piece on one ps: the building block of all others."""

from __future__ import annotations

import math
from typing import Literal

import torch

from paramserver.client.client import ParameterClient
from paramserver.distribute.core.devices import Device
from paramserver.distribute.core.worker import Worker
from paramserver.distribute.variables.variable import Assignment, Variable, VariableOptions, here
from paramserver.layout.variables import DTYPES, VariableSpec


class PlainVariable(Variable):
    """A variable that exists on its ps already; see `Variable`.

    Args:
        strategy: The strategy of the variable.
        client: The client of the ps tasks.
        ps: The index of the variable's ps.
        spec: The name, shape and dtype of the variable on the ps.
        options: The options that the program created it with.
    """

    def __init__(
        self, strategy: Worker, client: ParameterClient, ps: int, spec: VariableSpec, options: VariableOptions
    ) -> None:
        self.name, self.shape, self.dtype = spec.name, torch.Size(spec.shape), DTYPES[spec.dtype]
        self.device = str(Device.parse(strategy.parameter_devices[ps]))
        self.trainable, self.aggregation = options.trainable, options.aggregation
        self.strategy = strategy
        self.ps = ps
        self._client = client
        self._spec = spec

    def value(self) -> torch.Tensor:
        return here(self._client.variables.read(self.ps, self._spec, (0, self._spec.size)).view(self.shape))

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return a copy of rows ``[start, stop)``, of shape ``[stop - start, ...]``; no other rows are read."""
        row = math.prod(self.shape[1:])
        flat = self._client.variables.read(self.ps, self._spec, (start * row, stop * row))
        return here(flat.view(stop - start, *self.shape[1:]))

    def _apply(self, assignment: Assignment, value: torch.Tensor) -> torch.Tensor:
        operation: Literal["assign", "add"] = "assign" if assignment == "assign" else "add"
        values = -value if assignment == "assign_sub" else value  # exact, even where integers wrap around
        return self._client.variables.update(self.ps, self._spec, operation, values.flatten()).view(self.shape)
