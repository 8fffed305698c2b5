"""Slurm's lists, and the clusters that tasks derive from them, for any step."""

from __future__ import annotations

import itertools
import re
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from paramserver.cluster import ClusterSpec, SlurmClusterResolver
from paramserver.cluster.hostlist import expand_counts, expand_hosts
from paramserver.cluster.slurm import assign_roles
from paramserver.cluster.slurm_step import lay_out, read_step

NAMES = st.from_regex(r"[a-z]{1,3}[0-9]{1,3}(-[a-z]{1,2})?", fullmatch=True)
HOSTS = st.lists(NAMES, min_size=1, max_size=20, unique=True)


def compress(hosts: list[str]) -> str:
    """Hosts as Slurm writes them: runs of numbers of one width become ranges."""
    groups: list[tuple[str, str, list[str]]] = []
    for host in hosts:
        prefix, number, suffix = re.fullmatch(r"(\D*)(\d+)(.*)", host).groups()  # type: ignore[union-attr]  # it matches
        if groups and groups[-1][0] == prefix and groups[-1][1] == suffix:
            groups[-1][2].append(number)
        else:
            groups.append((prefix, suffix, [number]))
    return ",".join(f"{prefix}[{_ranges(numbers)}]{suffix}" for prefix, suffix, numbers in groups)


def _ranges(numbers: list[str]) -> str:
    runs: list[list[str]] = []
    for number in numbers:
        if runs and int(number) == int(runs[-1][-1]) + 1 and number == f"{int(number):0{len(runs[-1][0])}d}":
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


@given(HOSTS, st.booleans())
def test_hosts_are_expanded_as_they_were_compressed(hosts: list[str], is_sorted: bool) -> None:
    hosts = sorted(hosts) if is_sorted else hosts
    assert expand_hosts(compress(hosts)) == hosts


@given(st.lists(st.integers(0, 9), min_size=1, max_size=20))
def test_counts_are_expanded_as_they_were_compressed(counts: list[int]) -> None:
    runs = [(count, len(list(same))) for count, same in itertools.groupby(counts)]
    text = ",".join(str(count) if length == 1 else f"{count}(x{length})" for count, length in runs)
    assert expand_counts(text) == counts


@st.composite
def steps(draw: st.DrawFn) -> list[dict[str, str]]:
    """The variables of each task of a step, in a job of one or two components."""
    hosts = draw(HOSTS)
    counts = draw(st.lists(st.integers(1, 4), min_size=len(hosts), max_size=len(hosts)))
    cut = draw(st.integers(0, len(hosts) - 1))
    distribution = draw(st.sampled_from(["block", "cyclic"]))
    by_node = dict(zip(hosts, counts, strict=True))
    parts = [{node: by_node[node] for node in part} for part in (hosts[:cut], hosts[cut:]) if part]
    layout = lay_out(parts, distribution)
    shown = sorted(hosts) if len(parts) > 1 else hosts  # as Slurm sorts the list of a heterogeneous step
    shared = {
        "SLURM_JOB_ID": str(draw(st.integers(1, 10**6))),
        "SLURM_STEP_ID": str(draw(st.integers(0, 100))),
        "SLURM_STEP_NODELIST": compress(shown),
        "SLURM_STEP_TASKS_PER_NODE": ",".join(str(by_node[node]) for node in shown),
        "SLURM_STEP_NUM_TASKS": str(len(layout)),
        "SLURM_DISTRIBUTION": distribution,
    }
    if len(parts) > 1:
        shared["SLURM_HET_SIZE"] = "2"
        shared |= {f"SLURM_JOB_NODELIST_HET_GROUP_{group}": compress(list(part)) for group, part in enumerate(parts)}
    return [{**shared, "SLURM_PROCID": str(task), "SLURMD_NODENAME": node} for task, node in enumerate(layout)]


@given(steps(), st.integers(1, 5))
def test_every_task_derives_the_same_cluster_and_a_task_of_its_own(
    variables: list[dict[str, str]], num_ps: int
) -> None:
    if len(variables) <= num_ps:
        return
    found = [read_step(each) for each in variables]
    assert len({(step.job_id, step.step_id, step.nodes) for step in found}) == 1
    tasks = [assign_roles({"ps": num_ps}, step)[step.task or 0] for step in found]
    assert len(set(tasks)) == len(tasks)
    assert Counter(found[0].nodes) == Counter(each["SLURMD_NODENAME"] for each in variables)


@given(steps())
def test_no_two_ps_tasks_have_one_address(variables: list[dict[str, str]]) -> None:
    if len(variables) < 3:
        return
    resolver = _Described({"ps": len(variables) - 1}, variables[0])
    addresses = resolver.cluster_spec().as_dict()["ps"]
    assert len(set(addresses)) == len(variables) - 1
    assert isinstance(resolver.cluster_spec(), ClusterSpec)


class _Described(SlurmClusterResolver):
    """A resolver of variables that are given."""

    def __init__(self, jobs: dict[str, int], variables: dict[str, str]) -> None:
        super().__init__(jobs)
        self._variables = variables

    def _step(self):  # type: ignore[no-untyped-def]  # as in its base
        return read_step(self._variables)
