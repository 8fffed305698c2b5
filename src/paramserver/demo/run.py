"""``paramserver demo``: the main job with five real processes, and one live display. No torch here."""

from __future__ import annotations

import signal
import tempfile
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console

from paramserver.cluster.report import Report
from paramserver.demo.results import evaluations, results, times
from paramserver.errors import ConfigError
from paramserver.launch.display import Display, find_terminal
from paramserver.launch.local import launch
from paramserver.launch.output import OutputLine, Printer
from paramserver.launch.progress import RunProgress
from paramserver.launch.spec import PRELOADED, LaunchOptions, task_ids

SCRIPT = Path(__file__).with_name("digits.py")
IMPORTED = ("sklearn.datasets", "torchmetrics.classification")
"""Modules that the script imports, which takes seconds."""

KEPT_LINES = 200
INTERRUPTED = 128 + signal.SIGINT


def run_demo(steps: int, model_dir: str | None = None, lane: str = "auto") -> int:
    """Train a classifier of handwritten digits with a chief, a worker, two ps tasks and an evaluator. Blocks.

    Args:
        steps: Global steps to train.
        model_dir: Folder for results; a new temporary folder by default.
        lane: ``auto`` or ``tcp``.

    Returns:
        The exit code.

    Raises:
        ConfigError: If ``steps`` is not positive, or the folder cannot be used.
    """
    if steps <= 0:
        raise ConfigError(f"demo: --steps: expected a positive number, got {steps}")
    folder = _folder(model_dir)
    console = Console()
    lines: deque[OutputLine] = deque(maxlen=KEPT_LINES)
    options = LaunchOptions(
        script=str(SCRIPT),
        args=(str(folder), str(steps)),
        ps=2,
        workers=2,
        evaluator=True,
        lane=lane,
        preload=(*PRELOADED, *IMPORTED),
    )
    progress = RunProgress.of(task_ids(options))
    console.print("Training on handwritten digits: chief, worker, two ps tasks and an evaluator")
    code = _watched(options, progress, lines, console)
    if code:
        _tell_failure(options, lines, code == INTERRUPTED)
    else:
        _tell_results(progress, console)
    return code


def _watched(options: LaunchOptions, progress: RunProgress, lines: deque[OutputLine], console: Console) -> int:
    terminal = find_terminal()
    if terminal is None:
        return launch(options, _printing(progress, console), lines.append)
    with Display(progress, terminal):
        return launch(options, progress.take, lines.append, progress.end)


def _tell_results(progress: RunProgress, console: Console) -> None:
    console.print("Evaluations on the test images", style="bold")
    console.print(evaluations(progress))
    console.print("Milliseconds of a step", style="bold")
    console.print(times(progress))
    found = results(progress)
    width = max(len(title) for title, _ in found)
    for title, text in found:
        console.print(f"{title:<{width}}  {text}", soft_wrap=True, markup=False, highlight=False)


def _tell_failure(options: LaunchOptions, lines: Iterable[OutputLine], by_user: bool) -> None:
    """Print the output of the tasks or, if the user has ended the run, only that of the launcher."""
    show = Printer(task_ids(options))
    for line in lines:
        if line.task is None or not by_user:
            show(line)


def _printing(progress: RunProgress, console: Console) -> Callable[[Report], None]:
    def take(report: Report) -> None:
        progress.take(report)
        if report.evaluation:
            metrics = report.evaluation
            console.print(f"step {metrics['global_step']:.0f}: test accuracy {metrics['accuracy']:.3f}")

    return take


def _folder(model_dir: str | None) -> Path:
    if model_dir is None:
        return Path(tempfile.mkdtemp(prefix="paramserver-demo-"))
    if "://" in model_dir:
        raise ConfigError(f"demo: --model-dir: expected a folder of this machine, got {model_dir}")
    folder = Path(model_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"demo: --model-dir: {folder} cannot be made: {error.strerror}") from error
    return folder.absolute()
