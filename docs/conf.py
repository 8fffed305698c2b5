"""How Sphinx builds the site: the pages of docs/ and of the repository's root, and a reference from the docstrings.

`make docs` runs it with warnings as errors. MyST checks the links between pages, anchors included.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

import paramserver

ROOT = Path(__file__).parents[1]
INDEX = "docs/README"
INDEXES = {"README": INDEX, "docs/decisions/README": "docs/decisions/README"}
"""The pages that have others below them in the navigation, and the page that lists these."""
MODULES = ["", ".errors", ".estimator", ".placement", ".summary", ".testing"]

project = "paramserver"
version = release = paramserver.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = ["*.md", "docs/**", "benchmarks/*.md"]
exclude_patterns = [".*", "build", "examples", "run", "site", "src", "tests"]

html_theme = "furo"
html_title = "paramserver"
html_show_sphinx = False
html_copy_source = False
html_extra_path = ["index.html"]

myst_heading_anchors = 4

default_role = "py:obj"
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # a field's type stands in the signature
autodoc_mock_imports = ["ray"]  # an extra of its own
autodoc_type_aliases = {"Handle": "Handle"}  # else a union of all messages


def add_navigation(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put what an index lists into the navigation, a section of it under each of its headings."""
    if docname in INDEXES:
        index = ROOT / f"{INDEXES[docname]}.md"
        for section in re.split(r"^## ", index.read_text(encoding="utf-8"), flags=re.MULTILINE):
            caption = section.partition("\n")[0].lstrip("# ")
            targets = re.findall(r"^- .*?\]\((\S+\.md)\)", section, flags=re.MULTILINE)
            pages = [str((index.parent / target).resolve().relative_to(ROOT).with_suffix("")) for target in targets]
            entries = [f"/{INDEX if page == docname else page}" for page in pages]
            if entries:
                source[0] += "\n".join(["\n```{toctree}", ":hidden:", f":caption: {caption}", "", *entries, "```", ""])


def public_names(module: ModuleType) -> Iterator[str]:
    """The names that a module exports: those of `__all__`, or without it what is defined in the module."""
    own = [name for name, each in vars(module).items() if inspect.getmodule(each) is module and name[0] != "_"]
    return (f"{module.__name__}.{name}" for name in getattr(module, "__all__", own))


def check_reference(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn of each public name without an entry in the reference."""
    entries = {*env.domains.python_domain.objects, *env.domains.python_domain.modules}
    for module in MODULES:
        for name in public_names(importlib.import_module(f"paramserver{module}")):
            if name not in entries:
                logging.getLogger(__name__).warning("docs/reference: the public name %s has no entry", name)


def skip_fields(app: Sphinx, kind: str, name: str, each: object, skip: bool, options: object) -> bool:
    """Leave out the fields of a named tuple, which its docstring describes."""
    return skip or (inspect.getdoc(each) or "").startswith("Alias for field number")


def hide_functions(
    app: Sphinx, kind: str, name: str, each: object, options: object, arguments: str | None, returned: str | None
) -> tuple[str, str | None] | None:
    """Write ``...`` for a default that is a function, whose repr is no Python."""
    return (re.sub(r"<function \S+>", "...", arguments), returned) if arguments else None


def setup(app: Sphinx) -> None:
    """Connect what is above to the events of a build."""
    app.connect("source-read", add_navigation)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("autodoc-process-signature", hide_functions)
    app.connect("env-check-consistency", check_reference)
