"""The contract in docs/contract.md: a test names each of its codes, tests and pages name no others, and src names none.

A test names a code in its name, its docstring, a comment, or the id of one of its parameters.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
PAGES = sorted((ROOT / "docs").rglob("*.md"))
ENTRIES = re.findall(r"^- \*\*(\S+)\*\* ", (ROOT / "docs" / "contract.md").read_text(encoding="utf-8"), re.MULTILINE)
CODE = re.compile(r"\b(V2-\d\d|[A-Z]\d\d)\b(?: to (V2-\d\d|[A-Z]\d\d)\b)?")
IN_A_NAME = re.compile(r"_(v2_\d\d|[a-z]\d\d)(?=_)")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def codes_in(text: str) -> set[str]:
    """The codes in a text, with all codes of a range.

    >>> sorted(codes_in("when it ends (V01, V2-05; P20 to P22), not a utf8 L1 of 0x91"))
    ['P20', 'P21', 'P22', 'V01', 'V2-05']
    """
    found: set[str] = set()
    for first, last in CODE.findall(text):
        found |= {f"{first[:-2]}{number:02}" for number in range(int(first[-2:]), int((last or first)[-2:]) + 1)}
    return found


def codes_in_name(name: str) -> set[str]:
    """The codes in the name of a test.

    >>> sorted(codes_in_name("test_w04_v2_05_each_counts_once"))
    ['V2-05', 'W04']
    """
    return {code.upper().replace("_", "-") for code in IN_A_NAME.findall(name)}


def nodes(text: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(text)))


def codes_in_prose(text: str, *kinds: type[ast.AST]) -> set[str]:
    """The codes in the comments of a file, and in the docstrings of some kinds of its nodes."""
    docstrings = [ast.get_docstring(node) or "" for node in nodes(text) if isinstance(node, kinds)]
    return codes_in("\n".join([*re.findall("#.*", text), *docstrings]))


def named_by_tests(text: str) -> set[str]:
    """The codes that the tests of a file name. The docstring of the file itself is too far from each of them."""
    found = codes_in_prose(text, ast.ClassDef, ast.FunctionDef)
    for node in nodes(text):
        if isinstance(node, ast.FunctionDef):
            found |= codes_in_name(node.name)
        elif isinstance(node, ast.keyword) and node.arg == "id" and isinstance(node.value, ast.Constant):
            found |= codes_in(str(node.value.value))
    return found


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    paths = (path for path in sorted((ROOT / "tests").rglob("*.py")) if path != Path(__file__))
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}


def test_the_contract_has_each_code_once() -> None:
    assert len(ENTRIES) > 300
    assert len(ENTRIES) == len(set(ENTRIES))


def test_a_test_names_each_code(files: dict[str, str]) -> None:
    assert not set(ENTRIES).difference(*map(named_by_tests, files.values()))


def test_tests_name_no_other_codes(files: dict[str, str]) -> None:
    named = {path: named_by_tests(text) | codes_in_prose(text, ast.Module) for path, text in files.items()}
    assert not {path: others for path, codes in named.items() if (others := codes - set(ENTRIES))}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_no_other_codes(page: Path) -> None:
    assert codes_in(page.read_text(encoding="utf-8")) <= set(ENTRIES)


def test_src_names_no_code() -> None:
    """A reader of src cannot look them up; the tests that prove them can be searched for."""
    named = {path.name: codes_in_prose(path.read_text(encoding="utf-8"), *DOCUMENTED) for path in SOURCES}
    assert not {name: quoted for name, codes in named.items() if (quoted := codes & set(ENTRIES))}
