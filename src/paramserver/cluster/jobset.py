"""The cluster of a JobSet of Kubernetes, from the environment of one of its pods.

JobSet names its pods by a rule, ``<jobset>-<job>-<job index>-<pod index>.<subdomain>``, and labels each with the parts
of its name. It sets no environment variable: the manifest copies the labels into variables by the downward API, and
adds the number of pods, as ``paramserver manifest jobset`` does. ``JOB_COMPLETION_INDEX`` is set by Kubernetes itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

from paramserver.cluster import environment
from paramserver.cluster.addresses import LAST_PORT, check_addresses
from paramserver.cluster.resolver import ClusterResolver, DescribedTask, format_master_url
from paramserver.cluster.roles import parse_role
from paramserver.cluster.spec import ClusterSpec, canonical_job
from paramserver.cluster.task import Role
from paramserver.errors import ConfigError

PORT = 2222
"""The port of a ps unless another is given, as in TensorFlow's operators."""

LINGER = 20.0
"""Seconds that a ps goes on serving after SIGTERM, unless the manifest says otherwise. All pods of a JobSet are told to
end at once, and have 30 seconds by default."""

LABELS = {
    "JOBSET_NAME": "jobset.sigs.k8s.io/jobset-name",
    "REPLICATED_JOB_NAME": "jobset.sigs.k8s.io/replicatedjob-name",
    "JOB_INDEX": "jobset.sigs.k8s.io/job-index",
}
"""The labels of a pod whose values the manifest puts into variables."""

COMPLETION_INDEX = "JOB_COMPLETION_INDEX"
JOBS = "PARAMSERVER_JOBS"
PS_PORT = "PARAMSERVER_PS_PORT"
SUBDOMAIN = "PARAMSERVER_SUBDOMAIN"
POD_ADDRESSES = "PARAMSERVER_POD_ADDRESSES"

VARIABLES = (*LABELS, COMPLETION_INDEX, JOBS, PS_PORT, SUBDOMAIN, POD_ADDRESSES)


class Layout(NamedTuple):
    """The pods of a replicated job: so many Jobs of so many pods each; as text ``3``, or ``1x3`` for pods of one Job.

    >>> str(Layout(3)), str(Layout(1, 3))
    ('3', '1x3')
    """

    jobs: int
    pods: int = 1

    def __str__(self) -> str:
        return str(self.jobs) if self.pods == 1 else f"{self.jobs}x{self.pods}"

    @property
    def size(self) -> int:
        """The number of pods."""
        return self.jobs * self.pods


class JobSetClusterResolver(ClusterResolver):
    """Reads the environment of a pod of a JobSet at every access.

    The replicated jobs of the JobSet have the names of roles: ``chief``, ``worker``, ``ps``, ``evaluator``. The index
    of a task counts the pods of its replicated job: job index times pods of a Job, plus pod index.

    Args:
        jobs: The pods of each replicated job, such as ``"chief=1,ps=2,worker=1x3"``, where ``1x3`` stands for three
            pods of one Job; by default PARAMSERVER_JOBS.
        port: The port of each ps; by default PARAMSERVER_PS_PORT, or 2222.
        subdomain: The subdomain of the pods; by default PARAMSERVER_SUBDOMAIN, or the name of the JobSet, as in JobSet.
        task_type: Overrides the environment's.
        task_id: Overrides the environment's, even with 0.
        rpc_layer: The protocol that `master` puts before an address.

    Every method and property that reads the environment raises ConfigError if a variable is missing or malformed.
    """

    _environment = "kubernetes"
    linger = LINGER

    def __init__(
        self,
        jobs: str | None = None,
        *,
        port: int | None = None,
        subdomain: str | None = None,
        task_type: str | None = None,
        task_id: int | None = None,
        rpc_layer: str | None = None,
    ) -> None:
        self._jobs, self._port, self._subdomain = jobs, port, subdomain
        self.task_type, self.task_id, self.rpc_layer = task_type, task_id, rpc_layer

    def cluster_spec(self) -> ClusterSpec:
        """Return the chief, the workers and the ps tasks with the names of their pods; the evaluator stands outside."""
        given = environment.values(VARIABLES)
        layouts = self._layouts(given)
        jobset = _needed(given, "JOBSET_NAME")
        subdomain = self._subdomain or given.get(SUBDOMAIN) or jobset
        port = parse_port(given.get(PS_PORT) or str(PORT), PS_PORT) if self._port is None else self._port
        moved = _pod_addresses(given.get(POD_ADDRESSES, ""))
        cluster = {}
        for job, layout in layouts.items():
            names = [f"{name}.{subdomain}:{port}" for name in pod_names(jobset, job, layout)]
            if canonical_job(job) != Role.EVALUATOR:
                cluster[job] = [moved.get(name, name) for name in names]
        spec = ClusterSpec(cluster)
        check_addresses(spec, JOBS)
        return spec

    def master(self, task_type: str | None = None, task_id: int | None = None, rpc_layer: str | None = None) -> str:
        """Return the address of a task, by default of this one."""
        job, index = task_type or self.task_type, self.task_id if task_id is None else task_id
        address = self.cluster_spec().task_address(job or "", index or 0)
        return format_master_url(address, self.rpc_layer if rpc_layer is None else rpc_layer)

    def _layouts(self, given: Mapping[str, str]) -> dict[str, Layout]:
        return parse_jobs(_needed(given, JOBS) if self._jobs is None else self._jobs)

    def _identify(self) -> DescribedTask:
        given = environment.values(VARIABLES)
        job = _needed(given, "REPLICATED_JOB_NAME")
        layouts = self._layouts(given)
        if job not in layouts:
            raise ConfigError(f"{JOBS}: expected the replicated job {job!r} of this pod, got only {sorted(layouts)}")
        layout = layouts[job]
        job_index = _index(given, "JOB_INDEX", layout.jobs, f"Jobs of {job!r}")
        pod_index = _index(given, COMPLETION_INDEX, layout.pods, f"pods of a Job of {job!r}")
        return DescribedTask(job, job_index * layout.pods + pod_index)


def pod_names(jobset: str, job: str, layout: Layout) -> list[str]:
    """Return the host names of the pods of a replicated job, by the index of their task.

    >>> pod_names("train", "worker", Layout(1, 2))
    ['train-worker-0-0', 'train-worker-0-1']
    """
    return [f"{jobset}-{job}-{index}-{pod}" for index in range(layout.jobs) for pod in range(layout.pods)]


def parse_jobs(text: str) -> dict[str, Layout]:
    """Return the pods of each replicated job.

    Raises:
        ConfigError: If the text is malformed, a name is not that of a role, or a role is missing that a run needs.

    >>> parse_jobs("ps=2,worker=1x3")
    {'ps': Layout(jobs=2, pods=1), 'worker': Layout(jobs=1, pods=3)}
    """
    layouts: dict[str, Layout] = {}
    for item in filter(None, (item.strip() for item in text.split(","))):
        job, _, counts = item.partition("=")
        jobs, _, pods = counts.partition("x")
        numbers = [number for number in (jobs, pods or "1") if number.isascii() and number.isdecimal() and int(number)]
        if len(numbers) != 2 or job in layouts:
            raise ConfigError(f"{JOBS}: expected a list such as 'chief=1,ps=2,worker=1x3', got {item!r} in {text!r}")
        parse_role(job)
        layouts[job] = Layout(*map(int, numbers))
    roles = {parse_role(job) for job in layouts}
    if Role.PS not in roles or not roles & {Role.CHIEF, Role.WORKER}:
        raise ConfigError(f"{JOBS}: expected a ps, and a chief or a worker, got {text!r}; add the replicated job")
    return layouts


def parse_port(text: str, what: str) -> int:
    """Return a port.

    Raises:
        ConfigError: If the text is not a number from 1 to 65535.
    """
    if not (text.isascii() and text.isdecimal() and 0 < int(text) <= LAST_PORT):
        raise ConfigError(f"{what}: expected a port from 1 to {LAST_PORT}, got {text!r}")
    return int(text)


def _needed(given: Mapping[str, str], name: str) -> str:
    if value := given.get(name):
        return value
    source = f"by the downward API, from the label {LABELS[name]!r}" if name in LABELS else "such as 'chief=1,ps=2'"
    raise ConfigError(
        f"{name} is not set, so this pod cannot know the tasks of its JobSet; let the manifest set it, {source}, "
        "as `paramserver manifest jobset` does"
    )


def _index(given: Mapping[str, str], name: str, count: int, what: str) -> int:
    text = given.get(name) or "0"
    if not (text.isascii() and text.isdecimal() and int(text) < count):
        raise ConfigError(f"{name}: expected an index below {count}, as {JOBS} says of the {what}, got {text!r}")
    return int(text)


def _pod_addresses(text: str) -> dict[str, str]:
    try:
        addresses = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ConfigError(f"{POD_ADDRESSES}: expected a JSON object, got {text!r}") from error
    if not isinstance(addresses, dict):
        raise ConfigError(f"{POD_ADDRESSES}: expected a JSON object, got {text!r}")
    return {str(name): str(address) for name, address in addresses.items()}
