"""The learning rate over a training: a scheduler that follows the global step."""

from __future__ import annotations

import logging
import warnings
from bisect import bisect_right

from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler, SequentialLR

logger = logging.getLogger(__name__)

FEW_STEPS = 10_000
"""Steps that a scheduler makes one by one, so that its rates are those of plain PyTorch to the last bit."""
MANY_STEPS = 1_000_000
"""Steps one by one that take so long that it is said."""

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
"""Those whose ``step(epoch)`` works the rate of a step out by itself, whatever the rate was before. No subclasses: what
they do differently may need every step."""


class Schedule:
    """Steps a learning-rate scheduler once for each update of the model, those of other workers included.

    So its length is counted in the same steps as ``max_steps``, however many workers there are; all workers use the
    same rate at the same time; and a training that is resumed goes on where the schedule was, with nothing to save.

    Args:
        scheduler: Fresh, as the model_fn made it; None for a rate that stays.
        last_step: Where it stops, None for nowhere: the last updates of other workers may lead beyond ``max_steps``,
            where some schedulers refuse to go.
    """

    def __init__(self, scheduler: LRScheduler | None, last_step: int | None) -> None:
        self._scheduler = scheduler
        self._last_step = last_step
        self._step = 0

    def resume(self, global_step: int) -> None:
        """Go to where training starts from.

        More than `FEW_STEPS` are made in one, but for schedulers whose rate depends on all rates before: these take
        about 2 microseconds for each step.
        """
        with warnings.catch_warnings():
            # The steps of the optimizer that the scheduler misses were made before this process was started.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
            # torch would do without step(epoch), and has nothing in its place.
            warnings.filterwarnings("ignore", message="The epoch parameter in `scheduler.step", category=UserWarning)
            self._leap(global_step)
            self.follow(global_step)

    def follow(self, global_step: int) -> None:
        """Go to the rate of ``global_step``; never back."""
        if self._scheduler is None:
            return
        end = self._end(global_step)
        while self._step < end:
            self._scheduler.step()
            self._step += 1

    def _leap(self, global_step: int) -> None:
        """Go a long way in one step, if the scheduler can."""
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
    """Take a scheduler to a step; False if it is none that can be taken there."""
    if type(scheduler) is SequentialLR:
        return _leap_sequence(scheduler, step)
    if type(scheduler) not in _BY_STEP:
        return False
    scheduler.step(step)
    return True


def _leap_sequence(sequence: SequentialLR, step: int) -> bool:
    """As `_leap`: each scheduler of a sequence begins at 0 where the one before has ended."""
    milestones = [0, *sequence._milestones]  # torch shows neither these nor the schedulers by public names
    which = bisect_right(milestones, step) - 1
    scheduler: LRScheduler = sequence._schedulers[which]
    if not _leap(scheduler, step - milestones[which]):
        return False
    sequence.last_epoch = step
    sequence._last_lr = scheduler.get_last_lr()
    return True
