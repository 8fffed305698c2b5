"""The consequences of the end of a pod for a JobSet. No process or clock: it receives events and returns actions.

Rules
    * A pod that ends with 0 completes. A Job is complete with all its pods. When the Jobs that the success policy names
      are complete, the JobSet has succeeded: all other tasks are told to end, and cannot fail any more.
    * A pod that fails is made anew by its Job. The failure counts, unless the first rule of ``podFailurePolicy`` that
      matches the exit code says ``Ignore``. With more failures than ``backoffLimit``, or by a rule ``FailJob``, the Job
      fails.
    * A Job that fails is dealt with by the first rule of the failure policy that matches; without one, the JobSet is
      restarted; without a failure policy, it fails. ``maxRestarts`` limits all restarts that count, of Jobs and of the
      whole together.
    * A JobSet that fails or is restarted is stopped; the ps tasks are told last, as with any run.
    * Pauses before a new pod are those of any run; Kubernetes waits longer.
"""

from __future__ import annotations

import math
import signal
from collections import Counter
from collections.abc import Mapping

from paramserver.cluster.task import Role, TaskId
from paramserver.launch.jobsets.jobset import JobSet, Pod
from paramserver.launch.lifecycle import FIRST_PAUSE, LONGEST_PAUSE, Ending, Lifecycle, Limits

TOO_OFTEN, BY_RULE = "BackoffLimitExceeded", "PodFailurePolicy"
"""Reasons of a failed Job, as Kubernetes has them."""


class JobSetLifecycle(Lifecycle):
    """The state of a JobSet.

    Args:
        jobset: The JobSet.
        limits: The limits of the run's end.
        restarts: Number of restarts before, for a JobSet that was restarted.

    Attributes:
        restarts: Number of restarts that count.
        is_restarting: Whether all tasks are to end because the JobSet is restarted.
        has_succeeded: Whether the success policy is fulfilled.
    """

    def __init__(self, jobset: JobSet, limits: Limits, restarts: int = 0) -> None:
        self._pods: Mapping[TaskId, Pod] = {pod.task: pod for pod in jobset.pods()}
        super().__init__(self._pods, limits)
        self.restarts = restarts
        self.is_restarting = self.has_succeeded = False
        self._jobset = jobset
        self._complete: set[TaskId] = set()
        self._failed_pods: Counter[tuple[str, int]] = Counter()
        self._starts_of: Counter[TaskId] = Counter()

    def ended(self, task: TaskId, ending: Ending, now: float) -> float | None:
        is_failure = bool(ending.code) and task not in self._told
        is_failure = is_failure and not (self.is_stopping or self.has_succeeded)
        if is_failure and self._comes_back(task, ending):
            pause = min(math.ldexp(FIRST_PAUSE, self._starts_of[task]), LONGEST_PAUSE)
            self._starts_of[task] += 1
            self._starts[task] = now + pause
            return pause
        self.running.discard(task)
        self._due.pop(task, None)
        if not ending.code:
            self._complete.add(task)
            self.has_finished |= task.role is Role.CHIEF
            self._check_success(now)
        if is_failure and not self.is_restarting:
            self.failures.append((task, ending))
        if is_failure:
            self._stop(now)
        if not self._is_training:
            self._end_ps_tasks(now)
        return None

    def count(self, task: TaskId) -> str:
        pod = self._pods[task]
        failures = self._failed_pods[pod.job.name, pod.job_index]
        return f"its Job has failed {failures} times, limit {pod.job.backoff_limit}"

    def reason_to_leave(self, task: TaskId) -> str:
        if self.has_succeeded and task.role is not Role.PS:
            return f"the JobSet has succeeded; stopping {task}"
        return super().reason_to_leave(task)

    def _comes_back(self, task: TaskId, ending: Ending) -> bool:
        """Count the failure of a pod, and return whether it is made anew; if not, say what happens instead."""
        pod = self._pods[task]
        action = next((rule.action for rule in pod.job.exit_rules if rule.matches(ending.code)), "Count")
        if action == "Ignore":
            return True
        job = (pod.job.name, pod.job_index)
        if action == "Count":
            self._failed_pods[job] += 1
            if self._failed_pods[job] <= pod.job.backoff_limit:
                return True
        return self._job_comes_back(pod, BY_RULE if action == "FailJob" else TOO_OFTEN)

    def _job_comes_back(self, pod: Pod, reason: str) -> bool:
        action = self._action(pod.job.name, reason)
        name = f"Job {self._jobset.name}-{pod.job.name}-{pod.job_index} has failed ({reason})"
        counts = not action.endswith("IgnoreMaxRestarts")
        if action != "FailJobSet" and counts and self.restarts >= (self._jobset.max_restarts or 0):
            self.remarks.append(f"{name}; the JobSet fails after {self.restarts} restarts (maxRestarts)")
            return False
        if action == "FailJobSet":
            self.remarks.append(f"{name}; the JobSet fails")
            return False
        self.restarts += counts
        if action.startswith("RestartJobSet"):
            self.remarks.append(f"{name}; the JobSet is restarted")
            self.is_restarting = True
            return False
        self.remarks.append(f"{name}; it is made anew")
        del self._failed_pods[pod.job.name, pod.job_index]
        return True

    def _action(self, job: str, reason: str) -> str:
        if self._jobset.max_restarts is None:
            return "FailJobSet"
        matching = (rule.action for rule in self._jobset.rules if rule.matches(job, reason))
        return next(matching, "RestartJobSet")

    def _check_success(self, now: float) -> None:
        targets = self._jobset.success_targets
        jobs: dict[tuple[str, int], set[TaskId]] = {}
        for task, pod in self._pods.items():
            if not targets or pod.job.name in targets:
                jobs.setdefault((pod.job.name, pod.job_index), set()).add(task)
        complete = [tasks <= self._complete for tasks in jobs.values()]
        if any(complete) if self._jobset.success_operator == "Any" else all(complete):
            self.has_succeeded = True
            self.running -= self._starts.keys()
            self._starts.clear()
            for task in self.running - self._told:
                if task.role is not Role.PS:
                    self._due[task] = (now, signal.SIGTERM)
