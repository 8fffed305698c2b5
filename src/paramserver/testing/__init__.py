"""Public helpers for tests: local clusters, and kits that check lanes and update rules of your own."""

from paramserver.testing.lane_kit import CONNECTION_CHECKS, LANE_CHECKS, Pair, over_sockets, serving
from paramserver.testing.local_cluster import LocalCluster
from paramserver.testing.rule_kit import RULE_CHECKS

__all__ = ["CONNECTION_CHECKS", "LANE_CHECKS", "RULE_CHECKS", "LocalCluster", "Pair", "over_sockets", "serving"]
