"""The virtual environment of `make`: kept while its interpreter is the wanted one, made anew for another."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.patience import patience

pytestmark = pytest.mark.multiprocess

MAKE = shutil.which("make") or "make"
ROOT = Path(__file__).parents[2]


def planned(folder: Path, *arguments: str, venv_is_of: str) -> str:
    """The commands that make would run in a folder whose .venv is that of some interpreter."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    python = folder / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\n{venv_is_of} "$@"\n')
    python.chmod(0o755)
    (folder / ".venv/.installed").touch()
    done = subprocess.run(
        (MAKE, "-n", *arguments, ".venv"),
        cwd=folder,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
        timeout=patience(30),
    )
    return done.stdout


def test_an_environment_of_another_interpreter_is_made_anew(tmp_path: Path) -> None:
    assert "-m venv --clear .venv" in planned(tmp_path, f"PYTHON={sys.executable}", venv_is_of="echo another")


def test_an_environment_of_the_wanted_interpreter_is_kept(tmp_path: Path) -> None:
    assert "-m venv" not in planned(tmp_path, f"PYTHON={sys.executable}", venv_is_of=sys.executable)


def test_without_a_wanted_interpreter_an_environment_is_kept(tmp_path: Path) -> None:
    assert "-m venv" not in planned(tmp_path, venv_is_of="echo another")
