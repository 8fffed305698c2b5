"""The public names are these, and importing them does nothing."""

from __future__ import annotations

import inspect
import subprocess
import sys
import types

import pytest

import paramserver as ps

PUBLIC = [
    "BufferPolicy",
    "CentralStorageStrategy",
    "ClusterSpec",
    "InputContext",
    "InputOptions",
    "JobSetClusterResolver",
    "Mirrored",
    "ParameterServerStrategy",
    "PerReplica",
    "RayClusterResolver",
    "ReduceOp",
    "ReplicaContext",
    "Server",
    "SimpleClusterResolver",
    "SlurmClusterResolver",
    "TFConfigClusterResolver",
    "UnionClusterResolver",
    "ValueContext",
    "Variable",
    "VariableAggregation",
    "__version__",
    "errors",
    "estimator",
    "get_replica_context",
    "get_strategy",
    "has_strategy",
    "in_cross_replica_context",
    "in_replica_context",
    "placement",
    "resolve",
    "set_strategy",
    "summary",
]

WITHOUT_SIDE_EFFECTS = """
import logging, os, sys, threading

class Untouchable:
    def __getattribute__(self, name):
        raise AssertionError(f"the environment was asked for {name}")

os.environ = Untouchable()
modules = set(sys.modules)
import paramserver
assert threading.active_count() == 1
assert not logging.root.handlers and not logging.getLogger("paramserver").handlers
heavy = {"torch", "numpy", "msgspec", "rich", "typer"} & (sys.modules.keys() - modules)
assert not heavy, heavy
assert dir(paramserver) == sorted(paramserver.__all__)
"""


def public(module: types.ModuleType) -> list[object]:
    names = getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")])
    found = [getattr(module, name) for name in names if name != "__version__"]
    return [each for each in found if (getattr(each, "__module__", None) or "").startswith("paramserver")]


def test_the_list_of_public_names() -> None:
    assert sorted(ps.__all__) == PUBLIC


def test_importing_reads_no_environment_starts_no_thread_and_loads_nothing_heavy() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_SIDE_EFFECTS], check=True)


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "__version__"])
def test_every_public_name_has_a_docstring(name: str) -> None:
    assert (getattr(ps, name).__doc__ or "").strip()


MODULES = [ps.errors, ps.placement, ps.estimator, ps.summary]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_name_of_a_public_module_has_a_docstring(module: types.ModuleType) -> None:
    undocumented = [each for each in public(module) if not (inspect.getdoc(each) or "").strip()]
    assert not undocumented


@pytest.mark.parametrize("cls", [ps.ParameterServerStrategy, ps.Server, ps.ClusterSpec, ps.InputContext])
def test_every_public_method_has_a_docstring(cls: type) -> None:
    """A method that overrides has its contract in the base class."""
    methods = {name: each for name, each in inspect.getmembers(cls) if not name.startswith("_")}
    assert not [name for name, each in methods.items() if not (inspect.getdoc(each) or "").strip()]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'paramserver' has no attribute 'Serverr'"):
        ps.Serverr  # noqa: B018


def test_names_are_the_ones_of_their_homes() -> None:
    from paramserver.distribute import default

    assert ps.get_strategy is default.get_strategy
    assert ps.has_strategy is default.has_strategy
