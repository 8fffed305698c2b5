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
    from paramserver.cluster import ClusterSpec as ClusterSpec
    from paramserver.cluster import SimpleClusterResolver as SimpleClusterResolver
    from paramserver.cluster import TFConfigClusterResolver as TFConfigClusterResolver
    from paramserver.cluster import UnionClusterResolver as UnionClusterResolver
    from paramserver.distribute.context import get_strategy as get_strategy
    from paramserver.distribute.context import has_strategy as has_strategy
    from paramserver.distribute.input import InputContext as InputContext
    from paramserver.distribute.parameter_server import ParameterServerStrategy as ParameterServerStrategy
    from paramserver.distribute.reduction import ReduceOp as ReduceOp
    from paramserver.server import Server as Server

__version__ = "0.1.0"

_HOMES = {
    "ClusterSpec": "cluster",
    "InputContext": "distribute.input",
    "ParameterServerStrategy": "distribute.parameter_server",
    "ReduceOp": "distribute.reduction",
    "Server": "server",
    "SimpleClusterResolver": "cluster",
    "TFConfigClusterResolver": "cluster",
    "UnionClusterResolver": "cluster",
    "get_strategy": "distribute.context",
    "has_strategy": "distribute.context",
}
_MODULES = ("errors", "estimator", "placement")

__all__ = ["__version__", *_HOMES, *_MODULES]


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f"paramserver.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"paramserver.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'paramserver' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
