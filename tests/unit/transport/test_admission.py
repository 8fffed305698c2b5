"""The ps's side of the handshake, without a socket."""

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paramserver.errors import ParameterServerError, RefusedError, RemoteProtocolError, TokenError
from paramserver.transport.admission import admit
from paramserver.transport.identity import Identity
from paramserver.wire import codec
from paramserver.wire.messages import Challenge, Declare, Goodbye, Hello, Refused, Welcome

PS = Identity(task="ps:0", token="a secret", incarnation="p")
WORKER = Identity(task="worker:1", token="a secret", incarnation="w")
NONCE = b"n" * 16


class Peer:
    """What a peer sends and receives, as fast as it is asked for."""

    def __init__(self, is_local=False):
        self.sent = b""
        self.hello = None
        self._admission = admit(PS, "a local socket", is_local=is_local)
        self._turn = next(self._admission)
        self.sent += self._turn.send

    def say(self, data):
        """Send bytes; return those that were not asked for."""
        while self.hello is None and len(data) >= self._turn.receive:
            wanted, data = data[: self._turn.receive], data[self._turn.receive :]
            try:
                self._turn = self._admission.send(wanted)
            except StopIteration as end:
                self.hello = end.value
            else:
                self.sent += self._turn.send
        return data

    def challenge(self):
        """The challenge that it was sent first, after the preamble."""
        return next(self.messages())

    def messages(self):
        """All messages that it was sent."""
        left = self.sent[codec.PREAMBLE_BYTES :]
        while left:
            size, _ = codec.decode_header(left, "ps:0")
            yield codec.decode(left[codec.HEADER_BYTES :][:size], "ps:0")
            left = left[codec.HEADER_BYTES + size :]


def hello(to, **changes):
    proof = WORKER.proof(to.challenge().nonce)
    return codec.encode(msgspec.structs.replace(Hello("worker:1", "ps:0", "w", proof, NONCE, "tcp"), **changes))


def test_it_speaks_first():
    peer = Peer()
    assert peer.sent.startswith(codec.preamble())
    challenge = peer.challenge()
    assert isinstance(challenge, Challenge)
    assert (challenge.task, challenge.local_socket) == ("ps:0", "a local socket")
    assert challenge.nonce != Peer().challenge().nonce


def test_a_peer_that_holds_the_token_is_welcome_and_not_a_byte_more_is_taken():
    peer = Peer()
    rest = peer.say(codec.preamble() + hello(peer) + b"for the lane")
    assert rest == b"for the lane"
    assert (peer.hello.task, peer.hello.lane) == ("worker:1", "tcp")
    assert list(peer.messages())[1:] == [Welcome(PS.proof(NONCE))]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"proof": b"guessed"}, TokenError, "it does not hold the token"),
        ({"task": "worker:2"}, TokenError, "worker:2: it does not hold the token"),
        ({"peer": "ps:1"}, RefusedError, "worker:1 looked for ps:1 and found ps:0"),
        ({"lane": "rdma"}, RefusedError, "cannot serve worker:1: .*'rdma'"),
        ({"lane": "shared-memory"}, RefusedError, "from another host"),
    ],
)
def test_whoever_is_refused_is_told_why(changes, error, words):
    peer = Peer()
    with pytest.raises(error, match=words) as caught:
        peer.say(codec.preamble() + hello(peer, **changes))
    _, refusal = peer.messages()
    assert isinstance(refusal, Refused)
    assert refusal.message == str(caught.value)


@pytest.mark.parametrize("message", [Goodbye("forged\nline"), Declare((), create=True), Welcome(b"")])
def test_another_message_is_named_and_not_repeated(message):
    peer = Peer()
    with pytest.raises(RemoteProtocolError) as caught:
        peer.say(codec.preamble() + codec.encode(message))
    assert str(caught.value).endswith(f"was challenged and answered {type(message).__name__}")


def test_a_payload_is_not_waited_for():
    peer = Peer()
    body = hello(peer)[codec.HEADER_BYTES :]
    with pytest.raises(RemoteProtocolError, match="announced a payload"):
        peer.say(codec.preamble() + codec.head(len(body), 1 << 40) + body)


@given(st.lists(st.binary(max_size=40)))
def test_any_bytes_are_refused_or_waited_for(pieces):
    peer, left = Peer(), b""
    with contextlib.suppress(ParameterServerError):
        for piece in pieces:
            left = peer.say(left + piece)
    assert peer.hello is None
