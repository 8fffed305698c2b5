"""The virtual environments of the peers: each in ``.venv-peers/NAME``, made from ``requirements/NAME.txt`` when needed.

An environment that was made from other requirements is made again.
``python -m benchmarks.peers.environments`` makes all of them.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.console import Console

from benchmarks import ROOT
from benchmarks.harness.errors import BenchmarkError
from benchmarks.peers.catalogue import PEERS

REQUIREMENTS = Path(__file__).parent / "requirements"
ENVIRONMENTS = ROOT / ".venv-peers"
INSTALL_LIMIT = 1800.0
STAMP = "made-from.txt"
PIN = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.!]+)")


class NotInstalledError(BenchmarkError):
    """A peer's environment could not be made; the message says why."""


def parse_pins(text: str) -> dict[str, str]:
    r"""Return the versions that a requirements file pins, package -> version.

    Raises:
        ValueError: If a line pins nothing.

    >>> parse_pins("# what is measured\nray==2.60.0\n")
    {'ray': '2.60.0'}
    """
    pins = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        if not (match := PIN.fullmatch(line)):
            raise ValueError(f"requirements: expected NAME==VERSION, got {line!r}")
        pins[match["name"]] = match["version"]
    return pins


def interpreter(environment: str) -> Path:
    """Return the Python of an environment, made if need be, or for "" the one that runs this. Blocks, for minutes.

    Raises:
        NotInstalledError: If the environment cannot be made; nothing is left of it.
    """
    if not environment:
        return Path(sys.executable)
    folder, wanted = ENVIRONMENTS / environment, (REQUIREMENTS / f"{environment}.txt").read_text(encoding="utf-8")
    stamp = folder / STAMP
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        _make(environment, folder)
        stamp.write_text(wanted, encoding="utf-8")
    return _python(folder)


def versions(environment: str, packages: Iterable[str]) -> dict[str, str]:
    """Return the installed versions of some packages, package -> version."""
    folder = ENVIRONMENTS / environment if environment else Path(sys.prefix)
    path = [str(found) for found in folder.glob("lib/python*/site-packages")]
    found = {one.name.replace("_", "-"): one.version for one in importlib.metadata.distributions(path=path)}
    return {name: found[name] for name in packages if name in found}


def as_text(installed: Mapping[str, str]) -> str:
    """Return what `versions` has found, for people."""
    return ", ".join(f"{name} {version}" for name, version in installed.items()) or "not installed"


def install_all() -> int:
    """Make the environments of all peers, and return 1 if one of them could not be made, else 0."""
    code = 0
    console = Console()
    for name, peer in PEERS.items():
        try:
            with console.status(f"installing {name}"):
                interpreter(peer.environment)
            console.print(f"{name}: {as_text(versions(peer.environment, peer.packages))}", markup=False)
        except NotInstalledError as error:
            code = 1
            console.print(f"error: {error}", markup=False)
    return code


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _make(environment: str, folder: Path) -> None:
    pip = (str(_python(folder)), "-m", "pip", "--disable-pip-version-check", "-q")
    try:
        _run(environment, sys.executable, "-m", "venv", "--clear", str(folder))
        _run(environment, *pip, "install", "-r", str(REQUIREMENTS / f"{environment}.txt"))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _run(environment: str, *command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_LIMIT, check=False)
    except subprocess.TimeoutExpired:
        raise NotInstalledError(
            f"{environment} could not be installed: not done within {INSTALL_LIMIT:.0f} s: {' '.join(command)}"
        ) from None
    if done.returncode:
        complaints = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        raise NotInstalledError(
            f"{environment} could not be installed with Python {sys.version.split()[0]}: {complaints[-1]}"
        )


if __name__ == "__main__":
    sys.exit(install_all())
