"""The checkpoints of a model_dir: the file ``checkpoint``, and the folders that it lists.

Rules
    * A checkpoint is a folder ``ckpt-STEP`` with an index in it. It is written as ``ckpt-STEP.tmp-XXXX`` and then
      renamed, so a folder of the final name is whole. If model_dir is a URL, the folder is uploaded, and its index
      comes last; see `storage`.
    * The state file names a checkpoint only when it is whole, and stops naming it before it is deleted.
    * The state file is replaced in one move: a reader sees the old or the new one, never a part.
    * One process writes (the chief), any process may read. Names in the file are relative: a model_dir can be moved.
    * A checkpoint that cannot be deleted does not end a training.
"""

from __future__ import annotations

import logging
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from paramserver.checkpoint.index import VALUES_INDEX
from paramserver.checkpoint.storage import ASIDE, is_remote, local_copy, storage_of
from paramserver.errors import CheckpointError, ConfigError

STATE_FILE = "checkpoint"
INDEX_FILE = VALUES_INDEX

_NAME = re.compile(r"ckpt-(\d+)")
_LEFTOVER = re.compile(rf"(ckpt-\d+|{STATE_FILE}){re.escape(ASIDE)}.*")
logger = logging.getLogger(__name__)


class CheckpointState(msgspec.Struct, frozen=True, kw_only=True):
    """The content of the state file. Names are folders in model_dir."""

    latest: str | None = None
    retained: tuple[str, ...] = ()
    """Checkpoints, oldest first; the last is ``latest``. Checkpoints that are kept forever are not in it."""
    saved_at: dict[str, float] = {}
    """Time when each retained checkpoint was recorded, in seconds since 1970."""
    spare_after: float | None = None
    """Time in seconds since 1970 after which one more checkpoint will be kept forever."""
    run_id: str = ""
    """The run that trains, or trained last, in this model_dir."""
    finished: bool = False
    """Whether that run has ended by itself, so that it will write no newer checkpoint."""
    finished_at: float | None = None
    """Time when that run ended, in seconds since 1970."""


def read_state(model_dir: str) -> CheckpointState | None:
    """Return the state of a model_dir; None if there is no state file or, with a warning, if it cannot be read."""
    storage = storage_of(model_dir)
    path = storage.path(STATE_FILE)
    try:
        state = msgspec.json.decode(storage.read(STATE_FILE), type=CheckpointState)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        logger.warning("%s: cannot be read (%s); taken as if there were no checkpoint", path, error)
        return None
    names = (*state.retained, *([] if state.latest is None else [state.latest]))
    if strange := [name for name in names if not _NAME.fullmatch(name)]:
        logger.warning("%s: names %r, expected ckpt-STEP; taken as if there were no checkpoint", path, strange[0])
        return None
    return state


def latest_checkpoint(model_dir: str) -> str | None:
    """Return the path of the newest checkpoint; None if there is no checkpoint, or its files are gone."""
    state = read_state(model_dir)
    if state is None or state.latest is None:
        return None
    path = storage_of(model_dir).path(state.latest)
    return path if is_whole(path) else None


def checkpoint_to_restore(model_dir: str) -> str | None:
    """Return the checkpoint that a training starts from, as `latest_checkpoint` does, but refuse a damaged one.

    Raises:
        CheckpointError: If the latest checkpoint exists, but has lost its index.
    """
    state = read_state(model_dir)
    if state is None or state.latest is None:
        return None
    storage = storage_of(model_dir)
    path = storage.path(state.latest)
    if is_whole(path):
        return path
    if storage.has(state.latest):
        raise CheckpointError(
            f"checkpoint {path} is cut short: it has no {INDEX_FILE}; bring it back, or delete "
            f"{storage.path(STATE_FILE)} to train from the beginning",
            path,
        )
    logger.warning("checkpoint %s is gone; training starts from the beginning", path)
    return None


def is_whole(checkpoint_path: str) -> bool:
    """Return whether a path holds a checkpoint that was written completely."""
    return storage_of(checkpoint_path).has(INDEX_FILE)


def exists(checkpoint_path: str) -> bool:
    """Return whether there is anything at a path; a checkpoint may be deleted while it is read."""
    return bool(storage_of(checkpoint_path).names())


@contextmanager
def readable(place: str, pattern: str = "*") -> Iterator[Path]:
    """Provide a folder of saved values, or a local copy of it. Blocks.

    Errors about the copy name the folder instead.

    Args:
        place: A checkpoint, or another folder that holds values: a path or URL.
        pattern: Pattern for the names of the files that are needed.

    Raises:
        CheckpointError: If the folder cannot be fetched, or in place of one that the context raises about the copy.
    """
    try:
        if is_remote(place) and not exists(place):
            raise FileNotFoundError("there is nothing")
        with local_copy(place, pattern) as folder:
            yield folder
    except OSError as error:
        raise CheckpointError(f"{place} cannot be fetched: {error}", place) from error
    except CheckpointError as error:
        if not is_remote(place):
            raise
        raise CheckpointError(f"{place}: {error}", place) from error


def is_name(checkpoint_path: str) -> bool:
    """Return whether a path has the name of a checkpoint, such as ``run/ckpt-100``."""
    return _NAME.fullmatch(Path(checkpoint_path).name) is not None


def checkpoint_step(checkpoint_path: str) -> int:
    """Return the global step in the name of a checkpoint.

    Raises:
        CheckpointError: If the path does not have the name of a checkpoint.
    """
    match = _NAME.fullmatch(Path(checkpoint_path).name)
    if match is None:
        raise CheckpointError(f"{checkpoint_path}: expected a folder named ckpt-STEP", checkpoint_path)
    return int(match[1])


class CheckpointManager:
    """Maintains the state file and deletes old checkpoints. For the chief; not thread-safe.

    Args:
        model_dir: A path or URL, made by the first write.
        keep_max: Number of newest checkpoints to keep; None or 0 keeps all.
        keep_every_n_hours: One checkpoint of each such period is kept forever instead of being deleted; None keeps
            none.
        clock: Returns seconds since 1970, because they must still be valid after a restart.

    Raises:
        ConfigError: If ``keep_max`` is negative or ``keep_every_n_hours`` not positive.
    """

    def __init__(
        self,
        model_dir: str,
        keep_max: int | None = 5,
        keep_every_n_hours: float | None = 10_000,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if keep_max is not None and keep_max < 0:
            raise ConfigError(f"CheckpointManager: keep_max: expected at least 0 or None, got {keep_max!r}")
        if keep_every_n_hours is not None and not keep_every_n_hours > 0:
            raise ConfigError(
                f"CheckpointManager: keep_every_n_hours: expected a positive number, got {keep_every_n_hours}"
            )
        self.model_dir = model_dir
        self._storage = storage_of(model_dir)
        self._keep_max = keep_max or 0
        self._period = math.inf if keep_every_n_hours is None else keep_every_n_hours * 3600
        self._clock = clock
        self._state = self._recovered()

    def __repr__(self) -> str:
        return f"CheckpointManager({self.model_dir!r}, retained={list(self._state.retained)})"

    @property
    def state(self) -> CheckpointState:
        """The content of the state file, now or after the first write."""
        return self._state

    def save_path(self, step: int) -> str:
        """Return the path of the checkpoint of a step, which need not exist yet."""
        return self._storage.path(_name(step))

    def temporary_path(self, step: int) -> str:
        """Make a new folder to write the checkpoint of a step into; `publish` puts it in place.

        The path is absolute, and always in a file system that this task sees.

        Raises:
            CheckpointError: If the folder cannot be made.
        """
        with _as_checkpoint_error(self.model_dir, "cannot be written"):
            return str(self._storage.new_folder(_name(step)))

    def is_saved(self, step: int) -> bool:
        """Return whether the checkpoint of a step is recorded and whole, so that it need not be written again."""
        return _name(step) in self._state.retained and is_whole(self.save_path(step))

    def publish(self, temporary_path: str, step: int) -> str:
        """Put a whole checkpoint in place, record it, and return its path.

        Raises:
            CheckpointError: If it has no index, or cannot be renamed or uploaded.
        """
        path = self.save_path(step)
        if not is_whole(temporary_path):
            raise CheckpointError(f"{temporary_path}: is cut short: it has no {INDEX_FILE}", temporary_path)
        with _as_checkpoint_error(path, "cannot be put in place"):
            self._forget(_name(step))
            self._remove(_name(step))  # a checkpoint of the same step, or of an earlier run with a lost state file
            self._storage.publish(Path(temporary_path), _name(step), INDEX_FILE)
        self.record(step)
        return path

    def discard(self, temporary_path: str) -> None:
        """Delete a checkpoint that was not written completely; a failure only gives a warning."""
        try:
            shutil.rmtree(temporary_path)
        except FileNotFoundError:
            pass  # put in place already, or gone
        except OSError as error:
            # As text: a kept record must not keep what the error's frames hold.
            logger.warning("%s: cannot be deleted (%s); delete it by hand", temporary_path, str(error))

    def record(self, step: int) -> None:
        """Name the checkpoint of ``step``, which is whole, the latest, and delete old checkpoints.

        Raises:
            CheckpointError: If the state file cannot be written.
        """
        name, now = _name(step), self._clock()
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
        """Record that a run begins to train here.

        Raises:
            CheckpointError: If the state file cannot be written.
        """
        self._write(run_id=run_id, finished=False, finished_at=None)

    def mark_finished(self, run_id: str) -> None:
        """Record that a run has ended by itself, after its last checkpoint. Tells an evaluator to finish, too.

        Raises:
            CheckpointError: If the state file cannot be written.
        """
        self._write(run_id=run_id, finished=True, finished_at=self._clock())

    def remove_leftovers(self) -> None:
        """Delete unfinished files of an earlier run. Call this only while no other run writes."""
        for name in self._storage.names():
            if _LEFTOVER.fullmatch(name) or self._is_half_uploaded(name):
                self._remove(name)

    def _is_half_uploaded(self, name: str) -> bool:
        state = read_state(self.model_dir) or CheckpointState()
        if not is_remote(self.model_dir) or not _NAME.fullmatch(name) or name in (state.latest, *state.retained):
            return False  # a named checkpoint was whole once; the user decides about its remains
        return not is_whole(self._storage.path(name))

    def _forget(self, name: str) -> None:
        """Stop naming a checkpoint that is about to be replaced."""
        if name in self._state.retained:
            retained = tuple(other for other in self._state.retained if other != name)
            self._write(latest=retained[-1] if retained else None, retained=retained)

    def _recovered(self) -> CheckpointState:
        state = read_state(self.model_dir) or CheckpointState()
        there = tuple(name for name in state.retained if is_whole(self._storage.path(name)))
        return msgspec.structs.replace(state, retained=there)

    def _write(self, **changes: object) -> None:
        state = msgspec.structs.replace(self._state, **changes)
        text = msgspec.json.format(msgspec.json.encode(state), indent=2)
        with _as_checkpoint_error(self._storage.path(STATE_FILE), "cannot be written"):
            self._storage.replace(STATE_FILE, text)
        self._state = state  # not before: a checkpoint that the file does not name is not saved

    def _remove(self, name: str) -> None:
        """Delete a file or folder; a failure only gives a warning."""
        try:
            self._storage.delete(name, INDEX_FILE if _NAME.fullmatch(name) else "")
        except OSError as error:
            logger.warning("%s: cannot be deleted (%s); delete it by hand", self._storage.path(name), str(error))


def _name(step: int) -> str:
    return f"ckpt-{step}"


@contextmanager
def _as_checkpoint_error(path: str, what: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # storages that fsspec reaches raise errors of their own, not only OSError
        reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
        message = f"{path}: {what}: {reason}; check that model_dir exists and may be written"
        raise CheckpointError(message, path) from error
