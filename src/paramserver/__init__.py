"""Parameter-server training for PyTorch.

This file holds the public names only. Each is imported on its first use, so that the launcher and the command line need
not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paramserver import errors as errors
    from paramserver import estimator as estimator
    from paramserver import placement as placement
    from paramserver import summary as summary
    from paramserver.cluster import ClusterSpec as ClusterSpec
    from paramserver.cluster import JobSetClusterResolver as JobSetClusterResolver
    from paramserver.cluster import RayClusterResolver as RayClusterResolver
    from paramserver.cluster import SimpleClusterResolver as SimpleClusterResolver
    from paramserver.cluster import SlurmClusterResolver as SlurmClusterResolver
    from paramserver.cluster import TFConfigClusterResolver as TFConfigClusterResolver
    from paramserver.cluster import UnionClusterResolver as UnionClusterResolver
    from paramserver.cluster import resolve as resolve
    from paramserver.distribute.bound.buffer_policies import BufferPolicy as BufferPolicy
    from paramserver.distribute.central_storage import CentralStorageStrategy as CentralStorageStrategy
    from paramserver.distribute.core.input_context import InputContext as InputContext
    from paramserver.distribute.core.input_context import ValueContext as ValueContext
    from paramserver.distribute.core.values import Mirrored as Mirrored
    from paramserver.distribute.core.values import PerReplica as PerReplica
    from paramserver.distribute.default import get_replica_context as get_replica_context
    from paramserver.distribute.default import get_strategy as get_strategy
    from paramserver.distribute.default import has_strategy as has_strategy
    from paramserver.distribute.default import in_cross_replica_context as in_cross_replica_context
    from paramserver.distribute.default import in_replica_context as in_replica_context
    from paramserver.distribute.default import set_strategy as set_strategy
    from paramserver.distribute.input.options import InputOptions as InputOptions
    from paramserver.distribute.parameter_server import ParameterServerStrategy as ParameterServerStrategy
    from paramserver.distribute.reduce.reduction import ReduceOp as ReduceOp
    from paramserver.distribute.replicas.context import ReplicaContext as ReplicaContext
    from paramserver.distribute.variables.variable import Variable as Variable
    from paramserver.distribute.variables.variable import VariableAggregation as VariableAggregation
    from paramserver.server.server import Server as Server

__version__ = "0.1.0"

_HOMES = {
    "BufferPolicy": "distribute.bound.buffer_policies",
    "CentralStorageStrategy": "distribute.central_storage",
    "ClusterSpec": "cluster",
    "InputContext": "distribute.core.input_context",
    "InputOptions": "distribute.input.options",
    "JobSetClusterResolver": "cluster",
    "Mirrored": "distribute.core.values",
    "ParameterServerStrategy": "distribute.parameter_server",
    "PerReplica": "distribute.core.values",
    "RayClusterResolver": "cluster",
    "ReduceOp": "distribute.reduce.reduction",
    "ReplicaContext": "distribute.replicas.context",
    "Server": "server.server",
    "SimpleClusterResolver": "cluster",
    "SlurmClusterResolver": "cluster",
    "TFConfigClusterResolver": "cluster",
    "UnionClusterResolver": "cluster",
    "ValueContext": "distribute.core.input_context",
    "Variable": "distribute.variables.variable",
    "VariableAggregation": "distribute.variables.variable",
    "get_replica_context": "distribute.default",
    "get_strategy": "distribute.default",
    "has_strategy": "distribute.default",
    "in_cross_replica_context": "distribute.default",
    "in_replica_context": "distribute.default",
    "resolve": "cluster",
    "set_strategy": "distribute.default",
}
_MODULES = ("errors", "estimator", "placement", "summary")

__all__ = ["__version__", *_HOMES, *_MODULES]


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f"paramserver.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"paramserver.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'paramserver' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
