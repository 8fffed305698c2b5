"""A cluster of Ray on this machine, as a program: it reads commands, and answers each with a line of JSON.

The first line has the address. ``add`` starts a node and answers with the process id of its raylet; ``remove PID``
kills the processes of a node.
"""

from __future__ import annotations

import json
import sys

from ray.cluster_utils import Cluster

SMALL = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
CPUS = 8
"""More than there are: tasks mostly wait."""

QUICK_TO_NOTICE = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 20000,  # a node that is killed refuses at once, and a slow one is not gone
    "health_check_failure_threshold": 3,
    "enable_worker_prestart": False,
    "prestart_worker_first_driver": False,
}


def answer(value: object) -> None:
    """Print a value for the tests."""
    print(json.dumps(value), flush=True)  # noqa: T201


def main() -> None:
    """Serve commands until the input ends."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": QUICK_TO_NOTICE, **SMALL})
    nodes = {}
    answer(cluster.address)
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "add":
            node = cluster.add_node(num_cpus=CPUS, **SMALL)
            pid = node.all_processes["raylet"][0].process.pid
            nodes[pid] = node
            answer(pid)
        else:
            cluster.remove_node(nodes.pop(int(arguments[0])), allow_graceful=False)
            answer(None)
    cluster.shutdown()


if __name__ == "__main__":
    main()
