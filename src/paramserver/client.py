"""The worker's view of all parameter servers: splits a request by ps, joins the replies."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import torch

from paramserver.arena import DTYPES, ArenaLayout, Range, VariableSpec, pieces
from paramserver.checkpoint_files import SLOTS_INDEX, VALUES_INDEX, digest, read_index
from paramserver.errors import (
    ConfigError,
    DeadlineError,
    RemoteProtocolError,
)
from paramserver.lanes import Call, Lanes, Meanwhile, nothing
from paramserver.long_requests import ask_at_length
from paramserver.transport.lane import Lane, Piece, TableRows, WorkerMemory
from paramserver.wire import messages
from paramserver.wire.messages import Part
from paramserver.wire.refusals import raised
from paramserver.wire.values import packed, unpacked

logger = logging.getLogger(__name__)

WAIT_INTERVAL = 1.0
"""Seconds after which a ps answers a wait, so that a connection never looks dead while it waits."""

R = TypeVar("R", bound=messages.Message)


class PushResult(NamedTuple):
    """What came of a push.

    Attributes:
        global_step: Updates of the model after it.
        staleness: Updates by others between the pull of the values that its gradients were computed from, and it.
    """

    global_step: int
    staleness: int


@dataclass
class PushTimes:
    """Seconds that all pushes to one ps have taken.

    Attributes:
        task: The ps.
        sending: Until they were handed over.
        waiting: In which the answer was then waited for, one ps after the other.
        applying: In which the ps applied them meanwhile, as it says itself.
    """

    task: str
    sending: float = 0.0
    waiting: float = 0.0
    applying: float = 0.0


class _Made(NamedTuple):
    """A variable of the program's own: where it is, and the values that it was made with, None if others made it."""

    ps: int
    variable: VariableSpec
    values: torch.Tensor | None


class ParameterClient:
    """Talks to every ps of a run. Not thread-safe; every method blocks until all ps tasks have answered.

    Every method that talks to a ps raises ``UnavailableError`` naming the ps when its connection is lost, and
    ``RefusedError`` or a subclass when it refuses. The client can be used after a refusal.

    Args:
        lanes: A lane to each ps, by index. Owned by the client from now on.

    Attributes:
        lanes: The lanes.
        global_step: Updates of the model, as the ps tasks last told it, and one that is on its way.
        local_step: The global step of the values that are here, from which staleness is counted.
        push_times: For each ps.
    """

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self.lanes = Lanes(lanes)
        self._layouts: list[Sequence[ArenaLayout]] = [() for _ in lanes]
        self._memories: list[WorkerMemory] = []
        self._variables: set[str] = set()
        self._made: list[_Made] = []
        self._sequence = 0
        self._under_way: tuple[list[Call], Future[list[messages.Reply]]] | None = None
        self.global_step = 0
        self.local_step = 0
        self.push_times = [PushTimes(lane.task) for lane in lanes]

    # --- start

    def create(self, layouts: Sequence[Sequence[ArenaLayout]]) -> bool:
        """The chief creates the arenas, one list of layouts for each ps; whether all of them are ready already."""
        return self._declare(layouts, create=True)

    def await_ready(self, timeout: float, on_wait: Callable[[float], None] = lambda _: None) -> None:
        """Wait until the chief has initialized the variables on every ps.

        Args:
            timeout: Seconds to wait for, in all.
            on_wait: Called about every second with the seconds that were waited so far.

        Raises:
            DeadlineError: If it has not by then.
            RefusedError: If the chief failed.
        """
        started = time.monotonic()
        for lane in self.lanes.each():
            failing = f"the chief has not initialized the variables on {lane.task}"
            self._await(lane, messages.AwaitReady, started, timeout, failing, on_wait)

    def join(self, layouts: Sequence[Sequence[ArenaLayout]]) -> None:
        """Every other worker declares the arenas it expects.

        Raises:
            ModelMismatchError: If a ps holds others, naming the first variable that differs.
        """
        self._declare(layouts, create=False)

    def open(self) -> list[WorkerMemory]:
        """Make the memory for the declared arenas, for each ps."""
        self._memories = [lane.open(layouts) for lane, layouts in zip(self.lanes.each(), self._layouts, strict=True)]
        return self._memories

    def mark_ready(self, global_step: int) -> None:
        """The chief has initialized the variables: let the others begin."""
        self._ask_all(messages.MarkReady(global_step), messages.Done)
        self._arrived(global_step)

    def resume(
        self,
        lanes: Sequence[Lane],
        timeout: float,
        on_wait: Callable[[float], None] = lambda _: None,
        *,
        is_chief: bool,
    ) -> bool:
        """Go on over other lanes to the same ps tasks, after one of the present ones was lost.

        The memory stays the same. What a ps does not hold any more, the chief makes anew, without values: unless this
        returns True, it has to initialize the variables and `mark_ready`. Everyone else waits for that here.

        Args:
            lanes: By the ps's index. Owned by the client from now on.
            timeout: Seconds to wait for the chief, in all.
            on_wait: As for `await_ready`.
            is_chief: Whether this task initializes.

        Returns:
            Whether all ps tasks hold values.

        Raises:
            DeadlineError: If the chief has not initialized them by then.
        """
        self.lanes.replace(lanes)
        self._under_way = None
        is_ready = self.create(self._layouts) if is_chief else self._join_again(timeout, on_wait)
        for lane, layouts, memory in zip(lanes, self._layouts, self._memories, strict=True):
            lane.open(layouts, memory)
        for ps, variable, values in self._made:
            if values is not None:
                self._create(ps, variable, values)
            else:
                self._find(ps, variable, timeout, on_wait)
        return is_ready

    @property
    def ways(self) -> list[str]:
        """For each ps the lane that `resume` can go on with: ``auto``, or ``tcp`` where no memory was shared."""
        return ["tcp" if memory.file is None else "auto" for memory in self._memories]

    # --- steps

    def push_pull(
        self,
        parts: Sequence[Sequence[Part]],
        pull: Sequence[Sequence[int]],
        *,
        counts: bool,
        rows: Sequence[Sequence[TableRows]] | None = None,
        meanwhile: Meanwhile = nothing,
    ) -> PushResult:
        """Push what lies in the gradient memory, and bring the value memory up to date. The hot path.

        Args:
            parts: For each ps, what to do to its arenas.
            pull: For each ps, the arenas to pull.
            counts: Whether this is an update of the model, which the global step counts.
            rows: For each ps, what the parts that are about tables push, in their order; None if there is none.
            meanwhile: Called once all is pushed, before values come; see `Lanes.exchange`.
        """
        calls = self._push(parts, pull, counts, self.local_step, rows)
        return self._pushed(self._expected(calls, self.lanes.exchange(calls, meanwhile), messages.Applied))

    def begin_push_pull(
        self,
        parts: Sequence[Sequence[Part]],
        pull: Sequence[Sequence[int]],
        *,
        counts: bool,
        computed_from: int,
        rows: Sequence[Sequence[TableRows]] | None = None,
    ) -> None:
        """`push_pull` on a thread: until `end_push_pull` has returned, nobody else may touch the memory of both.

        Args:
            parts: As for `push_pull`.
            pull: As for `push_pull`.
            counts: As for `push_pull`.
            computed_from: The `local_step` of the values that the gradients were computed from.
            rows: As for `push_pull`.
        """
        calls = self._push(parts, pull, counts, computed_from, rows)
        self._under_way = calls, self.lanes.exchange_aside(calls)
        self.global_step += counts

    def end_push_pull(self) -> PushResult | None:
        """Wait for the end of `begin_push_pull`; None if none is under way. Raises what `push_pull` would."""
        under_way, self._under_way = self._under_way, None
        if under_way is None:
            return None
        calls, replies = under_way
        return self._pushed(self._expected(calls, replies.result(), messages.Applied))

    def pull(self, arenas: Sequence[Sequence[int]]) -> int:
        """Bring the value memory of these arenas of each ps up to date; the global step."""
        calls = [
            Call(lane, messages.Pull(tuple(wanted)), (), _whole(layouts, wanted))
            for lane, layouts, wanted in zip(self.lanes.each(), self._layouts, arenas, strict=True)
        ]
        self._arrived(self._exchange(calls, messages.State)[0].global_step)
        return self.global_step

    def pull_rows(self, wanted: Sequence[tuple[int, int, TableRows]]) -> None:
        """Fetch rows of tables.

        Args:
            wanted: The ps, the arena of the table there, and the rows, whose values are filled.
        """
        lanes, calls = self.lanes.each(), list[Call]()
        for ps, arena, rows in wanted:
            if len(rows.ids) and not lanes[ps].copy_rows(arena, rows):
                request = messages.PullRows(arena, len(rows.ids))
                calls.append(Call(lanes[ps], request, rows_out=[rows.id_bytes], rows_in=[rows.value_bytes]))
        if calls:
            self._exchange(calls, messages.State)

    def read_global_step(self) -> int:
        """Ask ps:0 for the global step."""
        self.global_step = self._ask(self.lanes.each()[0], messages.Pull(()), messages.State).global_step
        return self.global_step

    # --- variables of the program's own

    def unique_name(self, name: str) -> str:
        """A name that no variable of this client has: ``name``, or else ``name_1``, ``name_2`` and so on.

        It counts as taken from now on. The same calls in the same order give the same names on every worker.
        """
        taken = self._variables | _names(self._layouts)
        numbered = (f"{name}_{number}" for number in itertools.count(1))
        unique = next(each for each in itertools.chain([name], numbered) if each not in taken)
        self._variables.add(unique)
        return unique

    def create_variable(self, ps: int, variable: VariableSpec, values: torch.Tensor) -> None:
        """The chief makes a variable on a ps, with its first values; one that is there already keeps what it has.

        Nobody else sees it before it has all of them.

        Args:
            ps: The index of the ps.
            variable: What to make; its name is one of `unique_name`.
            values: Its values, flat.

        Raises:
            ModelMismatchError: If it is there already, with another shape or dtype.
        """
        self._create(ps, variable, values)
        self._made.append(_Made(ps, variable, values))

    def await_variable(
        self, ps: int, variable: VariableSpec, timeout: float, on_wait: Callable[[float], None] = lambda _: None
    ) -> None:
        """Every other worker waits until the chief has made a variable.

        Args:
            ps: The index of the ps.
            variable: What is expected there.
            timeout: Seconds to wait for.
            on_wait: Called about every second with the seconds that were waited so far.

        Raises:
            DeadlineError: If it is not there by then.
            ModelMismatchError: If it has another shape or dtype.
            RefusedError: If the chief failed.
            RunOverError: If the chief has finished without making it.
        """
        self._find(ps, variable, timeout, on_wait)
        self._made.append(_Made(ps, variable, None))

    def read_variable(self, ps: int, variable: VariableSpec, span: Range) -> torch.Tensor:
        """Elements ``[start, stop)`` of a variable, flat. What lies in one block is of one version."""
        lane = self.lanes.each()[ps]
        values = torch.empty(span[1] - span[0], dtype=DTYPES[variable.dtype], device="cpu")
        for start, stop in pieces([span]):
            reply = self._ask(lane, messages.ReadVariable(variable.name, start, stop), messages.Values)
            _fill(values[start - span[0] : stop - span[0]], reply, lane)
        return values

    def update_variable(
        self, ps: int, variable: VariableSpec, operation: Literal["assign", "add"], values: torch.Tensor
    ) -> torch.Tensor:
        """Assign or add to a whole variable, once; what this very update has made of it, flat.

        Atomic for each block of elements: a variable of more than `arena.BLOCK` may meet another worker's in between.
        """
        lane = self.lanes.each()[ps]
        result = torch.empty_like(values)
        for start, stop in pieces([(0, variable.size)]):
            self._sequence += 1
            request = messages.UpdateVariable(
                self._sequence, variable.name, operation, start, packed(values[start:stop])
            )
            _fill(result[start:stop], self._ask(lane, request, messages.Values), lane)
        return result

    # --- the chief's duties

    def save(self, directory: str) -> list[messages.Saved]:
        """Have every ps write its shard into ``directory``, all at once; this task writes for those that do not see it.

        Blocks for as long as it takes; a ps that is lost meanwhile is noticed.

        Args:
            directory: An absolute path of a folder that is there, of a name that no other folder has.

        Raises:
            CheckpointError: If it cannot be written.
        """
        lanes = self.lanes.each()
        calls = [Call(lane, messages.Save(directory, shard, len(lanes))) for shard, lane in enumerate(lanes)]
        return self._expected(calls, ask_at_length(self.lanes, calls, Path(directory), WAIT_INTERVAL), messages.Saved)

    def restore(self, directory: str) -> None:
        """Have every ps read its variables from a checkpoint; this task reads for those that do not see it.

        Blocks as `save` does.

        Args:
            directory: An absolute path.

        Raises:
            CheckpointError: If it is cut short or belongs to another model.
        """
        folder = Path(directory)
        weight_map, slot_map = read_index(folder / VALUES_INDEX), read_index(folder / SLOTS_INDEX)
        request = messages.Restore(directory, digest(folder), weight_map, slot_map)
        calls = [Call(lane, request) for lane in self.lanes.each()]
        self._expected(calls, ask_at_length(self.lanes, calls, folder, WAIT_INTERVAL), messages.Done)

    def await_workers(self, on_wait: Callable[[tuple[str, ...]], None] = lambda _: None) -> None:
        """Wait until this task is the only one that still trains. Blocks for as long as the others take.

        Args:
            on_wait: Called about every second with the tasks that are waited for.
        """
        for lane in self.lanes.each():
            while tasks := self._ask(lane, messages.AwaitWorkers(WAIT_INTERVAL), messages.Remaining).tasks:
                on_wait(tasks)

    # --- any time

    def status(self) -> list[messages.Status]:
        """What each ps holds and has done."""
        return self._ask_all(messages.GetStatus(), messages.Status)

    def goodbye(self, failure: str = "") -> None:
        """Tell every ps that this task has finished, or why it cannot go on; then close. Idempotent."""
        self.lanes.goodbye(failure)
        self._memories = []  # their files are closed with them

    def close(self) -> None:
        """Close the connections without a word. Idempotent."""
        self.lanes.close()
        self._memories = []

    def __repr__(self) -> str:
        return f"<ParameterClient of {self.lanes} at global step {self.global_step}>"

    def _arrived(self, global_step: int) -> None:
        """Values of this step are here."""
        self.global_step = self.local_step = global_step

    def _push(
        self,
        parts: Sequence[Sequence[Part]],
        pull: Sequence[Sequence[int]],
        counts: bool,
        computed_from: int,
        rows: Sequence[Sequence[TableRows]] | None,
    ) -> list[Call]:
        self._sequence += 1
        lanes = self.lanes.each()
        return [
            Call(
                lane,
                messages.Push(self._sequence, computed_from, counts, tuple(ps_parts), tuple(ps_pull)),
                _outgoing(layouts, ps_parts),
                _whole(layouts, ps_pull),
                [view for each in ps_rows for view in (each.id_bytes, each.value_bytes)],
            )
            for lane, layouts, ps_parts, ps_pull, ps_rows in zip(
                lanes, self._layouts, parts, pull, rows or [()] * len(lanes), strict=True
            )
        ]

    def _pushed(self, applied: Sequence[messages.Applied]) -> PushResult:
        each_ps = zip(self.push_times, self.lanes.sending, self.lanes.waiting, applied, strict=True)
        for times, sending, waiting, each in each_ps:
            times.sending += sending
            times.waiting += waiting
            times.applying += each.seconds
        first = applied[0]
        self.local_step = first.global_step
        self.global_step = max(self.global_step, first.global_step)  # it may have been asked for meanwhile
        return PushResult(first.global_step, first.staleness)

    def _join_again(self, timeout: float, on_wait: Callable[[float], None]) -> bool:
        self.await_ready(timeout, on_wait)
        self.join(self._layouts)
        return True

    def _create(self, ps: int, variable: VariableSpec, values: torch.Tensor) -> None:
        lane = self.lanes.each()[ps]
        for start, stop in list(pieces([(0, variable.size)])) or [(0, 0)]:
            request = messages.CreateVariable(variable, start, packed(values[start:stop]))
            if self._ask(lane, request, messages.Declared).ready:
                break

    def _find(self, ps: int, variable: VariableSpec, timeout: float, on_wait: Callable[[float], None]) -> None:
        lane = self.lanes.each()[ps]
        failing = f"the chief has not created variable {variable.name!r} on {lane.task}"
        self._await(lane, partial(messages.AwaitVariable, variable), time.monotonic(), timeout, failing, on_wait)

    def _await(
        self,
        lane: Lane,
        request: Callable[[float], messages.Request],
        started: float,
        timeout: float,
        failing: str,
        on_wait: Callable[[float], None],
    ) -> None:
        waited = 0.0
        while not self._ask(lane, request(_interval(timeout - waited)), messages.State).ready:
            waited = time.monotonic() - started
            if waited >= timeout:
                raise DeadlineError(
                    f"{failing} within {timeout:g} s; is it running? (session_creation_timeout_secs)", timeout
                )
            on_wait(waited)

    def _declare(self, layouts: Sequence[Sequence[ArenaLayout]], *, create: bool) -> bool:
        for name in sorted(self._variables & _names(layouts)):
            raise ConfigError(
                f"variable {name!r} of the model: a ps.Variable of that name was created before, and a checkpoint "
                "could not hold both; give that one another name"
            )
        self._layouts = list(layouts)
        calls = [
            Call(lane, messages.Declare(tuple(ps_layouts), create))
            for lane, ps_layouts in zip(self.lanes.each(), layouts, strict=True)
        ]
        return all(reply.ready for reply in self._exchange(calls, messages.Declared))

    def _ask(self, lane: Lane, request: messages.Request, expected: type[R]) -> R:
        return self._exchange([Call(lane, request)], expected)[0]

    def _ask_all(self, request: messages.Request, expected: type[R]) -> list[R]:
        return self._exchange([Call(lane, request) for lane in self.lanes.each()], expected)

    def _exchange(self, calls: Sequence[Call], expected: type[R]) -> list[R]:
        return self._expected(calls, self.lanes.exchange(calls), expected)

    @staticmethod
    def _expected(calls: Sequence[Call], replies: Sequence[messages.Reply], expected: type[R]) -> list[R]:
        return [_expect(call.lane, reply, expected) for call, reply in zip(calls, replies, strict=True)]


def _outgoing(layouts: Sequence[ArenaLayout], parts: Sequence[Part]) -> list[Piece]:
    return [
        Piece(part.arena, start, stop)
        for part in parts
        if part.rows is None
        for start, stop in (pieces(part.ranges) if part.ranges is not None else layouts[part.arena].pieces)
    ]


def _whole(layouts: Sequence[ArenaLayout], arenas: Sequence[int]) -> list[Piece]:
    return [Piece(arena, start, stop) for arena in arenas for start, stop in layouts[arena].pieces]


def _names(layouts: Sequence[Sequence[ArenaLayout]]) -> set[str]:
    """The variables of a model, those that are partitioned by the name of the whole."""
    return {
        variable.shard.variable if variable.shard else variable.name
        for ps_layouts in layouts
        for layout in ps_layouts
        for variable in layout.variables
    }


def _fill(out: torch.Tensor, reply: messages.Values, lane: Lane) -> None:
    if len(reply.values) != out.nbytes:
        raise RemoteProtocolError(
            f"{lane.task} was expected to send {out.nbytes} bytes of a variable, and sent {len(reply.values)}"
        )
    out.copy_(unpacked(reply.values, out.dtype))


def _expect(lane: Lane, reply: messages.Reply, expected: type[R]) -> R:
    if isinstance(reply, expected):
        return reply
    if isinstance(reply, messages.Refused):
        raise raised(reply, lane.task)
    raise RemoteProtocolError(f"{lane.task} was expected to answer {expected.__name__}, and answered {reply}")


def _interval(remaining: float) -> float:
    return min(WAIT_INTERVAL, max(remaining, 0.0))
