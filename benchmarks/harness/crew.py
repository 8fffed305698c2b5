"""The processes of a measurement: how they are started, get orders, and end with it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.participant import Message, Window
from paramserver.launch.fork_server import inherited_fork_server
from paramserver.launch.start_methods import Descriptors, Program, Spawn, StartMethod

END_LIMIT = 15.0
COMPLAINT_BYTES = 16384


class Child:
    """A process that belongs to a measurement, the leader of a session of its own.

    Attributes:
        name: Its name in messages.
        pid: Its process id.

    Args:
        program: The program that it runs.
        method: Starts it.
        inherited: Descriptors whose numbers it finds in its environment: variable -> descriptor.
    """

    def __init__(self, program: Program, method: StartMethod, inherited: Mapping[str, int]) -> None:
        self.name = program.name
        self._method = method
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the child
        (stdin, orders), (answers, stdout) = os.pipe(), os.pipe()
        self._input, self._output = os.fdopen(orders, "wb", 0), os.fdopen(answers, "rb", 0)
        streams = Descriptors(stdin=stdin, stdout=stdout, stderr=self._complaints.fileno(), inherited=inherited)
        try:
            self.pid = method.start(program, streams)
        finally:
            os.close(stdin)
            os.close(stdout)
        self._handle = os.pidfd_open(self.pid)

    def order(self, window: Window) -> None:
        """Order it to measure. Does not block.

        Raises:
            BenchmarkError: If it has ended.
        """
        try:
            self._input.write(msgspec.json.encode(window) + b"\n")
        except BrokenPipeError:
            raise self._failure() from None

    def receive(self, kind: type[Message], seconds: float) -> Message:
        """Return its next message. Blocks for at most ``seconds``.

        Raises:
            BenchmarkError: If it ends, says nothing in time, or says something else.
        """
        ready, _, _ = select.select([self._output], [], [], seconds)
        if not ready:
            raise BenchmarkError(f"{self.name} said nothing for {seconds:.0f} s; expected {kind.__name__}")
        line = self._output.readline()
        if not line:
            raise self._failure()
        try:
            return msgspec.json.decode(line, type=kind)
        except msgspec.DecodeError as error:
            raise BenchmarkError(f"{self.name} printed {line!r}; expected {kind.__name__}: {error}") from None

    def pause(self) -> None:
        """Stop its process group until `resume`."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Continue its process group after `pause`."""
        self._signal(signal.SIGCONT)

    def dismiss(self) -> None:
        """Tell it that there are no more orders, so that it ends. Idempotent."""
        self._input.close()

    def await_end(self, seconds: float) -> None:
        """Wait until it has ended with code 0.

        Raises:
            BenchmarkError: If it fails, or does not end within ``seconds``.
        """
        if not self._has_ended(seconds):
            raise BenchmarkError(f"{self.name} did not end within {seconds:.0f} s of the last order")
        if self._method.ending(self.pid).code:
            raise self._failure()

    def close(self) -> None:
        """Kill it if it still runs."""
        self._signal(signal.SIGKILL)
        self._has_ended()
        os.close(self._handle)
        for file in (self._input, self._output, self._complaints):
            file.close()

    def __repr__(self) -> str:
        return f"<Child {self.name} pid {self.pid}>"

    @property
    def last_words(self) -> str:
        """The last line of its standard error, "" if there is none."""
        complaints = os.pread(self._complaints.fileno(), COMPLAINT_BYTES, self._complaints_start())
        lines = complaints.decode("utf-8", "replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "")

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.killpg(self.pid, number)

    def _complaints_start(self) -> int:
        return max(os.fstat(self._complaints.fileno()).st_size - COMPLAINT_BYTES, 0)

    def _has_ended(self, within: float | None = None) -> bool:
        """Wait until it has ended, or for so many seconds, and return whether it has."""
        ready, _, _ = select.select([self._handle], [], [], within)
        return bool(ready)

    def _failure(self) -> BenchmarkError:
        end = self._method.ending(self.pid) if self._has_ended(END_LIMIT) else "closed its output"
        return BenchmarkError(f"{self.name} {end}: {self.last_words or 'it said nothing'}")


@contextlib.contextmanager
def standing_by(children: Sequence[Child]) -> Iterator[None]:
    """Stop these processes for the length of a block; some would poll for work all the time."""
    for child in children:
        child.pause()
    try:
        yield
    finally:
        for child in children:
            child.resume()


class Crew:
    """Starts processes, and kills those that still run when it is closed.

    Each is a program of its own, or a fork where a fork server was inherited.
    """

    def __init__(self) -> None:
        self._programs = Spawn()
        self._modules = inherited_fork_server() or self._programs
        self._children: list[Child] = []

    def start_module(
        self, name: str, module: str, argument: str, env: Mapping[str, str], listener: socket.socket | None = None
    ) -> Child:
        """Start ``python -m MODULE ARGUMENT``."""
        return self._start(self._modules, Program(name, (sys.executable, "-m", module, argument), env), listener)

    def start(self, name: str, command: Sequence[str], env: Mapping[str, str]) -> Child:
        """Start any process."""
        return self._start(self._programs, Program(name, command, env))

    def _start(self, method: StartMethod, program: Program, listener: socket.socket | None = None) -> Child:
        inherited = {} if listener is None else {"PARAMSERVER_LISTEN_FD": listener.fileno()}
        child = Child(program, method, inherited)
        self._children.append(child)
        return child

    def explain(self, error: BenchmarkError) -> BenchmarkError:
        """Return the error with the last words of all processes that it does not quote yet."""
        others = [child for child in self._children if child.last_words and child.last_words not in str(error)]
        return BenchmarkError(
            "\n  ".join([str(error), *(f"{other.name} said: {other.last_words}" for other in others)])
        )

    def close(self) -> None:
        """Kill all processes that still run."""
        for child in self._children:
            child.close()
        for method in {self._programs, self._modules}:
            method.close()


@contextlib.contextmanager
def crew() -> Iterator[Crew]:
    """Provide a `Crew` for the length of a block; SIGTERM ends the block as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    created = Crew()
    try:
        yield created
    except BenchmarkError as error:
        raise created.explain(error) from error
    finally:
        created.close()
        signal.signal(signal.SIGTERM, before)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
