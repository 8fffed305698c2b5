"""A peer beside paramserver: both stand ready at the same time and take turns, as in the case `step`."""

from __future__ import annotations

import contextlib
import json
import socket
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks.cases.step import StepOptions, start_tasks
from benchmarks.harness.cluster import threads_env
from benchmarks.harness.crew import END_LIMIT, Child, Crew, crew, standing_by
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.figure import Figure, Pair
from benchmarks.harness.options import LANE_NAMES
from benchmarks.harness.window import rate, run_window, slowest_step
from benchmarks.models.catalogue import MODELS
from benchmarks.peers.assignment import Assignment
from benchmarks.peers.catalogue import PEERS, TARGETS, Peer
from benchmarks.peers.environments import as_text, interpreter, versions
from paramserver.cluster.task import Role, TaskId
from paramserver.errors import ParameterServerError
from paramserver.launch.spec import HOST


class Comparison(StepOptions, kw_only=True, frozen=True):
    """What was measured, or why nothing was; rates are medians over the repeats, in steps per second.

    Attributes:
        peer: Its name in `PEERS`.
        versions: Installed versions of the peer's packages.
        steps_per_second: Global steps of paramserver, of all workers together.
        peer_steps_per_second: Global steps of the peer; worker-steps where all workers step together.
        ratio: The median of ``ratios``; more than 1 if paramserver is faster.
        ratios: Ours to the peer's, of each pair of windows.
        failure: Why there is no measurement; "" if there is one.
    """

    peer: str
    versions: dict[str, str]
    steps_per_second: float = 0.0
    peer_steps_per_second: float = 0.0
    ratio: float = 0.0
    ratios: list[float] = msgspec.field(default_factory=list)
    failure: str = ""

    def figure(self) -> Figure:
        """Return the measurement, which there has to be, as other benchmarks do."""
        return Figure(
            benchmark="peers",
            case=f"{self.model}, {LANE_NAMES[self.lane]}, beside {self.peer}",
            size=self.workers,
            size_unit="workers",
            measured=self.steps_per_second,
            beside=as_text(self.versions),
            baseline=self.peer_steps_per_second,
            ratio=self.ratio,
            ratios=self.ratios,
            target=TARGETS.get((self.model, self.lane, self.peer)),
        )


def compare(name: str, options: StepOptions) -> Comparison:
    """Measure one peer beside paramserver. Blocks for about ``2 * repeats * seconds`` and the start, at most minutes.

    A peer that cannot be installed or does not run is a result with a `failure`.
    """
    peer = PEERS[name]
    rates: list[Pair] = []
    failure = ""
    try:
        rates = _measure(name, peer, options)
    except (BenchmarkError, ParameterServerError) as error:
        failure = str(error)
    return result(name, versions(peer.environment, peer.packages), options, rates, failure)


def result(
    name: str, installed: dict[str, str], options: StepOptions, rates: Sequence[Pair], failure: str
) -> Comparison:
    """Return the comparison of pairs of rates, ours and the peer's."""
    comparison = Comparison(**msgspec.structs.asdict(options), peer=name, versions=installed, failure=failure)
    if not rates:
        return comparison
    ours, theirs = zip(*rates, strict=True)
    ratios = [one / other for one, other in rates]
    return msgspec.structs.replace(
        comparison,
        steps_per_second=statistics.median(ours),
        peer_steps_per_second=statistics.median(theirs),
        ratio=statistics.median(ratios),
        ratios=ratios,
    )


def _measure(name: str, peer: Peer, options: StepOptions) -> list[Pair]:
    python = interpreter(peer.environment)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, crew() as its_crew:
        ours = start_tasks(its_crew, MODELS[options.model], options)
        helpers, theirs = _start_peer(its_crew, name, python, options, folder)
        step_seconds = slowest_step([*ours.workers, *theirs])
        rates = []
        for _ in range(options.repeats):
            with standing_by([*helpers, *theirs]):
                our_window = run_window(ours.workers, options.seconds, step_seconds)
            with standing_by([*ours.workers, *ours.servers]):
                their_window = run_window(theirs, options.seconds, step_seconds)
            rates.append((rate(our_window), rate(their_window)))
        ours.end()
        _end_peer(theirs)
    return rates


def _end_peer(participants: Sequence[Child]) -> None:
    """Let a peer end by itself, so that it cleans up; what it has measured counts even if it does not."""
    for child in participants:
        child.dismiss()
    with contextlib.suppress(BenchmarkError):  # it is killed then, as its helpers are
        for child in participants:
            child.await_end(END_LIMIT)


def _start_peer(
    its_crew: Crew, name: str, python: Path, options: StepOptions, folder: str
) -> tuple[list[Child], list[Child]]:
    """Start all tasks of a peer: those that help, and those that take part."""
    peer = PEERS[name]
    tasks = (*peer.helpers, *peer.participants)
    addresses = _addresses(tasks) if peer.has_addresses else {}
    threads = options.threads // options.workers
    children = []
    for task in tasks:
        assignment = _assignment(task, tasks, options, threads, folder)
        command = (str(python), "-m", f"benchmarks.peers.{peer.module}", msgspec.json.encode(assignment).decode())
        env = {**peer.variables, **threads_env(threads), **tf_config(task, addresses)}
        children.append(its_crew.start(f"{name} {task}", command, env))
    return children[: len(peer.helpers)], children[len(peer.helpers) :]


def _assignment(task: TaskId, tasks: Sequence[TaskId], options: StepOptions, threads: int, folder: str) -> Assignment:
    return Assignment(
        role=task.role,
        index=task.index,
        tasks=tuple(map(str, tasks)),
        workers=options.workers,
        model=options.model,
        threads=threads,
        folder=folder,
    )


def _addresses(tasks: Sequence[TaskId]) -> dict[TaskId, str]:
    """An address for each task, free at the moment; TensorFlow cannot be handed a socket."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((HOST, 0))) for _ in tasks]
        return {task: f"{HOST}:{one.getsockname()[1]}" for task, one in zip(tasks, sockets, strict=True)}


def tf_config(task: TaskId, addresses: dict[TaskId, str]) -> dict[str, str]:
    """The variable that tells a TensorFlow process its cluster; none if there are no addresses."""
    if not addresses:
        return {}
    cluster: dict[Role, list[str]] = {}
    for other, address in sorted(addresses.items()):
        cluster.setdefault(other.role, []).append(address)
    return {"TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": task.role, "index": task.index}})}
