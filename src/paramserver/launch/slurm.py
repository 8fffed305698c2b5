"""A run as one step of Slurm inside an allocation, watched through one process: srun.

Rules
    * srun tells which tasks fail, and nothing of those that end well. The rules of `lifecycle` are applied to that: a
      chief or ps that fails ends the run.
    * Slurm signals a step as a whole, so all tasks are asked to leave at once, and once only: a second SIGTERM would
      kill a chief that saves. ps tasks go on serving until the others have left (``ClusterResolver.linger``).
    * srun itself takes SIGTERM for the order to kill. So the tasks are asked to leave by scancel, and killed by a
      SIGTERM to srun.
    * A job that Slurm is ending has signalled its tasks already; the launcher, which belongs to the job, is signalled,
      too.
    * The tasks' reports come through a pipe and cannot cross hosts, so the display shows the ends of tasks only.
"""

from __future__ import annotations

import os
import secrets
import selectors
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from functools import partial

from paramserver.cluster import environment
from paramserver.cluster.exit_codes import CONSEQUENCE
from paramserver.errors import ConfigError
from paramserver.launch.backends import OnEnd, OnOutput, OnReport
from paramserver.launch.lifecycle import Ending, Lifecycle, Limits
from paramserver.launch.output import LineBuffer, OutputLine, Printer
from paramserver.launch.signals import ENDING, caught_signals
from paramserver.launch.spec import LaunchOptions
from paramserver.launch.srun import (
    CANCELLED,
    StepSpec,
    advice,
    describe_step,
    plan_step,
    read_endings,
    read_line,
)
from paramserver.layout.lanes import check_platform

READ_BYTES = 65536
COMMAND_TIMEOUT = 20.0
"""Seconds for a question to Slurm's controller, which may be busy."""
COMMANDS = ("srun", "squeue", "scancel")


def launch(
    options: LaunchOptions,
    on_report: OnReport | None = None,
    on_output: OnOutput | None = None,
    on_end: OnEnd | None = None,
) -> int:
    """Run what ``options`` ask for as a step of this allocation; see `Backend.launch`. No task reports.

    Raises:
        ConfigError: If this is no allocation of Slurm, the options ask for what there is not, or a program is missing.
    """
    check_platform("launch")
    variables = environment.beginning_with("SLURM")
    token = environment.read().token or secrets.token_hex(16)
    spec = plan_step(options, variables, token, secrets.token_hex(4))
    for command in COMMANDS:
        if shutil.which(command) is None:
            raise ConfigError(
                f"launch --on slurm: there is no {command} in PATH; add the folder of Slurm's programs to PATH, or "
                "load the module that does so"
            )
    show = on_output or Printer(spec.tasks)
    if text := advice(options, variables):
        show(OutputLine(None, text, is_error=True))
    return SlurmRun(spec, options.limits, show, on_end).run()


def dry_run(options: LaunchOptions) -> str:
    """Return a description of what `launch` would start; see `Backend.dry_run`."""
    return describe_step(plan_step(options, environment.beginning_with("SLURM"), "***", "<run id>"))


class SlurmRun:
    """One run of a `StepSpec`. It can be run once.

    Args:
        spec: The step to start.
        limits: The limits of its end.
        on_output: As in `Backend.launch`.
        on_end: As in `Backend.launch`.
    """

    def __init__(self, spec: StepSpec, limits: Limits, on_output: OnOutput, on_end: OnEnd | None = None) -> None:
        self._spec = spec
        self._limits = limits
        self._on_output = on_output
        self._on_end = on_end
        self._lifecycle = Lifecycle(spec.tasks, limits)
        self._selector = selectors.DefaultSelector()
        self._open_pipes = 0
        self._were_asked = self._were_killed = self._has_named = False

    def __repr__(self) -> str:
        return f"<SlurmRun {self._spec.run_id}: {self._lifecycle!r}>"

    def run(self) -> int:
        """Start the step, wait for its end, and return the exit code of the run. Main thread only."""
        with self._selector, caught_signals() as interrupts:
            self._selector.register(interrupts, selectors.EVENT_READ, partial(self._interrupt, interrupts))
            # A session of its own: Ctrl-C in a terminal is for the launcher, which asks the tasks to leave.
            process = subprocess.Popen(
                self._spec.command,
                env=environment.for_child(self._spec.env),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            with process:
                try:
                    self._watch(process)
                    while self._open_pipes:
                        self._turn(process)
                except BaseException:
                    process.terminate()  # kills the tasks
                    raise
        return self._end(process.returncode)

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        for stream, is_error in ((process.stdout, False), (process.stderr, True)):
            if stream is not None:  # as both are
                read = partial(self._read, stream.fileno(), LineBuffer(), partial(self._take_line, is_error))
                self._selector.register(stream.fileno(), selectors.EVENT_READ, read)
                self._open_pipes += 1

    def _turn(self, process: subprocess.Popen[bytes]) -> None:
        now = time.monotonic()
        due = {number for _, number in self._lifecycle.take_due(now)}
        if signal.SIGTERM in due:
            self._ask(process)
        if signal.SIGKILL in due:
            self._kill(process)
        end = self._lifecycle.next_due()
        for key, _ in self._selector.select(None if end is None else max(0.0, end - now)):
            key.data()

    def _read(self, descriptor: int, buffer: LineBuffer, handle: Callable[[bytes], None]) -> None:
        data = os.read(descriptor, READ_BYTES)
        for line in buffer.feed(data) if data else buffer.finish():
            handle(line)
        if not data:
            self._selector.unregister(descriptor)
            self._open_pipes -= 1

    def _take_line(self, is_error: bool, line: bytes) -> None:
        output = read_line(self._spec, line.decode("utf-8", "replace"), is_error)
        self._were_asked |= is_error and CANCELLED.match(output.text) is not None
        endings = read_endings(self._spec, output.text) if output.task is None and is_error else []
        for task, ending in endings:
            if task in self._lifecycle.running:
                self._lifecycle.ended(task, ending, time.monotonic())
                if ending.code != CONSEQUENCE:
                    self._name_culprit()
                if self._on_end is not None:
                    self._on_end(task, ending)
        if not endings:
            self._on_output(output)

    def _interrupt(self, interrupts: socket.socket) -> None:
        for number in interrupts.recv(READ_BYTES):
            if number in ENDING:
                again = self._lifecycle.interrupt is not None
                if not again:
                    self._say(f"stopping the run ({signal.Signals(number).name}); once more kills it")
                self._lifecycle.interrupted(number, time.monotonic())
            else:
                name = signal.Signals(number).name
                self._say(f"{name} is not passed on: send it with scancel --signal={name} to the step")

    def _ask(self, process: subprocess.Popen[bytes]) -> None:
        """Ask all tasks to leave, unless Slurm has done so."""
        self._name_culprit()
        if self._were_asked or self._is_job_ending():
            return
        self._were_asked = True
        self._lifecycle.told_all()
        steps = self._steps()
        if not steps:  # it waits for its turn, or is ending
            process.terminate()
        for step in steps:
            _ask_slurm("scancel", "--signal=TERM", step)

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        if not self._were_killed:
            self._were_killed = True
            self._say(f"killing the tasks that are left; they had {self._limits.shutdown_timeout:g} s at most to end")
            process.terminate()

    def _is_job_ending(self) -> bool:
        states = _ask_slurm("squeue", "--noheader", f"--jobs={self._spec.job_ids[0]}", "--format=%T").split()
        return states != ["RUNNING"]

    def _steps(self) -> list[str]:
        """Return the ids of the step, one for each component of the job."""
        jobs = ",".join(self._spec.job_ids)
        lines = _ask_slurm("squeue", "--noheader", "--steps", f"--jobs={jobs}", "--format=%i %j").splitlines()
        return [step for step, _, name in (line.partition(" ") for line in lines) if name.strip() == self._spec.name]

    def _name_culprit(self) -> None:
        lifecycle = self._lifecycle
        if lifecycle.culprit is None or self._has_named or lifecycle.interrupt is not None:
            return
        task, ending = lifecycle.culprit
        self._has_named = True
        self._say(f"{task} {ending}; {'stopping the run' if lifecycle.is_stopping else 'the others go on'}")

    def _end(self, code: int) -> int:
        lifecycle = self._lifecycle
        if code and not lifecycle.failures and lifecycle.interrupt is None:
            self._say(f"error: srun ended with code {code}, and named no task that failed")
            return code if code > 0 else 128 - code
        for task in sorted(lifecycle.running):
            if self._on_end is not None:
                self._on_end(task, Ending(0))
        if lifecycle.summary:
            self._say(lifecycle.summary)
        return lifecycle.exit_code

    def _say(self, text: str) -> None:
        self._on_output(OutputLine(None, text, is_error=True))


def _ask_slurm(*command: str) -> str:
    """Return the output of a program of Slurm; empty if it fails, as it does for what has ended."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout
