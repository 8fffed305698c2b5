"""The rules of DESIGN.md that no type checker holds: arrows run downwards only, and what is nowhere done."""

from __future__ import annotations

import ast
import graphlib
import re
from pathlib import Path

import pytest

import paramserver

ROOT = Path(paramserver.__file__).parent
MODULES = {
    ".".join(("paramserver", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
# What each room may import. Whoever adds an arrow adds it here, and shows that it runs downwards.
ARROWS = {
    "errors": set(),
    "layout": {"errors"},
    "cluster": {"errors", "layout"},
    "memory": {"errors", "layout"},
    "placement": {"cluster", "errors", "layout"},
    "launch": {"cluster", "errors", "layout"},
    "wire": {"errors", "layout", "memory"},
    "checkpoint": {"errors", "layout", "memory"},
    "demo": {"cluster", "errors", "launch"},
    "transport": {"errors", "layout", "memory", "wire"},
    "store": {"checkpoint", "errors", "layout", "memory"},
    "client": {"checkpoint", "errors", "layout", "transport", "wire"},
    "server": {"checkpoint", "cluster", "errors", "layout", "memory", "store", "transport", "wire"},
    "observe": {"client", "cluster", "errors", "transport", "wire"},
    "distribute.core": {"client", "cluster", "layout"},
    "summary": {"distribute.core", "errors"},
    "distribute.input": {"distribute.core", "errors"},
    "distribute.reduce": {"cluster", "distribute.core"},
    "distribute.replicas": {"distribute.core", "distribute.reduce"},
    "distribute.bound": {
        "client",
        "distribute.core",
        "distribute.reduce",
        "errors",
        "layout",
        "memory",
        "placement",
        "transport",
        "wire",
    },
    "distribute.variables": {"client", "distribute.core", "distribute.replicas", "layout"},
    "distribute": {
        "checkpoint",
        "client",
        "cluster",
        "distribute.bound",
        "distribute.core",
        "distribute.input",
        "distribute.reduce",
        "distribute.replicas",
        "distribute.variables",
        "errors",
        "layout",
        "placement",
        "server",
        "transport",
    },
    "estimator": {
        "checkpoint",
        "client",
        "cluster",
        "distribute",
        "distribute.bound",
        "distribute.core",
        "distribute.input",
        "distribute.reduce",
        "distribute.replicas",
        "distribute.variables",
        "errors",
        "layout",
        "memory",
        "server",
        "summary",
        "transport",
    },
    "testing": {
        "client",
        "cluster",
        "distribute",
        "errors",
        "layout",
        "memory",
        "server",
        "store",
        "transport",
        "wire",
    },
    "integrations": {"cluster", "errors", "launch", "layout"},
    "cli": {"cluster", "demo", "errors", "estimator", "launch", "layout", "observe", "server"},
    "__main__": {"cli"},
}


def code(path: Path) -> list[ast.AST]:
    """All nodes of a file, also those that only type checkers see."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


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


def room(module: str) -> str:
    """The first folder of a module below the package, or its name in the root; below `distribute` the second one."""
    _, first, second = [*module.split("."), "", ""][:3]
    return f"{first}.{second}" if f"{first}.{second}" in ARROWS else first


def _is_ours(node: ast.AST) -> bool:
    return isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "paramserver"


def ours(path: Path) -> set[str]:
    return {name for name in imports(path) if name.split(".")[0] == "paramserver"}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"paramserver"}))
def test_arrows_run_downwards(module: str) -> None:
    reached = {room(name) for name in ours(MODULES[module])} - {room(module), ""}
    assert reached <= ARROWS[room(module)], f"{module} imports {sorted(reached - ARROWS[room(module)])}"


def test_the_arrows_make_no_circle() -> None:
    graphlib.TopologicalSorter(ARROWS).prepare()


def test_the_modules_make_no_circle() -> None:
    modules = {name: path for name, path in MODULES.items() if name != "paramserver"}  # it names all, and imports none
    graphlib.TopologicalSorter({name: ours(path) & modules.keys() - {name} for name, path in modules.items()}).prepare()


def test_there_are_few_rooms() -> None:
    assert len(ARROWS) <= 27


def test_the_root_holds_what_belongs_to_no_room() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == {"__init__", "__main__", "cli", "errors", "summary"}


def test_store_and_transport_never_see_each_other() -> None:
    assert "transport" not in ARROWS["store"] | ARROWS["checkpoint"]
    assert "store" not in ARROWS["transport"] | ARROWS["wire"]


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) in ("launch", "cluster", "errors")])
def test_the_launcher_never_waits_for_torch(module: str) -> None:
    assert not {"torch", "numpy", "sklearn"} & {name.split(".")[0] for name in imports(MODULES[module])}


def test_the_public_names_import_nothing_before_they_are_used() -> None:
    nodes = code(ROOT / "__init__.py")
    (block,) = (node for node in nodes if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    assert set(block.body) == set(filter(_is_ours, nodes))


PRIVATE = re.compile(r"torch(\.\w+)*\._(?!_)|torch\.\w*\._\w|\._(parameters|buffers|modules|version)$")


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"paramserver.memory.torch_internals"}))
def test_private_names_of_torch_stand_in_one_place(module: str) -> None:
    nodes = code(MODULES[module])
    used = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    used |= {f"{node.module}.{each.name}" for node in nodes if isinstance(node, ast.ImportFrom) for each in node.names}
    assert not {name for name in used if PRIVATE.search(name) and not name.startswith("self.")}


@pytest.mark.parametrize("module", MODULES)
def test_what_is_nowhere_done(module: str) -> None:
    calls = {ast.unparse(node.func) for node in code(MODULES[module]) if isinstance(node, ast.Call)}
    assert not calls & {"print", "time.sleep", "sleep", "torch.load", "torch.save", "eval", "exec"}
    assert not imports(MODULES[module]) & {"pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal"}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"paramserver.cluster.environment"}))
def test_the_environment_is_read_in_one_place(module: str) -> None:
    names = {ast.unparse(node) for node in code(MODULES[module]) if isinstance(node, ast.Attribute)}
    assert not names & {"os.environ", "os.getenv", "os.putenv"}
