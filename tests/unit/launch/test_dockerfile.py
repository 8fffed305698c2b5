"""The Dockerfile of the example agrees with the manifests."""

from __future__ import annotations

import re
from pathlib import Path

from paramserver.launch.manifests.pods import USER

TEXT = (Path(__file__).parents[3] / "examples/kubernetes/Dockerfile").read_text(encoding="utf-8")


def test_its_user_is_that_of_the_pods() -> None:
    assert f"USER {USER}:{USER}" in TEXT
    assert f"--uid {USER}" in TEXT


def test_it_begins_with_a_slim_image_without_a_host() -> None:
    assert set(re.findall(r"^FROM (\S+)", TEXT, re.MULTILINE)) == {"python:3.12-slim"}


def test_what_it_copies_is_there() -> None:
    root = Path(__file__).parents[3]
    sources = [name for line in re.findall(r"^COPY (?!--from)(.*)", TEXT, re.MULTILINE) for name in line.split()[:-1]]
    assert sources
    assert all((root / name).exists() for name in sources)
