"""After every test nothing is left: no thread, no child process, no socket, pipe or shared memory."""

from __future__ import annotations

import gc
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from tests.patience import patience

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")  # how long an example takes says more about the machine than about us

DESCRIPTORS = Path("/proc/self/fd")
THREADS = Path("/proc/self/task")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  # looked at only
PATIENCE = patience(2)
"""Seconds for a thread that is about to end to do so."""
LONGEST = 60.0
"""Seconds that a test takes at most on a quiet machine."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every test its limit: a test that reaches it hangs."""
    for item in items:
        item.add_marker(pytest.mark.timeout(patience(LONGEST)))


class Holdings(NamedTuple):
    """What this process holds."""

    threads: frozenset[threading.Thread]
    descriptors: frozenset[str]
    shared_memory: frozenset[str]
    children: frozenset[str]


@pytest.fixture(autouse=True, scope="session")
def _collections_are_quick() -> None:
    """Whatever was imported stays; without looking at it, a collection takes a hundredth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Fails a test that leaves something behind."""
    before = _holdings()
    yield
    leaks = _leaks(before)
    if leaks:
        gc.collect()  # what only waits for the collector is no leak; collecting after every test would take minutes
        gc.freeze()  # what is left is here to stay
        leaks = _leaks(before)
    assert not leaks, "left behind: " + "\n".join(leaks)


def _holdings() -> Holdings:
    links = (_target(entry) for entry in DESCRIPTORS.iterdir()) if DESCRIPTORS.exists() else ()
    return Holdings(
        threads=frozenset(threading.enumerate()),
        descriptors=frozenset(link for link in links if link.startswith(("socket:", "pipe:", "/memfd:"))),
        shared_memory=frozenset(map(str, SHARED_MEMORY.iterdir())) if SHARED_MEMORY.exists() else frozenset(),
        children=frozenset(pid for thread in THREADS.iterdir() for pid in _children(thread)),
    )


def _target(entry: Path) -> str:
    try:
        # With the inode, since all anonymous memory has the same name.
        return f"{entry.readlink()} {entry.stat().st_ino}"
    except OSError:  # closed meanwhile, such as the descriptor that lists the others
        return ""


def _leaks(before: Holdings) -> list[str]:
    for thread in threading.enumerate():
        if thread not in before.threads:
            thread.join(PATIENCE)
    after = _holdings()
    leaks = [_shown(thread) for thread in after.threads - before.threads]
    leaks += sorted(after.descriptors - before.descriptors)
    leaks += [path for path in after.shared_memory - before.shared_memory if _is_ours(path)]
    leaks += [f"a child process that nobody has waited for: {pid}" for pid in after.children - before.children]
    return leaks


def _shown(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    stack = "".join(traceback.format_stack(frame)) if frame else ""
    return f"{thread!r}\n{stack}"


def _children(thread: Path) -> list[str]:
    """The processes that a thread has started and nobody has waited for."""
    try:
        return (thread / "children").read_text().split()
    except OSError:
        if thread.exists():
            raise
        return []  # it has ended, and its process has adopted them


def _is_ours(path: str) -> bool:
    """Whether a new file in /dev/shm is of this process, or of a child that has ended, not of others."""
    file = Path(path)
    try:
        is_of_another_user = file.stat().st_uid != os.getuid()
    except OSError:  # it is gone by now
        return False
    if is_of_another_user or file.name.startswith("sem."):
        return path in _maps(Path("/proc/self"))  # a semaphore that nobody has mapped is of a process that was killed
    return not any(
        path in _maps(process)
        for process in Path("/proc").iterdir()
        if process.name.isdigit() and process.name != str(os.getpid())
    )


def _maps(process: Path) -> str:
    try:
        return (process / "maps").read_text()
    except OSError:  # it has ended, or is somebody else's
        return ""
