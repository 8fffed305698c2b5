"""The number of cores that a launch shares among its tasks, from files such as Linux shows them."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from paramserver.launch.cores import cpu_quota, usable_cores

NO, V2, V1 = "max 100000\n", "0::/jobs/run\n", "9:cpu,cpuacct:/docker/4f\n8:memory:/docker/4f\n0::/\n"


def system(root: Path, cgroup: str, **files: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "quota"),
    [
        pytest.param(V2, {}, math.inf, id="no files"),
        pytest.param(V2, {"cpu.max": NO}, math.inf, id="v2: none"),
        pytest.param(V2, {"jobs/run/cpu.max": "150000 100000\n"}, 1.5, id="v2: of its group"),
        pytest.param(V2, {"jobs/run/cpu.max": NO, "jobs/cpu.max": "400000 100000\n"}, 4.0, id="v2: above it"),
        pytest.param(V2, {"jobs/run/cpu.max": "300000 100000\n", "cpu.max": "50000 100000\n"}, 0.5, id="v2: lowest"),
        pytest.param("0::/\n", {"cpu.max": "200000 100000\n"}, 2.0, id="v2: in a namespace"),
        pytest.param("0::/../..\n", {"cpu.max": "200000 100000\n"}, 2.0, id="v2: a group above the namespace"),
        pytest.param(V1, {"cpu/docker/4f/cpu.cfs_quota_us": "-1\n"}, math.inf, id="v1: none"),
        pytest.param(
            V1,
            {"cpu/docker/4f/cpu.cfs_quota_us": "250000\n", "cpu/docker/4f/cpu.cfs_period_us": "100000\n"},
            2.5,
            id="v1: of its group",
        ),
        pytest.param(
            V1,
            {"cpu,cpuacct/cpu.cfs_quota_us": "50000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
            0.5,
            id="v1: a container sees its own at the mount",
        ),
        pytest.param("9:cpuset:/\n", {"cpu/cpu.cfs_quota_us": "50000"}, math.inf, id="v1: another controller"),
        pytest.param(V2, {"cpu.max": "nonsense"}, math.inf, id="nonsense"),
        pytest.param("", {"cpu.max": "50000 100000"}, math.inf, id="no control groups"),
    ],
)
def test_the_quota_is_the_lowest_of_all_groups(
    tmp_path: Path, cgroup: str, files: dict[str, str], quota: float
) -> None:
    assert cpu_quota(system(tmp_path, cgroup, **files)) == quota


@pytest.mark.parametrize(
    ("affinity", "quota", "cores"), [(8, "max", 8), (8, "250000", 2), (8, "50000", 1), (2, "800000", 2), (1, "max", 1)]
)
def test_cores_are_those_of_affinity_within_the_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, affinity: int, quota: str, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)))
    root = system(tmp_path, V2, **{"jobs/run/cpu.max": f"{quota} 100000\n"})
    assert usable_cores(root) == cores


def test_where_there_is_no_affinity_all_cores_are_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert usable_cores(tmp_path) == 6


def test_on_this_machine_there_is_a_core() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
