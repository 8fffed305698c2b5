"""The learning rate over a training: a scheduler that follows the global step."""

from __future__ import annotations

import logging
import warnings
from bisect import bisect_right

from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler, SequentialLR

logger = logging.getLogger(__name__)

FEW_STEPS = 10_000
"""Most steps that every scheduler makes one by one, so that its rates equal plain PyTorch's to the last bit."""
MANY_STEPS = 1_000_000
"""Number of steps one by one that takes so long that the log says so."""

_BY_STEP: frozenset[type[LRScheduler]] = frozenset(
    {
        lr_scheduler.LambdaLR,
        lr_scheduler.StepLR,
        lr_scheduler.MultiStepLR,
        lr_scheduler.ConstantLR,
        lr_scheduler.LinearLR,
        lr_scheduler.ExponentialLR,
        lr_scheduler.PolynomialLR,
        lr_scheduler.CosineAnnealingLR,
        lr_scheduler.CosineAnnealingWarmRestarts,
        lr_scheduler.CyclicLR,
        lr_scheduler.OneCycleLR,
    }
)
"""Schedulers whose ``step(epoch)`` computes the rate of a step independently of earlier rates. Subclasses are not
included: their own code may need every step."""


class Schedule:
    """Steps a learning-rate scheduler once for each update of the model, including those of other workers.

    So a schedule's length is counted in the same steps as ``max_steps``, for any number of workers; all workers use the
    same rate at the same time; and a resumed training continues the schedule without any saved state.

    Args:
        scheduler: A fresh scheduler, as the model_fn made it; None for a constant rate.
        last_step: The last step of the schedule; None for no limit. The last updates of other workers may lead beyond
            ``max_steps``, where some schedulers raise.
    """

    def __init__(self, scheduler: LRScheduler | None, last_step: int | None) -> None:
        self._scheduler = scheduler
        self._last_step = last_step
        self._step = 0

    def resume(self, global_step: int) -> None:
        """Advance to the step that training starts from.

        More than `FEW_STEPS` are made at once, except for schedulers whose rate depends on all earlier rates: these
        take about 2 microseconds for each step.
        """
        with warnings.catch_warnings():
            # The scheduler misses steps of the optimizer that were made before this process was started.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
            # torch deprecates step(epoch), but has no replacement for it.
            warnings.filterwarnings("ignore", message="The epoch parameter in `scheduler.step", category=UserWarning)
            self._leap(global_step)
            self.follow(global_step)

    def follow(self, global_step: int) -> None:
        """Advance to the rate of ``global_step``; never go back."""
        if self._scheduler is None:
            return
        end = self._end(global_step)
        while self._step < end:
            self._scheduler.step()
            self._step += 1

    def _leap(self, global_step: int) -> None:
        """Advance many steps at once, if the scheduler can."""
        end = self._end(global_step)
        if self._scheduler is None or end - self._step <= FEW_STEPS:
            return
        if _leap(self._scheduler, end):
            self._step = end
        elif end - self._step >= MANY_STEPS:
            kind = type(self._scheduler).__name__
            logger.info("%s goes through the rates of %d steps before training goes on", kind, end - self._step)

    def _end(self, global_step: int) -> int:
        return global_step if self._last_step is None else min(global_step, self._last_step)

    def __repr__(self) -> str:
        return f"<Schedule of {type(self._scheduler).__name__} at step {self._step}>"


def _leap(scheduler: LRScheduler, step: int) -> bool:
    """Take a scheduler directly to a step; return False if it cannot be taken there."""
    if type(scheduler) is SequentialLR:
        return _leap_sequence(scheduler, step)
    if type(scheduler) not in _BY_STEP:
        return False
    scheduler.step(step)
    return True


def _leap_sequence(sequence: SequentialLR, step: int) -> bool:
    """Take a sequence directly to a step, as `_leap`: each of its schedulers counts from the end of the one before."""
    milestones = [0, *sequence._milestones]  # torch has no public names for these and for the schedulers
    which = bisect_right(milestones, step) - 1
    scheduler: LRScheduler = sequence._schedulers[which]
    if not _leap(scheduler, step - milestones[which]):
        return False
    sequence.last_epoch = step
    sequence._last_lr = scheduler.get_last_lr()
    return True
