"""The only file that reads the environment, and the list of its variables.

``paramserver --help`` and ``docs/operations.md`` show this list.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from paramserver.cluster.logs import check_format, check_level
from paramserver.errors import ConfigError
from paramserver.layout.lanes import check_lane

HEARTBEAT_TIMEOUT = 30.0

FOR_USERS = (
    ("TF_CONFIG", "JSON, as TensorFlow's: the cluster, and the task of this process."),
    (
        "PARAMSERVER_TF_CONFIG_FILE",
        "Path of a file with the content of TF_CONFIG, read if that is not set. It is read again whenever a ps is "
        "looked for, so that addresses may change during a run.",
    ),
    (
        "PARAMSERVER_TOKEN",
        "The secret of the run, the same for all its tasks. Without one, a ps listens on a loopback address only.",
    ),
    (
        "PARAMSERVER_TOKEN_FILE",
        "Path of a file with the secret, read if PARAMSERVER_TOKEN is not set. Line ends after it are ignored.",
    ),
    ("PARAMSERVER_INSECURE", "1: a ps may listen on any address without a secret."),
    ("PARAMSERVER_RUN_ID", "Id of the run. It tells an evaluator a new run from an old one in the same model_dir."),
    (
        "PARAMSERVER_LANE",
        "auto (default: shared memory on one host, else TCP), shared-memory, tcp, or an installed lane.",
    ),
    (
        "PARAMSERVER_HEARTBEAT_TIMEOUT",
        "Seconds after which a task that gives no sign of life counts as lost (default: 30); 0 for no limit.",
    ),
    (
        "PARAMSERVER_LINGER",
        "Seconds that a ps that is asked to leave goes on serving while workers are connected (default: 0; Slurm and "
        "JobSet: 20).",
    ),
    (
        "PARAMSERVER_SLURM_JOBS",
        "Roles of a Slurm step's tasks, such as ps=2,evaluator=1; the others are a chief and workers (default: ps=1).",
    ),
    (
        "PARAMSERVER_SLURM_PORT_BASE",
        "Port of ps:0 of a Slurm step; ps:1 has the next one (default: follows from the ids of job and step).",
    ),
    ("PARAMSERVER_LOG_LEVEL", "Least level of the log of a command: debug, info (default), warning or error."),
    ("PARAMSERVER_LOG_FORMAT", "text (default), or json: each line of the log is an object."),
    (
        "XDG_RUNTIME_DIR",
        "Folder in which status finds launched runs; without it, the folder for temporary files.",
    ),
    ("JOBSET_NAME", "Kubernetes: the name of the JobSet, which a manifest copies from a label of the pod."),
    ("REPLICATED_JOB_NAME", "Kubernetes: the replicated job of the pod, likewise."),
    ("JOB_INDEX", "Kubernetes: the index of the pod's Job in its replicated job, likewise."),
    ("JOB_COMPLETION_INDEX", "Kubernetes: the index of the pod in its Job, which Kubernetes sets."),
    ("PARAMSERVER_JOBS", "Kubernetes: the pods of each replicated job, such as chief=1,ps=2,worker=3."),
    ("PARAMSERVER_PS_PORT", "Kubernetes: the port of each ps (default: 2222)."),
    ("PARAMSERVER_SUBDOMAIN", "Kubernetes: the subdomain of the pods (default: the name of the JobSet)."),
)
"""The variables for users: name, text."""

DEFAULTS_OF_LAUNCH = (
    ("OMP_NUM_THREADS", "Threads for one operator of torch (default: cores / workers)."),
    ("MKL_NUM_THREADS", "The same for MKL."),
    ("GOMP_SPINCOUNT", "How long idle threads of OpenMP spin (default: some 10 microseconds)."),
    ("OMP_WAIT_POLICY", "If it is set, GOMP_SPINCOUNT is left alone."),
    ("GLIBC_TUNABLES", "Settings of malloc (default: memory that a step frees is reused)."),
)
"""Variables of libraries that get a value from ``paramserver launch``, unless the user has set them."""

FROM_LAUNCHERS = (
    ("PARAMSERVER_LISTEN_FD", "Listening socket that a ps inherits instead of binding its address."),
    ("PARAMSERVER_RUN_FILE", "Path of the file of a launched run, which is gone when the run is over."),
    ("PARAMSERVER_RAY_RUN", "Name of a run on Ray, the beginning of the names of its actors."),
    ("PARAMSERVER_REPORT_FD", "Pipe that a task inherits and writes its reports to."),
    ("PARAMSERVER_FORK_SERVER_FD", "Connection to a fork server that a launcher inherits and uses."),
    ("PARAMSERVER_POD_ADDRESSES", "JSON: the address on this machine of each pod of launch --manifest, by its name."),
)
"""Variables that a launcher sets for its tasks."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The environment at one moment. Not cached: `read` reads it again every time."""

    tf_config: str = ""
    token: str = ""
    insecure: bool = False
    run_id: str = ""
    lane: str = "auto"
    listen_fd: int | None = None
    run_file: Path | None = None
    heartbeat_timeout: float = HEARTBEAT_TIMEOUT
    linger: float = 0.0
    slurm_jobs: str = ""
    slurm_port_base: str = ""
    ray_run: str = ""
    log_level: str = "info"
    log_format: str = "text"
    report_fd: int | None = None
    fork_server_fd: int | None = None

    def __post_init__(self) -> None:
        check_lane(self.lane, "PARAMSERVER_LANE")
        check_level(self.log_level, "PARAMSERVER_LOG_LEVEL")
        check_format(self.log_format, "PARAMSERVER_LOG_FORMAT")


def read() -> Environment:
    """Read the environment as it is now.

    Raises:
        ConfigError: If a variable has an invalid value.
    """
    return Environment(
        tf_config=os.environ.get("TF_CONFIG") or _content_of("PARAMSERVER_TF_CONFIG_FILE", "the cluster"),
        token=os.environ.get("PARAMSERVER_TOKEN") or _secret(),
        insecure=_flag("PARAMSERVER_INSECURE"),
        run_id=os.environ.get("PARAMSERVER_RUN_ID", ""),
        lane=os.environ.get("PARAMSERVER_LANE", "auto"),
        listen_fd=_descriptor("PARAMSERVER_LISTEN_FD"),
        run_file=_path("PARAMSERVER_RUN_FILE"),
        heartbeat_timeout=_seconds("PARAMSERVER_HEARTBEAT_TIMEOUT", HEARTBEAT_TIMEOUT),
        linger=_seconds("PARAMSERVER_LINGER", 0.0),
        slurm_jobs=os.environ.get("PARAMSERVER_SLURM_JOBS", ""),
        slurm_port_base=os.environ.get("PARAMSERVER_SLURM_PORT_BASE", ""),
        ray_run=os.environ.get("PARAMSERVER_RAY_RUN", ""),
        log_level=os.environ.get("PARAMSERVER_LOG_LEVEL", "info"),
        log_format=os.environ.get("PARAMSERVER_LOG_FORMAT", "text"),
        report_fd=_descriptor("PARAMSERVER_REPORT_FD"),
        fork_server_fd=_descriptor("PARAMSERVER_FORK_SERVER_FD"),
    )


def runtime_folder() -> Path:
    """Return the folder for files of runs that go on, which belongs to the user of this process."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "paramserver" if base else Path(tempfile.gettempdir()) / f"paramserver-{os.getuid()}"


def for_child(additions: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for a child process: that of this process with ``additions``."""
    return {**os.environ, **additions}


def extend(additions: Mapping[str, str]) -> None:
    """Add variables to the environment of this process, as if it had been started with them."""
    os.environ.update(additions)


def drop(names: Iterable[str]) -> None:
    """Remove variables from the environment of this process, as if it had been started without them."""
    for name in names:
        os.environ.pop(name, None)


def values(names: Iterable[str]) -> dict[str, str]:
    """Return those of some variables that are set."""
    return {name: os.environ[name] for name in names if name in os.environ}


def is_set(name: str) -> bool:
    """Return whether the user has set a variable, so that it must not get a default."""
    return name in os.environ


def beginning_with(prefix: str) -> dict[str, str]:
    """Return the variables whose names begin with a prefix, such as those that an engine sets."""
    return {name: value for name, value in os.environ.items() if name.startswith(prefix)}


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name)
    if text is None:
        return default
    with contextlib.suppress(ValueError):
        if math.isfinite(seconds := float(text)) and seconds >= 0:
            return seconds
    raise ConfigError(f"{name}: expected seconds, 0 or more, got {text!r}")


def _path(name: str) -> Path | None:
    text = os.environ.get(name)
    return Path(text) if text else None


def _secret() -> str:
    path = os.environ.get("PARAMSERVER_TOKEN_FILE")
    secret = _content_of("PARAMSERVER_TOKEN_FILE", "the secret of the run").rstrip("\r\n")
    if path and not secret.strip():
        raise ConfigError(f"PARAMSERVER_TOKEN_FILE: expected the secret of the run in {path!r}, and it is empty")
    return secret


def _content_of(name: str, what: str) -> str:
    """Return the text in the file that a variable names; nothing if it names none."""
    path = os.environ.get(name)
    if not path:
        return ""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise ConfigError(f"{name}: cannot read {what} from {path!r}: {why}") from error


def _flag(name: str) -> bool:
    text = os.environ.get(name, "")
    if text not in ("", "0", "1"):
        raise ConfigError(f"{name}: expected 1, or 0 or nothing, got {text!r}")
    return text == "1"


def _descriptor(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdecimal():
        raise ConfigError(f"{name}: expected the number of an open file descriptor, got {text!r}")
    return int(text)
