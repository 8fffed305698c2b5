"""The peers, as data. A new peer is a module, a row here, and its requirements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.models.shapes import MLPS, SPARSES
from paramserver.cluster.task import TaskId

WORKERS = 2
"""Number of tasks that train, of a peer and of ours."""

THREADS = 1
"""Threads of each of these tasks, and of the ps."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Another way to train.

    Attributes:
        title: Its description, for people.
        module: The module of this package that each of its tasks runs.
        participants: The tasks that get orders to measure, and report their progress.
        helpers: The tasks that run until the participants are done, and are killed then.
        packages: The packages whose versions a result names.
        environment: The name of its requirements and of its virtual environment; "" for the one that runs this.
        has_addresses: Whether its tasks find each other by the addresses in TF_CONFIG.
        models: The names of the models that it trains.
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
"""The promised ratios of our speed to a peer's: by model, lane and peer."""


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
