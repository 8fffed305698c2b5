"""Every message survives the way; what is no message is a protocol error and nothing else."""

import builtins
import contextlib
import types
import typing
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paramserver.errors import RemoteProtocolError
from paramserver.wire import codec
from paramserver.wire.messages import AnyMessage, Message

PLAIN: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(-(2**63), 2**64 - 1),
    str: st.text(max_size=20),
    bytes: st.binary(max_size=40),
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
    NoneType: st.none(),
}


def value(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of a type that messages use."""
    arguments = get_args(hint)
    match get_origin(hint):
        case typing.Annotated:
            return limited(arguments[0], arguments[1])
        case None if hint in PLAIN:
            return PLAIN[hint]
        case None:
            fields = get_type_hints(hint, include_extras=True)
            return st.builds(hint, **{name: value(field) for name, field in fields.items()})
        case types.UnionType | typing.Union:
            return st.one_of([value(argument) for argument in arguments])
        case typing.Literal:
            return st.sampled_from(arguments)
        case builtins.dict:
            return st.dictionaries(value(arguments[0]), value(arguments[1]), max_size=3)
        case _ if arguments[-1] is Ellipsis:
            return st.lists(value(arguments[0]), max_size=3).map(tuple)
        case _:
            return st.tuples(*map(value, arguments))


def limited(hint: Any, limits: msgspec.Meta) -> st.SearchStrategy[Any]:
    """Any value of a type within its limits; texts and lists are short anyway."""
    if hint is int:
        most = limits.le if limits.lt is None else limits.lt - 1
        return st.integers(limits.ge, most)
    if hint is float:
        return st.floats(limits.ge, limits.le)
    return value(hint) if limits.pattern is None else st.from_regex(limits.pattern, fullmatch=True)


MESSAGES: list[type[Message]] = list(get_args(AnyMessage))
messages = st.sampled_from(MESSAGES).flatmap(value)


def body_of(message: Message) -> bytes:
    return codec.encode(message)[codec.HEADER_BYTES :]


def test_every_message_is_in_the_union() -> None:
    assert set(MESSAGES) == set(Message.__subclasses__())


@settings(max_examples=30)  # of each
@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.__name__)
@given(st.data(), st.integers(0, 2**64 - 1))
def test_every_message_round_trips(message: type[Message], data: st.DataObject, payload_bytes: int) -> None:
    sent = data.draw(value(message))
    frame = codec.encode(sent, payload_bytes)
    header = codec.decode_header(frame, "ps:0")
    assert header == (len(frame) - codec.HEADER_BYTES, payload_bytes)
    assert codec.decode(memoryview(frame)[codec.HEADER_BYTES :], "ps:0") == sent


@given(messages, st.data())
def test_a_message_that_is_cut_short_is_no_message(message: Message, data: st.DataObject) -> None:
    body = body_of(message)
    with pytest.raises(RemoteProtocolError, match="ps:0 sent bytes"):
        codec.decode(body[: data.draw(st.integers(0, len(body) - 1))], "ps:0")


@given(messages, st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_message_that_was_damaged_is_another_or_none(message: Message, damages: list[tuple[int, int]]) -> None:
    body = bytearray(body_of(message))
    for place, byte in damages:
        body[place % len(body)] = byte
    decode_or_refuse(bytes(body))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_none(body: bytes) -> None:
    decode_or_refuse(body)


def decode_or_refuse(body: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        assert isinstance(codec.decode(body, "ps:0"), Message)


@given(st.binary(min_size=codec.HEADER_BYTES, max_size=codec.HEADER_BYTES))
def test_any_header_is_within_the_limit_or_refused(data: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        assert codec.decode_header(data, "ps:0")[0] <= codec.MAX_MESSAGE_BYTES
