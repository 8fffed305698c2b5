"""A run as actors of Ray, each of which holds the process of one task, watched by one loop.

Rules
    * The actors belong to this driver: Ray ends them with it, and their processes with them.
    * The rules of `lifecycle` decide what follows from the end of a task. A task that is started again gets a new
      actor, on another node if its own is gone.
    * Each ps listens where its actor is. The cluster is told to all tasks when every ps has an address, and again when
      one of them has a new one.
    * A task whose actor is gone has been killed, as far as the others are concerned.
"""

from __future__ import annotations

import secrets
import selectors
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from paramserver.cluster import environment
from paramserver.cluster.exit_codes import CONSEQUENCE, exit_code
from paramserver.cluster.report import Report
from paramserver.cluster.task import Role, TaskId
from paramserver.cluster.tf_config import as_tf_config
from paramserver.errors import ParameterServerError
from paramserver.launch import ray_cluster
from paramserver.launch.backends import OnEnd, OnOutput, OnReport
from paramserver.launch.lifecycle import Ending, Lifecycle
from paramserver.launch.output import OutputLine, Printer
from paramserver.launch.ray_cluster import Actor, Calls
from paramserver.launch.ray_host import Event
from paramserver.launch.ray_options import show_resources
from paramserver.launch.ray_spec import (
    RaySpec,
    cluster_of,
    describe_actors,
    describe_need,
    missing,
    not_placed,
    plan_actors,
)
from paramserver.launch.signals import ENDING, caught_signals
from paramserver.launch.spec import LEFT_ALONE, LaunchOptions
from paramserver.layout.lanes import check_platform

READ_BYTES = 65536
KILLED = Ending(128 + signal.SIGKILL, signal.SIGKILL)
SLOW_PLACEMENT = 2.0
"""Seconds after which a run says that it waits for resources."""


def launch(
    options: LaunchOptions,
    on_report: OnReport | None = None,
    on_output: OnOutput | None = None,
    on_end: OnEnd | None = None,
) -> int:
    """Run what ``options`` ask for on a cluster of Ray; see `Backend.launch`.

    Raises:
        ConfigError: If Ray is not installed, there is no cluster, or it has no place for the tasks.
    """
    check_platform("launch")
    token = environment.read().token or secrets.token_hex(16)
    spec = plan(options, token, secrets.token_hex(4))
    with ray_cluster.connected(spec.options, shows_output=False):
        return RayRun(spec, on_report, on_output, on_end).run()


def dry_run(options: LaunchOptions) -> str:
    """Return a description of what `launch` would start; see `Backend.dry_run`. Needs no Ray."""
    return describe_actors(plan(options, "***", "<run id>"))


def plan(options: LaunchOptions, token: str, run_id: str) -> RaySpec:
    """Return the run for this process's environment; see `plan_actors`."""
    return plan_actors(options, token, run_id, [name for name in LEFT_ALONE if environment.is_set(name)])


@dataclass
class Member:
    """A task that runs or is about to.

    Attributes:
        actor: Its actor.
        waits_until: When it is given up unless its actor is up; None once it is up.
        has_begun: Whether its process or function has been started.
    """

    actor: Actor
    waits_until: float | None
    has_begun: bool = False


@dataclass(frozen=True)
class Work:
    """A function that the tasks that train run, instead of a script.

    Attributes:
        function: The function.
        args: Its arguments.
    """

    function: Callable[..., object]
    args: tuple[object, ...]


class RayRun:
    """One run of a `RaySpec`, in a process that is connected to Ray. It can be run once.

    Args:
        spec: The run.
        on_report: As in `Backend.launch`.
        on_output: As in `Backend.launch`.
        on_end: As in `Backend.launch`.
        work: A function to run instead of the script.

    Attributes:
        results: The results of a function by task, as far as it has ended well.
        error: The first error by which it has failed; None without any.
    """

    def __init__(
        self,
        spec: RaySpec,
        on_report: OnReport | None = None,
        on_output: OnOutput | None = None,
        on_end: OnEnd | None = None,
        work: Work | None = None,
    ) -> None:
        self.results: dict[TaskId, object] = {}
        self.error: BaseException | None = None
        self._spec = spec
        self._on_report = on_report
        self._on_output = on_output or Printer(spec.tasks)
        self._on_end = on_end
        self._work = work
        self._lifecycle = Lifecycle(spec.tasks, spec.limits)
        self._numbers = {task: number for number, task in enumerate(spec.tasks)}
        self._members: dict[TaskId, Member] = {}
        self._attempts = dict.fromkeys(spec.tasks, 0)
        self._ps_addresses: dict[TaskId, str] = {}
        self._calls = Calls()
        self._selector = selectors.DefaultSelector()
        self._group: Any = None
        self._say_waiting_at: float | None = None
        self._give_up_at: float | None = None
        self._told: set[TaskId] = set()
        self._has_named = False

    def __repr__(self) -> str:
        return f"<RayRun {self._spec.run_id}: {self._lifecycle!r}>"

    @property
    def summary(self) -> str:
        """As in `Lifecycle`."""
        return self._lifecycle.summary

    def run(self) -> int:
        """Start the tasks, wait for the end of the run, and return its exit code. Main thread only.

        Raises:
            ConfigError: If there is no place for the tasks in time.
        """
        with self._selector, caught_signals() as interrupts:
            self._selector.register(interrupts, selectors.EVENT_READ, partial(self._interrupt, interrupts))
            self._selector.register(self._calls, selectors.EVENT_READ, self._calls.handle)
            try:
                self._place()
                while self._lifecycle.running:
                    self._turn()
            finally:
                self._sweep()
        if self._lifecycle.summary:
            self._say(self._lifecycle.summary)
        return self._lifecycle.exit_code

    def _place(self) -> None:
        now = time.monotonic()
        self._group = ray_cluster.place(self._spec)
        self._calls.when_done(self._group.ready(), self._placed, self._not_placed)
        nodes = ray_cluster.nodes()
        is_missing = missing(self._spec.bundles, self._spec.options.placement, nodes)
        self._say_waiting_at = now if is_missing else now + SLOW_PLACEMENT
        self._give_up_at = now + self._spec.options.start_timeout

    def _placed(self, _: object) -> None:
        self._say_waiting_at = self._give_up_at = None
        for task in self._spec.tasks:
            if task in self._lifecycle.running:
                self._start(task)

    def _not_placed(self, error: BaseException) -> None:
        raise not_placed(self._spec, ray_cluster.nodes()) from error

    def _start(self, task: TaskId) -> None:
        number = self._numbers[task]
        name = ray_cluster.actor_name(self._spec, task, self._attempts[task])
        self._attempts[task] += 1
        runs_function = self._work is not None and task.role is not Role.PS
        spec = self._spec.actors[number]
        actor = ray_cluster.start_actor(spec, self._group, number, name, runs_function=runs_function)
        member = Member(actor, time.monotonic() + self._spec.options.start_timeout)
        self._members[task] = member
        self._calls.when_done(actor.listen.remote(), partial(self._is_up, task, member), self._failed(task, member))

    def _is_up(self, task: TaskId, member: Member, address: str) -> None:
        member.waits_until = None
        if task.role is Role.PS:
            self._ps_addresses[task] = address
        if len(self._ps_addresses) < sum(each.role is Role.PS for each in self._spec.tasks):
            return
        for other, each in self._members.items():
            if each.waits_until is None and not each.has_begun:
                self._begin(other, each)
            elif each.has_begun and task.role is Role.PS:
                each.actor.update.remote(self._tf_config(other))

    def _begin(self, task: TaskId, member: Member) -> None:
        member.has_begun = True
        work, actor, tf_config = self._work, member.actor, self._tf_config(task)
        if work is not None and task.role is not Role.PS:
            call = actor.run.remote(work.function, work.args, tf_config)
            self._calls.when_done(call, partial(self._return, task, member), self._failed(task, member))
            return
        arguments = self._spec.actors[self._numbers[task]].arguments
        folder = None if self._work or self._spec.options.working_dir else str(Path.cwd())
        call = actor.start.remote(arguments, tf_config, folder, self._on_report is not None)
        self._calls.when_done(call, lambda _: self._listen(task, member), self._failed(task, member))

    def _listen(self, task: TaskId, member: Member) -> None:
        self._calls.when_done(
            member.actor.events.remote(), partial(self._take, task, member), self._failed(task, member)
        )

    def _take(self, task: TaskId, member: Member, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, OutputLine):
                self._on_output(event)
            elif isinstance(event, Report):
                if self._on_report is not None:
                    self._on_report(event)
            else:
                self._end(task, member, event)
                return
        self._listen(task, member)

    def _return(self, task: TaskId, member: Member, result: object) -> None:
        self.results[task] = result
        self._end(task, member, Ending(0))

    def _failed(self, task: TaskId, member: Member) -> Callable[[BaseException], None]:
        return partial(self._fail, task, member)

    def _fail(self, task: TaskId, member: Member, error: BaseException) -> None:
        """Note the end of a task whose actor is gone, or has raised an error."""
        if self._members.get(task) is not member:
            return
        if ray_cluster.is_gone(error):
            if task not in self._told:
                self._say(f"{task}: its actor is gone: {_first_line(error)}")
            self._end(task, member, KILLED)
            return
        cause = ray_cluster.cause_of(error)
        self.error = self.error or cause
        shown = str(cause) if isinstance(cause, ParameterServerError) else f"{type(cause).__name__}: {cause}"
        self._on_output(OutputLine(task, f"error: {shown}", is_error=True))
        self._end(task, member, Ending(exit_code(cause)))

    def _end(self, task: TaskId, member: Member, ending: Ending) -> None:
        if self._members.get(task) is not member:
            return
        del self._members[task]
        self._dismiss(task, member, ending)
        pause = self._lifecycle.ended(task, ending, time.monotonic())
        if pause is not None:
            self._say(f"{task} {ending}; it is started again in {pause:g} s ({self._lifecycle.count(task)})")
            return
        if self._lifecycle.has_finished:
            for each in self._members.values():
                each.actor.end_run.remote()
        if ending.code != CONSEQUENCE:
            self._name_culprit()
        if self._on_end is not None:
            self._on_end(task, ending)

    def _dismiss(self, task: TaskId, member: Member, ending: Ending) -> None:
        """End an actor, so that its bundle is free. One that has run a function first runs its exit handlers."""
        if self._work is not None and task.role is not Role.PS and ending != KILLED:
            member.actor.__ray_terminate__.remote()
        else:
            ray_cluster.kill(member.actor)

    def _turn(self) -> None:
        now = time.monotonic()
        for task in self._lifecycle.take_starts(now):
            self._start(task)
        for task, number in self._lifecycle.take_due(now):
            self._tell(task, number)
        self._look_at_waiting(now)
        ends = [self._lifecycle.next_due(), self._say_waiting_at, self._give_up_at]
        ends += [member.waits_until for member in self._members.values()]
        known = [end for end in ends if end is not None]
        for key, _ in self._selector.select(max(0.0, min(known) - now) if known else None):
            key.data()

    def _look_at_waiting(self, now: float) -> None:
        if self._say_waiting_at is not None and now >= self._say_waiting_at:
            self._say_waiting_at = None
            nodes = ray_cluster.nodes()
            why = missing(self._spec.bundles, self._spec.options.placement, nodes) or "other runs have the resources"
            limit = self._spec.options.start_timeout
            self._say(f"waiting for resources, for {limit:g} s at most: {why}; {describe_need(self._spec, nodes)}")
        if self._give_up_at is not None and now >= self._give_up_at:
            raise not_placed(self._spec, ray_cluster.nodes())
        for task, member in list(self._members.items()):
            if member.waits_until is not None and now >= member.waits_until:
                need = show_resources(self._spec.actors[self._numbers[task]].bundle)
                self._say(f"{task}: no node has had {need} for it for {self._spec.options.start_timeout:g} s")
                self._end(task, member, Ending(1))

    def _tell(self, task: TaskId, number: signal.Signals) -> None:
        self._told.add(task)
        if self._lifecycle.is_stopping:
            self._name_culprit()
        elif reason := self._lifecycle.reason_to_leave(task):
            self._say(reason)
        self._signal(task, number)

    def _signal(self, task: TaskId, number: signal.Signals) -> None:
        member = self._members.get(task)
        if member is None:  # it waits for its place
            self._lifecycle.ended(task, Ending(0), time.monotonic())
        elif not member.has_begun or (self._work is not None and task.role is not Role.PS):
            self._end(task, member, KILLED)  # nothing in it could save
        else:
            member.actor.send.remote(int(number))

    def _interrupt(self, interrupts: socket.socket) -> None:
        for number in interrupts.recv(READ_BYTES):
            name = signal.Signals(number).name
            if number in ENDING:
                if self._lifecycle.interrupt is None:
                    self._say(f"stopping the run ({name}); once more kills it")
                self._lifecycle.interrupted(number, time.monotonic())
            else:
                self._say(f"{name} is not passed on to other hosts")

    def _name_culprit(self) -> None:
        lifecycle = self._lifecycle
        if lifecycle.culprit is None or self._has_named or not lifecycle.running or lifecycle.interrupt is not None:
            return
        task, ending = lifecycle.culprit
        self._has_named = True
        self._say(f"{task} {ending}; {'stopping the run' if lifecycle.is_stopping else 'the others go on'}")

    def _sweep(self) -> None:
        for member in self._members.values():
            ray_cluster.kill(member.actor)
        if self._group is not None:
            ray_cluster.remove(self._group)
        self._calls.close()

    def _tf_config(self, task: TaskId) -> str:
        return as_tf_config(cluster_of(self._spec.tasks, self._ps_addresses), task)

    def _say(self, text: str) -> None:
        self._on_output(OutputLine(None, text, is_error=True))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "died because" in line or "node" in line.lower()), lines[0] if lines else "")
