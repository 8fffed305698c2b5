"""A kit that checks any lane and its session: those of paramserver, and your own.

A check is a function of a *maker*; it raises ``AssertionError`` with the expectation that failed. `LANE_CHECKS` hold
for every pair, `CONNECTION_CHECKS` for pairs whose session waits for requests.

Example:
    >>> import contextlib
    >>> from paramserver.transport.in_process import InProcessLane, InProcessSession
    >>> @contextlib.contextmanager
    ... def in_process():
    ...     handlers = []
    ...     session = InProcessSession("worker:0", "an incarnation")
    ...     lane = InProcessLane("ps:0", session, lambda *request: handlers[0](*request))
    ...     yield Pair(lane, session, lambda handle: contextlib.nullcontext(handlers.append(handle)))
    >>> for check in LANE_CHECKS:
    ...     check(in_process)
"""

from __future__ import annotations

import contextlib
import functools
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from paramserver.errors import UnavailableError
from paramserver.layout.arena import ArenaLayout
from paramserver.layout.blocks import BLOCK, ID_BYTES, Range, pieces
from paramserver.layout.variables import VariableSpec
from paramserver.memory import arena_memory
from paramserver.memory.arena_memory import StoreMemory, tensor_bytes
from paramserver.transport.frames import FrameSocket
from paramserver.transport.lane import Lane, LaneKind, Piece, Session, TableRows, WorkerMemory
from paramserver.wire import messages
from paramserver.wire.messages import Part, Reply, Request
from paramserver.wire.payload import dense_pieces

TIMEOUT = 30.0
"""Seconds after which an expected event counts as missing."""

Handle = Callable[[Session, Request], None]


class Pair(NamedTuple):
    """The two ends of one connection.

    Attributes:
        lane: The worker's end.
        session: The ps's end.
        serve: Returns a context in which a function carries out each request on the session, such as `serving`.
    """

    lane: Lane
    session: Session
    serve: Callable[[Handle], AbstractContextManager[None]]


Maker = Callable[[], AbstractContextManager[Pair]]
"""Function that returns a context with a connected pair; the context closes both ends at its exit."""


def over_sockets(kind: LaneKind) -> Maker:
    """Return a maker of pairs over a connected stream socket: a Unix socket if the kind is local, else TCP."""

    @contextlib.contextmanager
    def make() -> Iterator[Pair]:
        ours, theirs = socket.socketpair() if kind.is_local else _tcp_sockets()
        worker, ps = FrameSocket(ours, "ps:1"), FrameSocket(theirs, "worker:2")
        for end in (worker, ps):
            end.set_timeout(TIMEOUT)  # a deadlock is an error, not a test that hangs
        lane, session = kind.lane(worker), kind.session(ps, "an incarnation")
        with contextlib.closing(lane), contextlib.closing(session):
            yield Pair(lane, session, functools.partial(serving, session))

    return make


def _tcp_sockets() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return socket.create_connection(listening.getsockname()), listening.accept()[0]


@contextlib.contextmanager
def serving(session: Session, handle: Handle) -> Iterator[None]:
    """Serve a session that waits for requests on a thread, which ends with this context, as does the session.

    Raises:
        Exception: What ``handle`` raised, unless the connection was lost, which the lane sees as well.
    """
    with ThreadPoolExecutor(1, thread_name_prefix=f"serves {session.task}") as pool:
        served = pool.submit(_converse, session, handle)
        try:
            yield
        finally:
            session.close()
            served.result(TIMEOUT)


def _converse(session: Session, handle: Handle) -> None:
    with contextlib.closing(session), contextlib.suppress(UnavailableError):
        while (request := session.receive()) is not None:
            handle(session, request)


# --- both sides, as simple as can be -----------------------------------------------------------------------------


class Shelf:
    """A ps without rules: stores values as requested, and records all requests and gradients.

    Attributes:
        memory: The memory of its arenas.
        arrived: Each pushed piece of a gradient, in order.
        rows: The rows of each pushed part of a table.
        requests: Each request.
        limit: Number of pieces of a push that are read before it is refused; None to read all pieces.
        is_early: Whether values are sent while a push still comes in, if the lane does that.
    """

    def __init__(self) -> None:
        self.memory = StoreMemory([], [])
        self.arrived: list[tuple[Piece, torch.Tensor]] = []
        self.rows: list[TableRows] = []
        self.requests: list[Request] = []
        self.limit: int | None = None
        self.is_early = False
        self._layouts: Sequence[ArenaLayout] = ()
        self._lock = threading.Lock()

    def handle(self, session: Session, request: Request) -> None:
        """Carry out a request."""
        self.requests.append(request)
        match request:
            case messages.Declare(arenas):
                self._declare(session, arenas)
            case messages.Push(parts=parts, pull=pull):
                if self.limit is None:
                    taken = [self._taken(session, part) for part in parts if part.rows is not None]
                    self.rows += [TableRows(ids, values.clone()) for ids, values in taken]  # valid until the reply
                self._push(
                    session, [Piece(part.arena, *span) for part, span in dense_pieces(parts, self._layouts)], pull
                )
            case messages.Pull(arenas):
                session.reply(messages.State(True, 0), whole(self._layouts, arenas), self._lock_of)
            case messages.PullRows(wanted=((arena, count),)):
                ids = torch.from_numpy(_taken_ids(session, count))
                table = self.memory.values[arena].view(self._layouts[arena].table_shape)
                session.reply(messages.State(True, 0), rows=[tensor_bytes(table[ids])])
            case messages.Goodbye(failure):
                session.reply(messages.Refused("refused", failure))
            case _:
                session.reply(messages.Done())

    def write(self, piece: Piece, values: torch.Tensor | float) -> None:
        """Change a piece as a ps does: under a lock, with an odd version meanwhile."""
        versions, block = self.memory.versions[piece.arena], piece.start // BLOCK
        with self._lock:
            versions[block] += 1
            self.memory.values[piece.arena][piece.start : piece.stop] = values
            versions[block] += 1

    def _declare(self, session: Session, layouts: Sequence[ArenaLayout]) -> None:
        self._layouts, self.memory = layouts, arena_memory.shared_store_memory(layouts)
        session.open(layouts, self.memory)
        session.reply(messages.Declared(False))

    def _push(self, session: Session, pushed: Sequence[Piece], pull: Sequence[int]) -> None:
        pulled = whole(self._layouts, pull)
        send_values = session.early_values(pulled, self._lock_of) if self.is_early and pulled else None
        for count, piece in enumerate(pushed[: self.limit]):
            self.arrived.append((piece, session.gradient(piece).clone()))
            if send_values is not None:
                send_values(min(count, len(pulled)))
        if self.is_early and self.limit is not None:
            session.reply(messages.Refused("refused", "no more of this"))
        elif self.limit is None:
            session.reply(messages.Applied(1, 0), () if send_values else pulled, self._lock_of)
        elif pull:
            session.reply(messages.State(True, 0), whole(self._layouts, pull), self._lock_of)
        else:
            session.reply(messages.Refused("refused", "no more of this"))

    def _taken(self, session: Session, part: Part) -> TableRows:
        ids, layout = _taken_ids(session, part.rows or 0), self._layouts[part.arena]
        row_bytes = layout.table_shape[1] * layout.itemsize
        values = session.take_rows(len(ids) * row_bytes).reshape(len(ids), row_bytes)
        return TableRows(ids, torch.from_numpy(values).view(layout.torch_dtype))

    def _lock_of(self, _: Piece) -> contextlib.AbstractContextManager[object]:
        return self._lock


class Worker:
    """A worker that has declared its arenas; its memory is that of its lane."""

    def __init__(self, lane: Lane, layouts: Sequence[ArenaLayout]) -> None:
        self.lane = lane
        self.layouts = layouts
        expect(self.ask(messages.Declare(tuple(layouts), create=True)), messages.Declared(False))
        self.memory: WorkerMemory = lane.open(layouts)
        for index, (layout, gradient) in enumerate(zip(layouts, self.memory.gradients, strict=True)):
            gradient.copy_(pattern(layout.on_worker, seed=index))

    def ask(self, request: Request) -> Reply:
        """Send a request without a payload."""
        self.lane.start(request)
        return self.lane.finish()

    def push(self, *parts: Part, pull: Sequence[int] = (), rows: Sequence[TableRows] = ()) -> Reply:
        """Push parts, with the rows of those that concern tables, and pull arenas."""
        payload = [view for each in rows for view in (each.id_bytes, each.value_bytes)]
        self.lane.start(
            messages.Push(1, 0, True, parts, tuple(pull)),
            [Piece(part.arena, *span) for part, span in dense_pieces(parts, self.layouts)],
            payload,
        )
        return self.lane.finish(whole(self.layouts, pull))

    def pull_rows(self, arena: int, rows: TableRows) -> Reply:
        """Pull rows of a table."""
        self.lane.start(messages.PullRows(((arena, len(rows.ids)),)), (), [rows.id_bytes])
        return self.lane.finish((), [rows.value_bytes])

    def pull(self, *arenas: int) -> Reply:
        """Pull arenas."""
        self.lane.start(messages.Pull(arenas))
        return self.lane.finish(whole(self.layouts, arenas))


def whole(layouts: Sequence[ArenaLayout], arenas: Sequence[int]) -> list[Piece]:
    """Return all pieces of some arenas."""
    return [Piece(arena, start, stop) for arena in arenas for start, stop in layouts[arena].pieces]


def pattern(layout: ArenaLayout, seed: int) -> torch.Tensor:
    """Return values in which every element differs from its neighbours."""
    numbers = torch.arange(seed, seed + layout.size) % 97
    return (numbers % 2 if layout.dtype == "bool" else numbers).to(layout.torch_dtype)


def expect(got: object, expected: object) -> None:
    """Check that two values are equal.

    Raises:
        AssertionError: If they are not.
    """
    if got != expected:
        raise AssertionError(f"expected {expected!r}, got {got!r}")


def expect_equal(got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Check that two flat tensors hold the same bytes.

    Raises:
        AssertionError: If they do not.
    """
    if got.shape != expected.shape or tensor_bytes(got.clone()) != tensor_bytes(expected.clone()):
        raise AssertionError(f"{what} did not arrive as it was: expected {expected}, got {got}")


def _taken_ids(session: Session, count: int) -> npt.NDArray[np.int64]:
    return session.take_rows(count * ID_BYTES).view(np.int64).copy()


def _layout(dtype: str, *shapes: tuple[int, ...]) -> ArenaLayout:
    variables = tuple(VariableSpec(f"{dtype}/{index}", shape, dtype) for index, shape in enumerate(shapes))
    return ArenaLayout(dtype, None, variables)


LARGE = (_layout("float32", (4, BLOCK), (7,)),)
"""Five blocks, the last one not full: more than the buffers of any connection hold."""

TABLES = (
    _layout("float32", (2,)),
    ArenaLayout("float32", None, (VariableSpec("wide", (50_000, 40), "float32"),), is_table=True),
    ArenaLayout("bfloat16", None, (VariableSpec("narrow", (6, 1), "bfloat16"),), is_table=True),
)
"""Tables, beside an arena that is pushed whole."""

MODELS: tuple[Sequence[ArenaLayout], ...] = (
    (),
    (_layout("float32", ()),),
    (_layout("float32", (3, 2), (0, 4), (2,)), _layout("bfloat16", (5,)), _layout("int64", ()), _layout("bool", (9,))),
    (_layout("float64", (0,)), _layout("uint8", (BLOCK + 1,))),
    (*LARGE, _layout("float16", (3,))),
)


@contextlib.contextmanager
def _at_work(maker: Maker, layouts: Sequence[ArenaLayout]) -> Iterator[tuple[Worker, Shelf]]:
    with maker() as (lane, _, serve), serve((shelf := Shelf()).handle):
        yield Worker(lane, layouts), shelf


# --- what every lane does ------------------------------------------------------------------------------------------


def check_whole_gradients_arrive(maker: Maker) -> None:
    """Check that all gradients arrive unchanged and in order, for arenas of any kind."""
    for layouts in MODELS:
        with _at_work(maker, layouts) as (worker, shelf):
            parts = [Part(arena, "assign") for arena in range(len(layouts))]
            expect(worker.push(*parts), messages.Applied(1, 0))
            _expect_arrived(worker, shelf, whole(layouts, range(len(layouts))))


def check_partial_gradients_arrive(maker: Maker) -> None:
    """Check that only the named ranges arrive, cut at the ends of blocks."""
    ranges: tuple[Range, ...] = ((3, 10), (BLOCK - 1, BLOCK + 1), (2 * BLOCK + 5, 2 * BLOCK + 7))
    with _at_work(maker, LARGE) as (worker, shelf):
        expect(worker.push(Part(0, "assign", ranges)), messages.Applied(1, 0))
        _expect_arrived(worker, shelf, [Piece(0, start, stop) for start, stop in pieces(ranges)])


def check_values_come_back(maker: Maker) -> None:
    """Check that a pull brings the present values of its arenas, and nothing of other arenas."""
    for layouts in MODELS:
        with _at_work(maker, layouts) as (worker, shelf):
            for seed in (1, 2):
                _fill(shelf, layouts, seed)
                expect(worker.pull(*range(len(layouts))), messages.State(True, 0))
                for layout, values in zip(layouts, worker.memory.values, strict=True):
                    expect_equal(_variables(layout, values), _variables(layout, pattern(layout, seed)), "values")


def check_a_push_brings_values(maker: Maker) -> None:
    """Check that the reply to a push carries the requested arenas."""
    with _at_work(maker, LARGE) as (worker, shelf):
        _fill(shelf, LARGE, seed=5)
        expect(worker.push(Part(0, "assign"), pull=[0]), messages.Applied(1, 0))
        expect_equal(worker.memory.values[0], pattern(LARGE[0], seed=5), "values")


def check_values_may_come_early(maker: Maker) -> None:
    """Check that values may come while the push is still under way, also if the push is refused in the end."""
    with _at_work(maker, LARGE) as (worker, shelf):
        shelf.is_early = True
        _fill(shelf, LARGE, seed=5)
        expect(worker.push(Part(0, "assign"), pull=[0]), messages.Applied(1, 0))
        expect_equal(worker.memory.values[0], pattern(LARGE[0], seed=5), "values")
        _expect_arrived(worker, shelf, whole(LARGE, [0]))
        for shelf.limit in (0, 1, 2):
            expect(worker.push(Part(0, "assign"), pull=[0]), messages.Refused("refused", "no more of this"))
        shelf.limit, shelf.is_early = None, False
        _fill(shelf, LARGE, seed=6)
        expect(worker.push(Part(0, "assign"), pull=[0]), messages.Applied(1, 0))
        expect_equal(worker.memory.values[0], pattern(LARGE[0], seed=6), "values")


def check_renewed_gradients_arrive(maker: Maker) -> None:
    """Check that `renew` gives new, zeroed memory, which is pushed from then on.

    The old memory stays unchanged, and values come as before.
    """
    with _at_work(maker, LARGE) as (worker, shelf):
        old = worker.memory.gradients[0]
        kept = old.clone()
        worker.memory = worker.lane.renew()
        (gradients,) = worker.memory.gradients
        expect_equal(gradients, torch.zeros_like(kept), "new memory")
        gradients.copy_(pattern(LARGE[0], seed=8))
        _fill(shelf, LARGE, seed=5)
        expect(worker.push(Part(0, "assign"), pull=[0]), messages.Applied(1, 0))
        _expect_arrived(worker, shelf, whole(LARGE, [0]))
        expect_equal(worker.memory.values[0], pattern(LARGE[0], seed=5), "values")
        expect_equal(old, kept, "the old memory")


def check_a_refusal_leaves_the_lane_in_step(maker: Maker) -> None:
    """Check that a push may be refused in the middle of its payload, and the next request is understood."""
    with _at_work(maker, LARGE) as (worker, shelf):
        for shelf.limit in (0, 1, 2):
            expect(worker.push(Part(0, "assign")), messages.Refused("refused", "no more of this"))
        shelf.limit = None
        shelf.arrived.clear()
        expect(worker.push(Part(0, "assign")), messages.Applied(1, 0))
        _expect_arrived(worker, shelf, whole(LARGE, [0]))


def check_an_unread_payload_is_dropped(maker: Maker) -> None:
    """Check that a ps may answer a push without reading its payload, and neither side waits for the other forever."""
    with _at_work(maker, LARGE) as (worker, shelf):
        _fill(shelf, LARGE, seed=3)
        shelf.limit = 0
        expect(worker.push(Part(0, "assign"), pull=[0]), messages.State(True, 0))
        expect_equal(worker.memory.values[0], pattern(LARGE[0], seed=3), "values")


def check_rows_arrive(maker: Maker) -> None:
    """Check that rows of tables arrive in the order of their parts, few and many, beside other parts."""
    parts = (Part(1, "assign", rows=2), Part(0, "assign"), Part(2, "assign", rows=0), Part(1, "add", rows=40_000))
    rows = [_rows(1, 2), _rows(2, 0), _rows(1, 40_000)]
    with _at_work(maker, TABLES) as (worker, shelf):
        expect(worker.push(*parts, rows=rows), messages.Applied(1, 0))
        _expect_arrived(worker, shelf, whole(TABLES, [0]))
        expect(len(shelf.rows), len(rows))
        for got, sent in zip(shelf.rows, rows, strict=True):
            expect(got.ids.tolist(), sent.ids.tolist())
            expect_equal(got.values, sent.values, "rows")


def check_rows_come_back(maker: Maker) -> None:
    """Check that a pull of rows brings the requested rows of the table, few and many."""
    with _at_work(maker, TABLES) as (worker, shelf):
        _fill(shelf, TABLES, seed=3)
        for arena, count in ((1, 2), (2, 3), (1, 0), (1, 40_000)):
            rows = _rows(arena, count)
            expect(worker.pull_rows(arena, rows), messages.State(True, 0))
            table = pattern(TABLES[arena], seed=3).view(TABLES[arena].table_shape)
            expect_equal(rows.values, table[torch.from_numpy(rows.ids)], "rows")


def check_refused_rows_leave_the_lane_in_step(maker: Maker) -> None:
    """Check that a push may be refused before its rows are read, and the next request is understood."""
    with _at_work(maker, TABLES) as (worker, shelf):
        shelf.limit = 0
        refusal = worker.push(Part(1, "add", rows=40_000), rows=[_rows(1, 40_000)])
        expect(refusal, messages.Refused("refused", "no more of this"))
        shelf.limit = None
        expect(worker.push(Part(2, "add", rows=1), rows=[_rows(2, 1)]), messages.Applied(1, 0))
        expect([rows.ids.tolist() for rows in shelf.rows], [[0]])


def check_large_messages_arrive(maker: Maker) -> None:
    """Check that a message may be larger than any buffer, both ways."""
    text = "long" * 100_000
    with _at_work(maker, ()) as (worker, shelf):
        expect(worker.ask(messages.Goodbye(text)), messages.Refused("refused", text))
        expect(shelf.requests[-1], messages.Goodbye(text))


def check_closing_twice_is_closing_once(maker: Maker) -> None:
    """Check that both ends may be closed in any order, any number of times."""
    with maker() as (lane, session, _):
        for end in (lane, session, lane, session):
            end.close()


def _rows(arena: int, count: int) -> TableRows:
    """Return every other row of one of `TABLES`, or all if needed, with values that differ from row to row."""
    layout = TABLES[arena]
    stride = 2 if 2 * count <= layout.table_shape[0] else 1
    values = pattern(layout, seed=count).view(layout.table_shape)[:count]  # different for each count
    return TableRows(np.arange(count, dtype=np.int64) * stride, values.clone())


def _expect_arrived(worker: Worker, shelf: Shelf, expected: Sequence[Piece]) -> None:
    expect([piece for piece, _ in shelf.arrived], list(expected))
    for (arena, start, stop), gradient in shelf.arrived:
        expect_equal(gradient, worker.memory.gradients[arena][start:stop], f"a gradient of arena {arena}")


def _fill(shelf: Shelf, layouts: Sequence[ArenaLayout], seed: int) -> None:
    for arena, start, stop in whole(layouts, range(len(layouts))):
        shelf.write(Piece(arena, start, stop), pattern(layouts[arena], seed)[start:stop])


def _variables(layout: ArenaLayout, values: torch.Tensor) -> torch.Tensor:
    return torch.cat([view.flatten() for view in layout.views(values)])


# --- what a connection does ----------------------------------------------------------------------------------------


def check_a_block_is_of_one_version(maker: Maker) -> None:
    """Check that a block that is read while it is written again and again is never half old and half new."""
    over = threading.Event()
    with _at_work(maker, LARGE) as (worker, shelf), ThreadPoolExecutor(1) as pool:
        written = pool.submit(_keep_writing, shelf, over)
        try:
            seen = _versions_seen(worker)
        finally:
            over.set()
        if written.result(TIMEOUT) < len(seen) or len(seen) < 2:
            raise AssertionError(f"nothing was written while it was read; versions seen: {sorted(seen)}")


def _keep_writing(shelf: Shelf, over: threading.Event) -> int:
    rounds = 0
    while not over.wait(1e-4):
        rounds += 1
        for piece in whole(LARGE, [0]):
            shelf.write(piece, float(rounds))
    return rounds


def _versions_seen(worker: Worker) -> set[float]:
    seen = set()
    for _ in range(100):
        worker.pull(0)
        for start, stop in LARGE[0].pieces:
            smallest, largest = torch.aminmax(worker.memory.values[0][start:stop])
            expect(smallest.item(), largest.item())
            seen.add(largest.item())
    return seen


def check_the_end_of_a_worker_is_seen(maker: Maker) -> None:
    """Check that the session receives None when the lane is closed."""
    with maker() as (lane, session, _):
        lane.close()
        expect(session.receive(), None)


def check_the_end_of_a_ps_is_seen(maker: Maker) -> None:
    """Check that the lane raises UnavailableError naming the task when the session is closed."""
    with maker() as (lane, session, _):
        session.close()
        _expect_unavailable(lane)


def check_a_closed_lane_is_unavailable(maker: Maker) -> None:
    """Check that a request on a closed lane raises UnavailableError naming the task."""
    with maker() as (lane, _, _):
        lane.close()
        _expect_unavailable(lane)


def check_closing_wakes_receive(maker: Maker) -> None:
    """Check that a session that waits for a request receives None when another thread closes it."""
    with maker() as (_, session, _), ThreadPoolExecutor(1) as pool:
        entered = threading.Event()

        def receive() -> Request | None:
            entered.set()
            return session.receive()

        received = pool.submit(receive)
        entered.wait(TIMEOUT)
        session.close()
        expect(received.result(TIMEOUT), None)


def _expect_unavailable(lane: Lane) -> None:
    try:
        lane.start(messages.GetStatus())
        reply = lane.finish()
    except UnavailableError as error:
        expect(error.task, lane.task)
        expect(lane.task in str(error), True)
    else:
        raise AssertionError(f"expected UnavailableError naming {lane.task}, got {reply!r}")


Check = Callable[[Maker], None]

LANE_CHECKS: tuple[Check, ...] = (
    check_whole_gradients_arrive,
    check_partial_gradients_arrive,
    check_values_come_back,
    check_a_push_brings_values,
    check_values_may_come_early,
    check_renewed_gradients_arrive,
    check_a_refusal_leaves_the_lane_in_step,
    check_an_unread_payload_is_dropped,
    check_rows_arrive,
    check_rows_come_back,
    check_refused_rows_leave_the_lane_in_step,
    check_large_messages_arrive,
    check_closing_twice_is_closing_once,
)

CONNECTION_CHECKS: tuple[Check, ...] = (
    check_a_block_is_of_one_version,
    check_the_end_of_a_worker_is_seen,
    check_the_end_of_a_ps_is_seen,
    check_a_closed_lane_is_unavailable,
    check_closing_wakes_receive,
)
