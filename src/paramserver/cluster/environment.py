"""The one place that reads the environment.

Everything that a launcher tells a task goes through these variables:

TF_CONFIG
    JSON, as TensorFlow's: the cluster, and which task of it this process is.
PARAMSERVER_TOKEN
    The secret of the run. Tasks that do not hold it are refused.
PARAMSERVER_RUN_ID
    Which run this is; tells an evaluator a new run from an old one in the same model_dir.
PARAMSERVER_LANE
    How bytes go: ``auto`` (the default: shared memory on one host, else TCP), ``shared-memory``, ``tcp``, or the name
    of a lane that an installed package brings (``layout/lanes.py``).
PARAMSERVER_LISTEN_FD
    A listening socket that a ps task inherits instead of binding its address.
PARAMSERVER_PS_LISTEN
    ``1`` where the addresses of the ps tasks are listened on before any task is started, and until the run is over: a
    connection that is refused has come too late then, instead of too early.
PARAMSERVER_REPORT_FD
    A pipe that a task inherits and writes its reports to (``cluster/report.py``).
PARAMSERVER_FORK_SERVER_FD
    A connection to a fork server that a launcher inherits and uses (``launch/fork_server.py``), so that who starts many
    runs imports torch once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from paramserver.errors import ConfigError
from paramserver.layout.lanes import check_lane


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What the environment says at one moment. Nothing is cached: `read` looks every time."""

    tf_config: str = ""
    token: str = ""
    run_id: str = ""
    lane: str = "auto"
    listen_fd: int | None = None
    ps_listen: bool = False
    report_fd: int | None = None
    fork_server_fd: int | None = None

    def __post_init__(self) -> None:
        check_lane(self.lane, "PARAMSERVER_LANE")


def read() -> Environment:
    """What the environment says now.

    Raises:
        ConfigError: If a variable has a value that it cannot have.
    """
    return Environment(
        tf_config=os.environ.get("TF_CONFIG", ""),
        token=os.environ.get("PARAMSERVER_TOKEN", ""),
        run_id=os.environ.get("PARAMSERVER_RUN_ID", ""),
        lane=os.environ.get("PARAMSERVER_LANE", "auto"),
        listen_fd=_descriptor("PARAMSERVER_LISTEN_FD"),
        ps_listen=os.environ.get("PARAMSERVER_PS_LISTEN") == "1",
        report_fd=_descriptor("PARAMSERVER_REPORT_FD"),
        fork_server_fd=_descriptor("PARAMSERVER_FORK_SERVER_FD"),
    )


def for_child(additions: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with ``additions``: what a process that we start gets."""
    return {**os.environ, **additions}


def extend(additions: Mapping[str, str]) -> None:
    """Add to this process's own environment, as if it had been started with it."""
    os.environ.update(additions)


def is_set(name: str) -> bool:
    """Whether the user has set a variable, so that a default of ours must give way."""
    return name in os.environ


def _descriptor(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdecimal():
        raise ConfigError(f"{name}: expected the number of an open file descriptor, got {text!r}")
    return int(text)
