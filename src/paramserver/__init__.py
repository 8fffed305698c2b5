"""Parameter-server training for PyTorch.

The public names, and nothing else. They are imported when they are first used, so that the launcher and the command
line do not wait for torch.
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
    from paramserver.cluster import SimpleClusterResolver as SimpleClusterResolver
    from paramserver.cluster import TFConfigClusterResolver as TFConfigClusterResolver
    from paramserver.cluster import UnionClusterResolver as UnionClusterResolver
    from paramserver.distribute.buffer_policies import BufferPolicy as BufferPolicy
    from paramserver.distribute.central_storage import CentralStorageStrategy as CentralStorageStrategy
    from paramserver.distribute.current import get_replica_context as get_replica_context
    from paramserver.distribute.current import get_strategy as get_strategy
    from paramserver.distribute.current import has_strategy as has_strategy
    from paramserver.distribute.current import in_cross_replica_context as in_cross_replica_context
    from paramserver.distribute.current import in_replica_context as in_replica_context
    from paramserver.distribute.current import set_strategy as set_strategy
    from paramserver.distribute.input.context import InputContext as InputContext
    from paramserver.distribute.input.context import ValueContext as ValueContext
    from paramserver.distribute.input.options import InputOptions as InputOptions
    from paramserver.distribute.parameter_server import ParameterServerStrategy as ParameterServerStrategy
    from paramserver.distribute.reduction import ReduceOp as ReduceOp
    from paramserver.distribute.replica_context import ReplicaContext as ReplicaContext
    from paramserver.distribute.values import Mirrored as Mirrored
    from paramserver.distribute.values import PerReplica as PerReplica
    from paramserver.distribute.variable import Variable as Variable
    from paramserver.distribute.variable import VariableAggregation as VariableAggregation
    from paramserver.server import Server as Server

__version__ = "0.1.0"

_HOMES = {
    "BufferPolicy": "distribute.buffer_policies",
    "CentralStorageStrategy": "distribute.central_storage",
    "ClusterSpec": "cluster",
    "InputContext": "distribute.input.context",
    "InputOptions": "distribute.input.options",
    "Mirrored": "distribute.values",
    "ParameterServerStrategy": "distribute.parameter_server",
    "PerReplica": "distribute.values",
    "ReduceOp": "distribute.reduction",
    "ReplicaContext": "distribute.replica_context",
    "Server": "server",
    "SimpleClusterResolver": "cluster",
    "TFConfigClusterResolver": "cluster",
    "UnionClusterResolver": "cluster",
    "ValueContext": "distribute.input.context",
    "Variable": "distribute.variable",
    "VariableAggregation": "distribute.variable",
    "get_replica_context": "distribute.current",
    "get_strategy": "distribute.current",
    "has_strategy": "distribute.current",
    "in_cross_replica_context": "distribute.current",
    "in_replica_context": "distribute.current",
    "set_strategy": "distribute.current",
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
