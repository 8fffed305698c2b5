"""The hooks that write into model_dir: summaries (N10, Q11, B05) and checkpoints (N08, Q09)."""

import errno
import os

import pytest
import torch

from paramserver import summary
from paramserver.client.client import PushTimes
from paramserver.distribute.bound.step_times import StepTimes
from paramserver.errors import CheckpointError, NotFiniteError, UnavailableError
from paramserver.estimator import CheckpointSaverHook, CheckpointSaverListener, SummarySaverHook, TrainingHook
from paramserver.estimator.hooks.hook import HookRunner, RunContext, RunValues


class Clock:
    """Moves by hand."""

    now = 100.0

    def __call__(self):
        return self.now


class TrainingRun:
    """A session whose every step is one global step; others may move it by setting global_step."""

    task = "worker:1"
    model_dir = "run"

    def __init__(self, start=0, ends_at=None, is_chief=True):
        self.global_step = start
        self.is_chief = is_chief
        self.saved = []
        self._ends_at = ends_at

    def save(self):
        self.saved.append(self.global_step)
        return f"run/ckpt-{self.global_step}"

    def statistics(self):
        steps = self.global_step
        return StepTimes(steps, 0.25 * steps, 0.0, 0.125 * steps, (PushTimes("ps:0", 0.0, 0.125 * steps, 0.0),))

    def should_stop(self):
        return self._ends_at is not None and self.global_step >= self._ends_at

    def step(self):
        self.global_step += 1
        return RunValues(loss=torch.tensor(0.5), global_step=self.global_step, staleness=2)


class Listener(CheckpointSaverListener):
    """Writes down its calls; stops the training at one step."""

    def __init__(self, log, stop_at=None):
        self.log, self.stop_at = log, stop_at

    def begin(self):
        self.log.append("begin")

    def before_save(self, session, step):
        self.log.append(f"before {step}")

    def after_save(self, session, step):
        self.log.append(f"after {step}")
        return step == self.stop_at

    def end(self, session, step):
        self.log.append(f"end {step}")


class Writer:
    """Keeps its points, those that tell times apart from the others."""

    def __init__(self):
        self.points, self.times, self.distributions, self.flushed = [], [], [], 0

    def scalar(self, name, value, step):
        (self.times if name.startswith("milliseconds/") else self.points).append((name, value, step))

    def histogram(self, name, values, step):
        self.distributions.append((name, values.tolist(), step))

    def flush(self):
        self.flushed += 1


def train(*hooks, session=None, step=TrainingRun.step):
    runner = HookRunner(hooks)
    return runner.run(lambda: session or TrainingRun(ends_at=3), step)


def fail(*_):
    raise ConnectionError("ps:0 is gone")


def see(hook, session, *steps, loss=0.5):
    """Show a hook steps of a session; whether it asked for a stop."""
    context = RunContext(session)
    for step in steps:
        session.global_step = max(step, session.global_step)
        hook.after_run(context, RunValues(loss, step, 0))
    return context.stop_requested


def test_n10_summaries_at_the_first_step_then_when_due_and_flushed_at_the_end():
    clock, writer = Clock(), Writer()
    hook = SummarySaverHook(writer, save_steps=2, clock=clock)

    def step(session):
        clock.now += 0.5
        return session.step()

    train(hook, session=TrainingRun(ends_at=3), step=step)
    assert writer.points == [("loss", 0.5, 1), ("loss", 0.5, 3), ("global_step/sec", 2.0, 3)]
    assert writer.flushed == 1


def test_summaries_tell_where_the_time_of_the_steps_since_the_last_one_has_gone():
    writer = Writer()
    train(SummarySaverHook(writer, save_steps=2), session=TrainingRun(start=10, ends_at=13))
    assert [point for point in writer.times if point[2] == 13] == [
        ("milliseconds/computing", 250.0, 13),
        ("milliseconds/reducing", 0.0, 13),
        ("milliseconds/blocked", 125.0, 13),
        ("milliseconds/ps:0/sending", 0.0, 13),
        ("milliseconds/ps:0/waiting", 125.0, 13),
        ("milliseconds/ps:0/applying", 0.0, 13),
    ]


def test_n10_summaries_by_seconds():
    clock, writer = Clock(), Writer()

    def step(session):
        clock.now += 1
        return session.step()

    train(SummarySaverHook(writer, save_secs=2, clock=clock), session=TrainingRun(ends_at=6), step=step)
    assert [step for name, _, step in writer.points if name == "loss"] == [1, 4]


def test_n10_each_summary_has_the_staleness_of_all_pushes_since_the_last_one():
    writer, staleness = Writer(), iter([0, 3, 1, 1, 2])

    def step(session):
        return session.step()._replace(staleness=next(staleness))

    train(SummarySaverHook(writer, save_steps=3), session=TrainingRun(ends_at=5), step=step)
    name, values, step = writer.distributions[1]
    assert writer.distributions[0] == ("staleness", [0], 1)
    assert (name, sorted(values), step) == ("staleness", [1, 1, 3], 4)


def recorded_in(session, value=7.0, name="norm"):
    """A step whose model records a number."""
    summary.scalar(name, value)
    return session.step()


def test_n10_what_the_model_records_is_written_in_the_steps_that_are_due_with_the_step_of_the_update():
    writer, session = Writer(), TrainingRun(10, ends_at=13)
    train(SummarySaverHook(writer, save_steps=2), session=session, step=recorded_in)
    assert [point for point in writer.points if point[0] == "norm"] == [("norm", 7.0, 11), ("norm", 7.0, 13)]
    recorded_in(session)
    assert len(writer.points) == 5, "after the training nobody records"


def test_q11_the_loss_is_written_if_the_model_does_not_record_it():
    writer = Writer()
    hook = SummarySaverHook(writer, save_steps=1)
    train(hook, session=TrainingRun(ends_at=1), step=lambda session: recorded_in(session, 0.25, "loss"))
    assert writer.points == [("loss", 0.25, 1)]


def test_n10_a_step_that_fails_leaves_no_recording_behind():
    writer = Writer()

    def step(session):
        summary.scalar("norm", 1.0)
        fail()

    hook = SummarySaverHook(writer, save_steps=1)
    with pytest.raises(ConnectionError):
        train(hook, step=step)
    summary.scalar("norm", 2.0)
    train(hook, session=TrainingRun(ends_at=1), step=lambda session: recorded_in(session, 3.0))
    assert writer.points == [("loss", 0.5, 1), ("norm", 3.0, 1)]


def test_b05_w08_a_worker_that_is_not_the_chief_writes_no_summary():
    writer = Writer()
    hook = SummarySaverHook(writer, save_steps=1)
    train(hook, session=TrainingRun(ends_at=3, is_chief=False), step=recorded_in)
    assert writer.points == writer.distributions == []


@pytest.mark.parametrize(
    ("start", "end", "saved"), [(0, 5, [0, 2, 4, 5]), (4, 8, [4, 6, 8]), (3, 3, [3]), (0, 1, [0, 1])]
)
def test_n08_q09_saves_at_the_start_when_due_and_the_last_step_once(start, end, saved):
    session = train(CheckpointSaverHook(save_steps=2), session=TrainingRun(start, end))
    assert session.saved == saved


@pytest.mark.parametrize("start", [0, 2, 3])
def test_n08_v22_the_last_checkpoint_holds_what_others_pushed_after_the_step_to_stop_at(start):
    """An evaluator that sees a checkpoint of that step takes it for the last (V22)."""
    hook, session = CheckpointSaverHook(save_steps=1), TrainingRun(start, ends_at=3)
    hook.after_create_session(session)
    see(hook, session, 3)
    session.global_step = 4
    hook.end(session)
    assert [step for step in session.saved if step >= 3] == [4]


def test_n08_saves_by_seconds():
    clock = Clock()
    hook = CheckpointSaverHook(save_secs=10, clock=clock)

    def step(session):
        clock.now += 4
        return session.step()

    assert train(hook, session=TrainingRun(ends_at=7), step=step).saved == [0, 3, 6, 7]


def test_n08_the_steps_of_other_workers_count():
    hook, session = CheckpointSaverHook(save_steps=10), TrainingRun()
    hook.after_create_session(session)
    see(hook, session, 9, 25, 26, 34, 35)
    assert session.saved == [0, 25, 35]


def test_n08_listeners():
    log = []
    train(CheckpointSaverHook(save_steps=2, listeners=[Listener(log)]), session=TrainingRun(ends_at=3))
    saves = [f"{when} {step}" for step in (0, 2, 3) for when in ("before", "after")]
    assert log == ["begin", *saves, "end 3"]
    with pytest.raises(TypeError, match=r"listeners\[0\]: expected an instance of CheckpointSaverListener"):
        CheckpointSaverHook(save_steps=2, listeners=[TrainingHook()])


@pytest.mark.parametrize(("stop_at", "end"), [(0, 1), (2, 2)])
def test_n08_a_listener_can_stop_the_training_and_the_others_are_still_told(stop_at, end):
    logs = [], []
    listeners = [Listener(logs[0], stop_at), Listener(logs[1])]
    session = train(CheckpointSaverHook(save_steps=2, listeners=listeners), session=TrainingRun())
    assert session.global_step == end
    assert logs[0] == logs[1]


# --- storage that fails


class FullDisk(TrainingRun):
    """A session whose checkpoints of some steps cannot be written."""

    def __init__(self, fails, error=None, **options):
        super().__init__(**options)
        self._fails = set(fails)
        self._error = error or CheckpointError("run: cannot be written: No space left on device", "run")

    def save(self):
        if self.global_step in self._fails:
            raise self._error
        return super().save()


def test_a_checkpoint_that_cannot_be_written_is_loud_and_tried_again_when_the_next_is_due(caplog):
    hook = CheckpointSaverHook(save_steps=2)
    assert train(hook, session=FullDisk({0, 2, 4}, ends_at=9)).saved == [6, 8, 9]
    assert hook.failures == 3
    assert [record.levelname for record in caplog.records if "no checkpoint" in record.message] == ["ERROR"] * 3
    assert caplog.messages[1] == (
        "no checkpoint of step 2: run: cannot be written: No space left on device; the training goes on, and tries "
        "again when the next is due (failure 2)"
    )


def test_listeners_hear_of_no_checkpoint_that_was_not_written():
    log = []
    train(CheckpointSaverHook(save_steps=2, listeners=[Listener(log)]), session=FullDisk({2}, ends_at=3))
    assert log == ["begin", "before 0", "after 0", "before 2", "before 3", "after 3", "end 3"]


def test_only_a_last_checkpoint_that_cannot_be_written_ends_the_run():
    with pytest.raises(CheckpointError, match="No space left"):
        train(CheckpointSaverHook(save_steps=2), session=FullDisk({3}, ends_at=3))


def test_the_last_step_is_saved_at_the_end_if_that_failed_before():
    hook, session = CheckpointSaverHook(save_steps=2), FullDisk({2})
    hook.after_create_session(session)
    see(hook, session, 2)
    session._fails.clear()
    hook.end(session)
    assert session.saved == [0, 2]


@pytest.mark.parametrize(
    "error", [NotFiniteError("'w' is not finite", "run", "w"), UnavailableError("ps:0 is gone", "ps:0")]
)
def test_other_errors_are_no_fault_of_the_storage(error):
    with pytest.raises(type(error)):
        train(CheckpointSaverHook(save_steps=2), session=FullDisk({2}, error, ends_at=3))


class FullWriter(Writer):
    """Has no room for the points of some steps, nor at its end."""

    def __init__(self, fails):
        super().__init__()
        self._fails = fails

    def scalar(self, name, value, step):
        if step in self._fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().scalar(name, value, step)

    def flush(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_summaries_that_cannot_be_written_are_loud_and_tried_again_when_the_next_are_due(caplog):
    writer = FullWriter({1, 3})
    hook = SummarySaverHook(writer, save_steps=2)
    train(hook, session=TrainingRun(ends_at=6))
    assert [step for name, _, step in writer.points if name == "loss"] == [5]
    assert hook.failures == 3
    first, second, last = caplog.messages
    assert first == (
        "summaries of step 1 cannot be written, and the run goes on without them: [Errno 28] No space left on device"
    )
    assert second.startswith("summaries of step 3")
    assert last.startswith("summaries of step 6")
