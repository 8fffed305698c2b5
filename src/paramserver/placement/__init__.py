"""The choice of a ps for each variable.

Every worker creates the same variables in the same order, so every worker computes the same ps for each without asking.
A partitioner (`FixedShards`, `MinSize`, `MaxSize`) divides large variables by rows; each part then has a ps of its own.
"""

from paramserver.layout.partition import FixedShards, MaxSize, MinSize, Partitioner, row_ranges
from paramserver.placement.device_setter import DeviceSetter, Op, replica_device_setter
from paramserver.placement.policies import Greedy, Place, Placement, Policy, Random, RoundRobin, as_placement, byte_size

__all__ = [
    "DeviceSetter",
    "FixedShards",
    "Greedy",
    "MaxSize",
    "MinSize",
    "Op",
    "Partitioner",
    "Place",
    "Placement",
    "Policy",
    "Random",
    "RoundRobin",
    "as_placement",
    "byte_size",
    "replica_device_setter",
    "row_ranges",
]
