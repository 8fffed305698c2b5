"""Checkpoints of real ps tasks: a partitioned variable is one tensor (B06, V2-05, P07), and all of them write (B01)."""

import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from paramserver.checkpoint.folder import CheckpointFolder
from paramserver.checkpoint.model_dir import CheckpointManager, checkpoint_step, latest_checkpoint
from paramserver.client import checkpoints, client
from paramserver.distribute.checkpoints import restore_checkpoint, write_checkpoint
from paramserver.errors import CheckpointError, NotFiniteError, UnavailableError
from paramserver.estimator.checkpoint import inspect_checkpoint, load_model, read_values
from paramserver.layout.arena import ArenaLayout
from paramserver.layout.rules import describe
from paramserver.layout.variables import Shard, VariableSpec
from paramserver.placement import FixedShards, RoundRobin, row_ranges
from paramserver.server import handler
from paramserver.testing.local_cluster import LocalCluster
from paramserver.wire.messages import Part

ADAM = describe(torch.optim.Adam([torch.zeros(1)], lr=0.1), 0)
TABLE = VariableSpec("table.weight", (10, 4), "float32")


def layouts(num_shards, num_ps):
    """The one variable, in parts that the ps tasks take in turns."""
    ranges = row_ranges(FixedShards(num_shards), TABLE)
    parts = [
        VariableSpec(f"{TABLE.name}/part_{index}", (stop - start, 4), "float32", Shard(TABLE.name, index, start, 10))
        for index, (start, stop) in enumerate(ranges)
    ]
    place, held = RoundRobin().start(num_ps), [[] for _ in range(num_ps)]
    for spec in parts or [TABLE]:
        held[place(spec)].append(spec)
    return [[ArenaLayout("float32", ADAM, tuple(specs))] if specs else [] for specs in held]


class Chief:
    """A chief that sees the variable as one tensor, wherever its rows are."""

    def __init__(self, cluster, num_shards):
        self.client = cluster.client("chief:0")
        self._layouts = layouts(num_shards, len(cluster.servers))
        self.client.create(self._layouts)
        self._memory = self.client.open()
        self.client.mark_ready(0)

    def _rows(self, whole, memory):
        for ps_layouts, ps_memory in zip(self._layouts, memory, strict=True):
            for layout, flat in zip(ps_layouts, ps_memory, strict=True):
                for spec, view in zip(layout.variables, layout.views(flat), strict=True):
                    start = spec.shard.start if spec.shard else 0
                    yield whole[start : start + spec.shape[0]], view

    def push(self, gradient):
        for rows, view in self._rows(gradient, [memory.gradients for memory in self._memory]):
            view.copy_(rows)
        parts = [[Part(arena, "rule") for arena in range(len(ps_layouts))] for ps_layouts in self._layouts]
        self.client.push_pull(self.client.plan(parts, [(0,) * len(ps_parts) for ps_parts in parts]), counts=True)
        return self.values()

    def values(self):
        self.client.pull([tuple(range(len(ps_layouts))) for ps_layouts in self._layouts])
        whole = torch.empty(TABLE.shape)
        for rows, view in self._rows(whole, [memory.values for memory in self._memory]):
            rows.copy_(view)
        return whole


@pytest.mark.parametrize(("shards", "ps"), [((4, 1), (2, 1)), ((1, 4), (1, 3)), ((4, 2), (3, 2))])
def test_b06_v2_05_a_run_goes_on_with_another_partitioning(tmp_path, shards, ps):
    gradients = torch.randn(3, *TABLE.shape, generator=torch.Generator().manual_seed(0))
    with LocalCluster(ps=ps[0], workers=1) as cluster:
        chief = Chief(cluster, shards[0])
        for gradient in gradients[:2]:
            saved = chief.push(gradient)
        path = write_checkpoint(chief.client, CheckpointManager(str(tmp_path)), 2, {})
        expected = chief.push(gradients[2])
    assert torch.equal(read_values(path)[TABLE.name], saved)
    with LocalCluster(ps=ps[1], workers=1) as cluster:
        chief = Chief(cluster, shards[1])
        chief.client.restore(str(Path(path).absolute()))
        assert torch.equal(chief.values(), saved)
        torch.testing.assert_close(chief.push(gradients[2]), expected)


def test_b06_a_partitioned_variable_is_one_to_inspect_and_to_plain_modules(tmp_path):
    with LocalCluster(ps=3, workers=1) as cluster:
        chief = Chief(cluster, 4)
        values = chief.push(torch.ones(TABLE.shape))
        path = write_checkpoint(chief.client, CheckpointManager(str(tmp_path)), 1, {})
    found = inspect_checkpoint(path)
    assert found.step == checkpoint_step(path) == 1
    assert found.variables == [("table.weight", "float32", (10, 4), 160)]
    assert found.slots == ["exp_avg", "exp_avg_sq", "step"]
    module = nn.ModuleDict({"table": nn.Embedding(10, 4)})
    load_model(module, path)
    assert torch.equal(module["table"].weight, values)


# --- what is not finite


@pytest.mark.parametrize("saved", [False, True])
def test_cp_what_is_not_finite_is_refused_with_the_way_back_and_nothing_is_left(tmp_path, saved):
    """The client's save names the variable; the whole checkpoint's also what to go on from."""
    with LocalCluster(ps=2, workers=1) as cluster:
        chief, manager = Chief(cluster, 2), CheckpointManager(str(tmp_path))
        chief.push(torch.ones(TABLE.shape))
        if saved:
            write_checkpoint(chief.client, manager, 1, {})
        gradient = torch.ones(TABLE.shape)
        gradient[7, 2] = torch.nan
        chief.push(gradient)
        there = sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises(NotFiniteError, match=r"'table.weight' on ps:1 is nan at \[7, 2\]") as caught:
            write_checkpoint(chief.client, manager, 2, {})
        assert caught.value.variable == "table.weight"
        assert caught.value.path == str(tmp_path / "ckpt-2")
        way = f"the last good checkpoint is {tmp_path / 'ckpt-1'}: start" if saved else "there is no good checkpoint"
        assert way in str(caught.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == there
        folder = tmp_path / "own"
        folder.mkdir()
        with pytest.raises(NotFiniteError, match=r"'table.weight' on ps:1 is nan at \[7, 2\]"):
            chief.client.save(str(folder))
        assert torch.isnan(chief.values()[7, 2]), "the connection can still be used"


# --- B01: who writes


def ps_of_thread():
    """The ps that this thread serves for, "" if it is no ps's."""
    name = threading.current_thread().name
    return name.split()[0] if name.endswith("serves") else ""


@pytest.fixture(params=[(), ("ps:0",), ("ps:0", "ps:1")], ids="blind: {}".format)
def blind(request, monkeypatch):
    """Some ps tasks that do not see the folder of the chief."""
    sees = handler._sees
    monkeypatch.setattr(handler, "_sees", lambda *args: ps_of_thread() not in request.param and sees(*args))
    return request.param


@pytest.mark.parametrize("lane", ["auto", "tcp"])
def test_b01_what_a_ps_cannot_write_or_read_itself_goes_through_the_chief(tmp_path, monkeypatch, blind, lane):
    tasks = at_work(monkeypatch)
    with LocalCluster(ps=2, workers=1, lane=lane) as cluster:
        chief = Chief(cluster, 4)
        saved = chief.push(torch.randn(TABLE.shape, generator=torch.Generator().manual_seed(0)))
        path = write_checkpoint(chief.client, CheckpointManager(str(tmp_path)), 1, {})
        written = set(tasks)
        tasks.clear()
        chief.push(torch.ones(TABLE.shape))
        chief.client.restore(path)
        read = set(tasks)
        assert torch.equal(chief.values(), saved)
    assert torch.equal(read_values(path)[TABLE.name], saved)
    seeing = {"ps:0", "ps:1"} - set(blind)
    assert written == seeing | ({""} if blind else set())
    assert read == written


def at_work(monkeypatch):
    """Which tasks read and wrote; "" is the chief."""
    found, original = [], CheckpointFolder.carry_out

    def carry_out(folder, step):
        found.append(ps_of_thread())
        original(folder, step)

    monkeypatch.setattr(CheckpointFolder, "carry_out", carry_out)
    return found


def test_a_long_save_is_heard_of_again_and_again(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "WAIT_INTERVAL", 0.0)  # one step of the ps in each round
    rounds, content = [], checkpoints._content
    monkeypatch.setattr(checkpoints, "_content", lambda folder, reply: rounds.append(reply) or content(folder, reply))
    with LocalCluster(ps=2, workers=1) as cluster:
        chief = Chief(cluster, 4)
        saved = chief.push(torch.ones(TABLE.shape))
        path = write_checkpoint(chief.client, CheckpointManager(str(tmp_path)), 1, {})
    assert len(rounds) > 10
    assert torch.equal(read_values(path)[TABLE.name], saved)


def test_a_ps_that_is_lost_during_a_save_is_noticed(tmp_path, monkeypatch):
    with LocalCluster(ps=2, workers=1) as cluster:
        chief = Chief(cluster, 4)
        monkeypatch.setattr(checkpoints, "_content", lambda *_: cluster.servers[1].stop() or b"")
        with pytest.raises(UnavailableError, match="ps:1"):
            write_checkpoint(chief.client, CheckpointManager(str(tmp_path)), 1, {})
    assert latest_checkpoint(str(tmp_path)) is None


def test_a_folder_that_cannot_be_written_is_an_error_of_the_chief(tmp_path, monkeypatch):
    monkeypatch.setattr(handler, "_sees", lambda *_: False)
    with LocalCluster(ps=1, workers=1) as cluster:
        chief = Chief(cluster, 1)
        with pytest.raises(CheckpointError, match="writing the checkpoint file .*gone.* failed"):
            chief.client.save(str(tmp_path / "gone"))
        assert chief.values().shape == TABLE.shape  # the client can be used after that


def test_pushes_go_on_while_a_checkpoint_is_written(tmp_path):
    with LocalCluster(ps=1, workers=2) as cluster:
        chief = Chief(cluster, 1)
        worker = cluster.client("worker:0")
        worker.join(layouts(1, 1))
        worker.open()
        steps, content = [], checkpoints._content

        def push_between(folder, reply):
            steps.append(worker.push_pull(worker.plan([[Part(0, "rule")]], [(0,)]), counts=True).global_step)
            return content(folder, reply)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(client, "WAIT_INTERVAL", 0.0)
            patch.setattr(checkpoints, "_content", push_between)
            path = write_checkpoint(chief.client, CheckpointManager(str(tmp_path)), 0, {})
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 3
    assert set(read_values(path)) == {TABLE.name}


@pytest.mark.parametrize("place", ["file://{}", "memory://{}"])
def test_b01_b06_a_model_dir_may_be_a_url_and_the_next_run_of_another_size(tmp_path, blind, place):
    model_dir = place.format(tmp_path / "run")
    gradient = torch.randn(TABLE.shape, generator=torch.Generator().manual_seed(0))
    with LocalCluster(ps=2, workers=1) as cluster:
        chief = Chief(cluster, 4)
        saved = chief.push(gradient)
        path = write_checkpoint(chief.client, CheckpointManager(model_dir), 1, {})
        expected = chief.push(gradient)
    assert latest_checkpoint(model_dir) == path
    assert inspect_checkpoint(path).variables == [("table.weight", "float32", (10, 4), 160)]
    with LocalCluster(ps=3, workers=1) as cluster:
        chief = Chief(cluster, 2)
        restore_checkpoint(chief.client, path)
        assert torch.equal(chief.values(), saved)
        torch.testing.assert_close(chief.push(gradient), expected)
    CheckpointManager(model_dir, keep_max=1).record(2)  # deletes it
    with pytest.raises(CheckpointError, match="ckpt-1"):
        read_values(path)
