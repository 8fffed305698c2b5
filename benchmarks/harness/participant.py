"""A process that takes part in a measurement: it trains on order, and reports its progress.

It reads `Window` lines from its standard input, answers each with a `Measured` line on its standard output, and ends
when its input does. Times are of the monotonic clock, which all processes of a machine share.

Rules
    * A window is entered and left between two steps, so that only whole steps and their whole time count.
    * A participant trains from the order to the window's ``stop``, so that all participants are at work while any of
      them measures.
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
    """Reports that a participant is warm.

    Attributes:
        step_seconds: Approximate duration of a step.
        store_bytes: Bytes of values and slots on all ps tasks; 0 without any.
    """

    step_seconds: float
    store_bytes: int = 0


class Window(msgspec.Struct, kw_only=True):
    """An order to measure between ``begin`` and ``end``, and to train on until ``stop``."""

    begin: float
    end: float
    stop: float


class Measured(msgspec.Struct, kw_only=True):
    """Reports the steps of a participant in a window.

    Attributes:
        steps: Number of steps.
        seconds: Their duration together.
        staleness: Sum of the steps' staleness.
        largest_staleness: Largest staleness of a step.
        loss: Loss of the last step.
    """

    steps: int
    seconds: float
    staleness: int
    largest_staleness: int
    loss: float


Step = Callable[[], int]
"""Takes a step and returns its staleness."""

Message = TypeVar("Message", Ready, Measured, float)


def take_part(
    step: Step, loss: Callable[[], float] = float, store_bytes: Callable[[], int] = int, stride: int = 1
) -> None:
    """Warm up, say so, and carry out orders until there are no more. Blocks.

    Args:
        step: Called again and again.
        loss: Returns the loss of the last step.
        store_bytes: Returns the bytes that all ps tasks hold.
        stride: Number of steps that one call of ``step`` takes, where one process takes those of several.
    """
    step_seconds = warm_up(step)
    tell(Ready(step_seconds=step_seconds, store_bytes=store_bytes()))
    for line in sys.stdin.buffer:
        tell(measure(step, loss, msgspec.json.decode(line, type=Window), stride))


def warm_up(step: Step) -> float:
    """Take steps until they are as fast as they get, and return the seconds that one of them takes."""
    step()
    started, count = time.monotonic(), 0
    while count < WARM_UP_STEPS or time.monotonic() - started < WARM_UP_SECONDS:
        step()
        count += 1
    return (time.monotonic() - started) / count


def measure(step: Step, loss: Callable[[], float], window: Window, stride: int = 1) -> Measured:
    """Train through a window.

    Raises:
        ValueError: If the loss is not finite, so that the speed would mean nothing.
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


def tell(message: Ready | Measured) -> None:
    """Print a message as a line of JSON."""
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.buffer.flush()
