"""The processes of a measurement: started, talked to, and gone when it is over."""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from benchmarks.participant import Message, Window
from paramserver.cluster.task import Role
from paramserver.launch.fork_server import inherited_fork_server
from paramserver.launch.spec import HOST, THREAD_VARIABLES, LaunchOptions, plan
from paramserver.launch.start_methods import Descriptors, Program, Spawn, StartMethod

ROOT = Path(__file__).resolve().parents[1]
END_LIMIT = 15.0
COMPLAINT_BYTES = 16384


class BenchmarkError(Exception):
    """A measurement could not be made; the message says why."""


class Child:
    """A process that belongs to a measurement, the leader of a session of its own.

    Attributes:
        name: Who it is, for messages.
        pid: Its process id.

    Args:
        program: What it runs.
        method: Starts it.
        inherited: The descriptors that it finds by a variable of its environment: name -> descriptor.
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
        """Tell it to measure. Does not block.

        Raises:
            BenchmarkError: If it has ended.
        """
        try:
            self._input.write(msgspec.json.encode(window) + b"\n")
        except BrokenPipeError:
            raise self._failure() from None

    def receive(self, kind: type[Message], seconds: float) -> Message:
        """Its next message. Blocks for at most ``seconds``.

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
        """Stop it where it is, and what else is in its process group, until `resume`."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after `pause`."""
        self._signal(signal.SIGCONT)

    def dismiss(self) -> None:
        """Let it end: there are no more orders. Idempotent."""
        self._input.close()

    def await_end(self, seconds: float) -> None:
        """Wait until it has ended well.

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
        """The last line that it complained with, "" if it did not."""
        complaints = os.pread(self._complaints.fileno(), COMPLAINT_BYTES, self._complaints_start())
        lines = complaints.decode("utf-8", "replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "")

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.killpg(self.pid, number)

    def _complaints_start(self) -> int:
        return max(os.fstat(self._complaints.fileno()).st_size - COMPLAINT_BYTES, 0)

    def _has_ended(self, within: float | None = None) -> bool:
        """Wait until it has, or for so many seconds; whether it has."""
        ready, _, _ = select.select([self._handle], [], [], within)
        return bool(ready)

    def _failure(self) -> BenchmarkError:
        end = self._method.ending(self.pid) if self._has_ended(END_LIMIT) else "closed its output"
        return BenchmarkError(f"{self.name} {end}: {self.last_words or 'it said nothing'}")


@contextlib.contextmanager
def standing_by(children: Sequence[Child]) -> Iterator[None]:
    """For the length of a block these processes do nothing at all: some would poll for work that does not come."""
    for child in children:
        child.pause()
    try:
        yield
    finally:
        for child in children:
            child.resume()


class Cluster:
    """The tasks of a run.

    Attributes:
        servers: The ps tasks.
        workers: The chief and the workers.
    """

    def __init__(self, servers: Sequence[Child], workers: Sequence[Child]) -> None:
        self.servers = list(servers)
        self.workers = list(workers)

    def end(self) -> None:
        """Let the workers finish, and see that the ps tasks end by themselves.

        Raises:
            BenchmarkError: If one of them fails or stays.
        """
        for worker in self.workers:
            worker.dismiss()
        give_up = time.monotonic() + END_LIMIT
        for child in [*self.workers, *self.servers]:
            child.await_end(max(give_up - time.monotonic(), 0.1))


class Crew:
    """Starts processes, and is rid of them all when it is closed.

    Each is a program of its own, unless a fork server was inherited.
    """

    def __init__(self) -> None:
        self._programs = Spawn()
        self._modules = inherited_fork_server() or self._programs
        self._children: list[Child] = []

    def start_cluster(self, model: str, *, workers: int, ps: int, lane: str, threads: int) -> Cluster:
        """Start a cluster whose workers train ``model``, with ``threads`` threads for each task."""
        # With threads given, plan() neither needs the number of cores nor looks at the variables that are set.
        options = LaunchOptions(script="benchmarks/worker.py", workers=workers, ps=ps, lane=lane, threads=threads)
        with contextlib.ExitStack() as stack:
            listeners = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(ps)]
            ports = [listener.getsockname()[1] for listener in listeners]
            spec = plan(options, ports, secrets.token_hex(16), "benchmark", cores=threads)
            servers, trainers = [], []
            for task in spec.tasks:
                if task.task.role is Role.PS:
                    servers.append(self.start_server(str(task.task), task.env, listeners[task.task.index]))
                else:
                    trainers.append(self.start_module(str(task.task), "benchmarks.worker", model, task.env))
        return Cluster(servers, trainers)

    def start_plain(self, model: str, threads: int) -> Child:
        """Start plain PyTorch in one process with ``threads`` threads."""
        env = dict.fromkeys(THREAD_VARIABLES, str(threads))
        return self.start_module("plain PyTorch", "benchmarks.plain", model, env)

    def start_server(self, name: str, env: Mapping[str, str], listener: socket.socket) -> Child:
        """Start a ps that accepts connections at ``listener``."""
        return self.start_module(name, "paramserver", "server", env, listener)

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
        """The error, with what any process last complained about and the error does not say."""
        others = [child for child in self._children if child.last_words and child.last_words not in str(error)]
        return BenchmarkError(
            "\n  ".join([str(error), *(f"{other.name} said: {other.last_words}" for other in others)])
        )

    def close(self) -> None:
        """Kill whatever still runs."""
        for child in self._children:
            child.close()
        for method in {self._programs, self._modules}:
            method.close()


@contextlib.contextmanager
def crew() -> Iterator[Crew]:
    """A `Crew` for the length of a block; SIGTERM ends the block as Ctrl-C does."""
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
