"""A run of tasks on this machine, to its end."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

from paramserver.cluster.report import Report
from paramserver.cluster.task import TaskId
from paramserver.launch import local
from paramserver.launch.output import OutputLine
from paramserver.launch.spec import LaunchSpec, TaskSpec


class Run:
    """A finished run: its exit code and what it said.

    Args:
        tasks: What is started.
        reports: Whether tasks are asked for reports.
        listeners: Listening sockets that tasks inherit.
        options: More attributes of the `LaunchSpec`.
    """

    def __init__(
        self,
        *tasks: TaskSpec,
        reports: bool = False,
        listeners: Mapping[TaskId, socket.socket] | None = None,
        **options: Any,
    ) -> None:
        self.lines: list[OutputLine] = []
        self.reports: list[Report] = []
        self.code = local.run(
            LaunchSpec("run", tasks, **options),
            self.reports.append if reports else None,
            self.lines.append,
            listeners,
        )

    def said(self, task: TaskId | None, is_error: bool = False) -> list[str]:
        """The lines of a task, or with None the launcher's own."""
        return [line.text for line in self.lines if line.task == task and line.is_error == is_error]
