"""Work on many blocks: one thread for a block, and several blocks side by side.

torch uses several threads for one operator. Each operator then begins and ends with all of them, so that it waits
whenever one of them has to share its core: beside a busy neighbour, for every block and operator. Here each thread
takes the next block as soon as it is done with one, so a slow thread only takes fewer of them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

import torch

from paramserver.memory.torch_internals import one_thread_here

MOST_THREADS = 8
"""Limit for the threads of one piece of work: these move bytes as fast as memory gives and takes them."""

LEAST_ACTIONS = 4
"""Number of actions on blocks from which on it pays to start threads."""

Action = Callable[[], object]


def side_by_side(actions: Sequence[Action]) -> None:
    """Carry out actions in any order, several at once, and wait for them.

    If it is worth it, other threads help: with this one, as many as ``torch.get_num_threads()``. In an action, torch
    then uses one thread. After an error or an interrupt, no further action is begun.

    Raises:
        Exception: The first error of an action.
    """
    others = min(torch.get_num_threads(), len(actions), MOST_THREADS) - 1
    if others < 1 or len(actions) < LEAST_ACTIONS:
        for action in actions:
            action()
        return
    rest, errors = iter(actions), list[BaseException]()  # `next` of a list's iterator is atomic
    helpers = [threading.Thread(target=_help, args=(rest, errors), name="blocks") for _ in range(others)]
    started: list[threading.Thread] = []
    try:
        with contextlib.suppress(RuntimeError):  # the system gives no more threads
            for helper in helpers:
                helper.start()
                started.append(helper)
        _work(rest)
    finally:
        _drop(rest)
        for helper in started:
            helper.join()
    if errors:
        raise errors[0]


def _help(rest: Iterator[Action], errors: list[BaseException]) -> None:
    try:
        _work(rest)
    except BaseException as error:  # noqa: BLE001  # raised again by the thread that is helped
        errors.append(error)


def _work(rest: Iterator[Action]) -> None:
    with one_thread_here():
        try:
            for action in rest:
                action()
        finally:
            _drop(rest)


def _drop(rest: Iterator[Action]) -> None:
    for _ in rest:
        pass
