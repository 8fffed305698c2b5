"""The files by which launched runs are found."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from paramserver.cluster import run_file
from paramserver.cluster.run_file import Run
from paramserver.errors import ConfigError


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "paramserver"


def a_run(run_id: str, launcher: int = os.getpid()) -> Run:
    return Run(run_id=run_id, script="train.py", launcher=launcher, ps=["a:1"], token="secret")


def test_a_run_is_found_until_its_file_is_removed() -> None:
    path = run_file.write(a_run("1a"))
    assert run_file.running() == [a_run("1a")]
    run_file.remove(path)
    run_file.remove(path)
    assert run_file.running() == []


def test_only_the_user_can_read_the_token(folder: Path) -> None:
    path = run_file.write(a_run("1a"))
    assert (path.stat().st_mode & 0o777, folder.stat().st_mode & 0o777) == (0o600, 0o700)


def test_the_file_of_a_launcher_that_was_killed_is_removed() -> None:
    path = run_file.write(a_run("1a", launcher=2**22 + 1))  # above the largest process id of Linux
    assert run_file.running() == []
    assert not path.exists()


def test_the_next_launch_removes_it_too() -> None:
    path = run_file.write(a_run("1a", launcher=2**22 + 1))
    run_file.write(a_run("2b"))
    assert not path.exists()


def test_what_is_no_file_of_a_run_is_ignored(folder: Path) -> None:
    run_file.write(a_run("1a"))
    (folder / "other.json").write_text('{"of": "another version"}')
    assert run_file.running() == [a_run("1a")]


def test_a_folder_that_others_can_read_is_refused(folder: Path) -> None:
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    with pytest.raises(ConfigError, match="expected one that only its user can read, got the mode 755"):
        run_file.write(a_run("1a"))
