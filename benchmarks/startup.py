"""``python -m benchmarks.startup``: from nothing to the first step, beside what importing torch takes.

    * Launch: from the start of ``paramserver launch`` of 1 ps and 2 workers until both have taken their first step.
      All three are forks of a process that imports torch.
    * Import: a Python process that imports the package, beside one that does nothing; and one that imports a
      strategy, beside one that imports torch.

Files are in the page cache: everything is started once before it counts, unless this is to be quick.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from benchmarks.figure import Effort, Figure, compared, run, take_turns
from benchmarks.processes import ROOT, BenchmarkError
from paramserver.launch.start_methods import task_environment

LIMIT = 120.0
WORKERS = 2
MOST_OF_LAUNCH = 2.5
FIRST_STEP = re.compile(r"first step at ([\d.]+)")

PLAIN = "pass"
TORCH = "import torch"


def measure(effort: Effort) -> Iterator[Figure]:
    """The launch and both imports. Blocks for about a minute and a half."""
    options = ("launch", "--ps", "1", "--workers", str(WORKERS), "benchmarks/first_step.py")
    yield _beside("launch to first step", _launch(options), TORCH, effort, MOST_OF_LAUNCH)
    for statement, other in (("import paramserver", PLAIN), ("from paramserver import ParameterServerStrategy", TORCH)):
        yield _beside(statement, _python(statement), other, effort)


def _beside(case: str, ours: Callable[[], float], other: str, effort: Effort, target: float | None = None) -> Figure:
    plain = _python(other)
    if effort.picked == "all":
        ours(), plain()
    return compared(
        take_turns(ours, plain, effort.repeats),
        "startup",
        case,
        size=1,
        size_unit="run",
        beside=f"python -c '{other}'",
        unit="s",
        better="less",
        target=target,
    )


def _launch(options: tuple[str, ...]) -> Callable[[], float]:
    """Launches a run, and tells the seconds until the last worker's first step."""

    def launch() -> float:
        begun = time.monotonic()
        command = (sys.executable, "-m", "paramserver", *options)
        env = task_environment({})  # without a fork server that is there already
        with subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as run:
            assert run.stdout is not None  # it is a pipe
            said, steps = [], list[float]()
            for line in run.stdout:
                said.append(line)
                steps += map(float, FIRST_STEP.findall(line))
                if len(steps) == WORKERS:
                    run.terminate()
        if len(steps) != WORKERS:
            raise BenchmarkError(f"{len(steps)} of {WORKERS} workers took a step; the run said: {''.join(said)}")
        return max(steps) - begun

    return launch


def _python(statement: str) -> Callable[[], float]:
    """Runs a statement in a process, and tells the seconds that it takes in all."""

    def start() -> float:
        begun = time.monotonic()
        _run("-c", statement)
        return time.monotonic() - begun

    return start


def _run(*args: str) -> None:
    try:
        subprocess.run((sys.executable, *args), cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=True)
    except subprocess.TimeoutExpired:
        raise BenchmarkError(f"{' '.join(args)} did not end within {LIMIT:.0f} s") from None
    except subprocess.CalledProcessError as error:
        raise BenchmarkError(f"{' '.join(args)} ended with code {error.returncode}: {error.stderr}") from error


if __name__ == "__main__":
    run(measure, "From nothing to the first step, beside what importing torch takes.")
