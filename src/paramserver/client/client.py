"""The worker's view of all parameter servers: splits a request by ps and joins the replies."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from paramserver.checkpoint.index import SLOTS_INDEX, VALUES_INDEX, Maps, digest, merge_maps, read_index
from paramserver.checkpoint.memory_files import MemoryFiles
from paramserver.client.ask import WAIT_INTERVAL, OnWait, Patience, ask, ask_all, ask_each, ask_until_ready, expected
from paramserver.client.checkpoints import ask_at_length, ask_with_files
from paramserver.client.exchange import Answers, Call, Dialer, Exchange, Meanwhile, nothing
from paramserver.client.variables import OwnVariables
from paramserver.layout.arena import ArenaLayout
from paramserver.transport.lane import Lane, Piece, TableRows, WorkerMemory
from paramserver.transport.waiting import WaitLog
from paramserver.wire import messages
from paramserver.wire.messages import Part
from paramserver.wire.payload import dense_pieces

SLOTS_FILE = "slots"
"""File name under which the ps tasks refer to the slots that this task holds in memory for them."""

RETURN_TIME = 60.0
"""Seconds that a chief with a renewed connection waits for workers that may be about to renew theirs."""


class PushResult(NamedTuple):
    """Result of a push.

    Attributes:
        global_step: Updates of the model after the push.
        staleness: Updates by other workers since the pull of the values that the gradients were computed from.
    """

    global_step: int
    staleness: int


class PushTemplate(NamedTuple):
    """Content of a push to one ps, without its number and its table rows; the same in most steps.

    Attributes:
        parts: Operations on the arenas of the ps.
        pull: Arenas whose values come back.
        outgoing: Pieces of gradients to send.
        incoming: Pieces of values to receive.
    """

    parts: tuple[Part, ...]
    pull: tuple[int, ...]
    outgoing: tuple[Piece, ...]
    incoming: tuple[Piece, ...]


@dataclass
class PushTimes:
    """Seconds spent on all pushes to one ps.

    Attributes:
        task: The ps.
        sending: Until the pushes were handed over to the lane.
        waiting: Waiting for the answers after that, one ps after the other.
        applying: Applying the pushes meanwhile, as reported by the ps.
    """

    task: str
    sending: float = 0.0
    waiting: float = 0.0
    applying: float = 0.0


class ParameterClient:
    """Talks to every ps of a run. Not thread-safe; every method blocks until all ps tasks have answered.

    Every method that talks to a ps raises ``UnavailableError`` naming the ps when its connection is lost, and
    ``RefusedError`` or a subclass when it refuses. The client can be used after a refusal.

    Args:
        lanes: A lane to each ps, by index. Owned by the client from now on.
        dialer: As for `Exchange`.

    Attributes:
        lanes: The `Exchange` over the lanes.
        variables: The program's own variables.
        global_step: Updates of the model as last reported by the ps tasks, plus one that is under way.
        local_step: The global step of the values held here, from which staleness is counted.
        push_times: Times of all pushes, for each ps.
        emptied: The ps tasks, by index, that had lost their values when the chief came back by `resume`.
    """

    def __init__(self, lanes: Sequence[Lane], dialer: Dialer | None = None) -> None:
        self.lanes = Exchange(lanes, dialer)
        self._sequence = itertools.count(1)
        self.variables = OwnVariables(self.lanes, self._sequence)
        self._under_way: tuple[list[Call], Future[Answers]] | None = None
        self.global_step = 0
        self.local_step = 0
        self.emptied: list[int] = []
        self.push_times = [PushTimes(lane.task) for lane in lanes]

    # --- start

    def create(self, layouts: Sequence[Sequence[ArenaLayout]]) -> bool:
        """Create the arenas, as the chief, and return whether all of them are ready already.

        Args:
            layouts: One list of layouts for each ps.
        """
        return all(self._declare(layouts, create=True))

    def await_ready(self, timeout: float, on_wait: OnWait = lambda _: None) -> None:
        """Wait until the chief has initialized the variables on every ps.

        Args:
            timeout: Seconds to wait in total.
            on_wait: Called about every second with the seconds waited so far.

        Raises:
            DeadlineError: If the chief has not initialized the variables by then.
            RefusedError: If the chief failed.
        """
        self._await_ready(Patience(timeout, on_wait))

    def join(self, layouts: Sequence[Sequence[ArenaLayout]]) -> None:
        """Declare the arenas that this worker expects, as every worker but the chief does.

        Raises:
            ModelMismatchError: If a ps holds other arenas; the message names the first variable that differs.
        """
        self._declare(layouts, create=False)

    def open(self) -> list[WorkerMemory]:
        """Make the memory for the declared arenas, and return it for each ps."""
        lanes = self.lanes
        lanes.memories = [lane.open(layouts) for lane, layouts in zip(lanes.each(), lanes.layouts, strict=True)]
        return lanes.memories

    def renew_gradients(self, ps: int) -> WorkerMemory:
        """Replace the gradient memory of a ps by new, zeroed memory, and return the memory for the ps.

        The program may go on referring to the old gradient memory.
        """
        self.lanes.mend()
        memory = self.lanes.memories[ps] = self.lanes.each()[ps].renew()
        return memory

    def mark_ready(self, global_step: int) -> None:
        """Announce, as the chief, that the variables are initialized, so that the other workers begin."""
        epoch = secrets.token_hex(8)
        ask_all(self.lanes, messages.MarkReady(global_step, epoch), messages.Done)
        self.lanes.epochs = [epoch] * len(self.push_times)
        self._arrived(global_step)

    def mark_restored(self, global_step: int | None) -> None:
        """Announce, as the chief, that a checkpoint was restored after `mark_ready`, so that waiting workers go on.

        Args:
            global_step: The step of the checkpoint; None if there was no checkpoint.
        """
        ask_all(self.lanes, messages.MarkRestored(global_step), messages.Done)
        if global_step is not None:
            self._arrived(global_step)

    def await_restored(self, timeout: float, on_wait: OnWait = lambda _: None) -> None:
        """Wait, as `await_ready` does, until the chief has called `mark_restored` or any worker has made an update."""
        lane = self.lanes.each()[0]
        failing = "the chief has not restored a checkpoint, as this worker was told that it does"
        ask_until_ready(self.lanes, lane, messages.AwaitRestored, Patience(timeout, on_wait), failing)

    def is_beyond_restoring(self) -> bool:
        """Return whether the ps tasks hold values that were restored from a checkpoint or trained."""
        return ask(self.lanes, self.lanes.each()[0], messages.AwaitRestored(0.0), messages.State).ready

    def resume(self, timeout: float, on_wait: OnWait = lambda _: None, *, is_chief: bool) -> bool:
        """Connect to all ps tasks anew after one was lost, and go on.

        The memory stays the same, and interrupted requests are not repeated. The chief creates again, without values,
        the arenas that a ps has lost: unless this returns True, the chief has to initialize the variables and call
        `mark_ready`. All other workers wait here for that.

        Args:
            timeout: Seconds to wait for the ps tasks in total, and then as long again for the chief.
            on_wait: As for `await_ready`.
            is_chief: Whether this task initializes the variables.

        Returns:
            Whether all ps tasks hold values.

        Raises:
            DeadlineError: If a ps or the chief is not up by then.
        """
        assert self.lanes.dialer is not None  # noqa: S101  # only a client of a cluster loses a ps
        lanes = self.lanes.dialer.dial_all(timeout, self.lanes.memories)
        self.lanes.replace(lanes)
        self._under_way = None
        patience = Patience(timeout, on_wait)
        is_ready = self._create_again() if is_chief else self._join_again(patience)
        for lane, layouts, memory in zip(lanes, self.lanes.layouts, self.lanes.memories, strict=True):
            lane.open(layouts, memory)
        self.variables.find_again(patience)
        return is_ready

    def num_variables(self, ps: int) -> int:
        """Return the number of model variables, or parts of partitioned ones, on a ps."""
        return sum(len(layout.variables) for layout in self.lanes.layouts[ps])

    # --- steps

    def plan(self, parts: Sequence[Sequence[Part]], pull: Sequence[Sequence[int]]) -> list[PushTemplate]:
        """Return the push templates for `push_pull`, computed once for all steps that do the same.

        Args:
            parts: For each ps, the operations on its arenas.
            pull: For each ps, the arenas to pull.
        """
        return [
            PushTemplate(tuple(ps_parts), tuple(ps_pull), _outgoing(layouts, ps_parts), _whole(layouts, ps_pull))
            for layouts, ps_parts, ps_pull in zip(self.lanes.layouts, parts, pull, strict=True)
        ]

    def next_number(self) -> int:
        """Return a new number for one push to all ps tasks."""
        return next(self._sequence)

    def has_begun(self, number: int) -> bool:
        """Return whether a push was begun, and so is applied by every ps by now or after `finish_push`."""
        return self.lanes.begun >= number

    @property
    def refusing(self) -> Collection[int]:
        """The ps tasks, by index, that refused the last push; their values were not received."""
        return self.lanes.refusing

    def push_pull(
        self,
        plans: Sequence[PushTemplate],
        *,
        counts: bool,
        rows: Sequence[Sequence[TableRows]] | None = None,
        meanwhile: Meanwhile = nothing,
        number: int | None = None,
    ) -> PushResult:
        """Push the content of the gradient memory, and bring the value memory up to date. The hot path.

        After an interrupt, the gradient and value memory must stay unchanged until `finish_push` has returned.

        Args:
            plans: The push templates, for each ps; see `plan`.
            counts: Whether the global step counts this push as an update of the model.
            rows: For each ps, the rows for the parts that concern tables, in the order of these parts; None for none.
            meanwhile: Called after everything is pushed and before values arrive; see `Exchange.exchange`.
            number: The number from `next_number`, for `has_begun`.
        """
        calls = self._push(number or self.next_number(), plans, counts, self.local_step, rows)
        return self._pushed(calls, self.lanes.run(calls, meanwhile))

    def begin_push_pull(
        self,
        plans: Sequence[PushTemplate],
        *,
        counts: bool,
        computed_from: int,
        rows: Sequence[Sequence[TableRows]] | None = None,
        number: int | None = None,
    ) -> None:
        """Run `push_pull` on a thread; until `finish_push` returns, only that thread may touch gradients and values.

        Args:
            plans: As for `push_pull`.
            counts: As for `push_pull`.
            computed_from: The `local_step` of the values that the gradients were computed from.
            rows: As for `push_pull`.
            number: As for `push_pull`.
        """
        calls = self._push(number or self.next_number(), plans, counts, computed_from, rows)
        self._under_way = calls, self.lanes.run_in_background(calls)
        self.global_step += counts

    def finish_push(self) -> PushResult | None:
        """Wait for `begin_push_pull`, or complete an interrupted push; return None if there was neither. Blocks.

        Raises:
            ParameterServerError: Any error that `push_pull` raises.
        """
        if self._under_way is not None:
            calls, replies = self._under_way
            wait([replies])  # an interrupt here leaves the push under way
            self._under_way = None
            answers = replies.result()
            if answers.replies:
                return self._pushed(calls, answers)
        applied = [reply for reply in self.lanes.mend() if isinstance(reply, messages.Applied)]
        if not applied:
            return None
        self._arrived(applied[0].global_step)
        return PushResult(applied[0].global_step, applied[0].staleness)

    def pull(self, arenas: Sequence[Sequence[int]]) -> int:
        """Bring the value memory of these arenas of each ps up to date, and return the global step."""
        calls = [
            Call(lane, messages.Pull(tuple(wanted)), (), _whole(layouts, wanted))
            for lane, layouts, wanted in zip(self.lanes.each(), self.lanes.layouts, arenas, strict=True)
        ]
        self._arrived(ask_each(self.lanes, calls, messages.State)[0].global_step)
        return self.global_step

    def copy_rows(self, ps: int, arena: int, rows: TableRows) -> bool:
        """Copy rows of a table if that needs no request, and return whether they were copied. See `Lane.copy_rows`."""
        return self.lanes.each()[ps].copy_rows(arena, rows)

    def pull_rows(self, wanted: Sequence[tuple[int, int, TableRows]]) -> None:
        """Fetch rows of tables with one request to each ps.

        Args:
            wanted: The ps, the arena of the table on that ps, and the rows, whose values are filled in.
        """
        lanes = self.lanes.each()
        missing: dict[int, list[tuple[int, TableRows]]] = {}
        for ps, arena, rows in wanted:
            if len(rows.ids) and not lanes[ps].copy_rows(arena, rows):
                missing.setdefault(ps, []).append((arena, rows))
        if missing:
            ask_each(self.lanes, [_pull_rows(lanes[ps], tables) for ps, tables in missing.items()], messages.State)

    def read_global_step(self) -> int:
        """Ask ps:0 for the global step and return it."""
        self.global_step = ask(self.lanes, self.lanes.each()[0], messages.Pull(()), messages.State).global_step
        return self.global_step

    # --- the chief's duties

    def save(self, directory: str) -> list[messages.Saved]:
        """Have all ps tasks write their shards into ``directory`` at once; this task writes where a ps does not see it.

        Blocks until all shards are written; the loss of a ps is noticed meanwhile.

        Args:
            directory: The absolute path of an existing folder, whose name no other folder has.

        Raises:
            CheckpointError: If the shards cannot be written.
            NotFiniteError: If a trained variable is not finite.
        """
        lanes = self.lanes.each()
        calls = [Call(lane, messages.Save(directory, shard, len(lanes))) for shard, lane in enumerate(lanes)]
        return expected(calls, ask_at_length(self.lanes, calls, Path(directory), WAIT_INTERVAL), messages.Saved)

    def restore(self, directory: str) -> None:
        """Have every ps read its variables from a checkpoint; this task reads for those that do not see it.

        Blocks as `save` does.

        Args:
            directory: An absolute path.

        Raises:
            CheckpointError: If the checkpoint is truncated or belongs to another model.
        """
        folder = Path(directory)
        weight_map, slot_map = read_index(folder / VALUES_INDEX), read_index(folder / SLOTS_INDEX)
        request = messages.Restore(directory, digest(folder), weight_map, slot_map)
        calls = [Call(lane, request) for lane in self.lanes.each()]
        expected(calls, ask_at_length(self.lanes, calls, folder, WAIT_INTERVAL), messages.Done)

    def read_slots(self, variables: Sequence[str]) -> dict[str, torch.Tensor]:
        """Fetch the slots of variables from the ps tasks, by names such as ``fc.weight/exp_avg``.

        Each slot has the shape of its whole variable (``[1]`` for a scalar variable) or is a scalar. The values and
        slots of a block of elements belong to one moment; pushes go on meanwhile. Blocks as `save` does.
        """
        files, lanes = MemoryFiles(), self.lanes.each()
        names = tuple(variables)
        calls = [Call(lane, messages.ReadSlots(shard, len(lanes), names)) for shard, lane in enumerate(lanes)]
        sent = expected(calls, ask_with_files(self.lanes, calls, files, WAIT_INTERVAL), messages.Saved)
        slot_map = merge_maps(Maps(each.weight_map, each.slot_map) for each in sent).slot_map
        return {name: files.tensor(file, name) for name, file in slot_map.items()}

    def load_slots(self, groups: Sequence[messages.SlotGroup], slots: Mapping[str, torch.Tensor]) -> None:
        """Replace the slots of variables on the ps tasks. Blocks as `save` does.

        Args:
            groups: The variables, with the settings of their rules. A variable without slots in ``slots`` begins anew.
            slots: As `read_slots` returns them; contiguous, on the CPU.

        Raises:
            CheckpointError: If ``slots`` are not the slots of the rule with these settings.
        """
        files = MemoryFiles()
        files.add(SLOTS_FILE, slots)
        request = messages.LoadSlots(tuple(groups), dict.fromkeys(slots, SLOTS_FILE))
        calls = [Call(lane, request) for lane in self.lanes.each()]
        expected(calls, ask_with_files(self.lanes, calls, files, WAIT_INTERVAL), messages.Done)

    def await_workers(self, on_wait: Callable[[tuple[str, ...]], None] = lambda _: None) -> None:
        """Wait until this task is the only one that still trains. Blocks for as long as the others take.

        All ps tasks are asked at once, so that the loss of any ps is noticed. After this task has lost a ps, workers
        that have lost it too get `RETURN_TIME` to come back.

        Args:
            on_wait: Called about every second with the tasks that are still training.
        """
        log = WaitLog("this task")
        while tasks := self._who_trains():
            log.say(", ".join(sorted(tasks)), "the run is over when they have finished")
            on_wait(tuple(sorted(tasks)))

    # --- any time

    def status(self) -> list[messages.Status]:
        """Ask each ps for its contents and counters, and return them by the index of the ps."""
        return ask_all(self.lanes, messages.GetStatus(), messages.Status)

    def goodbye(self, failure: str = "") -> None:
        """Tell every ps that this task has finished, or why it cannot go on, then close. Idempotent."""
        self.lanes.goodbye(failure)
        self.lanes.memories = []  # their files are closed with them

    def close(self) -> None:
        """Close the connections without a goodbye. Idempotent."""
        self.lanes.close()
        self.lanes.memories = []

    def __repr__(self) -> str:
        return f"<ParameterClient of {self.lanes} at global step {self.global_step}>"

    def _arrived(self, global_step: int) -> None:
        """Note that the values of this step are here."""
        self.global_step = self.local_step = global_step

    def _push(
        self,
        number: int,
        plans: Sequence[PushTemplate],
        counts: bool,
        computed_from: int,
        rows: Sequence[Sequence[TableRows]] | None,
    ) -> list[Call]:
        lanes = self.lanes.each()
        if self.lanes.refusing:
            self.lanes.refusing.clear()
        if counts:
            self.lanes.has_updated = True
        return [
            Call(
                lane,
                messages.Push(number, computed_from, counts, plan.parts, plan.pull),
                plan.outgoing,
                plan.incoming,
                _bytes_of(ps_rows) if ps_rows else (),
            )
            for lane, plan, ps_rows in zip(lanes, plans, rows or [()] * len(lanes), strict=True)
        ]

    def _pushed(self, calls: Sequence[Call], answers: Answers) -> PushResult:
        refusing = [ps for ps, reply in enumerate(answers.replies) if type(reply) is messages.Refused]
        if refusing:
            self.lanes.refusing.update(refusing)
        applied = expected(calls, answers.replies, messages.Applied)
        each_ps = zip(self.push_times, answers.sending, answers.waiting, applied, strict=True)
        for times, sending, waiting, each in each_ps:
            times.sending += sending
            times.waiting += waiting
            times.applying += each.seconds
        first = applied[0]
        # Values that were read early lack what others have counted since.
        early = first.global_step if first.read_at is None else first.read_at + 1
        self.local_step = min(early, first.global_step)
        self.global_step = max(self.global_step, first.global_step)  # a newer one may have been read meanwhile
        return PushResult(first.global_step, first.staleness)

    def _who_trains(self) -> set[str]:
        may_return = time.monotonic() < self.lanes.renewed_at + RETURN_TIME
        replies = ask_all(self.lanes, messages.AwaitWorkers(WAIT_INTERVAL, may_return), messages.Remaining)
        absent = set.intersection(*(set(each.absent) for each in replies))  # no ps has received their goodbye
        return absent.union(*(each.tasks for each in replies))

    def _await_ready(self, patience: Patience) -> None:
        for lane in self.lanes.each():
            failing = f"the chief has not initialized the variables on {lane.task}"
            ask_until_ready(self.lanes, lane, messages.AwaitReady, patience, failing)

    def _join_again(self, patience: Patience) -> bool:
        self._await_ready(patience)
        self.join(self.lanes.layouts)
        return True

    def _create_again(self) -> bool:
        are_ready = self._declare(self.lanes.layouts, create=True)
        self.emptied = [index for index, is_ready in enumerate(are_ready) if not is_ready]
        return not self.emptied

    def _declare(self, layouts: Sequence[Sequence[ArenaLayout]], *, create: bool) -> list[bool]:
        self.variables.leave_to_model(_names(layouts))
        self.lanes.layouts = list(layouts)
        calls = [
            Call(lane, messages.Declare(tuple(ps_layouts), create))
            for lane, ps_layouts in zip(self.lanes.each(), layouts, strict=True)
        ]
        replies = ask_each(self.lanes, calls, messages.Declared)
        self.lanes.epochs = [reply.epoch for reply in replies]
        return [reply.ready for reply in replies]


def _pull_rows(lane: Lane, tables: Sequence[tuple[int, TableRows]]) -> Call:
    request = messages.PullRows(tuple((arena, len(rows.ids)) for arena, rows in tables))
    ids, values = ([getattr(rows, name) for _, rows in tables] for name in ("id_bytes", "value_bytes"))
    return Call(lane, request, rows_out=ids, rows_in=values)


def _bytes_of(rows: Sequence[TableRows]) -> list[memoryview]:
    return [view for each in rows for view in (each.id_bytes, each.value_bytes)]


def _outgoing(layouts: Sequence[ArenaLayout], parts: Sequence[Part]) -> tuple[Piece, ...]:
    return tuple(Piece(part.arena, *span) for part, span in dense_pieces(parts, layouts))


def _whole(layouts: Sequence[ArenaLayout], arenas: Sequence[int]) -> tuple[Piece, ...]:
    return tuple(Piece(arena, start, stop) for arena in arenas for start, stop in layouts[arena].pieces)


def _names(layouts: Sequence[Sequence[ArenaLayout]]) -> set[str]:
    """Return the names of a model's variables; a partitioned variable is named as a whole."""
    return {
        variable.shard.variable if variable.shard else variable.name
        for ps_layouts in layouts
        for layout in ps_layouts
        for variable in layout.variables
    }
