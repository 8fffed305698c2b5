"""The folder of a checkpoint: reading from it and writing into it.

Rules
    * Code that saves or restores yields `Read` and `Write` steps and does neither itself. So the same steps run where
      the folder is, or on a ps that does not see it, through a task that does.
    * Every write states its place: several tasks write into one folder, and into one file, in any order.
    * When the folder is closed, all written bytes are on the disk. They go there while more is written, so that at most
      twice `FLUSH_BYTES` are left for the end.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Generic, NamedTuple, Self, TypeVar

from paramserver.checkpoint.tensor_file import LENGTH_BYTES, FileTensor, header_length, parse_header, unreadable
from paramserver.errors import CheckpointError

FLUSH_BYTES = 64 << 20
MAX_OPEN_FILES = 16
THREADS = 2
"""Number of threads that share a large read: two copy faster from the page cache than one, and more are no faster."""
SHARE_BYTES = 8 << 20
"""Number of bytes that such a thread reads at once."""

HAS_POSITIONS = hasattr(os, "preadv")
"""Whether reads and writes may state their place in a file. On Windows they follow a seek instead, on one thread."""

_O_DSYNC: int = getattr(os, "O_DSYNC", 0)
_O_BINARY: int = getattr(os, "O_BINARY", 0)

R = TypeVar("R")


class Read(NamedTuple):
    """Fill ``out`` with the bytes of a file from ``offset`` on."""

    file: str
    offset: int
    out: memoryview


class Write(NamedTuple):
    """Write ``content`` at ``offset`` into a file that will have ``size`` bytes.

    ``is_shared``: other tasks may write into the same pages of the file. The content is valid until the next step.
    """

    file: str
    size: int
    is_shared: bool
    offset: int
    content: memoryview


_Opening = tuple[str, int]
"""The name of a file, and the flags with which it is open."""

Steps = Generator[Read | Write, None, R]
"""Generator that yields what to read and write, step by step, and returns a result."""


class EachStep(Generic[R]):
    """Iterates over steps, and keeps their result. A context manager, which closes them at its end.

    Attributes:
        result: The result of the steps; set when the iteration is over.
    """

    result: R

    def __init__(self, steps: Steps[R]) -> None:
        self._steps = steps

    def __iter__(self) -> Iterator[Read | Write]:
        self.result = yield from self._steps

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._steps.close()


class CheckpointFolder:
    """Carries out `Read` and `Write` in a folder that this task sees. A context manager; not thread-safe.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reading: dict[_Opening, int] = {}
        self._writing: dict[_Opening, int] = {}
        self._unflushed = 0
        self._flushing: Future[None] | None = None
        self._threads = ThreadPoolExecutor(THREADS, "checkpoint-folder")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.flush()
        self.close()

    def carry_out(self, step: Read | Write) -> None:
        """Read or write. Blocks.

        Raises:
            CheckpointError: If the step fails; the message names the file.
        """
        if isinstance(step, Read):
            self._read(step)
        else:
            self._write(step)

    def run(self, steps: Steps[R]) -> R:
        """Carry out all steps, and return their result. Blocks.

        Raises:
            CheckpointError: If a step fails.
        """
        with EachStep(steps) as each:
            for step in each:
                self.carry_out(step)
            return each.result

    def flush(self) -> None:
        """Bring all written bytes to the disk. Blocks.

        Raises:
            CheckpointError: If that fails.
        """
        self._await_flush()
        self._sync(self._writing)
        self._unflushed = 0

    def close(self) -> None:
        """Close all files. Idempotent."""
        self._threads.shutdown()
        for files in (self._reading, self._writing):
            while files:
                os.close(files.popitem()[1])

    def __repr__(self) -> str:
        return f"<CheckpointFolder {self.path}>"

    def _read(self, step: Read) -> None:
        path = self._checked(step.file)
        with _reading(path):
            file = self._opened(self._reading, (step.file, os.O_RDONLY))
            if step.out.nbytes <= SHARE_BYTES or not HAS_POSITIONS:
                _fill(file, step.offset, step.out)
            else:
                self._fill_in_shares(file, step)

    def _fill_in_shares(self, file: int, step: Read) -> None:
        shares = [
            self._threads.submit(_fill, file, step.offset + begin, step.out[begin : begin + SHARE_BYTES])
            for begin in range(0, step.out.nbytes, SHARE_BYTES)
        ]
        wait(shares)  # for all of them, even after an error: no thread may write into this memory after the step
        for share in shares:
            share.result()

    def _write(self, step: Write) -> None:
        path = self._checked(step.file)
        with _writing(path):
            # O_DSYNC, or else an NFS client may write whole pages, with zeros over another task's rows.
            opening = step.file, os.O_RDWR | os.O_CREAT | (_O_DSYNC if step.is_shared else 0)
            is_new = opening not in self._writing
            file = self._opened(self._writing, opening)
            if is_new:
                os.ftruncate(file, step.size)
            content, offset = step.content, step.offset
            while content:
                count = _write_at(file, content, offset)  # writes at most 2 GiB at once
                content, offset = content[count:], offset + count
        self._unflushed += step.content.nbytes
        if self._unflushed > FLUSH_BYTES:
            self._begin_flush()

    def _begin_flush(self) -> None:
        """Have a thread bring the bytes written so far to the disk, after it has finished the previous flush."""
        self._await_flush()
        self._unflushed = 0
        self._flushing = self._threads.submit(self._sync, dict(self._writing))

    def _sync(self, files: Mapping[_Opening, int]) -> None:
        for (name, _), file in files.items():
            with _writing(self.path / name):
                os.fsync(file)

    def _await_flush(self) -> None:
        if flushing := self._flushing:
            self._flushing = None
            flushing.result()

    def _checked(self, name: str) -> Path:
        if Path(name).name != name or name in ("", ".."):
            raise CheckpointError(
                f"{name!r} is not the name of a file in checkpoint {self.path}", str(self.path / name)
            )
        return self.path / name

    def _opened(self, files: dict[_Opening, int], opening: _Opening) -> int:
        if opening not in files:
            if len(files) == MAX_OPEN_FILES:
                oldest = next(iter(files))
                if files is self._writing:
                    self.flush()
                os.close(files.pop(oldest))
            name, flags = opening
            files[opening] = os.open(self.path / name, flags | _O_BINARY, 0o666)
        return files[opening]


def read_header(directory: str, file: str) -> Steps[dict[str, FileTensor]]:
    """Read the header of a file, and return the tensors in the file.

    Args:
        directory: The folder of the file, for messages.
        file: The name of the file.

    Raises:
        CheckpointError: If the file is not a safetensors file.
    """
    path = str(Path(directory, file))
    first = bytearray(LENGTH_BYTES)
    yield Read(file, 0, memoryview(first))
    text = bytearray(header_length(first, path))
    yield Read(file, LENGTH_BYTES, memoryview(text))
    tensors = parse_header(text, path)
    end = max((tensor.begin + tensor.spec.nbytes for tensor in tensors.values()), default=0)
    if end:
        yield Read(file, end - 1, memoryview(bytearray(1)))  # finds out at once if the file was cut short
    return tensors


def _fill(file: int, offset: int, out: memoryview) -> None:
    while out:
        count = _read_at(file, out, offset)
        if not count:
            raise EOFError(f"it ends at byte {offset}, {len(out)} bytes before it should")
        out, offset = out[count:], offset + count


def _read_at(file: int, out: memoryview, offset: int) -> int:
    if HAS_POSITIONS:
        return os.preadv(file, [out], offset)
    os.lseek(file, offset, os.SEEK_SET)
    content = os.read(file, min(len(out), SHARE_BYTES))
    out[: len(content)] = content
    return len(content)


def _write_at(file: int, content: memoryview, offset: int) -> int:
    if HAS_POSITIONS:
        return os.pwrite(file, content, offset)
    os.lseek(file, offset, os.SEEK_SET)
    return os.write(file, content)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"writing the checkpoint file {path} failed: {error}; does every ps see model_dir, and may it write there?",
            str(path),
        ) from error


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError) as error:
        raise unreadable(str(path), error) from error
