"""The handlers of a ps for all requests: message -> store -> reply."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from paramserver.checkpoint.folder import Steps
from paramserver.checkpoint.index import digest
from paramserver.errors import ParameterServerError, RefusedError, RemoteProtocolError, UnavailableError
from paramserver.layout.variables import DTYPES
from paramserver.memory.arena_memory import tensor_bytes
from paramserver.server.checkpoints import Transfer, here, loading_slots, reading_slots, restoring, saving, through_peer
from paramserver.server.push_plans import PushPlans
from paramserver.server.updates import TakenRows, Update, taken_ids, taken_values
from paramserver.store.membership import Membership
from paramserver.store.progress import Progress
from paramserver.store.store import Store
from paramserver.store.tables.table import StoredTable
from paramserver.transport.complaints import Complaints
from paramserver.transport.lane import Piece, Session
from paramserver.wire import messages
from paramserver.wire.refusals import refused
from paramserver.wire.values import packed, unpacked

logger = logging.getLogger(__name__)

LONGEST_WAIT = 30.0
"""Seconds after which every wait is answered, so that no thread waits much longer than its worker lives."""


class RequestHandler:
    """Carries out the requests of sessions on one store. Thread-safe; a session is used by one thread at a time.

    Args:
        store: The store.
        membership: The tasks that take part in the run.
        fail: Called with the reason if the chief cannot go on; by default ``store.fail``.
        complaints: Takes the faults of requests; by default they are logged, each kind once a minute.

    Attributes:
        pushes: The plans of pushes to the store.
    """

    def __init__(
        self,
        store: Store,
        membership: Membership,
        fail: Callable[[str], None] | None = None,
        complaints: Complaints | None = None,
    ) -> None:
        self._store = store
        self._complaints = complaints or Complaints(logger.warning)
        self._fail = fail or store.fail
        self._membership = membership
        self.pushes = PushPlans(store)
        self._transfers: WeakKeyDictionary[Session, Transfer] = (
            WeakKeyDictionary()
        )  # a transfer ends with its connection
        self._handlers: Mapping[type, Callable[[Session, Any], None]] = {
            messages.Push: self._push,
            messages.Pull: self._pull,
            messages.PullRows: self._pull_rows,
            messages.Declare: self._declare,
            messages.MarkReady: self._mark_ready,
            messages.AwaitReady: self._await_ready,
            messages.MarkRestored: self._mark_restored,
            messages.AwaitRestored: self._await_restored,
            messages.AwaitWorkers: self._await_workers,
            messages.Save: self._save,
            messages.Restore: self._restore,
            messages.ReadSlots: self._read_slots,
            messages.LoadSlots: self._load_slots,
            messages.Proceed: self._proceed,
            messages.CreateVariable: self._create_variable,
            messages.AwaitVariable: self._await_variable,
            messages.ReadVariable: self._read_variable,
            messages.UpdateVariable: self._update_variable,
            messages.GetStatus: self._status,
            messages.Goodbye: self._goodbye,
        }

    @property
    def requests(self) -> frozenset[type]:
        """Kinds of request that have a handler."""
        return frozenset(self._handlers)

    def handle(self, session: Session, request: messages.Request) -> None:
        """Carry out one request and answer it; a request that cannot be carried out is answered with a refusal.

        Raises:
            UnavailableError: If the connection is lost.
            RemoteProtocolError: If the peer breaks the protocol.
        """
        handler = self._handlers.get(type(request))
        if handler is None:
            raise RemoteProtocolError(f"{session.task} sent {type(request).__name__}, which is not a request")
        try:
            handler(session, request)
        except (UnavailableError, RemoteProtocolError):
            raise
        except ParameterServerError as error:
            session.reply(refused(error))
        except Exception as error:  # neither a peer's nonsense nor a fault of this code may end the session
            if session.is_of_program(error):
                raise
            what = f"{self._store.task} could not carry out a {type(request).__name__} of {session.task}"
            self._complain(error, f"a {type(request).__name__}", what)
            session.reply(messages.Refused("refused", f"{what}: {type(error).__name__}: {error}"))

    def _push(self, session: Session, push: messages.Push) -> None:
        store = self._store
        store.check_alive()
        # Everything is checked before the first part is applied: a push that is refused here has changed nothing.
        plan = self.pushes.plan(push)
        rows = [self._taken_rows(session, part) for part in plan.of_rows] if plan.of_rows else ()
        step, staleness, seconds, pulled = store.global_step, 0, 0.0, plan.pulled
        read_at: int | None = None
        progress = store.progress(session.incarnation)
        update = Update(session, progress, rows, plan)
        with progress.lock:
            if self._begins(session, progress, push.sequence):
                send_values = session.early_values(pulled, self._lock) if plan.answers else None
                if send_values is not None:
                    read_at, pulled = store.global_step, ()
                try:
                    seconds = update.apply(send_values)
                except (UnavailableError, RemoteProtocolError):
                    self._say_partial(update)
                    raise
                except Exception as error:
                    if session.is_of_program(error):
                        raise
                    raise self._failed(update, error) from error
                if push.counts:
                    step, staleness = store.count_update(push.local_step)
                progress.end()
        session.reply(messages.Applied(step, staleness, seconds, read_at), pulled, self._lock)

    def _begins(self, session: Session, progress: Progress, number: int) -> bool:
        try:
            return progress.begin(number)
        except ValueError as error:
            task = self._store.task
            raise RefusedError(
                f"an update of {session.task} on {task}: {error}; strategy.assign(model) or a checkpoint sets the "
                "values",
                task,
            ) from error

    def _say_partial(self, update: Update) -> None:
        if update.progress.done:
            logger.warning(
                "%s: %s was lost in the middle of an update: %d of its %d parts are applied; the others follow if it "
                "comes back",
                *(self._store.task, update.session.task, update.progress.done, update.num_parts),
            )

    def _failed(self, update: Update, error: Exception) -> RefusedError:
        """Return the refusal of a push of which a part could not be applied, and end its progress."""
        update.progress.end()
        task = self._store.task
        done, parts = update.progress.done, update.num_parts
        what = f"an update of {update.session.task} failed on {task} after {done} of {parts} parts"
        self._complain(error, "an update", what)
        return RefusedError(
            f"{what}, which stay applied; the global step does not count it: {type(error).__name__}: {error}", task
        )

    def _complain(self, error: Exception, during: str, what: str) -> None:
        """Complain about an error that is handled now, with its traceback: as text, which keeps no arenas."""
        self._complaints.add(f"{type(error).__name__} during {during}", f"{what}:\n{traceback.format_exc()}")

    def _taken_rows(self, session: Session, part: messages.Part) -> TakenRows:
        """Take the rows of a part and check them, before anything is applied."""
        table, count = self._table(part.arena), part.rows or 0
        try:
            table.check_rows(part.operation, count, part.settings)
            ids = taken_ids(session, count)
            table.check_ids(ids)
            values = taken_values(session, table.layout, count)
        except ValueError as error:
            raise self._refused_rows(part.arena, error) from error
        return TakenRows(table, part, ids, values)

    def _table(self, index: int) -> StoredTable:
        table = self._store.arena(index)
        if not isinstance(table, StoredTable):
            task = self._store.task
            raise RefusedError(f"rows of arena {index} of {task}: it is not a table, and has no rows", task)
        return table

    def _refused_rows(self, index: int, error: ValueError) -> RefusedError:
        task, table = self._store.task, self._store.arena(index).layout.variables[0].name
        return RefusedError(f"rows of {table!r} on {task} refused: {error}", task)

    def _pull_rows(self, session: Session, pull: messages.PullRows) -> None:
        self._store.check_alive()
        self.pushes.check_count(len(pull.wanted), len(self._store.arenas), "tables")
        rows = [self._read_rows(session, arena, count) for arena, count in pull.wanted]
        session.reply(messages.State(True, self._store.global_step), rows=list(map(tensor_bytes, rows)))

    def _read_rows(self, session: Session, arena: int, count: int) -> torch.Tensor:
        table = self._table(arena)
        try:
            table.check_rows("assign", count, None)
            ids = taken_ids(session, count)
            table.check_ids(ids)
        except ValueError as error:
            raise self._refused_rows(arena, error) from error
        return table.read_rows(ids)

    def _pull(self, session: Session, pull: messages.Pull) -> None:
        self._store.check_alive()
        session.reply(messages.State(True, self._store.global_step), self.pushes.whole(pull.arenas), self._lock)

    def _lock(self, piece: Piece) -> AbstractContextManager[object]:
        return self._store.arenas[piece.arena].lock(piece.start)

    def _declare(self, session: Session, declare: messages.Declare) -> None:
        self._store.check_alive()
        with self._store.progress(session.incarnation).lock:
            pass  # wait for a thread of a lost connection that still reads the memory that this worker will write to
        if self._store.memory is None and not declare.create:  # it was started again: what the worker knew is lost
            session.reply(messages.Refused("unavailable", f"{self._store.task} holds no variables of this run yet"))
            return
        store_memory = (self._store.create if declare.create else self._store.compare)(declare.arenas)
        session.open(declare.arenas, store_memory)
        session.reply(messages.Declared(self._store.is_ready, self._store.epoch))

    def _mark_ready(self, session: Session, request: messages.MarkReady) -> None:
        self._store.mark_ready(request.global_step, request.epoch)
        session.reply(messages.Done())

    def _await_ready(self, session: Session, request: messages.AwaitReady) -> None:
        ready = self._store.await_ready(_bounded(request.timeout))
        if not ready:
            self._membership.check_going_on(session.task)
        session.reply(messages.State(ready, self._store.global_step))

    def _mark_restored(self, session: Session, request: messages.MarkRestored) -> None:
        self._store.mark_restored(request.global_step)
        session.reply(messages.Done())

    def _await_restored(self, session: Session, request: messages.AwaitRestored) -> None:
        is_over = self._store.await_restored(_bounded(request.timeout))
        if not is_over:
            self._membership.check_going_on(session.task)
        session.reply(messages.State(is_over, self._store.global_step))

    def _await_workers(self, session: Session, request: messages.AwaitWorkers) -> None:
        left = self._membership.await_alone(session.task, _bounded(request.timeout), absent=request.absent)
        absent = self._membership.absent(besides=session.task) if request.absent else ()
        session.reply(messages.Remaining(left, absent))

    def _save(self, session: Session, save: messages.Save) -> None:
        self._check_shard(save)
        directory = Path(save.directory)
        self._begin(session, saving(self._store, save), directory, is_here=_sees(directory))

    def _restore(self, session: Session, restore: messages.Restore) -> None:
        directory = Path(restore.directory)
        self._begin(session, restoring(self._store, restore), directory, is_here=_sees(directory, restore.digest))

    def _read_slots(self, session: Session, request: messages.ReadSlots) -> None:
        self._check_shard(request)
        self._begin_through_peer(session, reading_slots(self._store, request))

    def _load_slots(self, session: Session, request: messages.LoadSlots) -> None:
        self._begin_through_peer(session, loading_slots(self._store, request, f"from {session.task}"))

    def _check_shard(self, request: messages.Save | messages.ReadSlots) -> None:
        if request.shard >= request.num_shards:
            task, shard, count = self._store.task, request.shard, request.num_shards
            raise RefusedError(f"a checkpoint of {task} refused: there is no shard {shard} of {count}", task)

    def _begin_through_peer(self, session: Session, steps: Steps[messages.Reply]) -> None:
        self._store.check_alive()
        self._transfers[session] = Transfer(through_peer(steps))
        session.reply(messages.Underway())

    def _begin(self, session: Session, steps: Steps[messages.Reply], directory: Path, *, is_here: bool) -> None:
        if not is_here:
            logger.info("%s does not see %s: its shard goes through %s", self._store.task, directory, session.task)
        self._transfers[session] = Transfer(here(steps, directory) if is_here else through_peer(steps))
        session.reply(messages.Underway())

    def _proceed(self, session: Session, request: messages.Proceed) -> None:
        transfer = self._transfers.get(session)
        if transfer is None:
            raise RefusedError(f"{self._store.task} has nothing to go on with", self._store.task)
        try:
            reply = transfer.proceed(_bounded(request.timeout), request.content)
        finally:
            if transfer.is_over:
                del self._transfers[session]
        session.reply(reply)

    def _create_variable(self, session: Session, request: messages.CreateVariable) -> None:
        self._store.check_alive()
        values = self._unpacked(request.values, request.variable.name, request.variable.dtype)
        session.reply(messages.Declared(self._store.create_variable(request.variable, request.start, values)))

    def _await_variable(self, session: Session, request: messages.AwaitVariable) -> None:
        is_there = self._store.await_variable(request.variable, _bounded(request.timeout))
        if not is_there:
            self._membership.check_going_on(session.task)
        session.reply(messages.State(is_there, self._store.global_step))

    def _read_variable(self, session: Session, request: messages.ReadVariable) -> None:
        self._store.check_alive()
        arena, piece = self._store.variable(request.variable), (request.start, request.stop)
        self._store.check_piece(arena, piece)
        session.reply(messages.Values(packed(arena.copy(piece))))

    def _update_variable(self, session: Session, request: messages.UpdateVariable) -> None:
        self._store.check_alive()
        arena = self._store.variable(request.variable)
        source = self._unpacked(request.values, request.variable, arena.layout.dtype)
        piece = (request.start, request.start + len(source))
        self._store.check_piece(arena, piece)
        progress = self._store.progress(session.incarnation)
        with progress.lock:
            if self._begins(session, progress, request.sequence):
                progress.enter_part()
                result = arena.update(request.operation, piece, source)
                progress.end()
            else:
                result = arena.copy(piece)
        session.reply(messages.Values(packed(result)))

    def _unpacked(self, data: bytes, variable: str, dtype: str) -> torch.Tensor:
        try:
            return unpacked(data, DTYPES[dtype])
        except (KeyError, ValueError) as error:
            task = self._store.task
            raise RefusedError(f"variable {variable!r} on {task}: values of {dtype} refused: {error}", task) from error

    def _status(self, session: Session, request: messages.GetStatus) -> None:
        session.reply(self.status())

    def status(self) -> messages.Status:
        """Return the contents and counters of the store."""
        statistics = self._store.statistics()
        arenas = self._store.held
        return messages.Status(
            task=self._store.task,
            num_variables=sum(len(arena.layout.variables) for arena in arenas),
            values_bytes=sum(arena.layout.nbytes for arena in arenas),
            slots_bytes=sum(arena.slots_bytes for arena in arenas),
            global_step=statistics.global_step,
            updates=statistics.updates,
            mean_staleness=statistics.mean_staleness,
            largest_staleness=statistics.largest_staleness,
            joined=self._membership.joined(),
        )

    def _goodbye(self, session: Session, goodbye: messages.Goodbye) -> None:
        if goodbye.failure and session.task == self._membership.chief:
            self._fail(f"{session.task} failed, and with it the run: {goodbye.failure}")
        elif goodbye.failure and not self._store.has_failed:  # after the chief's failure, it is a consequence
            logger.warning("%s failed: %s", session.task, goodbye.failure)
        try:
            session.reply(messages.Done())
        finally:  # even if the worker does not wait for the answer; after the answer, because this may end the run
            self._membership.leave(session.task, session.incarnation)


def _sees(directory: Path, expected: str = "") -> bool:
    """Return whether a folder is there and, if a digest is expected, holds the checkpoint with that digest."""
    return directory.is_dir() and (not expected or digest(directory) == expected)


def _bounded(timeout: float) -> float:
    return min(LONGEST_WAIT, timeout)  # this order of arguments turns a NaN into the limit
