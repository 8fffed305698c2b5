"""A lane of another package: bytes go over the Unix socket of a ps, without shared memory."""

from __future__ import annotations

from paramserver.transport.lane import LaneKind
from paramserver.transport.tcp import TcpLane, TcpSession


class UnixLane(TcpLane):
    """Sends and receives as over TCP, from and into the memory that is used."""

    name = "unix socket"


KIND = LaneKind(UnixLane, TcpSession, is_local=True)
