"""Which checkpoints a model_dir holds: the file ``checkpoint``, and the folders that it lists.

Rules:

1. A checkpoint is a folder ``ckpt-STEP`` with an index in it. It is written as ``ckpt-STEP.tmp-XXXX`` and
   renamed, so a folder of the final name is whole.
2. The state file names a checkpoint only when it is whole, and stops naming it before it is deleted.
3. The state file is replaced in one move: a reader sees the old or the new one, never a part.
4. One process writes (the chief), any may read. Names in the file are relative: a model_dir can be moved.
5. A checkpoint that cannot be deleted is no reason to end a training.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from paramserver.checkpoint_files import VALUES_INDEX
from paramserver.errors import CheckpointError, ConfigError

STATE_FILE = "checkpoint"
INDEX_FILE = VALUES_INDEX

_NAME = re.compile(r"ckpt-(\d+)")
_LEFTOVERS = ("ckpt-*.tmp-*", f"{STATE_FILE}.tmp-*")
_log = logging.getLogger(__name__)


class CheckpointState(msgspec.Struct, frozen=True, kw_only=True):
    """What the state file says. Names are folders in model_dir."""

    latest: str | None = None
    retained: tuple[str, ...] = ()
    """Oldest first; the last is ``latest``. Checkpoints that are spared for good are not in it."""
    saved_at: dict[str, float] = {}
    """When each retained checkpoint was recorded, in seconds since 1970."""
    spare_after: float | None = None
    """Of the checkpoints after this time one more will be spared."""
    run_id: str = ""
    """The run that trains, or trained last, in this model_dir."""
    finished: bool = False
    """Whether that run has ended by itself: no newer checkpoint will come of it."""
    finished_at: float | None = None
    """When it ended, in seconds since 1970."""


def read_state(model_dir: str) -> CheckpointState | None:
    """The state of a model_dir; None where there is none, or, with a warning, where it cannot be read."""
    path = Path(model_dir, STATE_FILE)
    try:
        state = msgspec.json.decode(path.read_bytes(), type=CheckpointState)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        _log.warning("%s: cannot be read (%s); taken as if there were no checkpoint", path, error)
        return None
    names = (*state.retained, *([] if state.latest is None else [state.latest]))
    if strange := [name for name in names if not _NAME.fullmatch(name)]:
        _log.warning(
            "%s: names %r, expected ckpt-STEP; taken as if there were no checkpoint", path, strange[0]
        )
        return None
    return state


def latest_checkpoint(model_dir: str) -> str | None:
    """The path of the newest checkpoint, None where there is none or its files are gone."""
    state = read_state(model_dir)
    if state is None or state.latest is None:
        return None
    path = Path(model_dir, state.latest)
    return str(path) if is_whole(str(path)) else None


def checkpoint_to_restore(model_dir: str) -> str | None:
    """What a training starts from: `latest_checkpoint`, but one that was damaged is not passed over in silence.

    Raises:
        CheckpointError: If the latest checkpoint is there, and has lost its index.
    """
    state = read_state(model_dir)
    if state is None or state.latest is None:
        return None
    path = Path(model_dir, state.latest)
    if is_whole(str(path)):
        return str(path)
    if path.exists():
        raise CheckpointError(
            f"checkpoint {path} is cut short: it has no {INDEX_FILE}; bring it back, or delete "
            f"{Path(model_dir, STATE_FILE)} to train from the beginning",
            str(path),
        )
    _log.warning("checkpoint %s is gone; training starts from the beginning", path)
    return None


def is_whole(checkpoint_path: str) -> bool:
    """Whether a path holds a checkpoint that was written to its end."""
    return Path(checkpoint_path, INDEX_FILE).is_file()


def checkpoint_step(checkpoint_path: str) -> int:
    """The global step in a checkpoint's name. Raises CheckpointError where it is no checkpoint's name."""
    match = _NAME.fullmatch(Path(checkpoint_path).name)
    if match is None:
        raise CheckpointError(f"{checkpoint_path}: expected a folder named ckpt-STEP", checkpoint_path)
    return int(match[1])


class CheckpointManager:
    """Keeps the state file and deletes what is too old. For the chief; not thread-safe.

    Args:
        model_dir: Made by the first write.
        keep_max: How many of the newest checkpoints are kept; None or 0 keeps all.
        keep_every_n_hours: Of each such period one checkpoint is spared when it would be deleted.
        clock: Returns seconds since 1970, because they must still hold after a restart.

    Raises:
        ConfigError: If ``keep_max`` is negative or ``keep_every_n_hours`` not positive.
    """

    def __init__(
        self,
        model_dir: str,
        keep_max: int | None = 5,
        keep_every_n_hours: float = 10_000,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if keep_max is not None and keep_max < 0:
            raise ConfigError(f"CheckpointManager: keep_max: expected at least 0 or None, got {keep_max!r}")
        if not keep_every_n_hours > 0:
            raise ConfigError(
                f"CheckpointManager: keep_every_n_hours: expected a positive number, got {keep_every_n_hours}"
            )
        self.model_dir = model_dir
        self._keep_max = keep_max or 0
        self._period = keep_every_n_hours * 3600
        self._clock = clock
        self._state = self._recovered()

    def __repr__(self) -> str:
        return f"CheckpointManager({self.model_dir!r}, retained={list(self._state.retained)})"

    @property
    def state(self) -> CheckpointState:
        """What the state file says, or will say after the first write."""
        return self._state

    def save_path(self, step: int) -> str:
        """Where the checkpoint of a step lies, or will lie."""
        return str(Path(self.model_dir, f"ckpt-{step}"))

    def temporary_path(self, step: int) -> str:
        """Make a new folder to write the checkpoint of a step into; `publish` gives it its final name.

        Raises:
            CheckpointError: If model_dir cannot be written.
        """
        folder = _aside(Path(self.save_path(step)))
        with _as_checkpoint_error(self.model_dir, "cannot be written"):
            folder.mkdir(parents=True)
        return str(folder)

    def is_saved(self, step: int) -> bool:
        """Whether the checkpoint of a step is recorded and whole, so that it need not be written again."""
        path = self.save_path(step)
        return Path(path).name in self._state.retained and is_whole(path)

    def publish(self, temporary_path: str, step: int) -> str:
        """Give a whole checkpoint its final name and record it; its path.

        Raises:
            CheckpointError: If it has no index, or cannot be renamed.
        """
        path = self.save_path(step)
        if not is_whole(temporary_path):
            raise CheckpointError(f"{temporary_path}: is cut short: it has no {INDEX_FILE}", temporary_path)
        with _as_checkpoint_error(path, "cannot be put in place"):
            self._remove(Path(path).name)  # one of an earlier run, after the state that named it was lost
            Path(temporary_path).rename(path)
            _sync_folder(Path(self.model_dir))
        self.record(step)
        return path

    def record(self, step: int) -> None:
        """The checkpoint of ``step`` is whole: name it the latest, and delete what is too old.

        Raises:
            CheckpointError: If the state file cannot be written.
        """
        name, now = Path(self.save_path(step)).name, self._clock()
        before = self._state
        retained = [*(other for other in before.retained if other != name), name]
        spare_after = now + self._period if before.spare_after is None else before.spare_after
        saved_at = {**before.saved_at, name: now}
        doomed = []
        while self._keep_max and len(retained) > self._keep_max:
            oldest = retained.pop(0)
            if saved_at.get(oldest, 0.0) > spare_after:
                spare_after = saved_at[oldest] + self._period
            else:
                doomed.append(oldest)
        self._write(
            latest=name,
            retained=tuple(retained),
            saved_at={kept: saved_at[kept] for kept in retained if kept in saved_at},
            spare_after=spare_after,
        )
        for oldest in doomed:
            self._remove(oldest)

    def mark_started(self, run_id: str) -> None:
        """A run begins to train here. Raises CheckpointError if the state file cannot be written."""
        self._write(run_id=run_id, finished=False, finished_at=None)

    def mark_finished(self, run_id: str) -> None:
        """A run has ended by itself, all its checkpoints are recorded. Tells an evaluator to finish, too.

        Raises:
            CheckpointError: If the state file cannot be written.
        """
        self._write(run_id=run_id, finished=True, finished_at=self._clock())

    def remove_leftovers(self) -> None:
        """Delete what an earlier run began to write and did not finish. Only while no other run writes."""
        for pattern in _LEFTOVERS:
            for path in Path(self.model_dir).glob(pattern):
                _delete(path)

    def _recovered(self) -> CheckpointState:
        state = read_state(self.model_dir) or CheckpointState()
        there = tuple(name for name in state.retained if is_whole(str(Path(self.model_dir, name))))
        return msgspec.structs.replace(state, retained=there)

    def _write(self, **changes: object) -> None:
        self._state = msgspec.structs.replace(self._state, **changes)
        text = msgspec.json.format(msgspec.json.encode(self._state), indent=2)
        with _as_checkpoint_error(str(Path(self.model_dir, STATE_FILE)), "cannot be written"):
            Path(self.model_dir).mkdir(parents=True, exist_ok=True)
            _replace_file(Path(self.model_dir, STATE_FILE), text)

    def _remove(self, name: str) -> None:
        """Delete a checkpoint: renamed first, so that nobody takes the half of it for a whole."""
        path = Path(self.model_dir, name)
        aside = _aside(path)
        try:
            path.rename(aside)
        except FileNotFoundError:
            return
        except OSError as error:
            _log.warning("%s: cannot be deleted (%s); delete it by hand", path, error)
            return
        _delete(aside)


@contextmanager
def _as_checkpoint_error(path: str, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"{path}: {what}: {reason}; check that model_dir exists and may be written"
        raise CheckpointError(message, path) from error


def _replace_file(path: Path, content: bytes) -> None:
    temporary = _aside(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _aside(path: Path) -> Path:
    """A name beside ``path`` that nobody has, and that `CheckpointManager.remove_leftovers` knows."""
    return path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _delete(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        _log.warning("%s: cannot be deleted (%s); delete it by hand", path, error)
