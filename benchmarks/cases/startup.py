"""From nothing to the first step, beside an import of torch.

    * Launch: from the start of ``paramserver launch`` of 1 ps and 2 workers until both have taken their first step.
      All three are forks of a process that imports torch.
    * Import: a Python process that imports the package, beside one that does nothing; and one that imports a
      strategy, beside one that imports torch.

Files are in the page cache: everything is started once before it counts, except in a smoke test.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial

from benchmarks import ROOT
from benchmarks.harness.case import Case
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.figure import Figure, Side, Subject, seconds_each
from benchmarks.harness.options import Effort
from paramserver.launch.start_methods import task_environment

LIMIT = 120.0
WORKERS = 2
MOST_OF_LAUNCH = 2.5
SCRIPT = "benchmarks/harness/programs/first_step.py"
LAUNCH = (sys.executable, "-m", "paramserver", "launch", "--ps", "1", "--workers", str(WORKERS), SCRIPT)
FIRST_STEP = re.compile(r"first step at ([\d.]+)")

PLAIN = "pass"
TORCH = "import torch"


def measure(options: Effort) -> Iterator[Figure]:
    """Measure the launch and both imports. Blocks for about a minute and a half."""
    yield _beside("launch to first step", _launch, TORCH, options, MOST_OF_LAUNCH)
    for statement, other in (("import paramserver", PLAIN), ("from paramserver import ParameterServerStrategy", TORCH)):
        yield _beside(statement, _python(statement), other, options)


def _beside(case: str, ours: Side, other: str, options: Effort, target: float | None = None) -> Figure:
    plain = _python(other)
    if options.sizes == "all":
        ours(), plain()
    return Subject(
        case=case, size_unit="run", beside=f"python -c '{other}'", unit="s", better="less", target=target
    ).measure(ours, plain, options.repeats)


def _launch() -> float:
    """Launch a run, and return the seconds until the last worker's first step."""
    begun = time.monotonic()
    env = task_environment({})  # without a fork server that is there already
    said, steps = [], list[float]()
    with subprocess.Popen(
        LAUNCH, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        assert run.stdout is not None  # it is a pipe
        for line in run.stdout:
            said.append(line)
            steps += map(float, FIRST_STEP.findall(line))
            if len(steps) == WORKERS:
                run.terminate()
    if len(steps) != WORKERS:
        raise BenchmarkError(f"{len(steps)} of {WORKERS} workers took a step; the run said: {''.join(said)}")
    return max(steps) - begun


def _python(statement: str) -> Side:
    """Return a side that runs a statement in a process, and returns the seconds that this takes in all."""
    return partial(seconds_each, partial(_run, "-c", statement))


def _run(*args: str) -> None:
    try:
        subprocess.run((sys.executable, *args), cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=True)
    except subprocess.TimeoutExpired:
        raise BenchmarkError(f"{' '.join(args)} did not end within {LIMIT:.0f} s") from None
    except subprocess.CalledProcessError as error:
        raise BenchmarkError(f"{' '.join(args)} ended with code {error.returncode}: {error.stderr}") from error


CASE = Case(title="From nothing to the first step", options=Effort, measure=measure, order=60)
