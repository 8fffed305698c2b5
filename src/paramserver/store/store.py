"""What one ps holds: its arenas, the global step, and whether the chief has made them ready."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from paramserver.arena import DTYPES, ArenaLayout, StoreMemory, VariableSpec
from paramserver.errors import ModelMismatchError, RefusedError
from paramserver.store.stored_arena import StoredArena

Allocate = Callable[[Sequence[ArenaLayout]], StoreMemory]


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What a store has done since it was made.

    Attributes:
        global_step: Updates of the model.
        updates: Pushes of gradients that were applied.
        mean_staleness: Of those, the mean of the global step they met less the one they were computed from.
        largest_staleness: Of those, the largest.
    """

    global_step: int
    updates: int
    mean_staleness: float
    largest_staleness: int


class Store:
    """The variables of one ps. Thread-safe.

    Args:
        task: The ps, for messages.
        allocate: Makes the memory for the arenas, shared or private.
    """

    def __init__(self, task: str, allocate: Allocate) -> None:
        self.task = task
        self.arenas: list[StoredArena] = []
        self.memory: StoreMemory | None = None
        self._allocate = allocate
        self._changed = threading.Condition()
        self._ready = False
        self._closed = False
        self._failure = ""
        self._global_step = self._updates = self._total_staleness = self._largest_staleness = 0
        self._last_sequence: dict[str, int] = {}

    # --- creation

    def create(self, layouts: Sequence[ArenaLayout]) -> StoreMemory:
        """Make the arenas; a second time, check that they are the same.

        Raises:
            ModelMismatchError: If there are arenas already, and they are others.
            RefusedError: If no ps can hold these, naming the variable.
            ConfigError: If an arena's rule is none.
        """
        with self._changed:
            if self.memory is None:
                _check(self.task, layouts)
                memory = self._allocate(layouts)
                self.arenas = list(map(StoredArena, layouts, memory.values, memory.versions))
                self.memory = memory  # last: until here it may fail, and the store be empty still
            return self.compare(layouts)

    def compare(self, layouts: Sequence[ArenaLayout]) -> StoreMemory:
        """Check that a worker's arenas are the ones that are here.

        Raises:
            ModelMismatchError: If they are not, naming the first variable that differs.
            RefusedError: If there are none yet.
        """
        with self._changed:
            if self.memory is None:
                raise RefusedError(f"{self.task} holds no variables yet; the chief creates them", self.task)
            _compare(self.task, [arena.layout for arena in self.arenas], layouts)
            return self.memory

    def arena(self, index: int) -> StoredArena:
        """One arena.

        Raises:
            RefusedError: If there is none of that index.
        """
        if not 0 <= index < len(self.arenas):
            raise RefusedError(f"{self.task} has no arena {index}; {len(self.arenas)} were declared", self.task)
        return self.arenas[index]

    @property
    def held(self) -> Sequence[StoredArena]:
        """All that a checkpoint holds."""
        return self.arenas

    @property
    def is_ready(self) -> bool:
        """Whether the chief has initialized or restored the variables."""
        return self._ready

    def mark_ready(self, global_step: int) -> None:
        """Open the store for everyone, at ``global_step``."""
        with self._changed:
            self._ready = True
            self._global_step = global_step
            self._changed.notify_all()

    def await_ready(self, timeout: float) -> bool:
        """Wait for `mark_ready` for at most ``timeout`` seconds, or for `close`; whether it has come.

        Raises:
            RefusedError: If the run has failed meanwhile.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._failure or self._closed, timeout)
            self.check_alive()
            return self._ready

    def fail(self, reason: str) -> None:
        """The chief cannot go on: from now on every request is refused with ``reason``."""
        with self._changed:
            self._failure = reason
            self._changed.notify_all()

    def check_alive(self) -> None:
        """Raises RefusedError if the run has failed."""
        if self._failure:
            raise RefusedError(self._failure, self.task)

    def close(self) -> None:
        """End every wait. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # --- steps

    @property
    def global_step(self) -> int:
        """Updates of the model so far."""
        return self._global_step

    def is_new(self, incarnation: str, sequence: int) -> bool:
        """Whether a push has not been seen before; it counts as seen from now on."""
        with self._changed:
            if sequence <= self._last_sequence.get(incarnation, 0):
                return False
            self._last_sequence[incarnation] = sequence
            return True

    def count_update(self, local_step: int) -> tuple[int, int]:
        """A push of gradients has been applied. Returns the global step after it, and its staleness."""
        with self._changed:
            staleness = max(self._global_step - local_step, 0)
            self._global_step += 1
            self._updates += 1
            self._total_staleness += staleness
            self._largest_staleness = max(self._largest_staleness, staleness)
            return self._global_step, staleness

    def statistics(self) -> Statistics:
        """What has been done so far, at one moment."""
        with self._changed:
            return Statistics(
                global_step=self._global_step,
                updates=self._updates,
                mean_staleness=self._total_staleness / max(self._updates, 1),
                largest_staleness=self._largest_staleness,
            )

    def __repr__(self) -> str:
        return f"<Store of {self.task}: {len(self.arenas)} arenas, global step {self._global_step}>"


def _check(task: str, layouts: Sequence[ArenaLayout]) -> None:
    seen: set[str] = set()
    for layout in layouts:
        for variable in layout.variables:
            for fault in _faults(layout, variable, seen):
                raise RefusedError(f"{task} cannot hold variable {variable.name!r}: {fault}", task)
            seen.add(variable.name)


def _faults(layout: ArenaLayout, variable: VariableSpec, seen: set[str]) -> Iterator[str]:
    if variable.dtype not in DTYPES:
        yield f"its dtype is {variable.dtype}; expected one of {', '.join(DTYPES)}"
    if variable.dtype != layout.dtype:
        yield f"its dtype is {variable.dtype}, and it is declared in an arena of {layout.dtype}"
    if min(variable.shape, default=0) < 0:
        yield f"its shape is {list(variable.shape)}; expected no negative dimension"
    if variable.name in seen:
        yield "it is declared twice"
    if layout.rule and not layout.torch_dtype.is_floating_point:
        yield f"its dtype is {variable.dtype}, which {layout.rule.name} cannot update; expected a floating dtype"


def _compare(task: str, held: Sequence[ArenaLayout], declared: Sequence[ArenaLayout]) -> None:
    mine, theirs = _by_name(held), _by_name(declared)
    for name, (spec, rule) in theirs.items():
        if name not in mine:
            raise ModelMismatchError(_difference(task, name, "no such variable", _shown(spec)), task, name)
        if mine[name] != (spec, rule):
            kept, kept_rule = mine[name]
            expected, got = (_shown(kept), _shown(spec)) if kept != spec else (kept_rule, rule)
            raise ModelMismatchError(_difference(task, name, expected, got), task, name)
    for name, (spec, _) in mine.items():
        if name not in theirs:
            raise ModelMismatchError(_difference(task, name, _shown(spec), "no such variable"), task, name)
    for kept_place, place in zip(_places(held), _places(declared), strict=True):
        if kept_place != place:
            raise ModelMismatchError(
                f"variable {kept_place[1]!r} on {task}: the chief's model has it in another order or another optimizer "
                "group than this worker's; every worker must build the same model and optimizer in the same order",
                task,
                kept_place[1],
            )


def _by_name(layouts: Sequence[ArenaLayout]) -> dict[str, tuple[VariableSpec, str]]:
    return {
        variable.name: (variable, layout.rule.name if layout.rule else "no optimizer")
        for layout in layouts
        for variable in layout.variables
    }


def _places(layouts: Sequence[ArenaLayout]) -> list[tuple[int, str]]:
    return [(arena, variable.name) for arena, layout in enumerate(layouts) for variable in layout.variables]


def _shown(variable: VariableSpec) -> str:
    return f"{variable.dtype}{list(variable.shape)}"


def _difference(task: str, name: str, expected: str, got: str) -> str:
    return (
        f"variable {name!r} on {task}: the chief's model has {expected}, this worker's has {got}; "
        "every worker must build the same model with the same optimizer"
    )

