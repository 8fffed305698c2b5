"""The file by which a launched run is found while it goes on: where its ps tasks are, and its token.

Rules
    * The launcher writes the file before any task starts, and removes it when the chief has finished or the run ends.
      So a task of the run that cannot reach a ps learns from the file's absence that the run is over.
    * Files lie in a folder that only their user can read: they hold tokens.
    * A launcher that is killed leaves its file behind. `running` and `write` remove such files.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec

from paramserver.cluster import environment
from paramserver.errors import ConfigError


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A run that a launcher on this machine has started.

    Attributes:
        run_id: The id of the run.
        script: The program that the tasks run.
        launcher: The process id of the launcher.
        ps: The addresses of the ps tasks, by index.
        token: The secret of the run.
    """

    run_id: str
    script: str
    launcher: int
    ps: list[str]
    token: str

    @property
    def is_running(self) -> bool:
        """Whether the launcher is alive."""
        return Path(f"/proc/{self.launcher}").exists()


def write(run: Run) -> Path:
    """Write the file of a run, and return its path.

    Raises:
        ConfigError: If the folder cannot be written, or belongs to another user.
    """
    running()  # removes what launchers that were killed have left
    path = _folder() / f"{run.run_id}.json"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.encode(run))
    return path


def remove(path: Path) -> None:
    """Remove the file of a run. Idempotent."""
    path.unlink(missing_ok=True)


def running() -> list[Run]:
    """Return the runs that go on, in the order in which they were started."""
    runs: list[Run] = []
    for path in sorted(_folder().glob("*.json"), key=_age):
        with contextlib.suppress(OSError, msgspec.DecodeError):  # removed meanwhile, or of another version
            run = msgspec.json.decode(path.read_bytes(), type=Run)
            if run.is_running:
                runs.append(run)
            else:
                remove(path)
    return runs


def _age(path: Path) -> float:
    with contextlib.suppress(OSError):  # removed meanwhile
        return path.stat().st_mtime
    return 0.0


def _folder() -> Path:
    folder = environment.runtime_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
    except OSError as error:
        raise ConfigError(f"the folder of run files, {folder}: {error.strerror}; set XDG_RUNTIME_DIR") from error
    if state.st_uid != os.getuid() or state.st_mode & 0o077:
        raise ConfigError(
            f"the folder of run files, {folder}: expected one that only its user can read, got the mode "
            f"{state.st_mode & 0o777:o} and user {state.st_uid}; set XDG_RUNTIME_DIR to another place"
        )
    return folder
