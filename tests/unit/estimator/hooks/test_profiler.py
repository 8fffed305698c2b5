"""ProfilerHook: which steps are profiled, where the traces go, and what is in them."""

import json
import threading

import pytest
import torch

from paramserver import CentralStorageStrategy, get_replica_context
from paramserver.checkpoint.storage import join, storage_of
from paramserver.estimator import ProfilerHook, RunValues
from paramserver.estimator.hooks.hook import HookRunner


class TrainingRun:
    """A session whose step multiplies matrices."""

    task = "worker:1"

    def __init__(self, model_dir, *, ends_at, start=0, is_chief=True, step=lambda: torch.ones(8, 8) @ torch.ones(8, 8)):
        self.model_dir, self.global_step, self.is_chief = str(model_dir), start, is_chief
        self._ends_at, self._work = ends_at, step

    def should_stop(self):
        return self.global_step >= self._ends_at

    def step(self):
        self.global_step += 1
        self._work()
        return RunValues(loss=0.5, global_step=self.global_step, staleness=0)


def train(hook, session):
    HookRunner([hook]).run(lambda: session, TrainingRun.step)


def names(folder):
    return sorted(path.name for path in folder.glob("*"))


def events(path):
    """What a trace says was done: name and thread of each operator. Perfetto and TensorBoard read this form."""
    trace = json.loads(path.read_text())
    return [(event["name"], event["tid"]) for event in trace["traceEvents"] if event.get("cat") == "cpu_op"]


def test_one_step_in_each_interval_after_the_first_is_profiled_into_model_dir(tmp_path):
    train(ProfilerHook(save_steps=2), TrainingRun(tmp_path, start=100, ends_at=105))
    assert names(tmp_path) == ["worker-1.102.pt.trace.json", "worker-1.104.pt.trace.json"]
    operators = [name for name, _ in events(tmp_path / "worker-1.104.pt.trace.json")]
    assert operators.count("aten::matmul") == 1, "one step alone"


def test_n12_the_first_step_of_a_task_is_never_profiled(tmp_path):
    hook = ProfilerHook(save_steps=1)
    for start in (0, 5):
        train(hook, TrainingRun(tmp_path / str(start), start=start, ends_at=start + 3))
        written = [f"worker-1.{start + step}.pt.trace.json" for step in (2, 3)]
        assert names(tmp_path / str(start)) == written


def test_seconds_between_two_traces(tmp_path):
    now = iter(range(0, 100, 3))
    hook = ProfilerHook(save_secs=5, clock=lambda: next(now))
    train(hook, TrainingRun(tmp_path, ends_at=3))
    assert names(tmp_path) == ["worker-1.2.pt.trace.json"]


def test_b05_in_model_dir_only_the_chief_writes_elsewhere_every_task(tmp_path):
    train(ProfilerHook(save_steps=1), TrainingRun(tmp_path / "run", ends_at=3, is_chief=False))
    assert not (tmp_path / "run").exists()
    hook = ProfilerHook(save_steps=1, output_dir=str(tmp_path / "traces"))
    train(hook, TrainingRun(tmp_path / "run", ends_at=2, is_chief=False))
    assert names(tmp_path / "traces") == ["worker-1.2.pt.trace.json"]
    assert not (tmp_path / "run").exists()


def test_a_trace_holds_what_every_replica_does(tmp_path):
    strategy = CentralStorageStrategy(["cpu:0", "cpu:1"])

    def on_a_replica():
        return [torch.sin, torch.cos][get_replica_context().index](torch.ones(3))

    train(ProfilerHook(save_steps=1), TrainingRun(tmp_path, ends_at=2, step=lambda: strategy.run(on_a_replica)))
    found = dict(events(tmp_path / "worker-1.2.pt.trace.json"))
    assert found["aten::sin"] != found["aten::cos"]


def test_options_reach_the_profiler(tmp_path):
    hook = ProfilerHook(save_steps=1, record_shapes=True, profile_memory=True, with_stack=True)
    train(hook, TrainingRun(tmp_path, ends_at=2))
    trace = json.loads((tmp_path / "worker-1.2.pt.trace.json").read_text())
    assert (trace["record_shapes"], trace["profile_memory"], trace["with_stack"]) == (1, 1, 1)


def test_a_step_that_fails_is_not_written_and_leaves_no_profile_running(tmp_path):
    def fail():
        raise ConnectionError

    hook = ProfilerHook(save_steps=1)
    with pytest.raises(ConnectionError):
        train(hook, TrainingRun(tmp_path, ends_at=2, step=fail))
    assert not torch.autograd._profiler_enabled()
    assert names(tmp_path) == []
    train(hook, TrainingRun(tmp_path, ends_at=2))
    assert names(tmp_path) == ["worker-1.2.pt.trace.json"]
    assert threading.active_count() == 1


@pytest.mark.parametrize("url", ["file://{}", "memory://{}"])
def test_a_trace_goes_to_a_url(tmp_path, caplog, url):
    caplog.set_level("INFO")
    run, traces = url.format(tmp_path / "run"), url.format(tmp_path / "traces")
    train(ProfilerHook(save_steps=1), TrainingRun(run, ends_at=2))
    train(ProfilerHook(save_steps=1, output_dir=traces), TrainingRun(run, ends_at=2, is_chief=False))
    for place in (run, traces):
        assert storage_of(place).names() == ["worker-1.2.pt.trace.json"]
        assert json.loads(storage_of(place).read("worker-1.2.pt.trace.json"))["traceEvents"]
        assert f"wrote a profile of step 2 to {join(place)}/worker-1.2.pt.trace.json" in caplog.text
