"""The worker's half of what takes a ps long: asks it to go on until it is done, and lends it a folder meanwhile.

The other half is `jobs`. A ps that sees the folder reads and writes there by itself and says no more than that it is
still at it; one that does not see it says what to read or write next.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from paramserver.checkpoint.folder import CheckpointFolder, Read, Write
from paramserver.client.exchange import Call, Exchange
from paramserver.transport.lane import Lane
from paramserver.wire import messages
from paramserver.wire.refusals import raised


class Files(Protocol):
    """Carries out what ps tasks ask for: a folder, or files in memory."""

    def carry_out(self, step: Read | Write) -> None:
        """Read or write."""


def ask_at_length(lanes: Exchange, calls: Sequence[Call], directory: Path, interval: float) -> list[messages.Reply]:
    """Ask several ps tasks at once; their last answers. Blocks for as long as it takes.

    Args:
        lanes: To all ps tasks.
        calls: What to ask, one for each ps.
        directory: Where those that do not see it have this task read and write.
        interval: Seconds after which each ps is to be heard of.

    Raises:
        UnavailableError: If a ps is lost.
        ParameterServerError: If a ps refuses; the first one that does.
        CheckpointError: If something cannot be read or written.
    """
    with CheckpointFolder(directory) as folder:
        return ask_with_files(lanes, calls, folder, interval)


def ask_with_files(lanes: Exchange, calls: Sequence[Call], files: Files, interval: float) -> list[messages.Reply]:
    """`ask_at_length` with files of any kind, which this task reads and writes for the ps tasks."""
    last: dict[Lane, messages.Reply] = {}
    going_on = list(calls)
    while going_on:
        replies = lanes.run(going_on).replies
        timeout = 0.0 if _asks_for_more(replies) else interval  # let nobody wait for the disk of another
        asked, going_on = going_on, []
        for (lane, *_), reply in zip(asked, replies, strict=True):
            if isinstance(reply, messages.Refused):
                raise raised(reply, lane.task)
            last[lane] = reply
            if isinstance(reply, messages.Underway | messages.FilePiece | messages.Wanted):
                going_on.append(Call(lane, messages.Proceed(timeout, _content(files, reply))))
    return [last[call.lane] for call in calls]


def _asks_for_more(replies: Iterable[messages.Reply]) -> bool:
    return any(isinstance(reply, messages.FilePiece | messages.Wanted) for reply in replies)


def _content(files: Files, reply: messages.Underway | messages.FilePiece | messages.Wanted) -> bytes:
    """Read or write for a ps; what it asked for."""
    match reply:
        case messages.FilePiece(file, size, is_shared, offset, content):
            files.carry_out(Write(file, size, is_shared, offset, memoryview(content)))
        case messages.Wanted(file, offset, count):
            wanted = bytearray(count)
            files.carry_out(Read(file, offset, memoryview(wanted)))
            return bytes(wanted)
    return b""
