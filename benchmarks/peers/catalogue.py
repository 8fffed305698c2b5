"""The peers, as data. A new one is a module and a row here, and its requirements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.models.shapes import MLPS, SPARSES
from paramserver.cluster.task import TaskId

WORKERS = 2
"""How many tasks train, of a peer and of ours."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A way to train that is not ours.

    Attributes:
        title: What it is, for people.
        module: Of this package; each of the tasks runs it.
        participants: The tasks that are told when to measure, and tell how far they came.
        helpers: The tasks that run until the participants are done, and are killed then.
        packages: Whose versions a result names.
        environment: The name of its requirements and of its virtual environment; "" for the one that runs this.
        has_addresses: Whether its tasks find each other by the addresses in TF_CONFIG.
        models: The names of those that it trains.
        variables: Environment variables of its processes.
    """

    title: str
    module: str
    participants: tuple[TaskId, ...]
    helpers: tuple[TaskId, ...] = ()
    packages: tuple[str, ...]
    environment: str = ""
    has_addresses: bool = False
    models: tuple[str, ...] = tuple(MLPS)
    variables: Mapping[str, str] = field(default_factory=dict)


TARGETS = {
    ("small", "auto", "tf-estimator"): 6.0,
    ("large", "auto", "tf-estimator"): 1.6,
    ("sparse", "auto", "tf-estimator"): 2.0,
    ("small", "tcp", "tf-estimator"): 4.0,
    ("small", "tcp", "torch-rpc"): 5.0,
}
"""How many times as fast as a peer we are to be at least: by model, lane and peer."""


def _tasks(*texts: str) -> tuple[TaskId, ...]:
    return tuple(TaskId.parse(text) for text in texts)


PEERS = {
    "tf-estimator": Peer(
        title="TensorFlow Estimator, ParameterServerStrategyV1",
        module="tf_estimator",
        participants=_tasks("chief:0", "worker:0"),
        helpers=_tasks("ps:0"),
        packages=("tensorflow-cpu",),
        environment="tf-estimator",
        has_addresses=True,
        models=(*MLPS, *SPARSES),
        variables={"TF_CPP_MIN_LOG_LEVEL": "2"},
    ),
    "tf-coordinator": Peer(
        title="TensorFlow ParameterServerStrategyV2, ClusterCoordinator",
        module="tf_coordinator",
        participants=_tasks("chief:0"),
        helpers=_tasks("worker:0", "worker:1", "ps:0"),
        packages=("tensorflow-cpu",),
        environment="tf-coordinator",
        has_addresses=True,
        variables={"TF_CPP_MIN_LOG_LEVEL": "2"},
    ),
    "torch-rpc": Peer(
        title="torch.distributed.rpc, as in the tutorial",
        module="torch_rpc",
        participants=_tasks("worker:0", "worker:1"),
        helpers=_tasks("ps:0"),
        packages=("torch",),
    ),
    "torch-ddp": Peer(
        title="DDP over Gloo, synchronous, no ps",
        module="torch_ddp",
        participants=_tasks("worker:0"),
        helpers=_tasks("worker:1"),
        packages=("torch",),
    ),
    "ray": Peer(
        title="Ray actors, asynchronous parameter server",
        module="ray_actors",
        participants=_tasks("chief:0"),
        packages=("ray", "torch"),
        environment="ray",
        variables={"RAY_USAGE_STATS_ENABLED": "0"},
    ),
}
