"""Slurm's short forms of lists."""

from __future__ import annotations

import pytest

from paramserver.cluster.hostlist import expand_counts, expand_hosts
from paramserver.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n1", ["n1"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[1-3,07,10-12]-ib,m3", ["n1-ib", "n2-ib", "n3-ib", "n07-ib", "n10-ib", "n11-ib", "n12-ib", "m3"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("n[9-10]", ["n9", "n10"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("r[1-2]n[3,5]x", ["r1n3x", "r1n5x", "r2n3x", "r2n5x"]),
        ("[1-2]n", ["1n", "2n"]),
        ("10.0.0.[7-8],a.b-c_d", ["10.0.0.7", "10.0.0.8", "a.b-c_d"]),
    ],
)
def test_hosts(text: str, hosts: list[str]) -> None:
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        "n1,",
        "n1,,n2",
        "n[",
        "n]",
        "n[1-2",
        "n1-2]",
        "n[]",
        "n[a]",
        "n[1-]",
        "n[-1]",
        "n[2-1]",
        "n[1--2]",
        "n[[1]]",
        "n[1,]",
        "n[٣]",
        "n[1-999999]",
        "a[1-1000]b[1-1000]",
    ],
)
def test_a_malformed_list_of_hosts(text: str) -> None:
    with pytest.raises(ConfigError, match="SLURM_X: expected hosts such as ") as raised:
        expand_hosts(text, "SLURM_X")
    assert f"got {text!r}: " in str(raised.value)


@pytest.mark.parametrize(("text", "counts"), [("1", [1]), ("2(x3),1", [2, 2, 2, 1]), ("3,1(x2)", [3, 1, 1])])
def test_counts(text: str, counts: list[int]) -> None:
    assert expand_counts(text) == counts


@pytest.mark.parametrize("text", ["", "a", "1,", "2(3)", "2(x)", "(x2)", "-1", "2(x999999)"])
def test_a_malformed_list_of_counts(text: str) -> None:
    with pytest.raises(
        ConfigError, match="counts: expected numbers such as '2(x3),1', got".replace("(", r"\(").replace(")", r"\)")
    ):
        expand_counts(text)
