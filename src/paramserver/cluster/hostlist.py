"""Slurm's short forms of lists: of hosts, such as ``n[1-3,07]-ib,m3``, and of counts, such as ``2(x3),1``. Pure.

Rules
    * Commas outside of brackets separate hosts. Brackets hold numbers and ranges of numbers, with the leading zeros of
      the first number of a range. With several brackets, the last one changes fastest.
    * ``2(x3)`` stands for ``2,2,2``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from paramserver.errors import ConfigError

MOST = 100_000
"""The most hosts of a list; Slurm's own limit for a range is below it."""

_PART = re.compile(r"\[([^\[\]]*)\]|([^\[\],]+)|(.)")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)
_COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?", re.ASCII)


def expand_hosts(text: str, what: str = "node list") -> list[str]:
    """Return the hosts of a list in its order.

    Args:
        text: The list in its short form.
        what: What the list is, for messages.

    Raises:
        ConfigError: If it is malformed or empty.

    >>> expand_hosts("n[1-2,07]-ib,m3")
    ['n1-ib', 'n2-ib', 'n07-ib', 'm3']
    >>> expand_hosts("r[1-2]n[08-09]")
    ['r1n08', 'r1n09', 'r2n08', 'r2n09']
    """
    hosts: list[str] = []
    pieces: list[list[str]] = []
    for bracket, plain, other in (match.groups() for match in _PART.finditer(text)):
        if other == ",":
            hosts += _products(pieces, text, what)
            pieces = []
        elif other is not None:
            raise _malformed(text, what, f"{other!r} without its counterpart")
        else:
            pieces.append([plain] if bracket is None else list(_numbers(bracket, text, what)))
    hosts += _products(pieces, text, what)
    if len(hosts) > MOST:
        raise _malformed(text, what, f"more than {MOST:,} hosts")
    return hosts


def expand_counts(text: str, what: str = "counts") -> list[int]:
    """Return the numbers of a list such as that of tasks per node.

    Raises:
        ConfigError: If it is malformed or empty.

    >>> expand_counts("2(x3),1")
    [2, 2, 2, 1]
    """
    counts: list[int] = []
    for part in text.split(","):
        match = _COUNT.fullmatch(part)
        if match is None or int(match[2] or 1) > MOST:
            raise ConfigError(f"{what}: expected numbers such as '2(x3),1', got {text!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _numbers(bracket: str, text: str, what: str) -> Iterator[str]:
    for part in bracket.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise _malformed(text, what, f"{part!r} is neither a number nor a range")
        first, last = match[1], match[2] or match[1]
        if not int(first) <= int(last) < int(first) + MOST:
            raise _malformed(text, what, f"the range {part!r} is empty or too long")
        for number in range(int(first), int(last) + 1):
            yield f"{number:0{len(first)}d}"


def _products(pieces: list[list[str]], text: str, what: str) -> list[str]:
    if not pieces:
        raise _malformed(text, what, "a host without a name")
    return ["".join(parts) for parts in itertools.islice(itertools.product(*pieces), MOST + 1)]


def _malformed(text: str, what: str, why: str) -> ConfigError:
    return ConfigError(f"{what}: expected hosts such as 'n[1-3,07],m3', got {text!r}: {why}")
