"""The learning rate over a training: a scheduler that follows the global step."""

from __future__ import annotations

import warnings

from torch.optim.lr_scheduler import LRScheduler


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
        """Go to where training starts from. Takes about 5 microseconds for each step."""
        with warnings.catch_warnings():
            # The steps of the optimizer that the scheduler misses were made before this process was started.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
            self.follow(global_step)

    def follow(self, global_step: int) -> None:
        """Go to the rate of ``global_step``; never back."""
        if self._scheduler is None:
            return
        end = global_step if self._last_step is None else min(global_step, self._last_step)
        while self._step < end:
            self._scheduler.step()
            self._step += 1

    def __repr__(self) -> str:
        return f"<Schedule of {type(self._scheduler).__name__} at step {self._step}>"
