"""Frames over one connected stream socket: blocking, with a time limit that the kernel keeps.

A connection carries bytes both ways at once. What `FrameSocket.send_soon` cannot hand over at once goes out whenever
the kernel takes more of it, while this end receives; so two peers that send to each other never wait for each other.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import ParamSpec, TypeVar

from paramserver.errors import RemoteProtocolError, UnavailableError
from paramserver.transport.arrival import Arrival
from paramserver.wire import codec
from paramserver.wire.messages import AnyMessage, Message

RECEIVE_BYTES = 64 << 10
MAX_VECTORS = 512
SOON_VECTORS = 8
"""Limit for the views of one call that does not wait: more than fits into a connection."""
HANG_UP = getattr(select, "POLLRDHUP", select.POLLHUP)  # Linux's POLLRDHUP comes even before all data is read

DEAD_HOST_TIMEOUT = 90
"""Seconds after which a host counts as lost if it answers nothing at all, not even the probes of the kernel."""

P = ParamSpec("P")
R = TypeVar("R")


class FrameSocket:
    """Sends and receives frames. One thread sends and receives; any thread may call `close`.

    Every method that sends or receives raises `UnavailableError` if the connection is lost or its time limit is over.
    It then closes the connection, because later bytes could be taken for the answer to another request.

    Args:
        connection: A connected stream socket, owned by this object from now on.
        task: The task at the other end, for messages: ``ps:1``.

    Attributes:
        max_message_bytes: Limit for the size of a received message; payloads may be larger.
        before_wait: Called, if it is not None, before all operations but `gather` that may wait for the peer, and
            before the descriptor is given back after an error.
        is_local: Whether the peer is on this host, connected by a Unix socket.
    """

    def __init__(self, connection: socket.socket, task: str) -> None:
        self.task = task
        self.max_message_bytes = codec.MAX_MESSAGE_BYTES
        self.before_wait: Callable[[], None] | None = None
        self.is_local = connection.family == socket.AF_UNIX
        self._socket = connection
        self._timeout = 0.0
        self._buffer = memoryview(bytearray(RECEIVE_BYTES))
        self._start = self._end = 0
        self._payload_left = 0
        self._unsent: list[memoryview] = []
        # Held during each system call: `close` may give the descriptor back, which another connection may get, only
        # after the call that it woke has returned.
        self._in_use = threading.RLock()
        connection.settimeout(None)
        self._arrival: Arrival | None = Arrival(connection)
        self._both_ways = select.poll()
        self._both_ways.register(connection, select.POLLIN | select.POLLOUT)
        self._hang_up = select.poll()
        self._hang_up.register(connection, HANG_UP)
        if not self.is_local:
            _tune(connection)

    def set_timeout(self, seconds: float) -> None:
        """Set the limit for each wait for the peer to send or take bytes; 0 means forever.

        Sets a socket option instead of Python's own time limit, which would make the socket non-blocking and cost a
        ``poll`` and many short reads for each large payload.
        """
        self._timeout = seconds
        limit = struct.pack("ll", *divmod(math.ceil(seconds * 1e6), 1_000_000))
        self._call(self._socket.setsockopt, socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        self._call(self._socket.setsockopt, socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def send(self, message: Message, payload: Sequence[memoryview] = ()) -> None:
        """Send one frame with a payload from its own memory, in one system call if the kernel takes it whole."""
        if payload:
            header = codec.encode(message, sum(view.nbytes for view in payload))
            self.send_views([memoryview(header), *payload])
        else:
            self.send_raw(codec.encode(message))

    def send_raw(self, view: memoryview | bytes) -> None:
        """Send bytes of a frame that takes several calls, or bytes outside of any frame."""
        if self.before_wait is None and not self._unsent:
            self._call(self._socket.sendall, view)
        else:
            self.send_views([memoryview(view)])

    def send_views(self, views: list[memoryview]) -> None:
        """Send bytes from several places, as `send_raw` does."""
        if self._unsent:
            self.flush()
        views = [view for view in views if view.nbytes]
        while views:
            _drop(views, self._send_some(views[:MAX_VECTORS]))

    def begin(self, message: Message, payload: Sequence[memoryview] = ()) -> None:
        """Send one frame as `send_soon` does; the memory of its payload must stay unchanged until it is sent."""
        self.send_soon([memoryview(codec.encode(message, sum(view.nbytes for view in payload))), *payload])

    def send_soon(self, views: Iterable[memoryview]) -> None:
        """Send as many bytes as the kernel takes without waiting, and the others while this end receives."""
        self._unsent += [view for view in views if view.nbytes]
        self._send_on()

    @property
    def is_sending(self) -> bool:
        """Whether some bytes of `send_soon` are not sent yet."""
        return bool(self._unsent)

    @property
    def events(self) -> int:
        """The events of ``poll`` after which `receive_now` or `gather` has something to do."""
        return select.POLLIN | (select.POLLOUT if self._unsent else 0)

    @property
    def time_limit(self) -> float:
        """The limit of `set_timeout` in seconds; 0 means none."""
        return self._timeout

    def silent(self) -> UnavailableError:
        """Close the connection because nothing has moved within the time limit, and return the error to raise."""
        return self._given_up(BlockingIOError())

    def flush(self) -> None:
        """Wait until all bytes of `send_soon` are sent."""
        while self._unsent:
            self.await_room()
            self._send_on()

    def send_now(self, views: list[memoryview]) -> int:
        """Send as many bytes as the kernel takes without waiting, and return their number."""
        return self._call(self._try, self._socket.sendmsg, views, ()) or 0

    def await_room(self) -> None:
        """Wait until `send_now` would send a good part of what fits into the connection."""
        poll = select.poll()
        poll.register(self._socket, select.POLLOUT)
        if not poll.poll(0):
            self._may_wait()
            if not self._call(poll.poll, self._timeout * 1000 or None):
                raise self._given_up(BlockingIOError())

    def gather(self) -> bool:
        """Receive the bytes that are there, without waiting for more, and return whether `receive` can go on.

        Sends on what `send_soon` left.

        It can after a whole frame including its payload, after a frame too large to be gathered, after a damaged head,
        and at the end of the stream. Call this between two messages, when nothing is left of the last payload.
        """
        self._send_on()
        self._make_room()
        if self._is_gathered():
            return True
        received = self._call(self._try, self._socket.recv_into, self._buffer[self._end :], 0)
        if not received:
            return received is not None
        self._end += received
        return self._is_gathered()

    def _is_gathered(self) -> bool:
        if self._end < codec.HEADER_BYTES:
            return False
        is_there = self._end >= min(codec.frame_bytes(self._buffer), RECEIVE_BYTES)
        return is_there or codec.is_damaged(self._buffer)  # what follows a damaged head is not waited for

    @property
    def has_more(self) -> bool:
        """Whether bytes beyond the last message were received or announced."""
        return self._end > self._start or self._payload_left > 0

    def receive(self) -> AnyMessage | None:
        """Receive the next message; None at the end of the stream, or after `close`. Blocks.

        Drops the rest of the last payload.

        Raises:
            RemoteProtocolError: If the peer sends bytes that are not a message, or a message that is too large.
        """
        if self._payload_left:
            self.discard_payload()
        if not self._fill(codec.HEADER_BYTES):
            return None
        header = self._buffer[self._start :]
        message_bytes, payload_bytes = codec.decode_header(header, self.task, self.max_message_bytes)
        self._start += codec.HEADER_BYTES
        message = codec.decode(self._body(message_bytes), self.task)
        self._payload_left = payload_bytes
        return message

    def receive_into(self, view: memoryview) -> None:
        """Receive the next bytes of the payload straight into ``view``.

        Raises:
            RemoteProtocolError: If the payload has fewer bytes left.
        """
        self._expect_payload(view.nbytes)
        self._payload_left -= view.nbytes
        self._read_into(view)

    def receive_now(self, view: memoryview) -> int:
        """Receive those of the next bytes of the payload that are there, and return their number. Does not wait.

        Sends on what `send_soon` left.

        Raises:
            RemoteProtocolError: If the payload has fewer bytes left than ``view``.
        """
        self._expect_payload(view.nbytes)
        self._send_on()
        received: int | None = self._take_gathered(view)
        if not received:
            received = self._call(self._try, self._socket.recv_into, view, 0)
            if received == 0:
                raise self._cut_short()
        self._payload_left -= received or 0
        return received or 0

    def _expect_payload(self, count: int) -> None:
        if count > self._payload_left:
            raise RemoteProtocolError(
                f"{self.task} sent a payload that is too short: {count} bytes were expected next, "
                f"{self._payload_left} are left"
            )

    def discard_payload(self) -> None:
        """Read and drop the rest of the last payload."""
        if self._payload_left:
            waste = memoryview(bytearray(min(self._payload_left, RECEIVE_BYTES)))
            while self._payload_left:
                self.receive_into(waste[: self._payload_left])

    def receive_raw(self, count: int) -> bytes:
        """Receive bytes outside of any frame: the preamble."""
        if not self._fill(count):
            raise UnavailableError(f"{self.task} closed the connection without a word", self.task)
        data = bytes(self._buffer[self._start : self._start + count])
        self._start += count
        return data

    def send_descriptor(self, descriptor: int) -> None:
        """Pass an open file to the peer, together with one byte outside of any frame. Unix sockets only."""
        self._may_wait()
        self._call(socket.send_fds, self._socket, [b"\0"], [descriptor])

    def receive_descriptor(self) -> int:
        """Receive an open file from the peer; the caller closes it.

        Raises:
            RemoteProtocolError: If the peer sends something else.
        """
        self._may_wait()
        data, descriptors, _, _ = self._call(socket.recv_fds, self._socket, 1, 1)
        if not data:
            raise self._cut_short()
        if not descriptors:
            raise RemoteProtocolError(f"{self.task} was to pass a shared memory, and passed none")
        os.set_inheritable(descriptors[0], False)
        return descriptors[0]

    def check_open(self) -> None:
        """Raise `UnavailableError` if the peer has closed the connection. Reads nothing; any thread may call it."""
        if self._hang_up.poll(0):
            raise self._given_up(ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)))

    def close(self) -> None:
        """Close the connection, and wake a thread that waits in `receive`. Idempotent."""
        with contextlib.suppress(OSError):  # the peer may have closed it first
            self._socket.shutdown(socket.SHUT_RDWR)
        with self._in_use:
            self._socket.close()
            self._arrival = None  # the descriptor may soon belong to another connection

    def __repr__(self) -> str:
        return f"<FrameSocket to {self.task}, {'closed' if self.is_closed else 'open'}>"

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._socket.fileno() < 0

    def fileno(self) -> int:
        """Return the descriptor, which becomes readable when there is something to receive."""
        return self._socket.fileno()

    def _send_some(self, views: list[memoryview]) -> int:
        if self.before_wait:
            sent = self._call(self._try, self._socket.sendmsg, views, ())
            if sent is not None:
                return sent
            self._may_wait()
        return self._call(self._socket.sendmsg, views)

    def _body(self, count: int) -> memoryview | bytearray:
        if self._end - self._start >= count:
            self._start += count
            return self._buffer[self._start - count : self._start]
        body = bytearray(count)
        self._read_into(memoryview(body))
        return body

    def _fill(self, count: int) -> bool:
        """Have ``count`` bytes in the buffer; return False if the stream ends before the first of them."""
        if self._end - self._start >= count:
            return True
        if self._start == self._end:
            self._start = self._end = 0
        else:
            self._make_room()
        while self._end < count:
            self._await_arrival()
            received = self._receive(self._buffer[self._end :])
            if not received:
                if not self._end:
                    return False
                raise self._cut_short()
            self._end += received
        return True

    def _make_room(self) -> None:
        kept = self._end - self._start
        self._buffer[:kept] = self._buffer[self._start : self._end]
        self._start, self._end = 0, kept

    def _read_into(self, view: memoryview) -> None:
        ready = self._take_gathered(view)
        while ready < view.nbytes:
            if self._unsent:
                self._send_until_arrival()
                received = self._receive(view[ready:])
            else:
                received = self._receive(view[ready:], socket.MSG_WAITALL)
            if not received:
                raise self._cut_short()
            ready += received

    def _take_gathered(self, view: memoryview) -> int:
        """Move bytes that were received with a message into ``view``, and return their number."""
        ready = min(self._end - self._start, view.nbytes)
        view[:ready] = self._buffer[self._start : self._start + ready]
        self._start += ready
        return ready

    def _send_on(self) -> None:
        """Send as much of what `send_soon` left as the kernel takes without waiting."""
        while self._unsent:
            sent = self.send_now(self._unsent[:SOON_VECTORS])
            if not sent:
                return
            _drop(self._unsent, sent)

    def _send_until_arrival(self) -> None:
        """Send on until there is something to receive, the stream ends, or all is sent."""
        while self._unsent:
            self._may_wait()
            with self._in_use:
                ready = self._both_ways.poll(self._timeout * 1000 or None)
            if not ready:
                raise self._given_up(BlockingIOError())
            if ready[0][1] != select.POLLOUT:
                return
            self._send_on()

    def _await_arrival(self) -> None:
        """Wait until there is something to receive, or until the stream ends, which `close` does too."""
        self._send_until_arrival()
        self._may_wait()
        with self._in_use:
            if self._arrival and not self._arrival.wait(self._timeout):
                raise self._given_up(BlockingIOError())

    def _receive(self, view: memoryview, flags: int = 0) -> int:
        """Receive bytes and return their number; 0 at the end of the stream, also if `close` ended it."""
        self._may_wait()
        with self._in_use:
            try:
                return self._socket.recv_into(view, 0, flags)
            except OSError as error:
                if self.is_closed:
                    return 0
                raise self._given_up(error) from error

    def _may_wait(self) -> None:
        if self.before_wait:
            self.before_wait()

    def _cut_short(self) -> UnavailableError:
        return UnavailableError(f"{self.task} closed the connection in the middle of a message", self.task)

    def _call(self, operation: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Make a system call, and turn its error into an `UnavailableError`.

        A plain function, because a context manager would add a microsecond to each call.
        """
        with self._in_use:
            try:
                return operation(*args, **kwargs)
            except OSError as error:
                raise self._given_up(error) from error

    def _given_up(self, error: OSError) -> UnavailableError:
        lost = self._lost(error)
        self._may_wait()
        self.close()
        return lost

    @staticmethod
    def _try(operation: Callable[..., int], *args: object) -> int | None:
        """Make a system call that takes flags last; return None if it would have to wait."""
        try:
            return operation(*args, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None

    def _lost(self, error: OSError) -> UnavailableError:
        if self.is_closed:
            return UnavailableError(f"the connection to {self.task} was closed by this task already", self.task)
        if isinstance(error, BlockingIOError):
            waited = f"{self.task} neither sent nor took anything for {self._timeout:g} s"
            return UnavailableError(f"{waited}; is that process stopped?", self.task)
        reason = error.strerror or error
        return UnavailableError(f"lost the connection to {self.task}: {reason}; has that process died?", self.task)


def _drop(views: list[memoryview], count: int) -> None:
    """Remove the first ``count`` bytes."""
    while views and count >= views[0].nbytes:
        count -= views.pop(0).nbytes
    if count:
        views[0] = views[0][count:]


def _tune(connection: socket.socket) -> None:
    """Make a socket send at once, and notice within `DEAD_HOST_TIMEOUT` that the other host is gone, even when idle."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": DEAD_HOST_TIMEOUT // 3,
        "TCP_KEEPINTVL": DEAD_HOST_TIMEOUT // 9,
        "TCP_KEEPCNT": 6,
        "TCP_USER_TIMEOUT": DEAD_HOST_TIMEOUT * 1000,
    }
    for name, value in options.items():
        if hasattr(socket, name):  # not every platform has all of these options
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
