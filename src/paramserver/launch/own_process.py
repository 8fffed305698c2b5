"""This process as a task that nobody launched: it sets for itself what a launcher sets for its tasks."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from paramserver.cluster import environment
from paramserver.launch.cores import usable_cores
from paramserver.launch.spec import LEFT_ALONE, MALLOC_VARIABLE, LaunchOptions, runtime_variables


def prepare(options: LaunchOptions, settings: Mapping[str, str]) -> None:
    """Set the environment variables for torch's threads and the C library, and ``settings``, before torch is imported.

    The C library reads its tunables when a program starts. So if the user has set none, the program starts once more,
    with the same arguments, and as the same process for its parent and for signals.

    Args:
        options: What the task runs. It gets all cores of this process, or the threads that the options ask for.
        settings: Environment variables that replace those of the user.
    """
    already_set = [name for name in LEFT_ALONE if environment.is_set(name)]
    variables = runtime_variables(options, usable_cores(), already_set)
    environment.extend({**settings, **variables})
    if MALLOC_VARIABLE in variables:
        os.execv(sys.executable, (sys.executable, *sys.orig_argv[1:]))  # noqa: S606  # our own program
