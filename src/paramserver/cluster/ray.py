"""The cluster of a run on Ray, as its driver tells it to every task. Ray itself is not needed for that."""

from __future__ import annotations

from paramserver.cluster import environment
from paramserver.cluster.resolver import DescribedTask
from paramserver.cluster.spec import ClusterSpec
from paramserver.cluster.tf_config import TFConfigClusterResolver
from paramserver.errors import ConfigError

RUN_VARIABLE = "PARAMSERVER_RAY_RUN"


class RayClusterResolver(TFConfigClusterResolver):
    """Knows the cluster of a run on Ray as it is at the moment, and which of its tasks this process is.

    For tasks of ``paramserver launch --on ray``, functions that `paramserver.integrations.ray` runs, and workers of its
    trainer. A ps that is started again on another node has a new address here at once.

    Args:
        rpc_layer: The protocol that `master` puts before an address.

    Every method and property that reads the cluster raises ConfigError if this process belongs to no such run.
    """

    def __init__(self, rpc_layer: str | None = None) -> None:
        super().__init__(rpc_layer=rpc_layer, environment="ray")

    def cluster_spec(self) -> ClusterSpec:
        """Return the cluster as it is now, without the evaluator."""
        _check_run()
        return super().cluster_spec()

    def _identify(self) -> DescribedTask:
        _check_run()
        return super()._identify()


def _check_run() -> None:
    if not environment.read().ray_run:
        raise ConfigError(
            f"ray: this process is no task of a run on Ray: {RUN_VARIABLE} is not set; start the run with paramserver "
            "launch --on ray, or paramserver.integrations.ray"
        )
