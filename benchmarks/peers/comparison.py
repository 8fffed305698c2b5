"""A peer beside paramserver: both stand ready at the same time and take turns; the other side is stopped meanwhile."""

from __future__ import annotations

import contextlib
import json
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks.harness.cluster import start_training, threads_env
from benchmarks.harness.crew import END_LIMIT, Child, Crew, crew, standing_by
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.figure import Figure, Subject
from benchmarks.harness.options import LANE_NAMES, Options
from benchmarks.harness.programs.trainer import Job
from benchmarks.harness.window import sides, slowest_step
from benchmarks.models.catalogue import MODELS
from benchmarks.peers.assignment import Assignment
from benchmarks.peers.catalogue import PEERS, TARGETS, THREADS, WORKERS, Peer
from benchmarks.peers.environments import as_text, interpreter, versions
from paramserver.cluster.task import Role, TaskId
from paramserver.launch.spec import HOST


def compare(name: str, model: str, lane: str, options: Options) -> Figure:
    """Measure one peer beside paramserver. Blocks for about ``2 * repeats * seconds`` and the start, at most minutes.

    Raises:
        BenchmarkError: If the peer cannot be installed or does not run.
        ParameterServerError: If a ps refuses.
    """
    peer = PEERS[name]
    python = interpreter(peer.environment)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, crew() as its_crew:
        job = Job(model=MODELS[model])
        ours = start_training(its_crew, job, workers=WORKERS, ps=1, lane=lane, threads=THREADS)
        helpers, theirs = _start_peer(its_crew, peer, python, model, folder)
        our_side, their_side = sides(options, slowest_step([*ours.workers, *theirs]), ours.workers, theirs)

        def take_ours() -> float:
            with standing_by([*helpers, *theirs]):
                return our_side()

        def take_theirs() -> float:
            with standing_by([*ours.workers, *ours.servers]):
                return their_side()

        figure = subject(name, model, lane).measure(take_ours, take_theirs, options.repeats)
        ours.end()
        _end_peer(theirs)
    return figure


def subject(name: str, model: str, lane: str) -> Subject:
    """Return the subject of a figure; a peer's steps are worker-steps where all workers step together."""
    peer = PEERS[name]
    return Subject(
        case=f"{model}, {LANE_NAMES[lane]}, beside {name}",
        size=WORKERS,
        size_unit="workers",
        beside=as_text(versions(peer.environment, peer.packages)),
        target=TARGETS.get((model, lane, name)),
    )


def _end_peer(participants: Sequence[Child]) -> None:
    """Let a peer end by itself, so that it cleans up; what it has measured counts even if it does not."""
    for child in participants:
        child.dismiss()
    with contextlib.suppress(BenchmarkError):  # it is killed then, as its helpers are
        for child in participants:
            child.await_end(END_LIMIT)


def _start_peer(its_crew: Crew, peer: Peer, python: Path, model: str, folder: str) -> tuple[list[Child], list[Child]]:
    """Start all tasks of a peer, and return those that help and those that take part."""
    tasks = (*peer.helpers, *peer.participants)
    addresses = _addresses(tasks) if peer.has_addresses else {}
    children = []
    for task in tasks:
        assignment = Assignment(
            role=task.role,
            index=task.index,
            tasks=tuple(map(str, tasks)),
            workers=WORKERS,
            model=model,
            threads=THREADS,
            folder=folder,
        )
        command = (str(python), "-m", f"benchmarks.peers.{peer.module}", msgspec.json.encode(assignment).decode())
        env = {**peer.variables, **threads_env(THREADS), **tf_config(task, addresses)}
        children.append(its_crew.start(f"{peer.module} {task}", command, env))
    return children[: len(peer.helpers)], children[len(peer.helpers) :]


def _addresses(tasks: Sequence[TaskId]) -> dict[TaskId, str]:
    """Return an address for each task, free at the moment; TensorFlow cannot be handed a socket."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((HOST, 0))) for _ in tasks]
        return {task: f"{HOST}:{one.getsockname()[1]}" for task, one in zip(tasks, sockets, strict=True)}


def tf_config(task: TaskId, addresses: dict[TaskId, str]) -> dict[str, str]:
    """Return the variable that tells a TensorFlow process its cluster; none without addresses."""
    if not addresses:
        return {}
    cluster: dict[Role, list[str]] = {}
    for other, address in sorted(addresses.items()):
        cluster.setdefault(other.role, []).append(address)
    return {"TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": task.role, "index": task.index}})}
