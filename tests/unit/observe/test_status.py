"""Which ps tasks are asked, and how their answers are shown."""

import io
import json
import os

import pytest
from rich.console import Console

from paramserver.cluster import run_file
from paramserver.cluster.run_file import Run
from paramserver.errors import ConfigError
from paramserver.observe.status import Found, Target, as_json, as_table, find_run, loads
from paramserver.wire.messages import Status


def status(task="ps:0", values=1000, **changes):
    fields = {
        "num_variables": 4,
        "slots_bytes": 2000,
        "global_step": 12,
        "updates": 10,
        "mean_staleness": 1.25,
        "largest_staleness": 7,
        "joined": ("chief:0", "worker:0"),
    }
    return Status(task=task, values_bytes=values, **{**fields, **changes})


def shown(statuses):
    out = io.StringIO()
    Console(file=out, width=80, highlight=False, markup=False).print(as_table(statuses))
    return out.getvalue().splitlines()


# --- who is asked


def test_addresses_are_asked_once_each_whoever_is_there(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", "no JSON")
    assert find_run(["a:1", "[::1]:65535", "a:1"]) == Found([Target("a:1"), Target("[::1]:65535")])


def test_without_addresses_the_ps_tasks_of_the_cluster_are_asked(monkeypatch):
    cluster = {"chief": ["c:1"], "ps": {"0": "a:1", "2": "b:1"}}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster}))
    assert find_run([]) == Found([Target("a:1", "ps:0"), Target("b:1", "ps:2")])


@pytest.mark.parametrize("tf_config", ["", "{}", '{"cluster": {"worker": ["a:1"]}}'])
def test_somebody_must_be_asked(monkeypatch, tmp_path, tf_config):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("TF_CONFIG", tf_config)
    with pytest.raises(ConfigError, match="one launched run, addresses of ps tasks, .* of this user are: none"):
        find_run([])


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """The runs that are launched on this machine: two, whose launcher is this process."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("TF_CONFIG", raising=False)
    for number in ("1a", "2b"):
        run = Run(run_id=number, script="train.py", launcher=os.getpid(), ps=["a:1", "b:1"], token=f"token {number}")
        run_file.write(run)
    return tmp_path / "paramserver"


def test_the_only_launched_run_is_asked_with_its_token(runs):
    run_file.remove(runs / "2b.json")
    assert find_run([]) == Found([Target("a:1", "ps:0"), Target("b:1", "ps:1")], "token 1a")


def test_a_launched_run_is_named_by_its_id(runs):
    assert find_run(["2b"]).token == "token 2b"
    with pytest.raises(ConfigError, match=r"expected one launched run.*1a \(train.py\), 2b \(train.py\)"):
        find_run([])
    with pytest.raises(ConfigError, match="expected the run '3c'"):
        find_run(["3c"])


@pytest.mark.parametrize("address", ["", ":1", "a:", "a:b", "a:0", "a:65536", "a:-1", "a:1٣", "http://a"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(ConfigError, match="^status: expected host:port, got ") as caught:
        find_run([address])
    assert repr(address) in str(caught.value)


# --- what is shown


def test_load_is_relative_to_the_mean():
    assert loads([status(values=100), status(values=300), status(values=200)]) == [0.5, 1.5, 1.0]


def test_load_of_empty_tasks_is_even():
    assert loads([status(values=0), status(values=0)]) == [1.0, 1.0]


def test_z22_the_table_shows_load_and_staleness():
    header, first, second = shown([status(values=1_040_000), status("ps:1", 960_000, updates=1234567, joined=())])
    assert header.split() == ["task", "variables", "values", "slots", "load", "updates", "staleness", "workers"]
    assert first.split() == ["ps:0", "4", "1.0", "MB", "2.0", "kB", "1.04x", "10", "1.2", "max", "7", "2"]
    assert second.split() == ["ps:1", "4", "960.0", "kB", "2.0", "kB", "0.96x", "1,234,567", "1.2", "max", "7", "0"]


def test_the_table_fits_in_80_columns_and_loses_nothing():
    large = status(
        "ps:127",
        123_456_789_012,
        num_variables=123_456,
        slots_bytes=246_913_578_024,
        updates=123_456_789,
        mean_staleness=12345.6,
        largest_staleness=98765,
        joined=("worker:0",) * 1000,
    )
    lines = shown([large, status()])
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)


def test_json_holds_everything():
    found = json.loads(as_json([status(values=100), status("ps:1", values=300)]))
    assert found["global_step"] == 12
    assert [task["load"] for task in found["tasks"]] == [0.5, 1.5]
    assert found["tasks"][1] == {
        "task": "ps:1",
        "num_variables": 4,
        "values_bytes": 300,
        "slots_bytes": 2000,
        "global_step": 12,
        "updates": 10,
        "mean_staleness": 1.25,
        "largest_staleness": 7,
        "joined": ["chief:0", "worker:0"],
        "load": 1.5,
    }
