"""Hooks: when they are called (N01-N03, Q11, Q12), and what the ready-made ones do (N06-N11)."""

import logging

import pytest
import torch

from paramserver.errors import ConfigError
from paramserver.estimator.basic_hooks import (
    CheckpointSaverHook,
    CheckpointSaverListener,
    LoggingHook,
    NanLossDuringTrainingError,
    NanLossHook,
    SecondOrStepTimer,
    StepCounterHook,
    StopAtStepHook,
    SummarySaverHook,
)
from paramserver.estimator.hooks import HookRunner, RunContext, RunValues, TrainingHook, order_hooks


class Clock:
    """Moves by hand."""

    now = 100.0

    def __call__(self):
        return self.now


class Session:
    """A session whose every step is one global step; others may move it by setting global_step."""

    is_chief = True
    task = "worker:1"
    model_dir = "run"

    def __init__(self, start=0, ends_at=None):
        self.global_step = start
        self.saved = []
        self._ends_at = ends_at

    def save(self):
        self.saved.append(self.global_step)
        return f"run/ckpt-{self.global_step}"

    def should_stop(self):
        return self._ends_at is not None and self.global_step >= self._ends_at

    def step(self):
        self.global_step += 1
        return RunValues(loss=torch.tensor(0.5), global_step=self.global_step, staleness=2)


class Recorder(TrainingHook):
    """Writes down its calls."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def begin(self):
        self.log.append(f"{self.name}.begin")

    def after_create_session(self, session):
        self.log.append(f"{self.name}.created")

    def before_run(self, context):
        self.log.append(f"{self.name}.before")

    def after_run(self, context, values):
        self.log.append(f"{self.name}.after")

    def end(self, session):
        self.log.append(f"{self.name}.end")


class StopNow(TrainingHook):
    """Stops at the first step."""

    def after_run(self, context, values):
        context.request_stop()


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
    """Keeps its points."""

    def __init__(self):
        self.points, self.flushed = [], 0

    def scalar(self, tag, value, step):
        self.points.append((tag, value, step))

    def flush(self):
        self.flushed += 1


def train(*hooks, session=None, step=Session.step):
    runner = HookRunner(hooks)
    return runner.run(lambda: session or Session(ends_at=3), step)


def see(hook, session, *steps, loss=0.5):
    """Show a hook steps of a session; whether it asked for a stop."""
    context = RunContext(session)
    for step in steps:
        session.global_step = max(step, session.global_step)
        hook.after_run(context, RunValues(loss, step, 0))
    return context.stop_requested


# The order.


def test_n01_order_of_calls():
    log = []
    a, b = Recorder("a", log), Recorder("b", log)

    def create():
        log.append("create")
        return Session(ends_at=2)

    def step(session):
        log.append("step")
        return session.step()

    HookRunner([a, b]).run(create, step)
    one_step = ["a.before", "b.before", "step", "a.after", "b.after"]
    start = ["a.begin", "b.begin", "create", "a.created", "b.created"]
    assert log == [*start, *one_step, *one_step, "a.end", "b.end"]


def test_n01_q11_q12_order_of_hooks():
    chief, user, nan = TrainingHook(), TrainingHook(), NanLossHook()
    parts = {"chief_only": [chief], "user": [user], "last": [nan]}
    assert order_hooks(is_chief=True, **parts) == (chief, user, nan)
    assert order_hooks(is_chief=False, **parts) == (user, nan)


def test_n02_a_requested_stop_is_clean_and_all_hooks_see_the_step():
    log = []
    session = train(StopNow(), Recorder("a", log), session=Session())
    assert session.global_step == 1
    assert log[-2:] == ["a.after", "a.end"]


def test_n02_the_end_of_the_input_is_clean():
    log = []
    batches = iter([1, 2])

    def step(session):
        next(batches)
        return session.step()

    assert train(Recorder("a", log), session=Session(), step=step).global_step == 2
    assert log[-2:] == ["a.before", "a.end"]


def test_n02_after_another_exception_end_is_not_called():
    log = []

    def step(session):
        raise ConnectionError("ps:0 is gone")

    with pytest.raises(ConnectionError, match="ps:0"):
        train(Recorder("a", log), step=step)
    assert log[-1] == "a.before"


def test_n03_no_step_after_a_stop():
    runner = HookRunner([StopNow()])
    session = Session()
    with pytest.raises(RuntimeError, match="before its session was created"):
        runner.step(session.step)
    runner.begin()
    runner.after_create_session(session)
    runner.step(session.step)
    assert runner.stop_requested
    with pytest.raises(RuntimeError, match="worker:1 after a hook requested a stop"):
        runner.step(session.step)
    assert session.global_step == 1


def test_n04_a_recreated_session_is_announced_again_but_begin_is_not():
    log = []
    runner = HookRunner([Recorder("a", log)])
    runner.begin()
    runner.after_create_session(Session())
    runner.after_create_session(Session())
    assert log == ["a.begin", "a.created", "a.created"]


def test_hooks_that_override_nothing_do_nothing():
    assert train(TrainingHook(), CheckpointSaverHook(save_steps=9, listeners=[CheckpointSaverListener()]))


# The ready-made hooks.


@pytest.mark.parametrize(
    "make",
    [
        SecondOrStepTimer,
        lambda **limits: CheckpointSaverHook(
            **{name.replace("every", "save"): value for name, value in limits.items()}
        ),
    ],
)
def test_n06_n08_exactly_one_limit(make):
    with pytest.raises(ConfigError, match=r"exactly one of .*, got none"):
        make()
    with pytest.raises(ConfigError, match=r"exactly one of .*, got both"):
        make(every_secs=1, every_steps=1)
    with pytest.raises(ConfigError, match="expected a positive number, got 0"):
        make(every_steps=0)


def test_n06_timer_by_steps():
    clock = Clock()
    timer = SecondOrStepTimer(every_steps=3, clock=clock)
    assert timer.should_trigger_for_step(7)
    assert timer.update_last_triggered_step(7) == (None, None)
    assert [timer.should_trigger_for_step(step) for step in (7, 8, 9, 10, 11)] == [False] * 3 + [True] * 2
    clock.now += 2
    assert timer.update_last_triggered_step(11) == (2, 4)
    assert timer.last_triggered_step == 11


def test_n06_timer_by_seconds():
    clock = Clock()
    timer = SecondOrStepTimer(every_secs=5, clock=clock)
    timer.update_last_triggered_step(1)
    clock.now += 4.9
    assert not timer.should_trigger_for_step(2)
    clock.now += 0.2
    assert timer.should_trigger_for_step(2)
    assert not timer.should_trigger_for_step(1)


@pytest.mark.parametrize("limits", [{}, {"num_steps": 1, "last_step": 1}])
def test_n07_stop_at_step_takes_exactly_one_limit(limits):
    with pytest.raises(ConfigError, match="StopAtStepHook: expected exactly one of num_steps and last_step"):
        StopAtStepHook(**limits)


@pytest.mark.parametrize(
    ("limits", "start", "end"), [({"num_steps": 3}, 10, 13), ({"last_step": 12}, 10, 12)]
)
def test_n07_steps_count_from_the_restored_step(limits, start, end):
    assert train(StopAtStepHook(**limits), session=Session(start)).global_step == end


def test_n07_num_steps_do_not_start_anew_with_a_recreated_session():
    hook = StopAtStepHook(num_steps=3)
    hook.after_create_session(Session(10))
    hook.after_create_session(Session(11))
    assert hook.last_step == 13


def test_n07_the_steps_of_other_workers_count():
    hook = StopAtStepHook(last_step=5)
    session = Session()
    assert not see(hook, session, 4)
    session.global_step = 5
    assert see(hook, session, 4)


def test_n09_the_rate_is_that_of_all_workers(caplog):
    caplog.set_level(logging.INFO)
    clock = Clock()
    hook = StepCounterHook(every_n_steps=10, clock=clock)
    hook.after_create_session(Session(100))
    clock.now += 2
    see(hook, Session(), 105)
    assert hook.steps_per_second is None
    see(hook, Session(), 140)
    assert hook.steps_per_second == 20
    assert caplog.messages == ["global_step/sec: 20"]


def test_n09_a_step_that_stands_still_is_warned_about_five_times(caplog):
    hook = StepCounterHook(every_n_secs=1, every_n_steps=None, clock=Clock())
    see(hook, Session(), *[7] * 1000)
    assert len(caplog.messages) == 5
    assert "worker:1 made 20 steps while the global step stayed at 7" in caplog.messages[0]


@pytest.mark.parametrize(("at_end", "logged"), [(False, [1, 4]), (True, [1, 4, 5])])
def test_n11_logging_counts_local_steps(caplog, at_end, logged):
    caplog.set_level(logging.INFO)
    train(LoggingHook(3, at_end=at_end, clock=Clock()), session=Session(ends_at=5))
    assert [message.partition(" (")[0] for message in caplog.messages] == [
        f"loss = 0.5, step = {step}" for step in logged
    ]


def test_n11_q11_a_nan_loss_is_an_error_after_the_users_hooks():
    log = []

    def step(session):
        return session.step()._replace(loss=torch.tensor(float("nan")))

    with pytest.raises(
        NanLossDuringTrainingError, match="loss of worker:1 is NaN at global step 1"
    ) as caught:
        train(Recorder("user", log), NanLossHook(), step=step)
    assert (caught.value.task, caught.value.global_step) == ("worker:1", 1)
    assert log[-1] == "user.after"


def test_n11_a_nan_loss_may_just_stop(caplog):
    assert see(NanLossHook(fail_on_nan_loss=False), Session(), 1, loss=float("nan"))
    assert "training stops" in caplog.text
    assert not see(NanLossHook(), Session(), 1, loss=float("inf"))


def test_n10_summaries_at_the_first_step_then_when_due_and_flushed_at_the_end():
    clock, writer = Clock(), Writer()
    hook = SummarySaverHook(writer, save_steps=2, clock=clock)

    def step(session):
        clock.now += 0.5
        return session.step()

    train(hook, session=Session(ends_at=3), step=step)
    first = [("loss", 0.5, 1), ("staleness", 2, 1)]
    assert writer.points == [*first, ("loss", 0.5, 3), ("staleness", 2, 3), ("global_step/sec", 2.0, 3)]
    assert writer.flushed == 1


@pytest.mark.parametrize(
    ("start", "end", "saved"), [(0, 5, [0, 2, 4, 5]), (4, 8, [4, 6, 8]), (3, 3, [3]), (0, 1, [0, 1])]
)
def test_n08_q09_saves_at_the_start_when_due_and_the_last_step_once(start, end, saved):
    session = train(CheckpointSaverHook(save_steps=2), session=Session(start, end))
    assert session.saved == saved


def test_n08_saves_by_seconds():
    clock = Clock()
    hook = CheckpointSaverHook(save_secs=10, clock=clock)

    def step(session):
        clock.now += 4
        return session.step()

    assert train(hook, session=Session(ends_at=7), step=step).saved == [0, 3, 6, 7]


def test_n08_the_steps_of_other_workers_count():
    hook, session = CheckpointSaverHook(save_steps=10), Session()
    hook.after_create_session(session)
    see(hook, session, 9, 25, 26, 34, 35)
    assert session.saved == [0, 25, 35]


def test_n08_listeners():
    log = []
    train(CheckpointSaverHook(save_steps=2, listeners=[Listener(log)]), session=Session(ends_at=3))
    saves = [f"{when} {step}" for step in (0, 2, 3) for when in ("before", "after")]
    assert log == ["begin", *saves, "end 3"]
    with pytest.raises(TypeError, match=r"listeners\[0\]: expected an instance of CheckpointSaverListener"):
        CheckpointSaverHook(save_steps=2, listeners=[TrainingHook()])


@pytest.mark.parametrize(("stop_at", "end"), [(0, 1), (2, 2)])
def test_n08_a_listener_can_stop_the_training_and_the_others_are_still_told(stop_at, end):
    logs = [], []
    listeners = [Listener(logs[0], stop_at), Listener(logs[1])]
    session = train(CheckpointSaverHook(save_steps=2, listeners=listeners), session=Session())
    assert session.global_step == end
    assert logs[0] == logs[1]
