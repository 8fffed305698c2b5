"""The handshake of two tasks: they find each other, verify each other, and choose a lane. This is the worker's side.

The ps's side is `admission`, which `reception` runs.

Rules
    * Each side sends its preamble at once: magic and protocol version.
    * The ps challenges with a nonce; the worker proves that it holds the run's token by an HMAC over this nonce, and
      the ps does the same over the worker's nonce. The token itself never travels.
    * The challenge names a Unix socket of the ps in Linux's abstract namespace. A worker that can connect to this
      socket is on the same host, and goes on there with a local lane if it may choose one. The worker names the lane
      that it has chosen, and both ends look it up by this name.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable

from paramserver.errors import DeadlineError, RefusedError, RemoteProtocolError, RunOverError, TokenError
from paramserver.layout.lanes import check_platform
from paramserver.memory import shared_file
from paramserver.transport.frames import FrameSocket
from paramserver.transport.identity import NONCE_BYTES, Identity
from paramserver.transport.lane import Lane, WorkerMemory
from paramserver.transport.lanes import usable_lanes
from paramserver.transport.tcp import expect_reply
from paramserver.transport.waiting import WaitLog
from paramserver.wire import codec
from paramserver.wire.messages import Challenge, Hello, Refused, Welcome
from paramserver.wire.refusals import raised

logger = logging.getLogger(__name__)

LOCAL_TIMEOUT = 30.0
"""Seconds to wait until a ps takes a connection to its local socket."""
REQUEST_TIMEOUT = 600.0
"""Seconds after which a ps that does not answer counts as lost. The longest requests write or read a shard."""
ATTEMPT_TIMEOUT = 10.0
"""Seconds after which a connection that is not answered is given up and tried again, so that a wait can be said."""
RETRY_INTERVAL = 0.1
SHORTEST_WAIT = 0.01


def connect(
    address: str | Callable[[], str],
    peer: str | None,
    me: Identity,
    *,
    lane: str,
    timeout: float,
    is_over: Callable[[], bool] = lambda: False,
    kept: WorkerMemory | None = None,
) -> Lane:
    """Connect to the ps ``peer`` at ``address``, trying again until it is up. Blocks for about ``timeout`` at most.

    Args:
        address: The address of the ps, ``host:port``; or a function that finds it, called for each try.
        peer: The expected ps; None accepts any ps.
        me: The identity of this task.
        lane: The name of a lane, or ``auto``.
        timeout: Seconds to try.
        is_over: Returns whether the run is known to be over; asked while the ps cannot be reached.
        kept: The memory of an earlier lane, which the new lane will go on with.

    Raises:
        ConfigError: If there is no such lane, or this system has no lanes.
        RunOverError: If the run is over.
        DeadlineError: If the ps does not come up in time.
        TokenError: If this task or the ps does not hold the token of the run.
        RefusedError: If another ps is at the address, or the lane does not lead to the ps.
        RemoteProtocolError: If something other than a ps answers, or a ps of another version.
        UnavailableError: If the ps goes away after its challenge.
    """
    check_platform(f"connecting to {peer or 'a ps'}")
    kinds = usable_lanes(lane, kept)
    find = address if callable(address) else lambda: address
    frames, challenge = _reach(find, peer or "the ps", timeout, is_over, WaitLog(me.task, timeout))
    if peer is None:
        frames.task = peer = challenge.task
    try:
        for name, kind in kinds.items():
            if not kind.is_local:
                return kind.lane(_introduce(frames, challenge, me, name))
            if local := _dial_local(challenge.local_socket, peer):
                frames.close()
                frames = local
                return kind.lane(_introduce(frames, _meet(frames, timeout), me, name))
        raise RefusedError(f"a {lane} lane does not lead from {me.task} to {peer}, which is on another host", me.task)
    except BaseException:
        frames.close()
        raise


def connect_heartbeats(address: str, peer: str, me: Identity, *, timeout: float, limit: float) -> FrameSocket:
    """Open a connection for heartbeats to a ps that is up; one is due within ``limit`` seconds. Blocks.

    Raises:
        ParameterServerError: As `connect`.
    """
    frames, challenge = _reach(lambda: address, peer, timeout, lambda: False, WaitLog(me.task, timeout))
    try:
        return _introduce(frames, challenge, me, "tcp", limit)
    except BaseException:
        frames.close()
        raise


def _reach(
    find_address: Callable[[], str], peer: str, timeout: float, is_over: Callable[[], bool], log: WaitLog
) -> tuple[FrameSocket, Challenge]:
    """Return a connection to the ps and its challenge, as soon as the ps is up.

    A connection that is closed before the challenge is tried again: a proxy may accept before its ps is up.
    """
    give_up = time.monotonic() + timeout
    is_resolved = True
    pause = threading.Event()  # only a pause: there is nothing to wait on before the peer listens
    while True:
        address = find_address()
        try:
            return _try_to_reach(address, peer, give_up)
        except OSError as error:  # an UnavailableError is one
            if is_over():
                raise RunOverError(f"{peer} at {address} has left: the run is over") from error
            if time.monotonic() + RETRY_INTERVAL > give_up:
                raise DeadlineError(
                    f"{peer} at {address} did not come up within {timeout:g} s ({error}); "
                    "is it started, and is the address in TF_CONFIG right?",
                    timeout,
                ) from error
            if is_resolved and isinstance(error, socket.gaierror):
                is_resolved = False  # said at once, but it may come to be known, as those of pods do
                logger.warning("%s: the name in its address %s does not resolve: %s", peer, address, error.strerror)
            log.say(f"{peer} at {address}", str(error))
        pause.wait(RETRY_INTERVAL)


def _try_to_reach(address: str, peer: str, give_up: float) -> tuple[FrameSocket, Challenge]:
    host, _, port = address.rpartition(":")
    frames = FrameSocket(socket.create_connection((host.strip("[]"), int(port)), _remaining(give_up)), peer)
    try:
        return frames, _meet(frames, _remaining(give_up))
    except BaseException:
        frames.close()
        raise


def _remaining(give_up: float) -> float:
    return min(max(give_up - time.monotonic(), SHORTEST_WAIT), ATTEMPT_TIMEOUT)


def _dial_local(name: str, peer: str) -> FrameSocket | None:
    if not name or not shared_file.can_share():
        return None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(LOCAL_TIMEOUT)
    try:
        connection.connect(f"\0{name}")
    except OSError:
        connection.close()
        return None
    return FrameSocket(connection, peer)


def _meet(frames: FrameSocket, timeout: float) -> Challenge:
    frames.set_timeout(max(timeout, SHORTEST_WAIT))
    frames.max_message_bytes = codec.MAX_HANDSHAKE_BYTES
    frames.send_raw(codec.preamble())
    codec.check_preamble(frames.receive_raw(codec.PREAMBLE_BYTES), frames.task)
    challenge = expect_reply(frames)
    if not isinstance(challenge, Challenge):
        raise RemoteProtocolError(f"{frames.task} was expected to start with a challenge, and sent {challenge}")
    return challenge


def _introduce(
    frames: FrameSocket, challenge: Challenge, me: Identity, lane: str, heartbeat: float = 0.0
) -> FrameSocket:
    peer = frames.task
    nonce = secrets.token_bytes(NONCE_BYTES)
    frames.send(Hello(me.task, peer, me.incarnation, me.proof(challenge.nonce), nonce, lane, heartbeat))
    answer = expect_reply(frames)
    if isinstance(answer, Refused):
        raise raised(answer, peer)
    if not isinstance(answer, Welcome) or not hmac.compare_digest(answer.proof, me.proof(nonce, peer)):
        raise TokenError(f"{peer} could not prove that it belongs to this run; is something else at its address?", peer)
    frames.max_message_bytes = codec.MAX_MESSAGE_BYTES
    frames.set_timeout(REQUEST_TIMEOUT)
    return frames
