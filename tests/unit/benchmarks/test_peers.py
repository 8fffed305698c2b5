"""The benchmarks beside peers: what a result is worth depends on its arithmetic, and on what is installed for it."""

import ast
import json
import re
from pathlib import Path

import pytest
from benchmarks.cases import peers
from benchmarks.cases.peers import PeerOptions, pairs
from benchmarks.harness.case import measure_case
from benchmarks.harness.command import print_json, print_tables
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.figure import read
from benchmarks.harness.options import LANE_NAMES
from benchmarks.harness.participant import Window, measure
from benchmarks.peers import comparison, environments
from benchmarks.peers.catalogue import PEERS, TARGETS, WORKERS
from benchmarks.peers.comparison import subject, tf_config
from benchmarks.peers.environments import NotInstalledError, parse_pins

from paramserver.cluster.task import Role, TaskId

ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENTS = sorted({peer.environment for peer in PEERS.values() if peer.environment})
OPTIONS = PeerOptions(model=["small"], peer=["ray", "torch-ddp"], seconds=1.0, repeats=3)


def test_a_peer_that_cannot_be_installed_has_no_figure_and_the_next_one_is_measured(
    monkeypatch, tmp_path, capsys
) -> None:
    def fail(environment: str, folder: Path) -> None:
        raise NotInstalledError(f"{environment} could not be installed: no such version")

    def compare(peer: str, *of: object) -> object:
        return comparison.compare(peer, *of) if peer == "ray" else measured

    measured = subject("torch-ddp", "small", "auto").figure([(40.0, 20.0), (90.0, 30.0)])
    monkeypatch.setattr(environments, "ENVIRONMENTS", tmp_path)
    monkeypatch.setattr(environments, "_make", fail)
    monkeypatch.setattr(peers, "compare", compare)
    assert list(peers.measure(OPTIONS)) == [measured]
    assert capsys.readouterr().err == "ray, small: NOT MEASURED: ray could not be installed: no such version\n"


def test_pairs_are_those_of_models_with_peers_that_train_them() -> None:
    assert pairs(["small", "sparse"], ["ray", "tf-estimator"]) == [
        ("small", "ray"), ("small", "tf-estimator"), ("sparse", "tf-estimator")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("models", "names", "message"),
    [
        (["huge"], ["ray"], "model: expected one of small, large, sparse, got 'huge'"),
        (["small"], ["mpi"], "peer: expected one of tf-estimator"),
        (["sparse"], ["ray"], "model: expected one that ray trains (large, small), got ['sparse']"),
    ],
)
def test_what_cannot_be_paired_is_refused(models: list[str], names: list[str], message: str) -> None:
    with pytest.raises(BenchmarkError, match=re.escape(message)):
        pairs(models, names)


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
    assert "benchmarks.harness.participant" in imported
    assert "paramserver" not in {name.partition(".")[0] for name in imported}
    if "torch" not in PEERS[peer].packages:
        assert "torch" not in {name.partition(".")[0] for name in imported}


def _imports(path: Path) -> set[str]:
    """What a file imports, and what the modules of the benchmarks that it imports do, with their packages."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            found.add(name)
            if name.startswith("benchmarks."):
                module = ROOT.joinpath(*name.split("."))
                packages = [folder for folder in module.parents if folder.is_relative_to(ROOT / "benchmarks")]
                for file in (module.with_suffix(".py"), *(folder / "__init__.py" for folder in packages)):
                    found |= _imports(file)
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


def test_a_line_of_json_is_a_figure_with_its_target(capsysbinary, monkeypatch) -> None:
    figure = subject("torch-rpc", "small", "tcp").figure([(40.0, 20.0), (90.0, 10.0)])
    monkeypatch.setattr(peers, "compare", lambda *_: figure)
    options = PeerOptions(model=["small"], peer=["torch-rpc"], lane="tcp")
    print_json(measure_case("peers", peers.CASE, options))
    [found] = read(capsysbinary.readouterr().out.splitlines())
    assert found.key == ("peers", "small, TCP, beside torch-rpc", 2)
    assert (found.ratio, found.target, found.is_reached) == (5.5, 5.0, True)
    assert found.beside.startswith("torch 2.")


def test_each_target_is_beside_a_peer_that_trains_the_model() -> None:
    assert all(model in PEERS[peer].models and lane in LANE_NAMES for model, lane, peer in TARGETS)


def test_the_table_has_the_ratio_and_the_versions(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    print_tables("beside others", [subject("torch-ddp", "small", "auto").figure([(40.0, 20.0), (90.0, 30.0)])])
    lines = capsys.readouterr().out.splitlines()
    [row] = [index for index, line in enumerate(lines) if "torch-ddp" in line]
    case, size, ours, beside, ratio, _ = (cell.strip() for cell in lines[row].strip("│").split("│"))
    assert (case, size) == ("small, shared memory, beside torch-ddp", f"{WORKERS} workers")
    assert (ours, ratio) == ("65 steps/s", "2.5")
    assert "(2 to 3)" in lines[row + 1]
    assert beside.startswith("torch 2.")
    assert beside.endswith(": 25 steps/s")
