"""Every lane passes the public kit; and what goes wrong on one lane only."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from paramserver.errors import LocalProtocolError, RefusedError, RemoteProtocolError, UnavailableError
from paramserver.memory import arena_memory, shared_file
from paramserver.memory.arena_memory import StoreMemory
from paramserver.testing import lane_kit
from paramserver.testing.lane_kit import (
    CONNECTION_CHECKS,
    LANE_CHECKS,
    LARGE,
    TABLES,
    Pair,
    Shelf,
    Worker,
    over_sockets,
    serving,
)
from paramserver.transport import shared_memory
from paramserver.transport.frames import FrameSocket
from paramserver.transport.in_process import InProcessLane, InProcessSession
from paramserver.transport.lane import Lane, LaneKind, Piece, Session, WorkerMemory
from paramserver.transport.shared_memory import SharedMemoryLane, SharedMemorySession
from paramserver.transport.tcp import TcpLane, TcpSession
from paramserver.wire import codec, messages
from paramserver.wire.messages import Part

PS, WORKER, INCARNATION = "ps:1", "worker:2", "an incarnation"


def connected(lane: type[Lane], session: type[Session]) -> contextlib.AbstractContextManager[Pair]:
    return over_sockets(LaneKind(lane, session, is_local=lane is not TcpLane))()


@contextlib.contextmanager
def in_process() -> Iterator[Pair]:
    handlers: list[lane_kit.Handle] = []
    session = InProcessSession(WORKER, INCARNATION)
    lane = InProcessLane(PS, session, lambda *request: handlers[0](*request))
    with contextlib.closing(lane), contextlib.closing(session):
        yield Pair(lane, session, lambda handle: contextlib.nullcontext(handlers.append(handle)))


tcp = functools.partial(connected, TcpLane, TcpSession)
shared = functools.partial(connected, SharedMemoryLane, SharedMemorySession)

lanes = pytest.mark.parametrize("maker", [in_process, tcp, shared], ids=["in process", "tcp", "shared memory"])
connections = pytest.mark.parametrize("maker", [tcp, shared], ids=["tcp", "shared memory"])


@lanes
@pytest.mark.parametrize("check", LANE_CHECKS, ids=lambda check: check.__name__)
def test_every_lane(check, maker):
    check(maker)


@connections
@pytest.mark.parametrize("check", CONNECTION_CHECKS, ids=lambda check: check.__name__)
def test_every_connection(check, maker):
    check(maker)


@lanes
def test_a_lane_shows_where_it_leads(maker):
    with maker() as (lane, _, _):
        assert PS in repr(lane)
        assert lane.name in repr(lane)


# --- the kit finds faults


class Forgetful(TcpLane):
    """Brings the first piece and no other."""

    def finish(self, incoming=()):
        return super().finish(incoming[:1])


def test_the_kit_finds_a_lane_that_does_not_bring_all_values():
    with pytest.raises(AssertionError, match="values did not arrive"):
        lane_kit.check_values_come_back(functools.partial(connected, Forgetful, TcpSession))


class Mixed(TcpLane):
    """Sends the rows of all parts in the other order."""

    def start(self, request, outgoing=(), rows=()):
        super().start(request, outgoing, [view for at in range(0, len(rows), 2) for view in rows[-2 - at :][:2]])


def test_the_kit_finds_a_lane_that_mixes_up_rows():
    with pytest.raises(AssertionError, match="expected"):
        lane_kit.check_rows_arrive(functools.partial(connected, Mixed, TcpSession))


class Reusing(TcpSession):
    """Takes all rows into the same memory."""

    def take_rows(self, nbytes):
        self.taken = getattr(self, "taken", np.empty(1 << 24, np.uint8))
        self.taken[:nbytes] = super().take_rows(nbytes)
        return self.taken[:nbytes]


def test_the_kit_finds_a_session_that_does_not_keep_rows_until_the_reply():
    with pytest.raises(AssertionError, match="rows did not arrive"):
        lane_kit.check_rows_arrive(functools.partial(connected, TcpLane, Reusing))


def test_the_kit_finds_a_session_that_keeps_what_was_not_read(monkeypatch):
    monkeypatch.setattr(lane_kit, "TIMEOUT", 0.2)
    monkeypatch.setattr(FrameSocket, "discard_payload", lambda self: None)
    with pytest.raises((UnavailableError, RemoteProtocolError)):
        lane_kit.check_an_unread_payload_is_dropped(tcp)


# --- torn reads


class Versions:
    """A block's version as a reader sees it, one after the other."""

    def __init__(self, *seen):
        self.seen = list(seen)

    def item(self, block):
        return self.seen.pop(0) if len(self.seen) > 1 else self.seen[0]


def copy_of(versions):
    theirs = StoreMemory([torch.ones(4)], [versions])
    return shared_memory._BlockCopy("ps:1", Piece(0, 0, 4), theirs, WorkerMemory([torch.zeros(4)], []))


def test_a_read_that_a_write_overtook_is_made_again():
    versions = Versions(2, 4, 5, 6, 6)
    copy_of(versions).run()
    assert versions.seen == [6]


def test_a_block_that_stays_half_written_is_a_dead_writer(monkeypatch):
    monkeypatch.setattr(shared_memory, "TORN_READ_LIMIT", 0.01)
    with lane_kit._at_work(shared, LARGE) as (worker, shelf):
        shelf.memory.versions[0][1] += 1
        with pytest.raises(UnavailableError, match=rf"{PS} has been writing the same block for 0.01 s"):
            worker.pull(0)


# --- a ps that is stopped


@connections
def test_a_ps_that_does_not_answer_is_given_up(maker):
    with maker() as (lane, _, _):
        lane._frames.set_timeout(0.05)
        lane.start(messages.GetStatus())
        with pytest.raises(UnavailableError, match=rf"{PS} neither sent nor took anything for 0\.05 s") as caught:
            lane.finish()
        assert caught.value.task == PS
        with pytest.raises(UnavailableError, match="closed by this task already"):
            lane.start(messages.GetStatus())


def test_a_ps_that_does_not_take_a_payload_is_given_up():
    with tcp() as (lane, _, _):
        lane.open(LARGE)
        lane._frames.set_timeout(0.05)
        lane.start(messages.GetStatus(), lane_kit.whole(LARGE, [0]))
        with pytest.raises(UnavailableError, match="took"):
            lane.finish()


def test_a_time_limit_that_is_nearly_nothing_is_not_for_ever():
    ours, theirs = socket.socketpair()
    with contextlib.closing(FrameSocket(ours, PS)) as frames, theirs:
        frames.set_timeout(1e-9)
        with pytest.raises(UnavailableError):
            frames.receive()


# --- frames that are cut short or make no sense


@pytest.mark.parametrize("maker", [tcp, shared], ids=["tcp", "shared memory"])
@pytest.mark.parametrize("sent", [b"\x05", codec.head(7, 0), codec.head(7, 0) + b"\x91"])
def test_an_end_in_the_middle_of_a_message_is_a_lost_connection(maker, sent):
    with maker() as (lane, session, _):
        lane._frames.send_raw(sent)
        lane.close()
        with pytest.raises(UnavailableError, match=f"{WORKER} closed the connection in the middle") as caught:
            session.receive()
        assert caught.value.task == WORKER


def flip_the_next_length(monkeypatch):
    """Every head that is sent from now on announces one byte of payload more, as after a flipped bit."""
    head = codec.head
    monkeypatch.setattr(codec, "head", lambda *lengths: bytes([*(h := head(*lengths))[:4], h[4] ^ 1, *h[5:]]))


@connections
def test_a_damaged_length_is_an_error_at_once_at_the_end_that_receives_it(maker, monkeypatch):
    with maker() as (lane, session, _):
        with monkeypatch.context() as damaged:
            flip_the_next_length(damaged)
            lane.start(messages.GetStatus())
        with pytest.raises(RemoteProtocolError, match=f"{WORKER} sent a frame with a damaged head"):
            session.receive()
        with monkeypatch.context() as damaged:
            flip_the_next_length(damaged)
            session.reply(messages.Done())
        with pytest.raises(RemoteProtocolError, match=f"{PS} sent a frame with a damaged head"):
            lane.finish()


def test_an_end_in_the_middle_of_a_payload_is_a_lost_connection():
    with tcp() as (lane, session, _):
        session.open(LARGE, arena_memory.shared_store_memory(LARGE))
        lane._frames.send_raw(codec.encode(messages.GetStatus(), 1 << 20))
        lane._frames.send_raw(b"\0" * 1000)
        lane.close()
        assert session.receive() == messages.GetStatus()
        with pytest.raises(UnavailableError, match="in the middle"):
            session.gradient(Piece(0, 0, 1000))


def test_a_payload_that_is_too_short_is_refused_before_it_is_read():
    with tcp() as (lane, session, _):
        session.open(LARGE, arena_memory.shared_store_memory(LARGE))
        lane._frames.send_raw(codec.encode(messages.GetStatus(), 8))
        assert session.receive() == messages.GetStatus()
        with pytest.raises(RemoteProtocolError, match="40 bytes were expected next, 8 are left"):
            session.gradient(Piece(0, 0, 10))


@connections
def test_a_push_before_anything_was_declared_breaks_the_protocol(maker):
    with maker() as (_, session, _), pytest.raises(RemoteProtocolError, match=f"{WORKER} pushed to arena 0 before"):
        session.gradient(Piece(0, 0, 1))


# --- passing memory: whatever goes wrong, no descriptor is left (conftest looks)


def test_memory_cannot_be_shared_before_it_is_declared():
    with shared() as (lane, _, serve), serve(Shelf().handle):
        with pytest.raises(RefusedError, match="declare the arenas first"):
            lane.open(LARGE)
        Worker(lane, LARGE)  # and the lane is in step


@pytest.mark.parametrize("answer", [None, messages.Done(), messages.State(True, 0)])
def test_a_ps_that_dies_or_errs_while_memory_is_shared(answer):
    def fail(session, request):
        session._frames.send(answer) if answer else None
        session.close()

    with (
        shared() as (lane, session, _),
        serving(Blunt(session._frames), fail),
        pytest.raises((UnavailableError, RemoteProtocolError), match=PS),
    ):
        lane.open(LARGE)


class Blunt:
    """Hands on every message, also those that a session keeps to itself."""

    task = WORKER

    def __init__(self, frames):
        self._frames = frames
        self.receive, self.close = frames.receive, frames.close


@contextlib.contextmanager
def sharing(layouts=LARGE):
    """A worker that is to pass its memory, and what comes of it on the ps."""
    with shared() as (lane, session, _), ThreadPoolExecutor(1) as pool:
        session.open(layouts, arena_memory.shared_store_memory(layouts))
        received = pool.submit(session.receive)
        lane._frames.send(messages.Share())
        assert lane._frames.receive() == messages.Done()
        yield lane._frames, received


def test_a_worker_that_dies_while_memory_is_shared():
    with sharing() as (frames, received):
        frames.close()
        with pytest.raises(UnavailableError, match=f"{WORKER} closed"):
            received.result(lane_kit.TIMEOUT)


def test_a_worker_that_dies_between_two_files():
    with sharing() as (frames, received):
        with contextlib.closing(shared_file.SharedFile.create(arena_memory.gradient_bytes(LARGE))) as gradients:
            frames.send_descriptor(gradients.fileno())
        frames.close()
        with pytest.raises(UnavailableError, match=f"{WORKER} closed"):
            received.result(lane_kit.TIMEOUT)


def a_pipe():
    reader, writer = os.pipe()
    os.close(writer)
    return reader


def an_unsealed_file():
    descriptor = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 1 << 30)
    return descriptor


def a_small_file():
    file = shared_file.SharedFile.create(1)
    return os.dup(file.fileno())


@pytest.mark.parametrize("make", [a_pipe, an_unsealed_file, a_small_file])
def test_a_file_that_is_no_shared_memory_is_refused(make):
    with sharing() as (frames, received):
        frames.send_descriptor(descriptor := make())
        os.close(descriptor)
        with pytest.raises(RemoteProtocolError, match=f"{WORKER} (shared|passed)"):
            received.result(lane_kit.TIMEOUT)


@pytest.mark.parametrize("make", [a_pipe, an_unsealed_file, a_small_file])
def test_a_file_for_rows_that_is_no_shared_memory_is_refused(make):
    with sharing(TABLES) as (frames, received):
        with contextlib.closing(shared_file.SharedFile.create(arena_memory.gradient_bytes(TABLES))) as gradients:
            frames.send_descriptor(gradients.fileno())
        frames.send_descriptor(descriptor := make())
        os.close(descriptor)
        with pytest.raises(RemoteProtocolError, match=f"{WORKER} (shared|passed)"):
            received.result(lane_kit.TIMEOUT)


def test_a_byte_instead_of_a_file_breaks_the_protocol():
    with sharing() as (frames, received):
        frames.send_raw(b"\0")
        with pytest.raises(RemoteProtocolError, match=f"{WORKER} was to pass"):
            received.result(lane_kit.TIMEOUT)


def test_what_was_passed_is_not_inherited_by_programs():
    ours, theirs = socket.socketpair()
    with contextlib.closing(FrameSocket(ours, PS)) as here, contextlib.closing(FrameSocket(theirs, WORKER)) as there:
        file = shared_file.SharedFile.create(1)
        here.send_descriptor(file.fileno())
        received = there.receive_descriptor()
        assert not os.get_inheritable(received)
        os.close(received)


def test_a_worker_cannot_write_to_the_values_of_a_ps():
    file = shared_file.SharedFile.create(100)
    with pytest.raises(PermissionError):
        os.pwrite(file.fileno(), b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(file.fileno(), 0)


def test_a_file_that_cannot_be_had_leaves_nothing():
    with pytest.raises(OSError, match=r"File too large|Cannot allocate"):
        shared_file.SharedFile.create(1 << 62)


def test_without_shared_files_the_platform_says_so(monkeypatch):
    monkeypatch.setattr(shared_file, "F_SEAL_FUTURE_WRITE", 1 << 20)  # as an older kernel
    assert not shared_file.can_share.__wrapped__()


@pytest.mark.parametrize("layouts", lane_kit.MODELS)
def test_memory_is_divided_without_overlap(layouts):
    held = arena_memory.private_store_memory(layouts)
    for index, values in enumerate(held.values):
        values.fill_(index % 2)
    assert all((versions == 0).all() for versions in held.versions)
    assert all((values == index % 2).all() for index, values in enumerate(held.values))


def test_a_push_reads_where_autograd_wrote():
    """On shared memory a gradient is not copied: the ps sees what is written after the memory was opened."""
    with lane_kit._at_work(shared, LARGE) as (worker, shelf):
        worker.memory.gradients[0].fill_(7)
        worker.push(Part(0, "assign"))
        assert all(gradient.eq(7).all() for _, gradient in shelf.arrived)


# --- rows in shared memory


class Keeping(Shelf):
    """Keeps the rows of pushes where they lie."""

    def __init__(self):
        super().__init__()
        self.taken = []

    def handle(self, session, request):
        if isinstance(request, messages.Push):
            self.taken += [session.take_rows(8) for part in request.parts if part.rows is not None]
            self.limit = 0
        super().handle(session, request)


PUSH_OF_ROWS = messages.Push(1, 0, True, (Part(1, "add", rows=1),), ())


def push_of(lane, number):
    lane.start(PUSH_OF_ROWS, (), [memoryview(bytes([number] * 8))])
    lane.finish()


def test_rows_lie_where_the_worker_put_them():
    shelf = Keeping()
    with shared() as (lane, session, serve), serve(shelf.handle):
        Worker(lane, TABLES)
        push_of(lane, 1)
        assert shelf.taken[0].tolist() == [1] * 8
        push_of(lane, 2)
        assert shelf.taken[0].tolist() == [2] * 8
        assert not session._frames._payload_left


def test_another_connection_has_memory_of_its_own_for_rows():
    """The ps may still be at work on what came over the one that was lost, when the worker goes on with a new one."""
    first, second = Keeping(), Keeping()
    with shared() as (lane, _, serve), serve(first.handle), shared() as (again, session, serve_again):
        kept = Worker(lane, TABLES).memory
        push_of(lane, 1)
        session.open(TABLES, first.memory)
        with serve_again(second.handle):
            again.open(TABLES, kept)
            push_of(again, 2)
        assert first.taken[0].tolist() == [1] * 8
        assert second.taken[0].tolist() == [2] * 8


def test_more_rows_than_there_is_memory_for_are_not_sent():
    with lane_kit._at_work(shared, TABLES) as (worker, shelf):
        too_many = memoryview(bytearray(arena_memory.rows_bytes(TABLES) + 1))
        with pytest.raises(LocalProtocolError, match=f"{PS} cannot be sent that many rows at once"):
            worker.lane.start(PUSH_OF_ROWS, (), [too_many])
        worker.push(Part(2, "add", rows=1), rows=[lane_kit._rows(2, 1)])
        assert [rows.ids.tolist() for rows in shelf.rows] == [[0]]


def test_rows_that_no_memory_was_shared_for_break_the_protocol():
    with shared() as (_, session, _), pytest.raises(RemoteProtocolError, match=f"{WORKER} pushed rows that are not"):
        session.take_rows(8)
