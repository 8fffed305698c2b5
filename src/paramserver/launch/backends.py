"""Where a launched run can run: a row for each engine. A backend is imported when it is used."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Protocol, TypeAlias, cast

from paramserver.cluster.report import Report
from paramserver.cluster.spec import expected_one_of
from paramserver.cluster.task import TaskId
from paramserver.errors import ConfigError
from paramserver.launch.lifecycle import Ending
from paramserver.launch.output import OutputLine
from paramserver.launch.spec import LOCAL, RAY, LaunchOptions

OnReport: TypeAlias = Callable[[Report], None]
OnOutput: TypeAlias = Callable[[OutputLine], None]
OnEnd: TypeAlias = Callable[[TaskId, Ending], None]


class Backend(Protocol):
    """The functions of a backend's module."""

    def launch(
        self,
        options: LaunchOptions,
        on_report: OnReport | None = None,
        on_output: OnOutput | None = None,
        on_end: OnEnd | None = None,
    ) -> int:
        """Run what ``options`` ask for, wait for its end, leave nothing behind, and return the exit code.

        Args:
            options: The options of the user.
            on_report: Called with every report of a task.
            on_output: Called with every line that a task or the launcher prints; None prints them.
            on_end: Called with each task that has ended for good.

        Raises:
            ConfigError: If the run cannot be started.
        """

    def dry_run(self, options: LaunchOptions) -> str:
        """Return a description of exactly what `launch` would start. Starts nothing."""


BACKENDS = {LOCAL: "paramserver.launch.local", "slurm": "paramserver.launch.slurm", RAY: "paramserver.launch.ray"}
"""Modules of the backends by name."""


def check_backend(name: str) -> None:
    """Raise ConfigError if there is no backend with a name."""
    if name not in BACKENDS:
        raise ConfigError(f"launch --on: {expected_one_of(BACKENDS, name)}")


def load(name: str) -> Backend:
    """Import a backend.

    Raises:
        ConfigError: If there is none with that name.
    """
    check_backend(name)
    return cast("Backend", importlib.import_module(BACKENDS[name]))
