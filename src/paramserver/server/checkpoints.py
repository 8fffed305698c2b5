"""Transfers of checkpoints in small steps: saving and restoring the shard of a ps, or its slots.

Rules
    * A transfer goes on only while its peer asks it to. So the peer hears of it every second, and the transfer needs no
      thread of its own; it ends when the peer is gone.
    * A transfer whose files are on this host reads and writes them itself. Any other transfer asks its peer to read and
      write, piece by piece.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from pathlib import Path

from paramserver.checkpoint.folder import CheckpointFolder, EachStep, Read, Steps, Write
from paramserver.errors import RemoteProtocolError
from paramserver.store.shards.restore import read_shard, read_slots
from paramserver.store.shards.save import write_shard, write_slots
from paramserver.store.store import Store
from paramserver.wire import messages

PIECE_BYTES = 8 << 20
"""Limit for the bytes of a file that one message holds."""


def saving(store: Store, save: messages.Save) -> Steps[messages.Reply]:
    """Yield the steps of a save, and return the answer."""
    written = yield from write_shard(store, save.shard, save.num_shards)
    return messages.Saved(written.weight_map, written.slot_map, written.nbytes, written.pause, written.longest_pause)


def restoring(store: Store, restore: messages.Restore) -> Steps[messages.Reply]:
    """Yield the steps of a restore, and return the answer."""
    yield from read_shard(store, restore.directory, restore.weight_map, restore.slot_map)
    return messages.Done()


def reading_slots(store: Store, request: messages.ReadSlots) -> Steps[messages.Reply]:
    """Yield the steps of sending slots, and return the answer."""
    written = yield from write_slots(store, request.shard, request.num_shards, frozenset(request.variables))
    return messages.Saved(written.weight_map, written.slot_map, written.nbytes, written.pause, written.longest_pause)


def loading_slots(store: Store, request: messages.LoadSlots, source: str) -> Steps[messages.Reply]:
    """Yield the steps of loading slots from ``source``, and return the answer."""
    groups = [(group.variables, group.settings) for group in request.groups]
    yield from read_slots(store, groups, request.slot_map, source)
    return messages.Done()


Rounds = Generator[messages.Reply, bytes, messages.Reply]
"""Generator that yields an answer each round, is sent the content of each `Proceed`, and returns the last answer."""


class Transfer:
    """A task that is done step by step. Used by one thread.

    Args:
        rounds: The rounds, from `here` or `through_peer`.

    Attributes:
        is_over: Whether the last answer was the end of the transfer, or an error.
    """

    def __init__(self, rounds: Rounds) -> None:
        self.is_over = False
        self._rounds = rounds
        self._has_begun = False

    def proceed(self, timeout: float, content: bytes) -> messages.Reply:
        """Go on for about ``timeout`` seconds and for at least one step, and return the answer. Blocks.

        Args:
            timeout: In seconds.
            content: The content that the last answer asked for.

        Raises:
            CheckpointError: If a step cannot be carried out.
            RemoteProtocolError: If the content does not have the requested size.
        """
        give_up = time.monotonic() + timeout
        self.is_over = True  # unless there is another round
        try:
            reply = self._rounds.send(content) if self._has_begun else next(self._rounds)
            self._has_begun = True
            while isinstance(reply, messages.Underway) and time.monotonic() < give_up:
                reply = next(self._rounds)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]  # typeshed types the value as Any
        self.is_over = False
        return reply


def here(steps: Steps[messages.Reply], directory: Path) -> Rounds:
    """Carry out the steps in a folder on this host, one step in each round."""
    with CheckpointFolder(directory) as folder, EachStep(steps) as each:
        for step in each:
            folder.carry_out(step)
            yield messages.Underway()
        return each.result


def through_peer(steps: Steps[messages.Reply]) -> Rounds:
    """Have the peer carry out the steps, a piece of a step in each round."""
    with EachStep(steps) as each:
        for step in each:
            yield from _asked(step) if isinstance(step, Read) else _told(step)
        return each.result


def _asked(step: Read) -> Generator[messages.Reply, bytes, None]:
    for begin in range(0, step.out.nbytes, PIECE_BYTES):
        part = step.out[begin : begin + PIECE_BYTES]
        content = yield messages.Wanted(step.file, step.offset + begin, part.nbytes)
        if len(content) != part.nbytes:
            raise RemoteProtocolError(
                f"expected {part.nbytes} bytes of checkpoint file {step.file}, got {len(content)}"
            )
        part[:] = content


def _told(step: Write) -> Generator[messages.Reply, bytes, None]:
    file, size, is_shared, offset, content = step
    for begin in range(0, content.nbytes, PIECE_BYTES):
        part = bytes(content[begin : begin + PIECE_BYTES])
        yield messages.FilePiece(file, size, is_shared, offset + begin, part)
