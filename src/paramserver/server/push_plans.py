"""Plans for pushes, worked out and checked once for all pushes that ask the same of a store.

Nearly every push of a run equals the one before, apart from its number: comparing the two is cheaper than planning
again.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from paramserver.errors import RefusedError
from paramserver.layout.blocks import BLOCK
from paramserver.layout.settings import Setting
from paramserver.store.arena import StoredArena
from paramserver.store.blocks import Operation, StoredBlocks
from paramserver.store.store import Store
from paramserver.store.tables.table import StoredTable
from paramserver.transport.lane import Piece
from paramserver.wire import messages
from paramserver.wire.payload import EARLY_BYTES, dense_pieces, parts_of_rows

PARTS_EACH = 2
"""Limit for the parts of a push for each arena: some buffers of an arena are added to, and others assigned."""


class Application(NamedTuple):
    """One operation on one piece: see `StoredArena.apply`."""

    arena: StoredArena
    operation: Operation
    piece: Piece
    settings: dict[str, Setting] | None


class PushPlan(NamedTuple):
    """All operations for a push.

    Attributes:
        parts: The parts of the push.
        pull: The arenas that the push pulls.
        of_rows: The parts that concern rows of tables, which come first.
        applications: All other parts, in the order in which their pieces come.
        pulled: The pieces of values to send back.
        answers: After each of the applications, how many of the pulled pieces are as this push leaves them; empty if
            the push is too small for its values to be sent before it has come in.
        elements: Number of elements that are read and written.
    """

    parts: tuple[messages.Part, ...]
    pull: tuple[int, ...]
    of_rows: tuple[messages.Part, ...]
    applications: tuple[Application, ...]
    pulled: tuple[Piece, ...]
    answers: tuple[int, ...]
    elements: float


class PushPlans:
    """Plans the pushes to one store. Thread-safe."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._last: PushPlan | None = None  # of any worker, because all workers push the same parts

    def plan(self, push: messages.Push) -> PushPlan:
        """Return the plan for a push, after a check of all of its parts.

        Raises:
            RefusedError: If a part cannot be applied. Nothing was applied then.
        """
        plan = self._known(push)
        if plan is None:
            self._check_counts(push)
            of_rows, applications = parts_of_rows(push.parts), tuple(self._applications(push.parts))
            pulled, elements = self.whole(push.pull), self._elements(push)
            answers = _answers(applications, pulled) if _nbytes(applications) >= EARLY_BYTES else ()
            self._last = plan = PushPlan(push.parts, push.pull, of_rows, applications, pulled, answers, elements)
        return plan

    def elements(self, request: messages.Request) -> float:
        """Return how many elements a request reads or writes; infinity if it may wait or does something else."""
        if isinstance(request, messages.Push):
            plan = self._known(request)
            return plan.elements if plan else self._elements(request)
        if isinstance(request, messages.Pull):
            return _whole(request.arenas, self._store.arenas)
        return math.inf

    def whole(self, arenas: Sequence[int]) -> tuple[Piece, ...]:
        """Return all pieces of some arenas.

        Raises:
            RefusedError: If one of the arenas does not exist, or there are more of them than exist.
        """
        self.check_count(len(arenas), len(self._store.arenas), "arenas to send")
        return tuple(
            Piece(index, start, stop) for index in arenas for start, stop in self._store.arena(index).layout.pieces
        )

    def _known(self, push: messages.Push) -> PushPlan | None:
        last = self._last
        return last if last is not None and last.parts == push.parts and last.pull == push.pull else None

    def check_count(self, count: int, most: int, what: str) -> None:
        """Check a number of things that a request names, so that no request takes much longer than it can mean.

        Raises:
            RefusedError: If there are more than ``most``.
        """
        if count > most:
            task = self._store.task
            raise RefusedError(f"a request to {task} refused: it names {count} {what}; at most {most} exist", task)

    def _check_counts(self, push: messages.Push) -> None:
        """Check that the time for a push is bounded by what the store holds, not by what a peer sends."""
        self.check_count(len(push.parts), PARTS_EACH * len(self._store.arenas), "parts")
        for part in push.parts:
            layout = self._store.arena(part.arena).layout
            most = len(layout.variables) + len(layout.pieces)
            self.check_count(len(part.ranges or ()), most, f"ranges of arena {part.arena}")

    def _check(self, part: messages.Part) -> None:
        arena = self._store.arena(part.arena)
        try:
            if isinstance(arena, StoredTable):
                raise ValueError("it is a table, of which rows are pushed")
            arena.check(part.operation, part.ranges, part.settings)
        except ValueError as error:
            task, what = self._store.task, f"{part.operation!r} on arena {part.arena}"
            raise RefusedError(f"push to {task} refused: {what}: {error}", task) from error

    def _applications(self, parts: Sequence[messages.Part]) -> Iterator[Application]:
        arenas = self._store.arenas
        for part in parts:
            if part.rows is None:
                self._check(part)
        for part, span in dense_pieces(parts, [arena.layout for arena in arenas]):
            arena = arenas[part.arena]
            assert isinstance(arena, StoredArena)  # noqa: S101  # just checked
            yield Application(arena, part.operation, Piece(part.arena, *span), part.settings)

    def _elements(self, push: messages.Push) -> int:
        arenas = self._store.arenas
        return sum(_part_elements(part, arenas) for part in push.parts) + _whole(push.pull, arenas)


def _nbytes(applications: Sequence[Application]) -> int:
    return sum((piece.stop - piece.start) * arena.layout.itemsize for arena, _, piece, _ in applications)


def _answers(applications: Sequence[Application], pulled: Sequence[Piece]) -> tuple[int, ...]:
    last = {(piece.arena, piece.start // BLOCK): index for index, (_, _, piece, _) in enumerate(applications)}
    blocks = ((piece.arena, piece.start // BLOCK) for piece in pulled)
    ready = list(accumulate((last.get(block, -1) for block in blocks), max))
    return tuple(bisect.bisect_right(ready, index) for index in range(len(applications)))


def _part_elements(part: messages.Part, arenas: Sequence[StoredBlocks]) -> int:
    if part.ranges is None:
        return _whole((part.arena,), arenas)
    return sum(stop - start for start, stop in part.ranges)


def _whole(indices: Iterable[int], arenas: Sequence[StoredBlocks]) -> int:
    return sum(arenas[index].layout.size for index in indices if index < len(arenas))
