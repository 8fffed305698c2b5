"""A process that takes part in a measurement: it trains when it is told to, and tells how far it came.

It reads `Window` lines from its standard input, answers each with a `Measured` line on its standard output, and ends
when its input does. Times are of the monotonic clock, which all processes of a machine share.

Rules
    * A window is entered and left between two steps, so that only whole steps and their whole time count.
    * A participant trains from the order to the window's ``stop``, so that all of them are at work while any of them
      measures.
    * This module imports no training library, so that programs of other libraries can take part.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import msgspec

WARM_UP_SECONDS = 0.7
WARM_UP_STEPS = 6


class Ready(msgspec.Struct, kw_only=True):
    """A participant is warm.

    Attributes:
        step_seconds: What a step takes, about.
        store_bytes: What all ps tasks hold, values and slots; 0 in plain PyTorch.
    """

    step_seconds: float
    store_bytes: int


class Window(msgspec.Struct, kw_only=True):
    """An order to measure between ``begin`` and ``end``, and to train on until ``stop``."""

    begin: float
    end: float
    stop: float


class Measured(msgspec.Struct, kw_only=True):
    """What happened in a window.

    Attributes:
        steps: Of this participant.
        seconds: For which it ran them.
        staleness: The sum over the steps.
        largest_staleness: Of one step.
        loss: Of the last step.
    """

    steps: int
    seconds: float
    staleness: int
    largest_staleness: int
    loss: float


Step = Callable[[], int]
"""Takes one step and returns its staleness."""

Message = TypeVar("Message", Ready, Measured)


def take_part(step: Step, loss: Callable[[], float], store_bytes: Callable[[], int], stride: int = 1) -> None:
    """Warm up, say so, and carry out orders until there are no more. Blocks.

    Args:
        step: Called again and again.
        loss: That of the last step.
        store_bytes: What all ps tasks hold.
        stride: How many steps one call of ``step`` takes, where one process takes those of several.
    """
    step_seconds = warm_up(step)
    _tell(Ready(step_seconds=step_seconds, store_bytes=store_bytes()))
    for line in sys.stdin.buffer:
        _tell(measure(step, loss, msgspec.json.decode(line, type=Window), stride))


def warm_up(step: Step) -> float:
    """Take steps until they are as fast as they get; the seconds that one of them takes."""
    step()
    started, count = time.monotonic(), 0
    while count < WARM_UP_STEPS or time.monotonic() - started < WARM_UP_SECONDS:
        step()
        count += 1
    return (time.monotonic() - started) / count


def measure(step: Step, loss: Callable[[], float], window: Window, stride: int = 1) -> Measured:
    """Train through a window.

    Raises:
        ValueError: If the training went wrong, so that its speed would mean nothing.
    """
    while (begun := time.monotonic()) < window.begin:
        step()
    steps = total = largest = 0
    while (ended := time.monotonic()) < window.end or not steps:
        staleness = step()
        steps += stride
        total += staleness
        largest = max(largest, staleness)
    while time.monotonic() < window.stop:
        step()
    if not math.isfinite(last := loss()):
        raise ValueError(f"the loss became {last}; the steps that led to it are not worth measuring")
    return Measured(steps=steps, seconds=ended - begun, staleness=total, largest_staleness=largest, loss=last)


def _tell(message: Ready | Measured) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.buffer.flush()
