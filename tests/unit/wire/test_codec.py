"""Bytes and messages, and what is no message."""

import struct
import tracemalloc

import msgspec
import pytest
import torch

from paramserver.errors import LocalProtocolError, RemoteProtocolError
from paramserver.layout.blocks import BLOCK
from paramserver.layout.variables import DTYPES
from paramserver.wire import codec
from paramserver.wire.messages import Done, Goodbye
from paramserver.wire.values import packed, unpacked

PEER = "worker:3"


def test_a_frame_starts_with_both_lengths():
    frame = codec.encode(Goodbye("why"), payload_bytes=1 << 40)
    header = codec.decode_header(frame, PEER)
    assert header == (len(frame) - codec.HEADER_BYTES, 1 << 40)
    assert codec.decode(frame[codec.HEADER_BYTES :], PEER) == Goodbye("why")


def test_a_message_that_is_too_large_is_not_sent(monkeypatch):
    monkeypatch.setattr(codec, "MAX_MESSAGE_BYTES", 100)
    with pytest.raises(LocalProtocolError, match=r"a Goodbye of \d+ bytes is larger .* \(100\)"):
        codec.encode(Goodbye("x" * 100))


@pytest.mark.parametrize("limit", [codec.MAX_HANDSHAKE_BYTES, codec.MAX_MESSAGE_BYTES])
def test_a_message_that_is_too_large_is_refused_by_its_announcement(limit):
    def announce(count):
        return codec.head(count, 0)

    assert codec.decode_header(announce(limit), PEER, limit) == (limit, 0)
    with pytest.raises(RemoteProtocolError, match=f"{PEER} announced .* {limit + 1} bytes; at most {limit} are"):
        codec.decode_header(announce(limit + 1), PEER, limit)


@pytest.mark.parametrize("bit", range(8 * codec.HEADER_BYTES))
def test_a_flipped_bit_of_a_head_is_noticed_before_anything_is_waited_for(bit):
    frame = bytearray(codec.encode(Goodbye("why"), payload_bytes=100))
    frame[bit // 8] ^= 1 << bit % 8
    assert codec.is_damaged(frame)
    with pytest.raises(
        RemoteProtocolError, match=f"{PEER} sent a frame with a damaged head, [0-9a-f]{{32}}: its check"
    ):
        codec.decode_header(frame, PEER)


def test_the_preamble_is_known():
    codec.check_preamble(codec.preamble(), PEER)
    assert len(codec.preamble()) == codec.PREAMBLE_BYTES


def test_a_stranger_is_told_apart():
    with pytest.raises(RemoteProtocolError, match=rf"{PEER} is not a paramserver task: .*got b'GET / HT'"):
        codec.check_preamble(b"GET / HT", PEER)


def test_another_version_is_told_apart():
    with pytest.raises(RemoteProtocolError, match=f"{PEER} speaks .* 99, this task speaks {codec.VERSION}"):
        codec.check_preamble(struct.pack("<4sI", codec.MAGIC, 99), PEER)


NONSENSE = {
    "nothing": b"",
    "another format": b'{"type": "Done"}',
    "no such message": msgspec.msgpack.encode(["Reboot"]),
    "no tag": msgspec.msgpack.encode([]),
    "too few fields": msgspec.msgpack.encode(["Welcome"]),
    "a field of another type": msgspec.msgpack.encode(["Goodbye", 7]),
    "more than one": codec.encode(Done())[codec.HEADER_BYTES :] * 2,
    "text that is no text": b"\x92\xa7Goodbye\xa2\xff\xfe",
    "nested without end": b"\x92\xa4Done" + b"\x91" * 100_000 + b"\x01",
    "an array of four billion": b"\x92\xa4Pull\xdd\xff\xff\xff\xff",
    "a map of four billion": b"\x95\xa5Saved\xdf\xff\xff\xff\xff",
    "bytes without end": b"\x92\xa7Welcome\xc6\xff\xff\xff\xff",
}


@pytest.mark.parametrize("body", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_is_refused_without_taking_memory(body):
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError, match=f"{PEER} sent bytes that are not a message"):
            codec.decode(body, PEER)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_values_in_a_message_are_those_that_were_packed(dtype):
    values = torch.arange(7).to(dtype)
    for each in (values, values[::2], values[3:3], values[:1].expand(4)):
        back = unpacked(packed(each), dtype)
        assert back.dtype is dtype
        assert torch.equal(back, each)
        back.zero_()
    assert torch.equal(values, torch.arange(7).to(dtype))


@pytest.mark.parametrize("data", [b"1", b"12345", b"1234567"])
def test_a_part_of_an_element_is_none(data):
    with pytest.raises(ValueError, match=f"{len(data)} bytes are not a whole number of elements of 4 bytes"):
        unpacked(data, torch.float32)


def test_a_block_of_values_fits_into_a_message():
    largest = BLOCK * max(dtype.itemsize for dtype in DTYPES.values())
    assert largest < codec.MAX_MESSAGE_BYTES // 2
