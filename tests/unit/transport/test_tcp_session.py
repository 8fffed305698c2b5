"""What a ps sends by TCP, over a pair of sockets."""

from __future__ import annotations

import contextlib
import mmap
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from paramserver.layout.arena import ArenaLayout
from paramserver.layout.blocks import BLOCK
from paramserver.layout.rules import Rule
from paramserver.layout.variables import VariableSpec
from paramserver.memory.arena_memory import StoreMemory
from paramserver.transport.frames import FrameSocket
from paramserver.transport.lane import Piece, whole_blocks
from paramserver.transport.tcp import IN_PLACE, TcpLane, TcpSession
from paramserver.wire.messages import Done

Pair = tuple[FrameSocket, TcpSession]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = map(FrameSocket, socket.socketpair(), ("ps:0", "worker:0"))
    session = TcpSession(theirs, "incarnation")
    with contextlib.closing(ours), contextlib.closing(session):
        yield ours, session


def received(frames: FrameSocket, count: int) -> torch.Tensor:
    """The values that come with a reply."""
    assert frames.receive() == Done()
    values = torch.zeros(count)
    frames.receive_into(values.view(torch.uint8).numpy().data)
    return values


def in_page(tensor: torch.Tensor) -> int:
    """How far into its page a tensor's memory begins."""
    return tensor.data_ptr() % mmap.PAGESIZE


def test_what_is_sent_and_received_lies_as_far_into_its_page_as_no_message_is_long(pair: Pair) -> None:
    frames, session = pair
    layouts = [ArenaLayout("float32", None, (VariableSpec(f"v{size}", (size,), "float32"),)) for size in (1, 3000)]
    memory = TcpLane(frames).open(layouts)
    session.open(layouts, StoreMemory([torch.zeros(layout.size) for layout in layouts], []))
    assert [in_page(each) for each in (*memory.values, *memory.gradients)] == [mmap.PAGESIZE // 2] * 4
    assert [each.tolist() for each in memory.gradients] == [[0] * layout.on_worker.size for layout in layouts]
    for index, layout in enumerate(layouts):
        frames.send(Done(), [memoryview(bytes(layout.nbytes))])
        session.receive()
        assert in_page(session.gradient(Piece(index, 0, layout.size))) == mmap.PAGESIZE // 2


def test_any_piece_of_an_arena_is_sent_also_of_one_that_workers_have_no_memory_for(pair: Pair) -> None:
    ours, session = pair
    table = ArenaLayout("float32", Rule("SGD", {}), (VariableSpec("t", (3, 2), "float32"),), is_table=True)
    session.open([table], StoreMemory([torch.arange(6.0)], []))
    session.reply(Done(), [Piece(0, 0, 6), Piece(0, 2, 4)], lambda _: contextlib.nullcontext())
    assert received(ours, 8).tolist() == [0, 1, 2, 3, 4, 5, 2, 3]


@pytest.mark.parametrize(("blocks", "in_place"), [(2, False), (4, True)])
def test_a_piece_is_of_one_moment_also_if_the_connection_takes_only_a_part_of_it_at_once(
    pair: Pair, blocks: int, in_place: bool
) -> None:
    """And the lock is not held while the rest waits for the peer."""
    ours, session = pair
    values = torch.zeros(blocks * BLOCK)
    assert (values.nbytes >= IN_PLACE) == in_place
    held = 0

    @contextlib.contextmanager
    def lock(piece: Piece) -> Iterator[None]:
        nonlocal held
        yield
        held += 1
        values[piece.start : piece.stop] = float(held)  # as whoever waited for the lock

    layout = ArenaLayout("float32", None, (VariableSpec("v", (blocks * BLOCK,), "float32"),))
    session.open([layout], StoreMemory([values], []))
    with ThreadPoolExecutor(1) as pool:
        arrived = pool.submit(received, ours, blocks * BLOCK)
        session.reply(Done(), whole_blocks([layout]), lock)
        assert not np.any(arrived.result(10).numpy())
    assert values[::BLOCK].tolist() == list(range(1, blocks + 1))
