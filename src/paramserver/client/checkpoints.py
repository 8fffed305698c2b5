"""The worker's half of long requests to a ps: keeps them going until they are done, and lends a folder meanwhile.

The other half is `server.checkpoints`. A ps that sees the folder reads and writes there itself and only reports that it
is still at work; a ps that does not see the folder asks this task to read or write for it.
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
    """Carries out reads and writes for ps tasks: a folder, or files in memory."""

    def carry_out(self, step: Read | Write) -> None:
        """Carry out one read or write."""


def ask_at_length(lanes: Exchange, calls: Sequence[Call], directory: Path, interval: float) -> list[messages.Reply]:
    """Ask several ps tasks at once, and return their last answers. Blocks until all are done.

    Args:
        lanes: The lanes to all ps tasks.
        calls: The calls, one for each ps.
        directory: Folder in which this task reads and writes for ps tasks that do not see it.
        interval: Seconds after which each ps has to report.

    Raises:
        UnavailableError: If a ps is lost.
        ParameterServerError: If a ps refuses; the error of the first one.
        CheckpointError: If a file cannot be read or written.
    """
    with CheckpointFolder(directory) as folder:
        return ask_with_files(lanes, calls, folder, interval)


def ask_with_files(lanes: Exchange, calls: Sequence[Call], files: Files, interval: float) -> list[messages.Reply]:
    """Do `ask_at_length` with any kind of files, which this task reads and writes for the ps tasks."""
    last: dict[Lane, messages.Reply] = {}
    going_on = list(calls)
    while going_on:
        replies = lanes.run(going_on).replies
        timeout = 0.0 if _asks_for_more(replies) else interval  # no ps waits for the disk of another
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
    """Read or write for a ps, and return the bytes it asked for."""
    match reply:
        case messages.FilePiece(file, size, is_shared, offset, content):
            files.carry_out(Write(file, size, is_shared, offset, memoryview(content)))
        case messages.Wanted(file, offset, count):
            wanted = bytearray(count)
            files.carry_out(Read(file, offset, memoryview(wanted)))
            return bytes(wanted)
    return b""
