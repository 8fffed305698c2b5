"""A process that outlives the launcher by a moment, to kill the tasks of a launcher that was killed.

Each task is the leader of a process group of its own, so no process is responsible for it once the launcher is gone.
The guard holds the reading end of a pipe whose other end only the launcher has. It learns the groups through this pipe,
and kills them when the pipe ends.

The kernel's own signal on the death of a parent would reach the tasks, but not the processes that they have started.

This file is run as a program without site packages, so it imports the standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path


class Guard:
    """The launcher's side: starts the guard, tells it the groups, and ends it."""

    def __init__(self) -> None:
        reader, self._writer = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(Path(__file__).resolve())],
                stdin=reader,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except BaseException:
            os.close(self._writer)
            raise
        finally:
            os.close(reader)

    def enter(self) -> None:
        """Announce the calling process's group. Called in a child that is about to become a task.

        Takes no lock and only writes a few bytes, because nothing else is safe between fork and exec.
        """
        announce(self._writer)

    def fileno(self) -> int:
        """Return the descriptor for `announce` in a descendant that becomes a task."""
        return self._writer

    def close(self) -> None:
        """End the guard before it kills anything. The groups must be gone. Idempotent."""
        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()
            os.close(self._writer)


def announce(descriptor: int) -> None:
    """Do `Guard.enter` in a process that has the guard's descriptor."""
    os.write(descriptor, b"%d\n" % os.getpid())


def main() -> None:
    """Read group ids until the launcher is gone, and then kill the groups; the guard's side."""
    groups = [int(line) for line in sys.stdin]
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
