"""The rules of DESIGN.md that no type checker holds: arrows run downwards only, and what is nowhere done."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import paramserver

ROOT = Path(paramserver.__file__).parent
MODULES = {
    ".".join(("paramserver", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
# What each part may import. Whoever adds an arrow adds it here, and shows that it runs downwards.
ARROWS = {
    "errors": set(),
    "rules": {"errors"},
    "arena": {"rules", "errors"},
    "row_loops": set(),
    "rows": {"row_loops"},
    "heap": set(),
    "huge_pages": set(),
    "partition": {"arena", "errors"},
    "placement": {"partition", "arena", "errors"},
    "tensor_file": {"arena", "errors"},
    "checkpoint_folder": {"tensor_file", "errors"},
    "checkpoint_files": {"checkpoint_folder", "tensor_file", "arena", "errors"},
    "checkpoint": {"checkpoint_files", "checkpoint_folder", "tensor_file", "arena", "errors"},
    "cluster": {"errors"},
    "launch": {"cluster", "errors"},
    "wire": {"arena", "rules", "errors"},
    "transport": {"wire", "rows", "huge_pages", "arena", "rules", "errors"},
    "store": {"checkpoint_files", "checkpoint_folder", "tensor_file", "rows", "huge_pages", "arena", "rules", "errors"},
    "lanes": {"transport", "wire", "arena", "errors"},
    "long_requests": {"lanes", "checkpoint_folder", "transport", "wire", "errors"},
    "questions": {"lanes", "transport", "wire", "errors"},
    "own_variables": {"questions", "lanes", "transport", "wire", "arena", "errors"},
    "jobs": {"store", "checkpoint_folder", "wire", "errors"},
    "client": {
        "own_variables",
        "questions",
        "long_requests",
        "lanes",
        "checkpoint",
        "checkpoint_files",
        "transport",
        "wire",
        "arena",
        "errors",
    },
    "push_plans": {"store", "transport", "wire", "arena", "rules", "errors"},
    "handler": {
        "push_plans",
        "jobs",
        "store",
        "checkpoint_files",
        "checkpoint_folder",
        "transport",
        "wire",
        "arena",
        "errors",
    },
    "serving": set(),
    "conversation": {"serving", "handler", "store", "transport", "wire", "errors"},
    "server": {
        "conversation",
        "serving",
        "handler",
        "store",
        "transport",
        "wire",
        "cluster",
        "heap",
        "arena",
        "errors",
    },
    "distribute": {
        "client",
        "checkpoint",
        "checkpoint_files",
        "lanes",
        "server",
        "transport",
        "wire",
        "cluster",
        "placement",
        "partition",
        "rows",
        "heap",
        "arena",
        "rules",
        "errors",
    },
    "summary": {"distribute", "errors"},
    "estimator": {
        "summary",
        "distribute",
        "client",
        "server",
        "cluster",
        "checkpoint",
        "checkpoint_files",
        "arena",
        "errors",
    },
    "status": {"client", "transport", "wire", "cluster", "errors"},
    "demo": {"launch", "estimator", "distribute", "cluster", "errors"},
    "cli": {"demo", "estimator", "status", "launch", "server", "cluster", "errors"},
    "__main__": {"cli"},
    "testing": {"distribute", "client", "server", "store", "transport", "wire", "cluster", "arena", "errors"},
}


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """What runs: everything but the blocks for type checkers."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from nodes(child)


def code(path: Path) -> list[ast.AST]:
    return list(nodes(ast.parse(path.read_text(encoding="utf-8"))))


def imports(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in code(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            assert node.module is not None
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found


def part(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def ours(path: Path) -> set[str]:
    return {name for name in imports(path) if name.split(".")[0] == "paramserver"}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"paramserver"}))
def test_arrows_run_downwards(module: str) -> None:
    reached = {part(name) for name in ours(MODULES[module])} - {part(module), ""}
    assert reached <= ARROWS[part(module)], f"{module} imports {sorted(reached - ARROWS[part(module)])}"


def test_the_arrows_make_no_circle() -> None:
    graphlib.TopologicalSorter(ARROWS).prepare()


def test_the_modules_make_no_circle() -> None:
    graphlib.TopologicalSorter({name: ours(path) - {name} for name, path in MODULES.items()}).prepare()


def test_store_and_transport_never_see_each_other() -> None:
    assert "transport" not in ARROWS["store"] | ARROWS["checkpoint_files"]
    assert "store" not in ARROWS["transport"] | ARROWS["wire"]


@pytest.mark.parametrize("module", [name for name in MODULES if part(name) in ("launch", "cluster", "errors")])
def test_the_launcher_never_waits_for_torch(module: str) -> None:
    assert not {"torch", "numpy", "sklearn"} & {name.split(".")[0] for name in imports(MODULES[module])}


def test_the_public_names_import_nothing_before_they_are_used() -> None:
    assert not ours(MODULES["paramserver"])


@pytest.mark.parametrize("module", MODULES)
def test_what_is_nowhere_done(module: str) -> None:
    calls = {ast.unparse(node.func) for node in code(MODULES[module]) if isinstance(node, ast.Call)}
    assert not calls & {"print", "time.sleep", "sleep", "torch.load", "torch.save", "eval", "exec"}
    assert not imports(MODULES[module]) & {"pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal"}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"paramserver.cluster.environment"}))
def test_the_environment_is_read_in_one_place(module: str) -> None:
    names = {ast.unparse(node) for node in code(MODULES[module]) if isinstance(node, ast.Attribute)}
    assert not names & {"os.environ", "os.getenv", "os.putenv"}
