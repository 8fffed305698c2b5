"""What the check after each test takes for a leak in /dev/shm: what is of this process, and not of others."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import SHARED_MEMORY, _is_ours

pytestmark = pytest.mark.multiprocess

MAPS = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    held = mmap.mmap(file.fileno(), 0)
print("mapped", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def file(request: pytest.FixtureRequest) -> Iterator[Path]:
    path = SHARED_MEMORY / f"{getattr(request, 'param', '')}test-{secrets.token_hex(8)}"
    path.write_bytes(b"something")
    yield path
    path.unlink(missing_ok=True)


def test_what_was_made_here_is_ours(file: Path) -> None:
    assert _is_ours(str(file))


@pytest.mark.parametrize("file", ["sem."], indirect=True)
def test_a_semaphore_that_is_not_mapped_here_is_none_of_ours(file: Path) -> None:
    assert not _is_ours(str(file))


def test_what_is_gone_or_of_another_user_is_none_of_ours(file: Path) -> None:
    assert not _is_ours(f"{file}-gone")
    if os.getuid() == 0:
        os.chown(file, 1, 1)
        assert not _is_ours(str(file))


def test_what_another_process_has_mapped_is_none_of_ours(file: Path) -> None:
    command = (sys.executable, "-c", MAPS, str(file))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "mapped\n"
        assert not _is_ours(str(file))
        process.communicate("")
