"""A worker's connection to a ps, from the end of its handshake to its own end."""

from __future__ import annotations

import contextlib
import logging
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from paramserver.errors import ParameterServerError, RemoteProtocolError, RunOverError, UnavailableError
from paramserver.server.models import Models
from paramserver.server.threads import Hook, Pace
from paramserver.store.liveness import Liveness
from paramserver.store.membership import Membership
from paramserver.transport.complaints import Complaints
from paramserver.transport.frames import FrameSocket
from paramserver.transport.identity import OBSERVER, Identity
from paramserver.transport.lane import Session
from paramserver.transport.lanes import lane_kind
from paramserver.transport.reception import Guest
from paramserver.wire import messages
from paramserver.wire.refusals import refused

logger = logging.getLogger(__name__)

QUICK_ELEMENTS = 64 << 10
"""Limit for the elements that a quick request reads and writes: about 10 microseconds, while other connections wait."""


@dataclass(frozen=True)
class Host:
    """The ps, as its connections see it.

    Attributes:
        me: The identity of the ps.
        membership: The tasks that take part in the run.
        models: The models that it holds.
        complaints: Takes the faults of peers.
        liveness: The signs of life of the workers.
        hang_up: Ends all connections of an incarnation.
    """

    me: Identity
    membership: Membership
    models: Models
    complaints: Complaints
    liveness: Liveness
    hang_up: Callable[[str], None]


class Conversation:
    """All requests on one connection, and their answers; implements `threads.Served`.

    Args:
        guest: The connection, which has proved itself; owned by this object from now on.
        host: The ps that accepted it.
    """

    def __init__(self, guest: Guest, host: Host) -> None:
        self._connection = guest.connection
        self._hello = guest.hello
        self.incarnation = guest.hello.incarnation
        self.is_seldom = bool(guest.hello.heartbeat)
        self._host = host
        self._frames: FrameSocket | None = None
        self._session: Session | None = None
        self._model: int | None = None
        self._is_draining = False
        self._handler = host.models.handler(0)

    @property
    def before_wait(self) -> Hook | None:
        """See `threads.Served`."""
        return self._frames.before_wait if self._frames else None

    @before_wait.setter
    def before_wait(self, hook: Hook | None) -> None:
        if self._frames:
            self._frames.before_wait = hook

    def fileno(self) -> int:
        """See `threads.Served`."""
        return self._connection.fileno()

    def proceed(self) -> Pace:
        """Make the session, and after that carry out one request at a time; see `threads.Served`."""
        try:
            if self._frames is None or self._session is None:
                return self._begin()
            return self._go_on(self._frames, self._session)
        except UnavailableError as error:  # no failure by itself: the membership judges how the peer has left
            logger.info("%s: %s", self._host.me.task, str(error))
        except ParameterServerError as error:
            self._complain(error, f"ended a connection: {error}")
        except Exception as error:  # noqa: BLE001  # the failure of one connection must not end any other
            self._complain(error, f"lost the connection of {self._hello.task} by an error:\n{traceback.format_exc()}")
        return Pace.OVER

    def _complain(self, error: Exception, message: str) -> None:
        kind = f"{type(error).__name__} of {self._hello.task}"
        self._host.complaints.add(kind, f"{self._host.me.task} {message}")

    def end(self) -> None:
        """See `threads.Served`."""
        if self._hello.heartbeat:
            self._host.liveness.forget(self.incarnation, self)
        if self._model is not None and self._session:
            has_left = self._host.membership.disconnect(self._session.task, self._session.incarnation)
            self._host.models.leave(self._model, said_goodbye=has_left)
        if self._session:
            self._session.close()
        self._connection.close()

    def drain(self) -> None:
        """See `threads.Served`."""
        self._is_draining = True
        with contextlib.suppress(OSError):  # it may be closed already
            self._connection.shutdown(socket.SHUT_RD)

    def hang_up(self) -> None:
        """See `threads.Served`."""
        with contextlib.suppress(OSError):  # it may be closed already
            self._connection.shutdown(socket.SHUT_RDWR)

    def _begin(self) -> Pace:
        # On this thread and not at the reception: a lane may wait for its peer here.
        self._frames = FrameSocket(self._connection, self._hello.task)
        self._session = lane_kind(self._hello.lane).session(self._frames, self._hello.incarnation)
        if self._hello.heartbeat:
            self._beat()
            return Pace.QUICK  # most of the time, it waits among others
        return Pace.SLOW if self._session.task == OBSERVER else self._join(self._session)

    def _beat(self) -> None:
        self._host.liveness.beat(self._hello.task, self.incarnation, self._hello.heartbeat, self)

    def _join(self, session: Session) -> Pace:
        try:
            self._host.models.check_alive()  # first, because a run that has failed is over as well
            self._model = self._host.membership.join(session.task, session.incarnation)
        except ParameterServerError as error:
            try:
                session.receive()
                session.reply(refused(error))
            finally:  # the worker counts as having left, even if it does not wait for the refusal
                if isinstance(error, RunOverError):
                    self._host.membership.leave(session.task, session.incarnation)
            return Pace.OVER
        for replaced in self._host.membership.replaced(session.task, session.incarnation):
            self._host.hang_up(replaced)
        self._handler = self._host.models.enter(self._model)
        return Pace.SLOW

    def _go_on(self, frames: FrameSocket, session: Session) -> Pace:
        try:
            if frames.before_wait and not frames.gather():
                return Pace.QUICK
            request = session.receive()
            if request is None:
                return Pace.OVER
            is_quick = self._handler.pushes.elements(request) <= QUICK_ELEMENTS
            if frames.before_wait and not is_quick:
                frames.before_wait()
            self._carry_out(session, request)
        except RemoteProtocolError as error:
            with contextlib.suppress(UnavailableError):  # the peer may be gone
                session.reply(refused(error))
            raise
        if self._is_draining:  # by TCP, more may still come in
            return Pace.OVER
        return Pace.QUICK if is_quick and not frames.has_more else Pace.SLOW

    def _carry_out(self, session: Session, request: messages.Request) -> None:
        if isinstance(request, messages.Heartbeat):
            self._beat()
            session.reply(messages.Done())
        elif isinstance(request, messages.GetStatus):
            session.reply(self._host.models.status())
        elif session.task != OBSERVER:
            self._handler.handle(session, request)
        else:  # an observer takes no part in the run: no task waits for it, and it changes nothing
            me, what = self._host.me.task, f"{type(request).__name__} of {session.task}"
            session.reply(messages.Refused("refused", f"{me} refused {what}: an observer may only ask for the status"))
