"""The pages: examples give what they say, what a page links to and names is there, and an index lists each page."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest
from tests.multiprocess.launch.test_signals import ROWS

from paramserver.cluster import environment

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
ALL = [*PAGES, *sorted(ROOT.glob("*.md"))]
FOR_READERS = [page for page in PAGES if page.parent != DOCS / "decisions" or page.name == "README.md"]
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
FAILURES = (DOCS / "failures.md").read_text(encoding="utf-8")
SOURCE = re.compile(r"`([\w/]+\.py)(?::([\w.]+))?`")


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them.

    >>> sorted(anchors(DOCS / "concepts.md"))[:2]
    ['aggregation', 'concepts']
    """
    headings = HEADING.findall(page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_examples(page: Path) -> None:
    failed, _ = doctest.testfile(str(page), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert not failed


@pytest.mark.parametrize("page", ALL, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(CODE.sub("", page.read_text(encoding="utf-8"))):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"


@pytest.mark.parametrize("page", ALL, ids=named)
def test_source_files_that_a_page_names_are_there(page: Path) -> None:
    """They are named as they lie below src/paramserver or in the repository, some with a name that they define."""
    for file, names in SOURCE.findall(page.read_text(encoding="utf-8")):
        found = [path for folder in ("src/paramserver", "src", "") if (path := ROOT / folder / file).exists()]
        assert found, file
        source = found[0].read_text(encoding="utf-8")
        assert all(re.search(rf"\b(?:def|class) {name}\b", source) for name in filter(None, names.split("."))), names


@pytest.mark.parametrize("page", FOR_READERS, ids=named)
def test_the_first_sentence_says_for_whom_a_page_is(page: Path) -> None:
    assert page.read_text(encoding="utf-8").split("\n\n")[1].startswith("For ")


@pytest.mark.parametrize("index", [DOCS / "README.md", DOCS / "decisions" / "README.md"], ids=named)
def test_an_index_lists_each_page(index: Path) -> None:
    below = index.parent.rglob("*.md") if index.parent == DOCS / "decisions" else FOR_READERS
    listed = {(index.parent / target).resolve() for target, _ in LINK.findall(index.read_text(encoding="utf-8"))}
    assert set(below) - {index} <= listed


def test_the_concepts_have_examples() -> None:
    assert (DOCS / "concepts.md").read_text(encoding="utf-8").count(">>>") > 20


def test_the_table_of_signals_has_the_rows_and_codes_of_its_tests() -> None:
    told = dict(re.findall(r"^\| `((?:own|estimator) [^`]+)` \| (\d+) \| \d+\.\d \|", FAILURES, re.MULTILINE))
    killed = 128  # a shell tells the death by signal N, which is -N in Python, as 128 + N
    assert told == {str(row): str(row.code if row.code >= 0 else killed - row.code) for row in ROWS}


def test_the_tests_that_the_page_about_failures_names_are_there() -> None:
    tests = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    named_tests = set(re.findall(r"`(test_\w+)`", FAILURES))
    assert named_tests
    assert [name for name in sorted(named_tests) if f"def {name}(" not in tests] == []


def test_the_loop_that_saves_when_it_is_asked_to_leave_is_that_of_the_example() -> None:
    (block,) = re.findall(r"^```\n(asked_to_leave.*?)^```", FAILURES, re.MULTILINE | re.DOTALL)
    example = (ROOT / "examples" / "leaving.py").read_text(encoding="utf-8")
    assert all(part in example for part in block.split("...\n"))


def test_operations_lists_the_environment_variables_of_the_help() -> None:
    page = (DOCS / "operations.md").read_text(encoding="utf-8").partition("## Environment variables")[2]
    tables = [re.findall(r"^\| `(\w+)` \| (.*) \|$", part, re.MULTILINE) for part in page.split("###")[1:]]
    lists = (environment.FOR_USERS, environment.DEFAULTS_OF_LAUNCH, environment.FROM_LAUNCHERS)
    assert tables == [list(variables) for variables in lists]
