"""A partitioned variable in a checkpoint of real ps tasks: one tensor, for any partitioning (B06, V2-05, P07)."""

from pathlib import Path

import pytest
import torch
from torch import nn

from paramserver.arena import ArenaLayout, Shard, VariableSpec
from paramserver.estimator.checkpoint import inspect_checkpoint, load_model, read_values, write_checkpoint
from paramserver.estimator.checkpoint_state import CheckpointManager, checkpoint_step
from paramserver.placement import FixedShards, RoundRobin, row_ranges
from paramserver.rules import describe
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
        self.client.push_pull(parts, [(0,) * len(ps_parts) for ps_parts in parts], counts=True)
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
