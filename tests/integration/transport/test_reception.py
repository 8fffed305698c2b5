"""Strangers at a ps: how many, for how long, and what they cost."""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import selectors
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.patience import patience

from paramserver.errors import DeadlineError, TokenError
from paramserver.transport import reception
from paramserver.transport.handshake import connect
from paramserver.transport.identity import Identity
from paramserver.transport.listener import Listener
from paramserver.transport.reception import Reception
from paramserver.wire import codec

TIMEOUT = patience(30.0)
PS = Identity(task="ps:0", token="a secret", incarnation="p")
WORKER = Identity(task="worker:1", token="a secret", incarnation="w")


class Ps:
    """A reception at work on one thread; its guests, and its complaints."""

    def __init__(self, sockets=None):
        self.listener = Listener("127.0.0.1:0", "ps:0")
        if sockets:
            self.listener.sockets = [sockets(self.listener.sockets[0]), *self.listener.sockets[1:]]
        self.complaints = queue.Queue()
        self.guests = queue.Queue()
        self._pool = ThreadPoolExecutor(1)
        self._work = self._pool.submit(self._receive)

    def _receive(self):
        for guest in Reception(self.listener, PS, self.complaints.put).guests():
            guest.connection.close()
            self.guests.put(guest.hello.task)

    def dial(self):
        peer = socket.create_connection(("127.0.0.1", self.listener.port))
        peer.settimeout(TIMEOUT)
        return peer

    def send_a_worker(self):
        """Have a worker prove itself; blocks until it is let in."""
        with contextlib.closing(connect(self.address, "ps:0", WORKER, lane="tcp", timeout=TIMEOUT)):
            return self.guests.get(timeout=TIMEOUT)

    @property
    def address(self):
        return f"127.0.0.1:{self.listener.port}"

    def complaint(self):
        return self.complaints.get(timeout=TIMEOUT)

    def close(self):
        self.listener.close()
        self._work.result(TIMEOUT)
        self._pool.shutdown()
        self.listener.release()


@contextlib.contextmanager
def receiving(sockets=None):
    with contextlib.closing(Ps(sockets)) as ps:
        yield ps


def hears_nothing_more(peer):
    """Whether the ps has closed a connection; waits for it."""
    try:
        while peer.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    return True


def is_open(peer):
    """Whether a peer that has been challenged would have to wait for more."""
    peer.recv(1 << 16)
    peer.setblocking(False)
    try:
        return bool(peer.recv(1))
    except BlockingIOError:
        return True
    finally:
        peer.settimeout(TIMEOUT)


def test_strangers_cost_no_thread_and_keep_no_worker_out():
    with receiving() as ps, contextlib.ExitStack() as strangers:
        ps.send_a_worker()
        before = threading.active_count()
        for _ in range(50):
            peer = strangers.enter_context(ps.dial())
            peer.sendall(codec.preamble()[:5])
            peer.recv(1)
        assert threading.active_count() == before
        assert ps.send_a_worker() == "worker:1"


def test_one_time_limit_holds_for_the_whole_handshake(monkeypatch):
    """A stranger that sends a byte now and then is not waited for any longer than one that is silent."""
    monkeypatch.setattr(reception, "HANDSHAKE_TIMEOUT", 0.3)
    with receiving() as ps, ps.dial() as drop_by_drop:
        pause = threading.Event()
        with contextlib.suppress(OSError):  # closed by the ps in the end
            for byte in codec.preamble() + codec.head(4000, 0) + b"\0" * 4000:
                drop_by_drop.sendall(bytes([byte]))
                pause.wait(0.02)
                if not ps.complaints.empty():
                    break
        error = ps.complaint()
        assert isinstance(error, DeadlineError)
        assert error.timeout == 0.3
        assert hears_nothing_more(drop_by_drop)


def test_the_oldest_stranger_gives_up_its_place(monkeypatch):
    monkeypatch.setattr(reception, "MAX_STRANGERS", 3)
    monkeypatch.setattr(reception, "SHORTEST_STAY", 0.0)
    with receiving() as ps, contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(ps.dial()) for _ in range(3)]
        for each in strangers:
            each.recv(1)
        assert ps.send_a_worker() == "worker:1"
        assert isinstance(ps.complaint(), DeadlineError)
        assert hears_nothing_more(strangers[0])
        assert is_open(strangers[1])
        assert is_open(strangers[2])


def test_the_next_stranger_waits_while_all_others_are_new(monkeypatch):
    monkeypatch.setattr(reception, "MAX_STRANGERS", 2)
    monkeypatch.setattr(reception, "SHORTEST_STAY", TIMEOUT)
    with receiving() as ps, ps.dial() as first, ps.dial() as second, ps.dial() as third:
        for each in (first, second):
            each.recv(1)
        third.settimeout(0.05)
        with pytest.raises(TimeoutError):
            third.recv(1)
        assert ps.complaints.empty()
        first.close()
        third.settimeout(TIMEOUT)
        assert third.recv(4) == codec.MAGIC


def test_many_workers_at_once_are_all_let_in(monkeypatch):
    monkeypatch.setattr(reception, "MAX_STRANGERS", 4)
    with receiving() as ps, ThreadPoolExecutor(16) as pool:
        lanes = list(pool.map(lambda _: connect(ps.address, "ps:0", WORKER, lane="tcp", timeout=TIMEOUT), range(64)))
        for lane in lanes:
            lane.close()
        assert [ps.guests.get(timeout=TIMEOUT) for _ in lanes] == ["worker:1"] * 64


class Exhausted(socket.socket):
    """A listening socket of a process without descriptors, a few times."""

    errors = ()

    @classmethod
    def of(cls, listening, errors):
        self = cls(fileno=listening.detach())
        self.setblocking(False)
        self.errors, self.tries = list(errors), 0
        return self

    def accept(self):
        self.tries += 1
        if self.errors:
            raise self.errors.pop(0)
        return super().accept()


NOTHING_LEFT = [OSError(number, os.strerror(number)) for number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)]


def test_a_ps_without_descriptors_goes_on_and_does_not_spin(monkeypatch):
    monkeypatch.setattr(reception, "RETRY_INTERVAL", 0.02)
    made = []

    def exhausted(listening):
        made.append(Exhausted.of(listening, [*NOTHING_LEFT, MemoryError()]))
        return made[0]

    with receiving(exhausted) as ps:
        assert ps.send_a_worker() == "worker:1"
        assert [ps.complaint() for _ in range(4)][:3] == NOTHING_LEFT
        assert made[0].tries == 5


def test_handshakes_go_on_while_nothing_can_be_accepted(monkeypatch):
    monkeypatch.setattr(reception, "RETRY_INTERVAL", TIMEOUT)
    sockets = []

    def exhausted(listening):
        sockets.append(Exhausted.of(listening, []))
        return sockets[0]

    with receiving(exhausted) as ps, ps.dial() as peer:
        peer.recv(1)
        sockets[0].errors.append(NOTHING_LEFT[0])
        with ps.dial():
            assert ps.complaint() is NOTHING_LEFT[0]
            peer.sendall(b"GET / HT")
            assert "is not a paramserver task" in str(ps.complaint())
            assert hears_nothing_more(peer)


def test_a_fault_in_one_handshake_leaves_all_others_alone(monkeypatch):
    admit, broken = reception.admit, [True]

    def fail_once(*args, **options):
        if broken:
            raise ZeroDivisionError(broken.pop())
        return (yield from admit(*args, **options))

    monkeypatch.setattr(reception, "admit", fail_once)
    with receiving() as ps, ps.dial() as unlucky:
        assert isinstance(ps.complaint(), ZeroDivisionError)
        assert hears_nothing_more(unlucky)
        assert ps.send_a_worker() == "worker:1"


def test_a_wait_that_fails_is_made_again(monkeypatch):
    monkeypatch.setattr(reception, "RETRY_INTERVAL", 0.0)
    select, broken = selectors.PollSelector.select, [NOTHING_LEFT[2]]

    def fail_once(self, timeout=None):
        if broken:
            raise broken.pop()
        return select(self, timeout)

    monkeypatch.setattr(selectors.PollSelector, "select", fail_once)
    with receiving() as ps:
        assert ps.complaint() is NOTHING_LEFT[2]
        assert ps.send_a_worker() == "worker:1"


def test_a_wrong_token_is_a_complaint_and_no_guest():
    other = Identity(task="worker:1", token="another", incarnation="w")
    with receiving() as ps:
        with pytest.raises(TokenError):
            connect(ps.address, "ps:0", other, lane="tcp", timeout=TIMEOUT)
        assert isinstance(ps.complaint(), TokenError)
        assert ps.guests.empty()


def test_strangers_are_sent_away_at_the_end():
    ps = Ps()
    with ps.dial() as silent:
        silent.recv(1)
        ps.close()
        assert hears_nothing_more(silent)
