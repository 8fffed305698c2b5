"""What a ps sends by TCP, over a pair of sockets in one thread."""

from __future__ import annotations

import contextlib
import socket

import torch

from paramserver.arena import ArenaLayout, StoreMemory, VariableSpec
from paramserver.rules import Rule
from paramserver.transport.frames import FrameSocket
from paramserver.transport.lane import Piece
from paramserver.transport.tcp import TcpSession
from paramserver.wire.messages import Done


def test_any_piece_of_an_arena_is_sent_also_of_one_that_workers_have_no_memory_for() -> None:
    table = ArenaLayout("float32", Rule("SGD", {}), (VariableSpec("t", (3, 2), "float32"),), is_table=True)
    ours, theirs = map(FrameSocket, socket.socketpair(), ("ps:0", "worker:0"))
    session = TcpSession(theirs, "incarnation")
    with contextlib.closing(ours), contextlib.closing(session):
        session.open([table], StoreMemory([], []))
        session.reply(Done(), [Piece(0, 0, 6), Piece(0, 2, 4)], lambda piece, out: out.fill_(piece.start + 1))
        assert ours.receive() == Done()
        values = torch.zeros(8)
        ours.receive_into(values.view(torch.uint8).numpy().data)
    assert values.tolist() == [1.0] * 6 + [3.0] * 2
