"""The evaluator: which checkpoints it evaluates, when it stops (V20 to V27, V31, Y02, B04). Time moves by hand."""

import logging
import shutil
from pathlib import Path

import pytest

from paramserver.checkpoint.model_dir import INDEX_FILE, CheckpointManager, checkpoint_step, latest_checkpoint
from paramserver.cluster.report import Reporter
from paramserver.errors import CheckpointError, ConfigError
from paramserver.estimator import EvalSpec, Exporter, FinalExporter
from paramserver.estimator.evaluate.evaluator import POLL_INTERVAL, Evaluator


class Run:
    """A model_dir in which a script of saves happens while the evaluator waits. It is also the estimator."""

    def __init__(self, model_dir):
        self.model_dir = str(model_dir)
        self.manager = CheckpointManager(self.model_dir, clock=lambda: self.now)
        self.now = 1000.0
        self.events = []
        self.evaluated = []
        self.exported = []
        self.on_evaluate = lambda step: None
        self.results = lambda step: {"loss": 1.0 / (step + 1), "global_step": step}

    def save(self, step):
        folder = Path(self.manager.temporary_path(step))
        (folder / INDEX_FILE).write_text("{}")
        self.manager.publish(str(folder), step)

    def at(self, seconds, event):
        self.events.append((1000.0 + seconds, event))

    def wait(self, seconds):
        assert 0 < seconds <= POLL_INTERVAL
        self.now += seconds
        while self.events and self.events[0][0] <= self.now:
            self.events.pop(0)[1]()
        assert self.now < 10_000, "the evaluator does not end"

    def latest_checkpoint(self):
        return latest_checkpoint(self.model_dir)

    def evaluate(self, input_fn, steps, hooks, checkpoint_path, name):
        step = checkpoint_step(checkpoint_path)
        self.on_evaluate(step)
        self.evaluated.append((self.now - 1000.0, step))
        return self.results(step)

    def export_model(self, export_path, serving_input_fn, checkpoint_path, assets_extra):
        self.exported.append(checkpoint_step(checkpoint_path))
        return f"{export_path}/1"

    def follow(self, max_steps=None, run_id="", **spec):
        options = {"start_delay_secs": 0, "throttle_secs": 0} | spec
        evaluator = Evaluator(self, EvalSpec(list, **options), max_steps, Reporter("evaluator:0", None))
        evaluator.follow(run_id, wait=self.wait, clock=lambda: self.now)
        return evaluator

    @property
    def steps(self):
        return [step for _, step in self.evaluated]


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run")


class Recorder(Exporter):
    """Writes down how it is called (V25)."""

    name = "recorder"

    def __init__(self):
        self.calls = []

    def export(self, estimator, export_path, checkpoint_path, eval_result, is_the_final_export):
        self.calls.append((export_path, checkpoint_step(checkpoint_path), eval_result["loss"], is_the_final_export))


def test_v20_each_new_checkpoint_is_evaluated_until_max_steps(run):
    for second, step in ((1, 10), (2, 20), (3, 30)):
        run.at(second, lambda step=step: run.save(step))
    assert run.follow(max_steps=30).is_done
    assert run.steps == [10, 20, 30]


def test_v20_the_start_delay_comes_first_and_the_throttle_between(run):
    for second in range(10, 80, 10):
        run.at(second, lambda step=second: run.save(step))
    run.follow(max_steps=60, start_delay_secs=30, throttle_secs=20)
    assert run.evaluated == [(30.0, 30), (50.0, 50), (70.0, 70)]


def test_v21_a_missing_checkpoint_is_warned_of_every_ten_minutes(run, caplog):
    run.at(1300, lambda: run.save(10))
    run.follow(max_steps=10)
    assert [record.levelno for record in caplog.records if "no checkpoint" in record.message] == [logging.WARNING] * 3


def test_v21_the_same_checkpoint_is_evaluated_once(run):
    run.save(10)
    run.at(50, lambda: run.save(20))
    run.follow(max_steps=20)
    assert run.steps == [10, 20]


def test_v22_a_checkpoint_beyond_max_steps_is_the_last(run):
    run.save(23)
    run.follow(max_steps=20)
    assert run.steps == [23]


def test_v23_v25_exporters_are_told_of_every_evaluation_and_of_the_last(run):
    exporter = Recorder()
    run.save(10)
    run.at(1, lambda: run.save(20))
    run.follow(max_steps=20, exporters=[exporter, FinalExporter("final")])
    path = str(Path(run.model_dir, "export", "recorder"))
    assert exporter.calls == [(path, 10, 1 / 11, False), (path, 20, 1 / 21, True)]
    assert run.exported == [20]


def test_v24_without_a_throttle_it_looks_now_and_then_and_not_all_the_time(run):
    """`Run.wait` checks that every wait is one, and no longer than the interval."""
    run.save(10)
    run.at(30, lambda: run.save(20))
    run.follow(max_steps=20, throttle_secs=0)
    assert run.evaluated == [(0.0, 10), (30.0, 20)]


@pytest.mark.parametrize(
    ("results", "error", "message"),
    [
        ({}, ConfigError, "no metrics"),
        ([1], TypeError, "got a list"),
        ({"loss": 1.0}, ConfigError, "no 'global_step', only loss"),
    ],
)
def test_v26_what_an_estimator_returns_is_checked(run, results, error, message):
    run.save(10)
    run.results = lambda step: results
    with pytest.raises(error, match=message):
        run.follow(max_steps=10)


def test_y02_v31_a_run_that_ends_early_ends_the_evaluator_with_its_last_checkpoint(run):
    exporter = Recorder()
    run.save(10)

    def end():
        run.save(15)
        run.manager.mark_finished("mine")

    run.at(5, end)
    run.follow(max_steps=1000, run_id="mine", throttle_secs=600, exporters=exporter)
    assert run.evaluated == [(0.0, 10), (5.0, 15)]
    assert [call[3] for call in exporter.calls] == [False, True]


def test_y02_exporters_learn_of_the_end_after_the_last_evaluation(run):
    """The last checkpoint is there a moment before the run says that it has ended."""
    run.save(15)
    run.at(5, lambda: run.manager.mark_finished("mine"))
    evaluator = run.follow(run_id="mine", exporters=FinalExporter("final"))
    assert run.steps == [15]
    assert run.exported == [15]
    assert evaluator.last.is_final


def test_v31_the_end_of_an_older_run_is_none(run):
    run.save(10)
    run.manager.mark_finished("older")
    run.at(5, lambda: run.save(20))
    run.at(6, lambda: run.manager.mark_finished("mine"))
    run.follow(max_steps=1000, run_id="mine")
    assert run.steps == [10, 20]


def test_v31_without_a_run_id_the_time_tells_an_older_end_from_ours(run):
    run.save(10)
    run.now = 900.0
    run.manager.mark_finished("")
    run.now = 1000.0
    run.at(5, lambda: run.manager.mark_finished(""))
    run.follow(max_steps=1000)
    assert run.now >= 1005


def test_a_run_that_ends_without_a_checkpoint_ends_the_evaluator(run):
    run.at(5, lambda: run.manager.mark_finished("mine"))
    assert run.follow(run_id="mine").last is None


def test_b04_a_checkpoint_that_is_deleted_meanwhile_is_no_error(run):
    run.save(10)

    def lose(step):
        if step == 10:
            run.save(20)
            shutil.rmtree(run.manager.save_path(10))
            raise CheckpointError("no file", "")

    run.on_evaluate = lose
    run.follow(max_steps=20)
    assert run.steps == [20]


def test_b04_a_checkpoint_that_is_broken_is_one(run):
    run.save(10)

    def fail(step):
        raise CheckpointError("is cut short", "")

    run.on_evaluate = fail
    with pytest.raises(CheckpointError, match="is cut short"):
        run.follow(max_steps=20)
