"""Frames over one connected stream socket, blocking, with a time limit that the kernel keeps."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator, Sequence

from paramserver.errors import RemoteProtocolError, UnavailableError
from paramserver.wire import codec
from paramserver.wire.messages import AnyMessage, Message

RECEIVE_BYTES = 64 << 10
MAX_VECTORS = 512


class FrameSocket:
    """Sends and receives frames. One thread sends and receives; `close` may be called by any.

    Args:
        connection: A connected stream socket, owned by this object from now on.
        task: The task at the other end, for messages: ``ps:1``.
    """

    def __init__(self, connection: socket.socket, task: str) -> None:
        connection.settimeout(None)
        self.task = task
        self.socket = connection
        self._buffer = memoryview(bytearray(RECEIVE_BYTES))
        self._start = self._end = 0
        self._payload_left = 0

    def set_timeout(self, seconds: float) -> None:
        """The longest wait for the peer to send or take anything; 0 means for ever.

        A socket option instead of Python's own time limit, which would make the socket non-blocking and cost a
        ``poll`` and many short reads for each large payload.
        """
        limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def send(self, message: Message, payload: Sequence[memoryview] = ()) -> None:
        """One frame, with the payload from where it lies, in one system call where the kernel takes it whole."""
        header = codec.encode(message, sum(view.nbytes for view in payload))
        with self._mapped_errors():
            if payload:
                self._send_vectors([memoryview(header), *payload])
            else:
                self.socket.sendall(header)

    def send_raw(self, view: memoryview | bytes) -> None:
        """Bytes of a payload that was announced by `announce`."""
        with self._mapped_errors():
            self.socket.sendall(view)

    def announce(self, message: Message, payload_bytes: int) -> None:
        """The head of a frame whose payload follows in several `send_raw`."""
        self.send_raw(codec.encode(message, payload_bytes))

    def receive(self) -> AnyMessage | None:
        """The next message; None at the end of the stream. Drops what was left of the last payload."""
        self._discard_payload()
        if not self._fill(codec.HEADER_BYTES, at_start=True):
            return None
        header = codec.decode_header(self._buffer[self._start :], self.task)
        self._start += codec.HEADER_BYTES
        body = self._body(header.message_bytes)
        message = codec.decode(body, self.task)
        self._payload_left = header.payload_bytes
        return message

    def receive_into(self, view: memoryview) -> None:
        """The next bytes of the payload, straight into ``view``."""
        if view.nbytes > self._payload_left:
            raise RemoteProtocolError(
                f"{self.task} sent a payload that is too short: {view.nbytes} bytes were expected next, "
                f"{self._payload_left} are left"
            )
        self._payload_left -= view.nbytes
        self._read_into(view)

    def receive_raw(self, count: int) -> bytes:
        """Bytes outside of any frame: the preamble."""
        if not self._fill(count, at_start=False):
            raise UnavailableError(f"{self.task} closed the connection instead of answering", self.task)
        data = bytes(self._buffer[self._start : self._start + count])
        self._start += count
        return data

    def close(self) -> None:
        """Close the connection; wakes whoever waits in `receive`. Idempotent."""
        with contextlib.suppress(OSError):  # the peer may have closed it first
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def _send_vectors(self, views: list[memoryview]) -> None:
        while views:
            sent = self.socket.sendmsg(views[:MAX_VECTORS])
            while views and sent >= views[0].nbytes:
                sent -= views.pop(0).nbytes
            if sent:
                views[0] = views[0][sent:]

    def _body(self, count: int) -> memoryview | bytearray:
        if count > RECEIVE_BYTES:
            body = bytearray(count)
            self._read_into(memoryview(body))
            return body
        self._fill(count, at_start=False)
        self._start += count
        return self._buffer[self._start - count : self._start]

    def _fill(self, count: int, *, at_start: bool) -> bool:
        """Have ``count`` bytes in the buffer; False if the stream ends before the first of them."""
        if self._end - self._start >= count:
            return True
        kept = self._end - self._start
        self._buffer[:kept] = self._buffer[self._start : self._end]
        self._start, self._end = 0, kept
        while self._end < count:
            with self._mapped_errors():
                received = self.socket.recv_into(self._buffer[self._end :])
            if not received and at_start and not self._end:
                return False
            self._check_open(received)
            self._end += received
        return True

    def _read_into(self, view: memoryview) -> None:
        ready = min(self._end - self._start, view.nbytes)
        view[:ready] = self._buffer[self._start : self._start + ready]
        self._start += ready
        while ready < view.nbytes:
            with self._mapped_errors():
                received = self.socket.recv_into(view[ready:], 0, socket.MSG_WAITALL)
            self._check_open(received)
            ready += received

    def _discard_payload(self) -> None:
        while self._payload_left:
            self.receive_into(memoryview(bytearray(min(self._payload_left, RECEIVE_BYTES))))

    def _check_open(self, received: int) -> None:
        if not received:
            raise UnavailableError(f"{self.task} closed the connection in the middle of a message", self.task)

    @contextlib.contextmanager
    def _mapped_errors(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError as error:
            raise UnavailableError(f"{self.task} did not answer within its time limit", self.task) from error
        except OSError as error:
            raise UnavailableError(
                f"lost the connection to {self.task}: {error.strerror or error}; has that process died?", self.task
            ) from error
