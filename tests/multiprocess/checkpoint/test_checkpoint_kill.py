"""A run that is killed at any moment leaves a whole checkpoint, and goes on from it (B01, B02).

A program that has imported everything, and has one thread, forks a child again and again. Each child is a chief with
two ps tasks, restores the latest checkpoint, trains, and writes a checkpoint after every step, until it is killed at a
random moment. The values and slots of a step follow from its number, so every checkpoint is checked to the last bit.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.patience import patience

pytestmark = [pytest.mark.multiprocess, pytest.mark.whole_program]

KILLS = 50

PROGRAM = """
import os
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")  # before numpy starts threads
import itertools, json, random, signal, sys, time, traceback
from pathlib import Path
import torch
from paramserver.checkpoint.index import SLOTS_INDEX, read_index
from paramserver.checkpoint.reading import read_tensors
from paramserver.layout.arena import ArenaLayout
from paramserver.layout.blocks import BLOCK
from paramserver.layout.rules import describe
from paramserver.layout.variables import Shard, VariableSpec
from paramserver.distribute.checkpoints import write_checkpoint
from paramserver.estimator.checkpoint import read_values
from paramserver.checkpoint.model_dir import CheckpointManager, checkpoint_step, checkpoint_to_restore, read_state
from paramserver.testing.local_cluster import LocalCluster
from paramserver.wire.messages import Part

ROWS = BLOCK + 1000
RULE = describe(torch.optim.SGD([torch.zeros(1)], lr=1.0, momentum=1.0), 0)
MODEL = [
    [ArenaLayout("float32", RULE, (
        VariableSpec(f"table/part_{index}", (ROWS,), "float32", Shard("table", index, index * ROWS, 2 * ROWS)),
        VariableSpec(f"bias{index}", (7,), "float32"),
    ))]
    for index in (0, 1)
]

def train(model_dir, tell):
    torch.set_num_threads(1)  # makes anew, while there is one thread, what the fork has broken
    manager = CheckpointManager(model_dir, keep_max=2)
    manager.remove_leftovers()
    with LocalCluster(ps=2, workers=1) as cluster:
        client = cluster.client("chief:0")
        client.create(MODEL)
        memory = client.open()
        checkpoint, start = checkpoint_to_restore(model_dir), 0
        if checkpoint is not None:
            client.restore(checkpoint)
            start = checkpoint_step(checkpoint)
        client.mark_ready(start)
        client.pull([[0], [0]])
        for held, (layout,) in zip(memory, MODEL):
            held.gradients[0].fill_(-1.0)
            for view in layout.views(held.values[0]):
                assert (view == value_at(start)).all(), f"restored {view} at step {start}"
        tell("restored", start)
        for step in itertools.count(start + 1):
            client.push_pull(client.plan([[Part(0, "rule")]] * 2, [(0,)] * 2), counts=True)
            write_checkpoint(client, manager, step, {})
            tell("saved", step)

def value_at(step):
    return step * (step + 1) / 2

def check(model_dir, saved):
    '''The latest checkpoint is whole, and as new as the last one that a chief was told of; its step.'''
    state = read_state(model_dir)
    if state is None or state.latest is None:
        assert saved == 0, f"step {saved} was saved, and there is no checkpoint"
        return 0
    for name in state.retained:
        folder = Path(model_dir, name)
        step, values = checkpoint_step(name), read_values(str(folder))
        assert values.keys() == {"table", "bias0", "bias1"} and values["table"].shape == (2 * ROWS,)
        slots = dict(read_tensors(folder, read_index(folder / SLOTS_INDEX)))
        assert slots.keys() == {f"{name}/momentum_buffer" for name in values}
        assert all((value == value_at(step)).all() for value in values.values()), (name, values)
        assert all((slot == -step).all() for slot in slots.values()), (name, slots)
    latest = checkpoint_step(state.latest)
    assert latest >= saved, f"step {saved} was saved, and the latest checkpoint is of step {latest}"
    return latest

def start_child(model_dir):
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would be missing after a fork"
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    try:
        train(model_dir, lambda what, step: os.write(writing, f"{what} {step}\\n".encode()))
    except BaseException:
        traceback.print_exc()
    os._exit(1)

def kill_once(model_dir, words, delay):
    pid, reading = start_child(model_dir)
    told = b""
    while told.count(b"\\n") < words and (more := os.read(reading, 4096)):
        told += more
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    while more := os.read(reading, 65536):
        told += more
    os.close(reading)
    assert os.WIFSIGNALED(status), "the child ended by itself"
    return [line.split() for line in told.decode().splitlines()]

torch.set_num_threads(1)
model_dir, kills, chance = sys.argv[1], int(sys.argv[2]), random.Random(0)
saved = 0
for round in range(kills):
    words = chance.randint(1, 4) if round % 5 else 0
    told = kill_once(model_dir, words, chance.uniform(0.0, 0.08))
    saved = max([saved, *(int(step) for what, step in told if what == "saved")])
    leftovers = len(list(Path(model_dir).glob("*.tmp-*")))
    print(json.dumps({"latest": check(model_dir, saved), "told": told, "leftovers": leftovers}), flush=True)
"""


def test_b01_b02_a_run_that_is_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, tmp_path, str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience(100), check=False)
    assert (done.returncode, done.stderr) == (0, "")
    rounds = [json.loads(line) for line in done.stdout.splitlines()]
    steps = [each["latest"] for each in rounds]
    assert len(steps) == KILLS
    assert steps == sorted(steps)
    restored = [int(step) for each in rounds for what, step in each["told"] if what == "restored"]
    assert all(step in (0, *steps) for step in restored)
    assert steps[-1] > KILLS / 2, "the runs went on"
    assert sum(each["leftovers"] > 0 for each in rounds) > KILLS / 5, "kills fell into saves"
