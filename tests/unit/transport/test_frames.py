"""Frames over a pair of sockets in one thread, which hold what is sent until it is read."""

import contextlib
import socket
import threading

import pytest

from paramserver.errors import RemoteProtocolError, UnavailableError
from paramserver.transport import frames
from paramserver.transport.frames import RECEIVE_BYTES, FrameSocket
from paramserver.wire import codec
from paramserver.wire.messages import Done, Goodbye, Pull


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    worker, ps = FrameSocket(ours, "ps:0"), FrameSocket(theirs, "worker:1")
    with contextlib.closing(worker), contextlib.closing(ps):
        yield worker, ps


def test_messages_arrive_in_order_however_they_were_cut(pair):
    worker, ps = pair
    sent = [Done(), Goodbye("x" * 100), Pull((1, 2)), Done()]
    stream = b"".join(map(codec.encode, sent))
    for place in range(0, len(stream), 7):
        worker.send_raw(stream[place : place + 7])
    assert [ps.receive() for _ in sent] == sent


@pytest.mark.parametrize("size", [RECEIVE_BYTES - 40, RECEIVE_BYTES, RECEIVE_BYTES + 1, 3 * RECEIVE_BYTES])
def test_messages_may_be_larger_than_the_buffer(pair, size):
    worker, ps = pair
    worker.send(Goodbye("x" * size))
    worker.send(Done())
    assert ps.receive() == Goodbye("x" * size)
    assert ps.receive() == Done()


@pytest.mark.parametrize("size", [1, RECEIVE_BYTES, 3 * RECEIVE_BYTES + 5])
def test_a_payload_is_read_in_parts_and_what_is_left_is_dropped(pair, size):
    worker, ps = pair
    payload = bytes(range(256)) * (size // 256 + 1)
    worker.send(Done(), [memoryview(payload)[:10], memoryview(payload)[10:size]])
    worker.send(Pull((7,)))
    assert ps.receive() == Done()
    part = memoryview(bytearray(min(size, 1000)))
    ps.receive_into(part)
    assert part == payload[: len(part)]
    assert ps.receive() == Pull((7,))


def test_a_payload_may_lie_in_more_places_than_one_call_takes(pair, monkeypatch):
    monkeypatch.setattr(frames, "MAX_VECTORS", 3)
    worker, ps = pair
    worker.send(Done(), [memoryview(bytes([number])) for number in range(20)] + [memoryview(b"")])
    ps.receive()
    read = memoryview(bytearray(20))
    ps.receive_into(read)
    assert bytes(read) == bytes(range(20))


def test_an_announced_payload_is_sent_in_several_calls(pair):
    worker, ps = pair
    worker.send_raw(codec.encode(Done(), 4))
    worker.send_raw(b"ab")
    worker.send_raw(b"cd")
    ps.receive()
    ps.receive_into(read := memoryview(bytearray(4)))
    assert read == b"abcd"


def test_more_than_the_payload_is_not_read(pair):
    worker, ps = pair
    worker.send(Done(), [memoryview(b"ab")])
    ps.receive()
    with pytest.raises(RemoteProtocolError, match=r"worker:1 sent a payload that is too short: 3 bytes .* 2 are left"):
        ps.receive_into(memoryview(bytearray(3)))


def test_the_end_of_the_stream_is_none(pair):
    worker, ps = pair
    worker.send(Done())
    worker.close()
    assert ps.receive() == Done()
    assert ps.receive() is None
    assert ps.receive() is None


def test_what_is_closed_does_not_wait_for_who_has_its_descriptor_now(pair):
    _, ps = pair
    descriptor = ps._socket.fileno()
    ps.close()
    one, other = socket.socketpair()
    received = []
    receiver = threading.Thread(target=lambda: received.append(ps.receive()))
    with one, other:
        assert descriptor in (one.fileno(), other.fileno())
        receiver.start()
        receiver.join(5)
        waited = receiver.is_alive()
        for end in (one, other):
            end.send(b"\0")  # what ends the wait, if there is one
        receiver.join()
    assert received == [None]
    assert not waited


def test_after_close_nothing_is_received_and_nothing_can_be_sent(pair):
    worker, _ = pair
    worker.close()
    worker.close()
    assert worker.receive() is None
    with pytest.raises(UnavailableError, match="the connection to ps:0 was closed by this task already") as caught:
        worker.send(Done())
    assert caught.value.task == "ps:0"
    assert repr(worker) == "<FrameSocket to ps:0, closed>"


def test_sending_to_nobody_is_a_lost_connection(pair):
    worker, ps = pair
    ps.close()
    with pytest.raises(UnavailableError, match="lost the connection to ps:0: Broken pipe; has that process died"):
        worker.send(Done())


def test_a_large_message_is_refused_where_only_small_ones_are_expected(pair):
    worker, ps = pair
    ps.max_message_bytes = 100
    worker.send_raw(codec.head(101, 0))
    with pytest.raises(RemoteProtocolError, match="101 bytes; at most 100"):
        ps.receive()


def test_a_connection_between_hosts_sends_at_once_and_notices_a_dead_host():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        connection = socket.create_connection(listening.getsockname())
        with contextlib.closing(FrameSocket(connection, "ps:0")):
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            user_timeout = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
            assert user_timeout == frames.DEAD_HOST_TIMEOUT * 1000


# --- where waiting is announced


def test_a_frame_is_gathered_until_it_is_whole_and_received_without_waiting(pair):
    worker, ps = pair
    waits = []
    ps.before_wait = lambda: waits.append(1)
    frame = codec.encode(Pull((1, 2)), 3) + b"abc"
    assert not ps.gather()
    for place in range(len(frame) - 1):
        worker.send_raw(frame[place : place + 1])
        assert not ps.gather()
    worker.send_raw(frame[-1:])
    assert ps.gather()
    assert ps.receive() == Pull((1, 2))
    assert ps.has_more
    ps.receive_into(read := memoryview(bytearray(3)))
    assert (bytes(read), ps.has_more, waits) == (b"abc", False, [])


def test_a_frame_that_is_too_large_to_be_gathered_is_received_with_an_announcement(pair):
    worker, ps = pair
    waits = []
    ps.before_wait = lambda: waits.append(1)
    worker.send(Goodbye("x" * 2 * RECEIVE_BYTES))
    assert ps.gather()
    assert ps.receive() == Goodbye("x" * 2 * RECEIVE_BYTES)
    assert waits


def test_the_end_of_the_stream_is_gathered(pair):
    worker, ps = pair
    ps.before_wait = lambda: None
    worker.send_raw(b"\0")
    assert not ps.gather()
    worker.close()
    assert ps.gather()
    with pytest.raises(UnavailableError, match="in the middle of a message"):
        ps.receive()


def test_a_send_that_would_wait_is_announced_and_loses_nothing(pair):
    worker, ps = pair
    arrived = bytearray()

    def drain():
        with contextlib.suppress(BlockingIOError):
            while True:
                arrived.extend(worker_end.recv(1 << 20, socket.MSG_DONTWAIT))

    def make_room():
        ps.before_wait = None
        drain()

    worker_end, sent = worker._socket, bytearray()
    ps.before_wait = make_room
    while ps.before_wait:
        payload = bytes([len(sent) % 251]) * 50_000
        ps.send(Done(), [memoryview(payload)])
        sent += codec.encode(Done(), len(payload)) + payload
    drain()
    assert arrived == sent


def test_an_error_is_announced_before_the_descriptor_is_given_back(pair):
    worker, ps = pair
    descriptors = []
    ps.before_wait = lambda: descriptors.append(ps._socket.fileno())
    worker.close()
    with pytest.raises(UnavailableError):
        ps.send(Done())
    assert descriptors[-1] >= 0
    assert ps._socket.fileno() < 0
