"""Who serves whom: connections that answer each byte, over pairs of sockets."""

from __future__ import annotations

import contextlib
import socket
import threading

import pytest
from tests.patience import patience

from paramserver.server import threads
from paramserver.server.threads import Pace, ServingThreads

PATIENCE = patience(30.0)
QUICK, SLOW, WAIT, AHEAD = b"q", b"s", b"w", b"a"


class Echo:
    """Answers each byte with itself, which says how: among others, after a wait, or on a thread of its own."""

    def __init__(self, connection, gate):
        self.before_wait = None
        self.is_seldom = False
        self.threads = []
        self.num_ends = 0
        self._connection = connection
        self._gate = gate

    def fileno(self):
        return self._connection.fileno()

    def proceed(self):
        byte = self._connection.recv(1)
        if not byte:
            return Pace.OVER
        self.threads.append(threading.get_ident())
        if self.before_wait and byte in (SLOW, WAIT):
            self.before_wait()
        if byte == WAIT:
            self._gate.wait(PATIENCE)
        try:
            self._connection.sendall(byte)
        except BrokenPipeError:  # after `hang_up`
            return Pace.OVER
        return Pace.QUICK if byte in (QUICK, WAIT) else Pace.SLOW

    def end(self):
        self.num_ends += 1
        self._connection.close()

    def drain(self):
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RD)

    def hang_up(self):
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)


class Echoes:
    """Served connections, and how to ask them."""

    def __init__(self):
        self.threads = ServingThreads("serves")
        self.gate = threading.Event()
        self.served = []
        self._stack = contextlib.ExitStack()

    def new(self):
        ours, theirs = socket.socketpair()
        ours.settimeout(PATIENCE)
        self._stack.enter_context(ours)
        self.served.append(Echo(theirs, self.gate))
        self.threads.add(self.served[-1])
        return ours

    def close(self):
        self.gate.set()
        self.threads.stop()
        self._stack.close()


@pytest.fixture
def echoes():
    with contextlib.closing(Echoes()) as its_echoes:
        yield its_echoes


def ask(connection, what=QUICK):
    connection.sendall(what)
    assert connection.recv(1) == what


def test_after_a_quick_request_one_thread_serves_all(echoes):
    connections = [echoes.new() for _ in range(20)]
    for _ in range(3):
        for connection in connections:
            ask(connection)
    firsts = {one.threads[0] for one in echoes.served}
    leaders = {thread for one in echoes.served for thread in one.threads[1:]}
    assert len(firsts) > 1
    assert len(leaders) == 1
    assert "20 connections, 20 on one of" in repr(echoes.threads)


def test_a_slow_connection_keeps_its_thread_until_it_is_quick(echoes):
    slow, quick = echoes.new(), echoes.new()
    for connection in (slow, quick):
        ask(connection)
    for what in (SLOW, SLOW, SLOW, QUICK):
        ask(slow, what)
    for connection in (slow, quick):
        ask(connection)
    threads = echoes.served[0].threads
    assert threads[1] == threads[2] == threads[3] == threads[4] != threads[5] == echoes.served[1].threads[-1]


def test_whoever_waits_delays_nobody(echoes):
    waiting, others = [echoes.new() for _ in range(3)], [echoes.new() for _ in range(3)]
    for connection in (*waiting, *others):
        ask(connection)
    for connection in waiting:
        connection.sendall(WAIT)
    for connection in others:
        ask(connection)
    assert not echoes.gate.is_set()
    echoes.gate.set()
    assert [connection.recv(1) for connection in waiting] == [WAIT] * 3
    for connection in (*waiting, *others):
        ask(connection)


def test_what_came_beyond_a_request_is_served(echoes):
    connection = echoes.new()
    ask(connection)
    ask(connection, AHEAD)
    ask(connection)


def test_a_connection_that_is_over_is_ended_once_and_the_others_are_served_on(echoes):
    gone, other = echoes.new(), echoes.new()
    for connection in (gone, other):
        ask(connection)
    gone.shutdown(socket.SHUT_WR)
    assert gone.recv(1) == b""
    ask(other)
    assert [one.num_ends for one in echoes.served] == [1, 0]


def test_stop_ends_every_connection_and_every_thread(echoes):
    for what in (QUICK, SLOW, None):
        connection = echoes.new()
        if what:
            ask(connection, what)
    echoes.threads.stop()
    echoes.threads.stop()
    assert [one.num_ends for one in echoes.served] == [1, 1, 1]
    assert repr(echoes.threads) == "<ServingThreads: 0 connections, 0 on one of 0 threads>"


def test_stop_without_a_connection_ends_at_once(echoes):
    echoes.threads.stop()


def test_without_further_threads_all_are_served_still(echoes, monkeypatch, caplog):
    """Leaders that have to wait, and have nobody to hand the lead to, lead again when they are done."""
    connections = [echoes.new() for _ in range(4)]
    for each in connections * 2:
        ask(each)
    with monkeypatch.context() as limited:
        limited.setattr(threading.Thread, "start", no_thread)
        for each in connections[:3]:
            each.sendall(WAIT)
        connections[3].sendall(QUICK)
        echoes.gate.set()
        assert [each.recv(1) for each in connections] == [WAIT, WAIT, WAIT, QUICK]
        for each in connections * 2:
            ask(each)
    (line,) = caplog.messages
    assert line == "serves with fewer threads: can't start new thread; raise the limit (ulimit -u)"


def no_thread(thread):
    raise RuntimeError("can't start new thread")


def test_the_request_at_hand_is_answered_before_the_end(echoes):
    connection = echoes.new()
    connection.sendall(WAIT)
    stopping = threading.Thread(target=echoes.threads.stop)
    stopping.start()
    echoes.gate.set()
    assert connection.recv(2) == WAIT
    assert connection.recv(1) == b""
    stopping.join(PATIENCE)


def test_a_request_that_takes_too_long_is_cut_off_at_the_end(echoes, monkeypatch):
    monkeypatch.setattr(threads, "DRAIN_TIMEOUT", 0.0)
    connection = echoes.new()
    connection.sendall(WAIT)
    stopping = threading.Thread(target=echoes.threads.stop)
    stopping.start()
    assert connection.recv(1) == b""
    echoes.gate.set()
    stopping.join(PATIENCE)
