"""A process that outlives the launcher by one moment, to kill what a launcher that was killed leaves behind.

Each task is the leader of a process group of its own, and so belongs to nobody once the launcher is gone. The
guard holds the reading end of a pipe whose other end only the launcher has. It learns the groups through it,
and when the pipe ends it kills them.

The kernel's own signal on the death of a parent would reach the tasks but not what they have started.

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
    """The launcher's side: starts the guard, tells it of groups, and ends it."""

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

        It takes no lock and only writes a few bytes: that is all that is safe between fork and exec.
        """
        announce(self._writer)

    def fileno(self) -> int:
        """What `announce` is called with where it is a descendant that becomes a task."""
        return self._writer

    def close(self) -> None:
        """End the guard without it killing anything. The groups must be gone. Idempotent."""
        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()
            os.close(self._writer)


def announce(descriptor: int) -> None:
    """As `Guard.enter`, in a process that has got the guard's descriptor."""
    os.write(descriptor, b"%d\n" % os.getpid())


def main() -> None:
    """The guard's side: read group ids until the launcher is gone, then kill the groups."""
    groups = [int(line) for line in sys.stdin]
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
