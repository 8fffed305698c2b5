"""The store of one ps: its arenas, the global step, and whether the chief has made them ready."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from paramserver.errors import ConfigError, ModelMismatchError, RefusedError, RunFailedError
from paramserver.layout.arena import ArenaLayout
from paramserver.layout.blocks import Range, num_blocks
from paramserver.layout.variables import DTYPES, VariableSpec, shown
from paramserver.memory.arena_memory import StoreMemory
from paramserver.store.arena import StoredArena
from paramserver.store.progress import Progress
from paramserver.store.tables.table import StoredTable

Allocate = Callable[[Sequence[ArenaLayout]], StoreMemory]


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Counters of a store since it was made.

    Attributes:
        global_step: Updates of the model.
        updates: Pushes of gradients that were applied.
        mean_staleness: Mean staleness of these pushes: the global step when applied less the step of their values.
        largest_staleness: Largest staleness of these pushes.
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

    Attributes:
        task: The ps.
        arenas: The arenas of the model's variables, by index.
        variables: The program's own variables by name, each in an arena of its own.
        memory: The memory of the model's arenas; None before they are created.
        epoch: The epoch of the values: a new one whenever the chief initializes or restores them.
    """

    def __init__(self, task: str, allocate: Allocate) -> None:
        self.task = task
        self.arenas: list[StoredArena | StoredTable] = []
        self.variables: dict[str, StoredArena] = {}
        self.memory: StoreMemory | None = None
        self.epoch = ""
        self._allocate = allocate
        self._incomplete: dict[str, StoredArena] = {}
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)  # the lock alone is quicker to enter where nothing waits
        self._ready = self._restored = False
        self._closed = False
        self._failure = ""
        self._global_step = self._updates = self._total_staleness = self._largest_staleness = 0
        self._progress: dict[str, Progress] = {}

    # --- creation

    def create(self, layouts: Sequence[ArenaLayout]) -> StoreMemory:
        """Make the arenas; if they exist already, check that they are the same.

        Raises:
            ModelMismatchError: If other arenas exist already.
            RefusedError: If no ps can hold these arenas; the message names the variable.
            ConfigError: If the rule of an arena does not exist.
        """
        with self._changed:
            if self.memory is None:
                _check(self.task, layouts)
                with _room_for(self.task, layouts):
                    memory = self._allocate(layouts)
                try:
                    self.arenas = list(map(_stored, layouts, memory.values, memory.versions))
                except ConfigError:
                    raise
                except ValueError as error:
                    raise RefusedError(f"{self.task} cannot hold these variables: {error}", self.task) from error
                self.memory = memory  # last, so that a failure before leaves the store empty
            return self.compare(layouts)

    def compare(self, layouts: Sequence[ArenaLayout]) -> StoreMemory:
        """Check that the arenas of a worker are those of this store.

        Raises:
            ModelMismatchError: If they differ; the message names the first variable that differs.
            RefusedError: If no arenas exist yet.
        """
        with self._changed:
            if self.memory is None:
                raise RefusedError(f"{self.task} holds no variables yet; the chief creates them", self.task)
            _compare(self.task, [arena.layout for arena in self.arenas], layouts)
            return self.memory

    def arena(self, index: int) -> StoredArena | StoredTable:
        """Return one arena.

        Raises:
            RefusedError: If there is no arena of that index.
        """
        if not 0 <= index < len(self.arenas):
            raise RefusedError(f"{self.task} has no arena {index}; {len(self.arenas)} were declared", self.task)
        return self.arenas[index]

    @property
    def held(self) -> Sequence[StoredArena | StoredTable]:
        """All arenas, tables and variables, as a checkpoint holds them."""
        with self._changed:
            return [*self.arenas, *self.variables.values()]

    @property
    def is_ready(self) -> bool:
        """Whether the chief has initialized or restored the variables."""
        return self._ready

    def mark_ready(self, global_step: int, epoch: str = "") -> None:
        """Open the store for all workers, at ``global_step``; see `wire.messages.MarkReady`."""
        with self._changed:
            self._ready, self.epoch = True, epoch
            self._global_step = global_step
            self._changed.notify_all()

    def await_ready(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds for `mark_ready` or `close`; return whether the store is ready.

        Raises:
            RunFailedError: If the run has failed meanwhile.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._failure or self._closed, timeout)
            self.check_alive()
            return self._ready

    def mark_restored(self, global_step: int | None) -> None:
        """Note that the chief has restored a checkpoint.

        Args:
            global_step: The step of the checkpoint; None if there was no checkpoint, and the step stays as it is.
        """
        with self._changed:
            self._restored = True
            if global_step is not None:
                self._global_step = global_step
            self._changed.notify_all()

    def await_restored(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds for `mark_restored`, the first update, or `close`.

        Training may have begun without a restore; then workers that come later need not wait for one.

        Returns:
            Whether a checkpoint was restored or an update was made.

        Raises:
            RunFailedError: If the run has failed meanwhile.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_beyond_restoring or self._failure or self._closed, timeout)
            self.check_alive()
            return self._is_beyond_restoring

    @property
    def _is_beyond_restoring(self) -> bool:
        return self._restored or self._updates > 0

    def fail(self, reason: str) -> None:
        """Refuse every request from now on with ``reason``, because the chief cannot go on."""
        with self._changed:
            self._failure = reason
            self._changed.notify_all()

    @property
    def has_failed(self) -> bool:
        """Whether the run has failed."""
        return bool(self._failure)

    def check_alive(self) -> None:
        """Raise an error if the run has failed.

        Raises:
            RunFailedError: With the reason of the failure.
        """
        if self._failure:
            raise RunFailedError(self._failure, self.task)

    def close(self) -> None:
        """End every wait. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # --- the program's own variables

    def create_variable(self, variable: VariableSpec, start: int, values: torch.Tensor) -> bool:
        """Create a variable, or fill its next block; return whether it is complete, so that every worker can use it.

        A complete variable keeps its values, so a restarted chief finds it unchanged.

        Args:
            variable: The variable to create.
            start: The first element of ``values``; 0 begins the creation.
            values: The values from there on, of one block.

        Raises:
            ModelMismatchError: If the variable exists with another shape or dtype.
            RefusedError: If no ps can hold the variable, or the values are not a block of it.
        """
        with self._changed:
            if self._is_complete(variable):
                return True
            if start == 0:
                self._incomplete[variable.name] = self._new_variable(variable)
            arena, stop = self._incomplete.get(variable.name), start + len(values)
            if arena is None or arena.layout.variables != (variable,):
                raise RefusedError(f"{self.task} was sent a later block of variable {variable.name!r} first", self.task)
            if variable.size:
                self.check_piece(arena, (start, stop))
                arena.update("assign", (start, stop), values)
            if stop == variable.size:
                self.variables[variable.name] = self._incomplete.pop(variable.name)
                self._changed.notify_all()
            return stop == variable.size

    def await_variable(self, variable: VariableSpec, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds for a variable of the chief, or for `close`; return whether it exists.

        Raises:
            ModelMismatchError: If the variable has another shape or dtype.
            RunFailedError: If the run has failed meanwhile.
        """
        with self._changed:
            self._changed.wait_for(lambda: variable.name in self.variables or self._failure or self._closed, timeout)
            self.check_alive()
            return self._is_complete(variable)

    def variable(self, name: str) -> StoredArena:
        """Return the arena of one variable.

        Raises:
            RefusedError: If there is no variable of that name, or it is not complete.
        """
        arena = self.variables.get(name)
        if arena is None:
            raise RefusedError(f"{self.task} holds no variable {name!r}; the chief creates it", self.task)
        return arena

    def check_piece(self, arena: StoredArena, piece: Range) -> None:
        """Check that a piece lies within one block of a variable.

        Raises:
            RefusedError: If it does not.
        """
        try:
            arena.check_piece(piece)
        except ValueError as error:
            name = arena.layout.variables[0].name
            raise RefusedError(f"variable {name!r} on {self.task}: {error}", self.task) from error

    def _is_complete(self, variable: VariableSpec) -> bool:
        arena = self.variables.get(variable.name)
        if arena is None:
            return False
        (held,) = arena.layout.variables
        if held != variable:
            kept, own = map(_variable_shown, (held, variable))
            raise ModelMismatchError(
                f"variable {variable.name!r} on {self.task} is {kept}, as the chief has created it, and this worker's "
                f"is {own}; every worker must create the same variables in the same order",
                self.task,
                variable.name,
            )
        return True

    def _new_variable(self, variable: VariableSpec) -> StoredArena:
        layout = ArenaLayout(variable.dtype, None, (variable,))
        _check(self.task, [layout])
        # In private memory: the values travel in messages, and each shared memory would take a file descriptor.
        with _room_for(self.task, [layout]):
            values = torch.zeros(layout.size, dtype=layout.torch_dtype, device="cpu")
        return StoredArena(layout, values, np.zeros(num_blocks(layout.size), dtype=np.uint64))

    # --- steps

    @property
    def global_step(self) -> int:
        """Updates of the model so far."""
        return self._global_step

    def progress(self, incarnation: str) -> Progress:
        """Return the progress of the updates of one incarnation of a worker."""
        return self._progress.get(incarnation) or self._progress.setdefault(incarnation, Progress())

    def count_update(self, local_step: int) -> tuple[int, int]:
        """Count an applied push of gradients, and return the global step after it and its staleness."""
        with self._lock:
            staleness = max(self._global_step - local_step, 0)
            self._global_step += 1
            self._updates += 1
            self._total_staleness += staleness
            self._largest_staleness = max(self._largest_staleness, staleness)
            return self._global_step, staleness

    def statistics(self) -> Statistics:
        """Return the counters, all of one moment."""
        with self._lock:
            return Statistics(
                global_step=self._global_step,
                updates=self._updates,
                mean_staleness=self._total_staleness / max(self._updates, 1),
                largest_staleness=self._largest_staleness,
            )

    def __repr__(self) -> str:
        return (
            f"<Store of {self.task}: {len(self.arenas)} arenas, {len(self.variables)} variables of the program's own, "
            f"global step {self._global_step}>"
        )


def _stored(layout: ArenaLayout, values: torch.Tensor, versions: npt.NDArray[np.uint64]) -> StoredArena | StoredTable:
    return (StoredTable if layout.is_table else StoredArena)(layout, values, versions)


@contextlib.contextmanager
def _room_for(task: str, layouts: Sequence[ArenaLayout]) -> Iterator[None]:
    """Refuse layouts for which no memory can be had."""
    try:
        yield
    except (OSError, MemoryError, OverflowError, RuntimeError) as error:  # the last is torch's
        nbytes = sum(layout.nbytes for layout in layouts)
        raise RefusedError(f"{task} has no memory for {nbytes} bytes of variables: {error}", task) from error


def _check(task: str, layouts: Sequence[ArenaLayout]) -> None:
    seen: set[str] = set()
    for layout in layouts:
        for variable in layout.variables:
            for fault in _faults(layout, variable, seen):
                raise RefusedError(f"{task} cannot hold variable {variable.name!r}: {fault}", task)
            seen.add(variable.name)
        if layout.dtype not in DTYPES:  # of an arena without variables
            raise RefusedError(f"{task} cannot hold an arena of {layout.dtype}; expected {', '.join(DTYPES)}", task)


def _faults(layout: ArenaLayout, variable: VariableSpec, seen: set[str]) -> Iterator[str]:
    if variable.dtype not in DTYPES:
        yield f"its dtype is {variable.dtype}; expected one of {', '.join(DTYPES)}"
    if variable.dtype != layout.dtype:
        yield f"its dtype is {variable.dtype}, and it is declared in an arena of {layout.dtype}"
    if min(variable.shape, default=0) < 0:
        yield f"its shape is {list(variable.shape)}; expected no negative dimension"
    if variable.name in seen:
        yield "it is declared twice"
    if layout.is_table and (layout.rule is None or len(layout.variables) != 1 or len(variable.shape) != 2):
        yield f"it is declared as a table of {len(layout.variables)} variables, of shape {list(variable.shape)}"
    if layout.rule and not layout.torch_dtype.is_floating_point:
        yield f"its dtype is {variable.dtype}, which {layout.rule.name} cannot update; expected a floating dtype"


def _compare(task: str, held: Sequence[ArenaLayout], declared: Sequence[ArenaLayout]) -> None:
    mine, theirs = _by_name(held), _by_name(declared)
    for name, (spec, rule) in theirs.items():
        if name not in mine:
            raise ModelMismatchError(_difference(task, name, "no such variable", _variable_shown(spec)), task, name)
        if mine[name] != (spec, rule):
            kept, kept_rule = mine[name]
            expected, got = (_variable_shown(kept), _variable_shown(spec)) if kept != spec else (kept_rule, rule)
            raise ModelMismatchError(_difference(task, name, expected, got), task, name)
    for name, (spec, _) in mine.items():
        if name not in theirs:
            raise ModelMismatchError(_difference(task, name, _variable_shown(spec), "no such variable"), task, name)
    for kept_place, place in zip(_places(held), _places(declared), strict=True):
        if kept_place != place:
            raise ModelMismatchError(
                f"variable {kept_place[1]!r} on {task}: the chief's model has it in another order or another optimizer "
                "group than this worker's; every worker must build the same model and optimizer in the same order",
                task,
                kept_place[1],
            )


def _by_name(layouts: Sequence[ArenaLayout]) -> dict[str, tuple[VariableSpec, str]]:
    return {variable.name: (variable, _rule_shown(layout)) for layout in layouts for variable in layout.variables}


def _rule_shown(layout: ArenaLayout) -> str:
    if layout.rule is None:
        return "no optimizer"
    return f"{layout.rule.name} by rows" if layout.is_table else layout.rule.name


def _places(layouts: Sequence[ArenaLayout]) -> list[tuple[int, str]]:
    return [(arena, variable.name) for arena, layout in enumerate(layouts) for variable in layout.variables]


def _variable_shown(variable: VariableSpec) -> str:
    return shown(variable.dtype, variable.shape)


def _difference(task: str, name: str, expected: str, got: str) -> str:
    return (
        f"variable {name!r} on {task}: the chief's model has {expected}, this worker's has {got}; "
        "every worker must build the same model with the same optimizer"
    )
