"""The hook that profiles single steps."""

from __future__ import annotations

import logging
import time
from functools import partial

import torch

from paramserver.checkpoint.storage import storage_of
from paramserver.estimator.hooks.basic import Clock, SecondOrStepTimer
from paramserver.estimator.hooks.hook import RunContext, RunValues, TrainingHook, TrainingSession
from paramserver.memory.torch_internals import all_threads

logger = logging.getLogger(__name__)


class ProfilerHook(TrainingHook):
    """Writes a trace of a step, operator by operator, after each interval of global steps or seconds.

    One step is profiled each time. The first is one interval after the start, and never this task's first step, which
    contains work that is done only once. A trace is a JSON file ``TASK.STEP.pt.trace.json``, such as
    ``chief-0.100.pt.trace.json``, that ui.perfetto.dev, chrome://tracing and TensorBoard's profiler plugin open; it
    covers the threads of all replicas, and their GPUs. Profiling slows that step down, the first time by about a
    second.

    Args:
        save_steps: Global steps between two traces; exactly one of the two is given.
        save_secs: Seconds between two traces.
        output_dir: The folder of the traces, a path or URL; every task that has this hook writes there. By default the
            model_dir, where only the chief writes.
        record_shapes: Whether to record the shapes of operators' arguments.
        profile_memory: Whether to record allocations and deallocations.
        with_stack: Whether to record the calling Python lines; slow.
        clock: Returns seconds.

    Raises:
        ConfigError: If not exactly one interval is given, or it is not positive.

    >>> hook = ProfilerHook(save_steps=500, profile_memory=True)
    """

    def __init__(
        self,
        save_steps: int | None = None,
        save_secs: float | None = None,
        output_dir: str = "",
        *,
        record_shapes: bool = False,
        profile_memory: bool = False,
        with_stack: bool = False,
        clock: Clock = time.monotonic,
    ) -> None:
        self._timer = SecondOrStepTimer(every_secs=save_secs, every_steps=save_steps, clock=clock)
        self._output_dir = output_dir
        self._new_profile = partial(
            torch.profiler.profile,
            record_shapes=record_shapes,
            profile_memory=profile_memory,
            with_stack=with_stack,
            experimental_config=all_threads(),
        )
        self._is_on = self._has_begun = False
        self._profile: torch.profiler.profile | None = None

    def begin(self) -> None:
        """Note that the next step is the training's first, which is not profiled."""
        self._has_begun = False

    def after_create_session(self, session: TrainingSession) -> None:
        """Start the first interval."""
        self._is_on = session.is_chief or bool(self._output_dir)
        self._timer.update_last_triggered_step(session.global_step)

    def before_run(self, context: RunContext) -> None:
        """Profile the step if that is due."""
        self._profile = None
        is_first, self._has_begun = not self._has_begun, True
        is_due = self._is_on and self._timer.should_trigger_for_step(context.session.global_step + 1)
        if is_due and not is_first:
            self._profile = self._new_profile()
            context.wrap_step(self._profile)

    def after_run(self, context: RunContext, values: RunValues) -> None:
        """Write the trace of a profiled step.

        Raises:
            OSError: If the trace cannot be written or uploaded.
        """
        if self._profile is None:
            return
        self._timer.update_last_triggered_step(values.global_step)
        storage = storage_of(self._output_dir or context.session.model_dir)
        name = f"{context.session.task.replace(':', '-')}.{values.global_step}.pt.trace.json"
        with storage.new_file(name) as path:
            self._profile.export_chrome_trace(str(path))
        self._profile = None
        logger.info("wrote a profile of step %d to %s", values.global_step, storage.path(name))
