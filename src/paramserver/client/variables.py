"""The program's own variables, as a worker sees them: created by the chief, read and updated by every worker.

Their values travel inside the messages, block by block.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Literal, NamedTuple

import torch

from paramserver.client.ask import OnWait, Patience, ask, ask_until_ready, expected
from paramserver.client.exchange import Call, Exchange
from paramserver.errors import ConfigError, RemoteProtocolError
from paramserver.layout.blocks import Range, pieces
from paramserver.layout.variables import DTYPES, VariableSpec
from paramserver.transport.lane import Lane
from paramserver.wire import messages
from paramserver.wire.values import packed, unpacked


class _Made(NamedTuple):
    """A variable, its ps, and the values it was created with; the values are None if another task created it."""

    ps: int
    variable: VariableSpec
    values: torch.Tensor | None


class OwnVariables:
    """The program's own variables on all ps tasks. Not thread-safe; errors are those of `ParameterClient`.

    Args:
        lanes: The lanes to all ps tasks.
        sequence: Ascending numbers for updates, shared with all other pushes.
    """

    def __init__(self, lanes: Exchange, sequence: Iterator[int]) -> None:
        self._lanes = lanes
        self._sequence = sequence
        self._names: set[str] = set()
        self._model_names: set[str] = set()
        self._begun: dict[str, int] = {}
        self._made: list[_Made] = []

    def unique_name(self, name: str) -> str:
        """Return a name that no variable has: ``name``, or else ``name_1``, ``name_2`` and so on.

        The name counts as taken after `finish` was called with it, so a variable whose creation was interrupted is
        created again under the same name. The same calls in the same order give the same names on every worker.
        """
        taken = self._names | self._model_names
        numbered = (f"{name}_{number}" for number in itertools.count(1))
        return next(each for each in itertools.chain([name], numbered) if each not in taken)

    def ps_of(self, name: str, place: Callable[[], int]) -> int:
        """Return the ps for a variable or a part of one: where its creation was begun before, or else ``place()``."""
        if name not in self._begun:
            self._begun[name] = place()
        return self._begun[name]

    def finish(self, name: str, parts: Iterable[str]) -> None:
        """Note that a variable with these parts is created."""
        self._names.add(name)
        for part in parts:
            self._begun.pop(part, None)

    @property
    def names(self) -> frozenset[str]:
        """Names taken by the program's own variables."""
        return frozenset(self._names)

    @property
    def known(self) -> frozenset[str]:
        """Names of all variables, including the model's."""
        return frozenset(self._names | self._model_names)

    def leave_to_model(self, names: set[str]) -> None:
        """Reserve these names for the variables of a model.

        Raises:
            ConfigError: If one of the names is taken.
        """
        for name in sorted(self._names & names):
            raise ConfigError(
                f"variable {name!r} of the model: a ps.Variable of that name was created before, and a checkpoint "
                "could not hold both; give that one another name"
            )
        self._model_names = names

    def create(self, ps: int, variable: VariableSpec, values: torch.Tensor) -> None:
        """Create a variable with its first values on a ps, as the chief; an existing variable keeps its values.

        Other tasks see the variable only when it has all of its values.

        Args:
            ps: The index of the ps.
            variable: The variable to create, with a name from `unique_name`.
            values: Its values, flat.

        Raises:
            ModelMismatchError: If the variable exists with another shape or dtype.
        """
        self._create(ps, variable, values)
        self._made.append(_Made(ps, variable, values))

    def find(self, ps: int, variable: VariableSpec, timeout: float, on_wait: OnWait = lambda _: None) -> None:
        """Wait until the chief has created a variable, as every worker but the chief does.

        Args:
            ps: The index of the ps.
            variable: The expected variable.
            timeout: Seconds to wait.
            on_wait: Called about every second with the seconds waited so far.

        Raises:
            DeadlineError: If the variable is not there by then.
            ModelMismatchError: If the variable has another shape or dtype.
            RefusedError: If the chief failed.
            RunOverError: If the chief has finished without making it.
        """
        self._find(ps, variable, Patience(timeout, on_wait))
        self._made.append(_Made(ps, variable, None))

    def find_again(self, patience: Patience) -> None:
        """Create or await each variable again after a ps was lost, in the way this task did at first."""
        for ps, variable, values in self._made:
            if values is not None:
                self._create(ps, variable, values)
            else:
                self._find(ps, variable, patience)

    def made_on(self, ps: int) -> list[str]:
        """Return the names of the variables that this program has created or found on a ps."""
        return [each.variable.name for each in self._made if each.ps == ps]

    def read(self, ps: int, variable: VariableSpec, span: Range) -> torch.Tensor:
        """Read elements ``[start, stop)`` of a variable, flat. The elements of one block are of one version."""
        lane = self._lanes.each()[ps]
        values = torch.empty(span[1] - span[0], dtype=DTYPES[variable.dtype], device="cpu")
        for start, stop in pieces([span]):
            reply = ask(self._lanes, lane, messages.ReadVariable(variable.name, start, stop), messages.Values)
            _fill(values[start - span[0] : stop - span[0]], reply, lane)
        return values

    def update(
        self, ps: int, variable: VariableSpec, operation: Literal["assign", "add"], values: torch.Tensor
    ) -> torch.Tensor:
        """Assign or add to a whole variable exactly once, and return the flat values that this very update produced.

        Atomic for each block of elements: updates of a variable larger than `blocks.BLOCK` may interleave with those of
        other workers.
        """
        lane, blocks = self._lanes.each()[ps], list(pieces([(0, variable.size)]))
        calls = [
            Call(lane, messages.UpdateVariable(number, variable.name, operation, start, packed(values[start:stop])))
            for (start, stop), number in zip(blocks, self._sequence, strict=False)
        ]
        replies = expected(calls, self._lanes.run_in_turn(calls), messages.Values)
        result = torch.empty_like(values)
        for (start, stop), reply in zip(blocks, replies, strict=True):
            _fill(result[start:stop], reply, lane)
        return result

    def __repr__(self) -> str:
        return f"<OwnVariables: {', '.join(each.variable.name for each in self._made) or 'none'}>"

    def _create(self, ps: int, variable: VariableSpec, values: torch.Tensor) -> None:
        lane = self._lanes.each()[ps]
        for start, stop in list(pieces([(0, variable.size)])) or [(0, 0)]:
            request = messages.CreateVariable(variable, start, packed(values[start:stop]))
            if ask(self._lanes, lane, request, messages.Declared).ready:
                break

    def _find(self, ps: int, variable: VariableSpec, patience: Patience) -> None:
        lane = self._lanes.each()[ps]
        failing = f"the chief has not created variable {variable.name!r} on {lane.task}"
        ask_until_ready(self._lanes, lane, partial(messages.AwaitVariable, variable), patience, failing)


def _fill(out: torch.Tensor, reply: messages.Values, lane: Lane) -> None:
    if len(reply.values) != out.nbytes:
        raise RemoteProtocolError(
            f"{lane.task} was expected to send {out.nbytes} bytes of a variable, and sent {len(reply.values)}"
        )
    out.copy_(unpacked(reply.values, out.dtype))
