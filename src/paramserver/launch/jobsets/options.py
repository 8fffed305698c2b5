"""The options of a run of a JobSet on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from paramserver.cluster.logs import check_format
from paramserver.errors import ConfigError
from paramserver.launch.spec import START_METHODS


@dataclass(frozen=True, kw_only=True)
class JobSetOptions:
    """The options of a run of a JobSet.

    Attributes:
        path: The file with its manifest.
        name: Its name, if the file has several.
        mounts: Folders of this machine by the paths in a pod that stand for them.
        start_method: As in `LaunchOptions`, for pods whose commands are Python's.
        log_format: As in `LaunchOptions`; for what the launcher prints.
        log_dir: As in `LaunchOptions`.
    """

    path: Path
    name: str | None = None
    mounts: Mapping[str, str] = field(default_factory=dict)
    start_method: str = "forkserver"
    log_format: str | None = None
    log_dir: Path | None = None

    def __post_init__(self) -> None:
        if self.start_method not in START_METHODS:
            raise ConfigError(f"start method: expected one of {', '.join(START_METHODS)}, got {self.start_method!r}")
        if self.log_format is not None:
            check_format(self.log_format, "log format")


def parse_mounts(texts: Iterable[str]) -> dict[str, str]:
    """Return folders by path, from texts such as ``/model=run``.

    Raises:
        ConfigError: If a text is malformed.

    >>> parse_mounts(["/model/=run"])
    {'/model': 'run'}
    """
    mounts = {}
    for text in texts:
        path, _, folder = text.partition("=")
        if not (path.startswith("/") and folder):
            raise ConfigError(f"--mount: expected PATH=FOLDER such as /model=run, got {text!r}")
        mounts[path.rstrip("/")] = folder
    return mounts
