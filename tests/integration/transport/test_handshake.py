"""How a worker and a ps make sure of each other, and which lane comes of it."""

from __future__ import annotations

import contextlib
import hmac
import platform
import queue
import re
import selectors
import socket
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import msgspec
import pytest
from tests.integration.transport.ipv6 import needs_ipv6
from tests.patience import patience

from paramserver.errors import (
    DeadlineError,
    RefusedError,
    RemoteProtocolError,
    RunOverError,
    TokenError,
    UnavailableError,
)
from paramserver.memory import shared_file
from paramserver.transport import handshake, reception
from paramserver.transport.frames import FrameSocket
from paramserver.transport.handshake import connect
from paramserver.transport.identity import Identity, new_incarnation
from paramserver.transport.lane import Session, WorkerMemory
from paramserver.transport.lanes import lane_kind
from paramserver.transport.listener import Listener
from paramserver.transport.reception import Reception
from paramserver.wire import codec
from paramserver.wire.messages import Challenge, Done, GetStatus, Hello, Message, Refused, Welcome

TIMEOUT = patience(30.0)
TOKEN = "a secret of this run"
WORKER = Identity(task="worker:1", token=TOKEN, incarnation="w")
PS = Identity(task="ps:0", token=TOKEN, incarnation="p")


class Ps:
    """A ps that only shakes hands.

    Attributes:
        address: Where it listens.
        outcomes: What came of each connection: a session or an error.
    """

    def __init__(self, me: Identity, local_socket: str | None = None, host: str = "127.0.0.1") -> None:
        self._listener = Listener(f"{host}:0", me.task)
        self._me = me
        if local_socket is not None:
            self._listener.local_socket = local_socket
        self._sessions = contextlib.ExitStack()
        self._pool = ThreadPoolExecutor()
        self.outcomes: queue.Queue[Session | Exception] = queue.Queue()
        self._acceptor = self._pool.submit(self._accept)
        self.address = f"{host}:{self._listener.port}"

    def outcome(self) -> Session | Exception:
        """What came of the connection on which the worker went on in the end."""
        while isinstance(outcome := self.outcomes.get(timeout=TIMEOUT), UnavailableError):
            pass
        return outcome

    def close(self) -> None:
        self._listener.close()
        self._acceptor.result(TIMEOUT)
        self._pool.shutdown()
        self._listener.release()
        self._sessions.close()

    def _accept(self) -> None:
        for session in sessions(self._listener, self._me, self.outcomes.put):
            self._sessions.callback(session.close)
            self.outcomes.put(session)


def sessions(listener: Listener, me: Identity, complain: Callable[[Exception], None]) -> Iterator[Session]:
    """The session of each peer that proves itself."""
    for connection, hello in Reception(listener, me, complain).guests():
        yield lane_kind(hello.lane).session(FrameSocket(connection, hello.task), hello.incarnation)


@contextlib.contextmanager
def serving(me: Identity = PS, local_socket: str | None = None) -> Iterator[Ps]:
    with contextlib.closing(Ps(me, local_socket)) as ps:
        yield ps


@contextlib.contextmanager
def stranger(behave: Callable[[socket.socket], None]) -> Iterator[str]:
    """Something that listens, and does ``behave`` to the first who connects; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as pool:
        host, port = listening.getsockname()

        def meet() -> None:
            with listening.accept()[0] as connection:
                behave(connection)

        met = pool.submit(meet)
        yield f"{host}:{port}"
        met.result(TIMEOUT)


def join(address: str, me: Identity = WORKER, *, lane: str = "auto", timeout: float = TIMEOUT):
    return contextlib.closing(connect(address, "ps:0", me, lane=lane, timeout=timeout))


# --- which address


@needs_ipv6
@pytest.mark.parametrize("host", ["[::1]", "127.0.0.1", "localhost"])
def test_a_host_is_an_address_of_either_family_or_a_name(host):
    with contextlib.closing(Ps(PS, host=host)) as ps, join(ps.address, lane="tcp") as lane:
        assert lane.task == "ps:0"


@needs_ipv6
@pytest.mark.parametrize("found", [["::1"], ["127.0.0.1"], ["::1", "127.0.0.1"], ["127.0.0.1", "::1"]])
@pytest.mark.parametrize("listens", ["::1", "127.0.0.1"])
def test_all_addresses_of_a_name_are_tried(found, listens, monkeypatch):
    kinds = {"::1": socket.AF_INET6, "127.0.0.1": socket.AF_INET}

    def look_up(host, port, *_):
        return [(kinds[each], socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (each, port)) for each in found]

    with contextlib.closing(Ps(PS, host=f"[{listens}]" if listens == "::1" else listens)) as ps:
        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        address = f"a-name:{ps.address.rpartition(':')[2]}"
        if listens not in found:
            with pytest.raises(DeadlineError), join(address, timeout=0.0):
                pass
            return
        with join(address, lane="tcp") as lane:
            assert lane.task == "ps:0"


# --- which lane


@pytest.mark.parametrize(("choice", "name"), [("auto", "shared memory"), ("tcp", "tcp")])
def test_the_lane_on_one_host(choice, name):
    with serving() as ps, join(ps.address, lane=choice) as lane:
        assert (lane.name, lane.task) == (name, "ps:0")
        session = ps.outcome()
        assert (session.task, session.incarnation) == ("worker:1", "w")
        lane.start(GetStatus())
        assert session.receive() == GetStatus()
        session.reply(Done())
        assert lane.finish() == Done()


@pytest.mark.parametrize("local_socket", ["", "a socket of another host"])
def test_a_local_socket_that_cannot_be_reached_leaves_tcp(local_socket):
    with serving(local_socket=local_socket) as ps, join(ps.address) as lane:
        assert lane.name == "tcp"
        assert ps.outcomes.get(timeout=TIMEOUT).task == "worker:1"


def test_a_worker_without_shared_memory_uses_tcp(monkeypatch):
    with serving() as ps:
        monkeypatch.setattr(shared_file, "can_share", lambda: False)
        with join(ps.address) as lane:
            assert lane.name == "tcp"


def test_a_ps_sees_that_a_worker_goes_on_by_the_local_socket():
    with serving() as ps, join(ps.address):
        outcomes = [ps.outcomes.get(timeout=TIMEOUT) for _ in range(2)]
        (error,) = (outcome for outcome in outcomes if isinstance(outcome, UnavailableError))
        assert str(error) == "a peer that has not said who it is went away before it had said so"


def test_every_start_of_a_task_has_a_name_of_its_own():
    assert new_incarnation() != new_incarnation()


# --- a lane knows how long to wait


def test_a_lane_gives_up_a_ps_that_is_stopped(monkeypatch):
    monkeypatch.setattr(handshake, "REQUEST_TIMEOUT", 0.05)
    with serving() as ps, join(ps.address) as lane:
        lane.start(GetStatus())
        with pytest.raises(UnavailableError, match=r"ps:0 neither sent nor took anything for 0\.05 s; is .* stopped"):
            lane.finish()


def test_a_session_waits_for_a_worker_that_computes():
    with serving() as ps, join(ps.address) as lane, ThreadPoolExecutor(1) as pool:
        received = pool.submit(ps.outcome().receive)
        with pytest.raises(TimeoutError):
            received.result(0.1)
        lane.start(GetStatus())
        assert received.result(TIMEOUT) == GetStatus()


# --- tokens


@pytest.mark.parametrize("lane", ["auto", "tcp"])
def test_a_worker_with_another_token_is_refused_on_both_sides(lane):
    with serving() as ps:
        with pytest.raises(TokenError, match=r"ps:0 refused worker:1: .* set PARAMSERVER_TOKEN") as caught:
            connect(ps.address, "ps:0", replace(WORKER, token="another"), lane=lane, timeout=TIMEOUT)
        assert caught.value.task == "ps:0"
        error = ps.outcome()
        assert isinstance(error, TokenError)
        assert str(error) == str(caught.value)


def challenge(frames: FrameSocket) -> Hello:
    frames.send_raw(codec.preamble())
    frames.receive_raw(codec.PREAMBLE_BYTES)
    frames.send(Challenge("ps:0", b"n" * 16, ""))
    hello = frames.receive()
    assert isinstance(hello, Hello)
    return hello


def answering(reply: Callable[[Hello], Message]) -> Callable[[socket.socket], None]:
    def behave(connection: socket.socket) -> None:
        with contextlib.closing(FrameSocket(connection, "worker:1")) as frames:
            frames.send(reply(challenge(frames)))

    return behave


def proof(token: str, nonce: bytes, task: str) -> bytes:
    return hmac.digest(token.encode(), nonce + task.encode(), "sha256")


@pytest.mark.parametrize(
    "reply",
    [
        lambda hello: Welcome(proof("another", hello.nonce, "ps:0")),
        lambda hello: Welcome(proof(TOKEN, hello.nonce, "ps:1")),
        lambda hello: Welcome(hello.proof),
        lambda hello: Welcome(b""),
        lambda hello: Done(),
    ],
    ids=["another token", "another ps", "the worker's own proof", "no proof", "no welcome"],
)
def test_a_ps_that_cannot_prove_itself_is_refused_by_the_worker(reply):
    with stranger(answering(reply)) as address, pytest.raises(TokenError, match="ps:0 could not prove"):
        connect(address, "ps:0", WORKER, lane="auto", timeout=TIMEOUT)


def test_a_ps_that_can_is_not():
    honest = answering(lambda hello: Welcome(proof(TOKEN, hello.nonce, "ps:0")))
    with stranger(honest) as address, join(address) as lane:
        assert lane.name == "tcp"


def test_a_refusal_comes_as_the_error_that_it_is():
    not_today = answering(lambda hello: Refused("refused", "not today"))
    with stranger(not_today) as address, pytest.raises(RefusedError, match="not today"):
        connect(address, "ps:0", WORKER, lane="auto", timeout=TIMEOUT)


def test_a_proof_cannot_be_used_for_another_task_or_again():
    with serving() as ps, open_handshake(ps.address) as (frames, first):
        hello = Hello("worker:1", "ps:0", "w", proof(TOKEN, first.nonce, "worker:1"), b"n" * 16, "tcp")
        frames.send(msgspec.structs.replace(hello, task="worker:2"))
        assert frames.receive().kind == "token"
        with open_handshake(ps.address) as (again, second):
            assert second.nonce != first.nonce
            again.send(hello)
            assert again.receive().kind == "token"


@pytest.mark.parametrize(
    ("lane", "message"),
    [
        ("rdma", "ps:0 cannot serve worker:1: .*'rdma'.*; install the package that brings it on the ps"),
        ("shared-memory", "worker:1 asked for a shared-memory lane from another host than that of ps:0"),
    ],
)
def test_a_lane_that_the_ps_cannot_serve_is_refused(lane, message):
    with serving() as ps, open_handshake(ps.address) as (frames, first):
        frames.send(Hello("worker:1", "ps:0", "w", proof(TOKEN, first.nonce, "worker:1"), b"n" * 16, lane))
        refusal = frames.receive()
        assert refusal.kind == "refused"
        assert re.search(message, refusal.message)


def test_a_local_lane_to_another_host_says_so():
    with serving(local_socket="a socket of another host") as ps, pytest.raises(RefusedError, match="on another host"):
        join(ps.address, lane="shared-memory")


@pytest.mark.parametrize("machine", ["aarch64", "ppc64le"])
def test_shared_memory_is_not_for_machines_that_reorder(machine, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with serving() as ps, join(ps.address) as lane:
        assert lane.name == "tcp"
    with pytest.raises(RefusedError, match=f"cannot be used here: processors of {machine} may reorder"):
        join("127.0.0.1:1", lane="shared-memory")


def test_a_lane_that_cannot_keep_the_memory_is_refused():
    kept = WorkerMemory([], [])
    with pytest.raises(RefusedError, match="a shared-memory lane cannot be used here: it cannot go on with the memory"):
        connect("127.0.0.1:1", "ps:0", WORKER, lane="shared-memory", timeout=TIMEOUT, kept=kept)


@contextlib.contextmanager
def open_handshake(address: str) -> Iterator[tuple[FrameSocket, Challenge]]:
    """A peer of a ps that has been challenged."""
    host, port = address.split(":")
    with contextlib.closing(FrameSocket(socket.create_connection((host, int(port))), "ps:0")) as frames:
        frames.set_timeout(TIMEOUT)
        frames.send_raw(codec.preamble())
        codec.check_preamble(frames.receive_raw(codec.PREAMBLE_BYTES), "ps:0")
        received = frames.receive()
        assert isinstance(received, Challenge)
        yield frames, received


@pytest.mark.parametrize("token", [TOKEN, "another"])
def test_the_token_never_travels(token):
    me = replace(WORKER, token=token)
    with serving() as ps, tapped(ps.address) as (address, seen), contextlib.suppress(TokenError):
        connect(address, "ps:0", me, lane="tcp", timeout=TIMEOUT).close()
    said = bytes(seen)
    assert codec.preamble() in said
    assert b"worker:1" in said
    assert TOKEN.encode() not in said
    assert token.encode() not in said


@contextlib.contextmanager
def tapped(address: str) -> Iterator[tuple[str, bytearray]]:
    """Another address of a ps, and all bytes that pass there, both ways."""
    seen = bytearray()
    host, port = address.split(":")

    def relay(connection: socket.socket) -> None:
        with socket.create_connection((host, int(port))) as onward, selectors.DefaultSelector() as selector:
            selector.register(connection, selectors.EVENT_READ, onward)
            selector.register(onward, selectors.EVENT_READ, connection)
            while True:
                for key, _ in selector.select():
                    data = key.fileobj.recv(1 << 16)
                    if not data:
                        return
                    seen.extend(data)
                    key.data.sendall(data)

    with stranger(relay) as tap:
        yield tap, seen


# --- what is no ps at the address


def test_another_ps_at_the_address_is_named_on_both_sides():
    with serving(replace(PS, task="ps:1")) as ps:
        with pytest.raises(RefusedError, match="worker:1 looked for ps:0 and found ps:1; .* TF_CONFIG") as caught:
            connect(ps.address, "ps:0", WORKER, lane="auto", timeout=TIMEOUT)
        assert not isinstance(caught.value, TokenError)
        error = ps.outcome()
        assert type(error) is RefusedError
        assert (str(error), error.task) == (str(caught.value), "ps:1")


def sending(data: bytes) -> Callable[[socket.socket], None]:
    def behave(connection: socket.socket) -> None:
        connection.sendall(data)
        connection.settimeout(TIMEOUT)
        while connection.recv(1 << 16):
            pass

    return behave


NO_PS = {
    "another version": (struct.pack("<4sI", codec.MAGIC, 99), "ps:0 speaks protocol version 99, this task speaks"),
    "a web server": (b"HTTP/1.1 400 Bad Request\r\n\r\n", "ps:0 is not a paramserver task"),
    "a large message": (codec.preamble() + codec.head(1 << 20, 0), "ps:0 announced a message of 1048576 bytes"),
    "garbage": (
        codec.preamble() + codec.head(3, 0) + b"\xc1\xc1\xc1",
        "ps:0 sent bytes that are not a message",
    ),
    "another message": (codec.preamble() + codec.encode(Done()), "ps:0 was expected to start with a challenge"),
}


@pytest.mark.parametrize(("data", "words"), NO_PS.values(), ids=NO_PS)
def test_what_is_no_ps_is_told_apart_at_once(data, words):
    with stranger(sending(data)) as address, pytest.raises(RemoteProtocolError, match=words):
        connect(address, "ps:0", WORKER, lane="auto", timeout=TIMEOUT)


def test_a_ps_that_never_comes_up_is_named_with_its_address():
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        with pytest.raises(DeadlineError, match=rf"ps:0 at {address} did not .* 0\.05 s .*refused") as caught:
            connect(address, "ps:0", WORKER, lane="auto", timeout=0.05)
        assert caught.value.timeout == 0.05


def test_nobody_waits_for_a_ps_of_a_run_that_is_over():
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        with pytest.raises(RunOverError, match=f"ps:0 at {address} has left"):
            connect(address, "ps:0", WORKER, lane="auto", timeout=TIMEOUT, is_over=lambda: True)


def test_a_refused_connection_by_itself_is_no_end_of_a_run():
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        with pytest.raises(DeadlineError, match="did not come up within 0.2 s .*Connection refused"):
            connect(address, "ps:0", WORKER, lane="auto", timeout=0.2)


def test_a_ps_that_says_nothing_is_named_with_its_address():
    """As a port that a launcher holds while its ps starts, or a ps that is stopped."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(DeadlineError, match=rf"ps:0 at {address} did not .* 0\.2 s .*ps:0 neither sent"):
            connect(address, "ps:0", WORKER, lane="auto", timeout=0.2)


def test_a_ps_that_comes_up_late_is_reached(monkeypatch):
    """Also behind a proxy, which accepts and closes until the ps is there."""
    monkeypatch.setattr(handshake, "RETRY_INTERVAL", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as pool:

        def be_late():
            listening.accept()[0].close()
            listener = Listener("", "ps:0", listening.detach())
            with contextlib.closing(next(sessions(listener, PS, lambda _: None))):
                listener.close()
                listener.release()

        accepted = pool.submit(be_late)
        with join(f"127.0.0.1:{listening.getsockname()[1]}") as lane:
            assert lane.task == "ps:0"
        accepted.result(TIMEOUT)


# --- who a ps turns away


STRANGERS = {
    "a browser": (b"GET / HTTP/1.1\r\n\r\n", "is not a paramserver task: .*GET"),
    "another version": (struct.pack("<4sI", codec.MAGIC, 99), "speaks protocol version 99"),
    "a large message": (codec.preamble() + codec.head(1 << 20, 0), "announced a message of 1048576 bytes"),
    "garbage": (codec.preamble() + codec.head(2, 0) + b"\xc1\xc1", "sent bytes that are not a message"),
    "a request": (codec.preamble() + codec.encode(GetStatus()), "was challenged and answered GetStatus"),
}


@pytest.mark.parametrize(("data", "words"), STRANGERS.values(), ids=STRANGERS)
def test_a_stranger_is_turned_away(data, words):
    with serving() as ps, dialled_by_a_stranger(ps, data) as peer:
        error = ps.outcomes.get(timeout=TIMEOUT)
        assert isinstance(error, RemoteProtocolError)
        assert re.match(f"a peer that has not said who it is {words}", str(error))
        with contextlib.suppress(ConnectionResetError):  # instead of an end, if not all that it sent was read
            while peer.recv(1 << 16):
                pass


@pytest.mark.parametrize("data", [b"", codec.preamble(), codec.preamble() + b"\1"])
def test_a_peer_that_says_nothing_more_is_not_waited_for(data, monkeypatch):
    monkeypatch.setattr(reception, "HANDSHAKE_TIMEOUT", 0.05)
    with serving() as ps, dialled_by_a_stranger(ps, data) as peer:
        error = ps.outcomes.get(timeout=TIMEOUT)
        assert isinstance(error, DeadlineError)
        assert re.match(r"a peer that .* is did not prove within 0\.05 s that it belongs to the run", str(error))
        while peer.recv(1 << 16):
            pass


@contextlib.contextmanager
def dialled_by_a_stranger(ps: Ps, data: bytes = b"") -> Iterator[socket.socket]:
    """A connection to a ps on which a stranger has sent something."""
    host, port = ps.address.split(":")
    with socket.create_connection((host, int(port))) as peer:
        peer.settimeout(TIMEOUT)
        peer.sendall(data)
        yield peer
