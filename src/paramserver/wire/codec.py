"""Messages to bytes and back. No socket, no clock, no thread.

Rules
    * A connection starts with a preamble from each side: ``PSRV`` and the protocol version. It comes before any
      message, so that a peer of another version is recognized, whatever format its messages have.
    * After that, frames follow: the length of the message (u32) and of the payload (u64), and the CRC-32 of these two
      (u32), all little endian; the message as msgpack; the payload as raw bytes.
    * The checksum covers the head only, so that it costs nothing per byte. A wrong length would make a task wait for
      bytes that never come, or take one message for a part of another.
    * The length of a message is checked before memory is taken for it. A stranger, which has not proved yet that it
      belongs to the run, may only send short messages. A payload takes no memory of its own: it is read into arenas.
"""

from __future__ import annotations

import struct
import zlib

import msgspec

from paramserver.errors import LocalProtocolError, RemoteProtocolError
from paramserver.wire.messages import AnyMessage, Message

VERSION = 8
MAGIC = b"PSRV"
MAX_MESSAGE_BYTES = 64 << 20
MAX_HANDSHAKE_BYTES = 4 << 10

_PREAMBLE = struct.Struct("<4sI")
_LENGTHS = struct.Struct("<IQ")
_HEAD = struct.Struct("<IQI")
_NUM_CHECKED = _LENGTHS.size
PREAMBLE_BYTES = _PREAMBLE.size
HEADER_BYTES = _HEAD.size

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def preamble() -> bytes:
    """Return the bytes that each side sends first."""
    return _PREAMBLE.pack(MAGIC, VERSION)


def check_preamble(data: bytes, peer: str) -> None:
    """Check that a peer speaks this version of the protocol.

    Raises:
        RemoteProtocolError: If the peer is not a paramserver task, or of another version.
    """
    magic, version = _PREAMBLE.unpack(data)
    if magic != MAGIC:
        raise RemoteProtocolError(f"{peer} is not a paramserver task: expected {preamble()!r} first, got {data!r}")
    if version != VERSION:
        raise RemoteProtocolError(
            f"{peer} speaks protocol version {version}, this task speaks {VERSION}; "
            "install the same version of paramserver for all tasks of a run"
        )


def encode(message: Message, payload_bytes: int = 0) -> bytes:
    """Return the header and the message as bytes; the payload is sent after them.

    Raises:
        LocalProtocolError: If the message is larger than `MAX_MESSAGE_BYTES`.
    """
    body = _encoder.encode(message)
    if len(body) > MAX_MESSAGE_BYTES:
        raise LocalProtocolError(
            f"a {type(message).__name__} of {len(body)} bytes is larger than a message may be ({MAX_MESSAGE_BYTES})"
        )
    return head(len(body), payload_bytes) + body


def head(message_bytes: int, payload_bytes: int) -> bytes:
    """Return the head of a frame: its first `HEADER_BYTES`."""
    return _HEAD.pack(message_bytes, payload_bytes, zlib.crc32(_LENGTHS.pack(message_bytes, payload_bytes)))


def decode_header(data: bytes | memoryview, peer: str, max_message_bytes: int = MAX_MESSAGE_BYTES) -> tuple[int, int]:
    """Return the lengths of the message and of the payload from the first `HEADER_BYTES` of a frame.

    Raises:
        RemoteProtocolError: If the head is damaged, or announces a message larger than ``max_message_bytes``.
    """
    message_bytes, payload_bytes, checksum = _HEAD.unpack_from(data)
    if checksum != zlib.crc32(data[:_NUM_CHECKED]):
        raise RemoteProtocolError(
            f"{peer} sent a frame with a damaged head, {bytes(data[:HEADER_BYTES]).hex()}: its checksum is wrong; "
            "is the network or the memory of one of the two hosts faulty?"
        )
    if message_bytes > max_message_bytes:
        raise RemoteProtocolError(
            f"{peer} announced a message of {message_bytes} bytes; at most {max_message_bytes} are allowed"
        )
    return message_bytes, payload_bytes


def frame_bytes(data: bytes | memoryview) -> int:
    """Return the length of the whole frame that begins with these `HEADER_BYTES`, if they are intact."""
    message_bytes, payload_bytes, _ = _HEAD.unpack_from(data)
    return HEADER_BYTES + int(message_bytes) + int(payload_bytes)


def is_damaged(data: bytes | memoryview) -> bool:
    """Return whether the checksum of these `HEADER_BYTES` is wrong; `decode_header` refuses them then."""
    return bool(_HEAD.unpack_from(data)[2] != zlib.crc32(data[:_NUM_CHECKED]))


def decode(body: bytes | bytearray | memoryview, peer: str) -> AnyMessage:
    """Return the message of a frame.

    Raises:
        RemoteProtocolError: If the bytes are not a message of this protocol.
    """
    try:
        return _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"{peer} sent bytes that are not a message: {error}") from error
