"""The benchmarks beside peers: what a result is worth depends on its arithmetic, and on what is installed for it."""

import ast
import json
from pathlib import Path

import pytest
from benchmarks.figure import read
from benchmarks.models import LANE_NAMES
from benchmarks.participant import Window, measure
from benchmarks.peers import environments
from benchmarks.peers.__main__ import print_json, print_results, table
from benchmarks.peers.catalogue import PEERS, TARGETS, WORKERS
from benchmarks.peers.comparison import Comparison, compare, result, tf_config
from benchmarks.peers.environments import NotInstalledError, parse_pins
from benchmarks.step import StepOptions
from rich.console import Console

from paramserver.cluster.task import Role, TaskId

ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENTS = sorted({peer.environment for peer in PEERS.values() if peer.environment})
OPTIONS = StepOptions(model="small", workers=WORKERS, threads=WORKERS, seconds=1.0, repeats=3)


def test_the_ratio_is_the_median_of_pairs_in_time_and_not_the_ratio_of_medians() -> None:
    found = result("ray", {"ray": "2.0"}, OPTIONS, [(100.0, 10.0), (40.0, 20.0), (90.0, 30.0)], "")
    assert found.steps_per_second == 90.0
    assert found.peer_steps_per_second == 20.0
    assert found.ratios == [10.0, 2.0, 3.0]
    assert found.ratio == 3.0


def test_a_peer_that_cannot_be_installed_is_a_result_that_says_so(monkeypatch, tmp_path) -> None:
    def fail(environment: str, folder: Path) -> None:
        raise NotInstalledError(f"{environment} could not be installed: no such version")

    monkeypatch.setattr(environments, "ENVIRONMENTS", tmp_path)
    monkeypatch.setattr(environments, "_make", fail)
    found = compare("ray", OPTIONS)
    assert found.failure == "ray could not be installed: no such version"
    assert found.versions == {}
    assert found.ratios == []


def test_an_environment_of_the_requirements_of_now_is_not_made_again(monkeypatch, tmp_path) -> None:
    made: list[str] = []

    def make(environment: str, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        made.append(environment)

    monkeypatch.setattr(environments, "ENVIRONMENTS", tmp_path)
    monkeypatch.setattr(environments, "_make", make)
    assert environments.interpreter("ray") == environments.interpreter("ray") == tmp_path / "ray" / "bin" / "python"
    assert made == ["ray"]
    (tmp_path / "ray" / environments.STAMP).write_text("ray==1.0\n", encoding="utf-8")
    environments.interpreter("ray")
    assert made == ["ray", "ray"]


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_all_requirements_are_pinned_and_have_what_a_result_names(name: str) -> None:
    pins = parse_pins((environments.REQUIREMENTS / f"{name}.txt").read_text(encoding="utf-8"))
    assert "msgspec" in pins
    for peer in PEERS.values():
        if peer.environment == name:
            assert set(peer.packages) <= set(pins)


def test_the_original_is_the_version_that_was_the_last_with_an_estimator() -> None:
    text = (environments.REQUIREMENTS / "tf-estimator.txt").read_text(encoding="utf-8")
    assert parse_pins(text)["tensorflow-cpu"] == "2.15.1"


@pytest.mark.parametrize("line", ["ray", "ray>=2.0", "ray==2.0+cpu", "-r other.txt"])
def test_a_line_that_pins_nothing_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="expected NAME==VERSION"):
        parse_pins(line)


@pytest.mark.parametrize("peer", [name for name, peer in PEERS.items() if peer.environment])
def test_what_a_peer_imports_of_the_house_needs_no_package_of_the_house(peer: str) -> None:
    imported = _imports(ROOT / "benchmarks" / "peers" / f"{PEERS[peer].module}.py")
    assert "benchmarks.participant" in imported
    assert "paramserver" not in {name.partition(".")[0] for name in imported}
    if "torch" not in PEERS[peer].packages:
        assert "torch" not in {name.partition(".")[0] for name in imported}


def _imports(path: Path) -> set[str]:
    """What a file imports, and what the modules of the benchmarks that it imports do."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            found.add(name)
            if name.startswith("benchmarks."):
                found |= _imports(ROOT.joinpath(*name.split(".")).with_suffix(".py"))
    return found


def test_tf_config_has_the_addresses_in_the_order_of_the_tasks() -> None:
    addresses = {TaskId(Role.WORKER, 1): "b:2", TaskId(Role.WORKER, 0): "a:1", TaskId(Role.PS, 0): "c:3"}
    config = json.loads(tf_config(TaskId(Role.WORKER, 1), addresses)["TF_CONFIG"])
    assert config == {
        "cluster": {"ps": ["c:3"], "worker": ["a:1", "b:2"]},
        "task": {"type": "worker", "index": 1},
    }
    assert tf_config(TaskId(Role.WORKER, 1), {}) == {}


def test_a_call_that_takes_the_steps_of_several_workers_counts_them_all() -> None:
    calls: list[None] = []

    def step() -> int:
        calls.append(None)
        return 0

    measured = measure(step, lambda: 0.5, Window(begin=0.0, end=0.0, stop=0.0), stride=2)
    assert len(calls) == 1
    assert measured.steps == 2


def test_a_peer_without_a_measurement_is_told_beside_the_table(capsys) -> None:
    failed = result("ray", {}, OPTIONS, [], "ray could not be installed: no such version")
    measured = result("torch-ddp", {"torch": "2.0"}, OPTIONS, [(40.0, 20.0)], "")
    print_results([failed, measured])
    shown = capsys.readouterr().out
    assert "ray, small: NOT MEASURED: ray could not be installed: no such version" in shown.replace("\n", " ")
    assert shown.count("ray") == 2


def test_a_line_of_json_is_a_figure_with_its_target_and_a_failure_is_none(capsysbinary) -> None:
    print_json(result("torch-rpc", {}, OPTIONS, [], "it does not run"))
    told = capsysbinary.readouterr()
    assert (told.out, told.err) == (b"", b"torch-rpc, small: NOT MEASURED: it does not run\n")

    options = StepOptions(model="small", lane="tcp")
    print_json(result("torch-rpc", {"torch": "2.0"}, options, [(40.0, 20.0), (90.0, 10.0)], ""))
    [figure] = read(capsysbinary.readouterr().out.splitlines())
    assert figure.key == ("peers", "small, TCP, beside torch-rpc", 2)
    assert (figure.ratio, figure.target, figure.is_reached, figure.beside) == (5.5, 5.0, True, "torch 2.0")


def test_each_target_is_beside_a_peer_that_trains_the_model() -> None:
    assert all(model in PEERS[peer].models and lane in LANE_NAMES for model, lane, peer in TARGETS)


def test_the_table_has_the_ratio_and_the_versions() -> None:
    console = Console(width=140)
    measured: Comparison = result("torch-ddp", {"torch": "2.0"}, OPTIONS, [(40.0, 20.0), (90.0, 30.0)], "")
    with console.capture() as captured:
        console.print(table([measured]))
    [row] = [line for line in captured.get().splitlines() if "torch-ddp" in line]
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "small", "auto", "torch-ddp", "torch 2.0", "65", "25", "2.50", "2.00-3.00",
    ]  # fmt: skip
