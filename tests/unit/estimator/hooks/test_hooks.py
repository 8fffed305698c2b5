"""Hooks: when they are called (N01 to N03, Q11, Q12), and what those do that write nothing (N06 to N12)."""

import contextlib
import logging

import pytest
import torch

from paramserver.errors import ConfigError
from paramserver.estimator import (
    CheckpointSaverHook,
    CheckpointSaverListener,
    FinalOpsHook,
    GlobalStepWaiterHook,
    LoggingHook,
    NanLossDuringTrainingError,
    NanLossHook,
    ProfilerHook,
    SecondOrStepTimer,
    StepCounterHook,
    StopAfterNEvalsHook,
    StopAtStepHook,
    SummarySaverHook,
)
from paramserver.estimator.evaluate.evaluation import EvaluationSession
from paramserver.estimator.hooks.hook import HookRunner, RunContext, RunValues, TrainingHook, order_hooks


class Clock:
    """Moves by hand."""

    now = 100.0

    def __call__(self):
        return self.now


class TrainingRun:
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


# The order.


def test_n01_order_of_calls():
    log = []
    a, b = Recorder("a", log), Recorder("b", log)

    def create():
        log.append("create")
        return TrainingRun(ends_at=2)

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
    session = train(StopNow(), Recorder("a", log), session=TrainingRun())
    assert session.global_step == 1
    assert log[-2:] == ["a.after", "a.end"]


def test_n02_the_end_of_the_input_is_clean():
    log = []
    batches = iter([1, 2])

    def step(session):
        next(batches)
        return session.step()

    assert train(Recorder("a", log), session=TrainingRun(), step=step).global_step == 2
    assert log[-2:] == ["a.before", "a.end"]


def test_n02_after_another_exception_end_is_not_called():
    log = []

    with pytest.raises(ConnectionError, match="ps:0"):
        train(Recorder("a", log), step=fail)
    assert log[-1] == "a.before"


def test_n03_no_step_after_a_stop():
    runner = HookRunner([StopNow()])
    session = TrainingRun()
    with pytest.raises(RuntimeError, match="before its session was created"):
        runner.step(session.step)
    runner.begin()
    runner.after_create_session(session)
    runner.step(session.step)
    assert runner.stop_requested
    with pytest.raises(RuntimeError, match="worker:1 after a hook requested a stop"):
        runner.step(session.step)
    assert session.global_step == 1


@contextlib.contextmanager
def noting(log, name):
    log.append(f"{name} entered")
    try:
        yield
    finally:
        log.append(f"{name} left")


class Wrapper(Recorder):
    """Wraps its first step."""

    def before_run(self, context):
        if not any("entered" in entry for entry in self.log):
            context.wrap_step(noting(self.log, self.name))


def test_n03_a_hook_may_add_to_a_step_what_is_entered_around_it_alone():
    log = []

    def step(session):
        log.append("step")
        return session.step()

    train(Wrapper("a", log), Recorder("b", log), session=TrainingRun(ends_at=2), step=step)
    first = ["b.before", "a entered", "step", "a left", "a.after", "b.after"]
    assert log[4:-2] == [*first, "b.before", "step", "a.after", "b.after"]


def test_n03_what_a_step_is_wrapped_in_is_left_when_it_fails():
    log = []
    with pytest.raises(ConnectionError):
        train(Wrapper("a", log), step=fail)
    assert log[-2:] == ["a entered", "a left"]


def test_n04_a_recreated_session_is_announced_again_but_begin_is_not():
    log = []
    runner = HookRunner([Recorder("a", log)])
    runner.begin()
    runner.after_create_session(TrainingRun())
    runner.after_create_session(TrainingRun())
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
        lambda **limits: SummarySaverHook(
            None, **{name.replace("every", "save"): value for name, value in limits.items()}
        ),
        lambda **limits: ProfilerHook(**{name.replace("every", "save"): value for name, value in limits.items()}),
        lambda every_secs=None, every_steps=None: StepCounterHook(every_steps, every_secs),
        lambda every_secs=None, every_steps=None: LoggingHook(every_steps, every_secs),
    ],
    ids=["timer", "CheckpointSaverHook", "SummarySaverHook", "ProfilerHook", "StepCounterHook", "LoggingHook"],
)
def test_n06_n08_n09_n10_exactly_one_limit(make):
    with pytest.raises(ConfigError, match=r"exactly one of .*, got none"):
        make()
    with pytest.raises(ConfigError, match=r"exactly one of .*, got both"):
        make(every_secs=1, every_steps=1)
    with pytest.raises(ConfigError, match="last_step: expected a positive number, got True"):
        StopAtStepHook(last_step=True)
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


@pytest.mark.parametrize(("limits", "start", "end"), [({"num_steps": 3}, 10, 13), ({"last_step": 12}, 10, 12)])
def test_n07_steps_count_from_the_restored_step(limits, start, end):
    assert train(StopAtStepHook(**limits), session=TrainingRun(start)).global_step == end


def test_n07_num_steps_do_not_start_anew_with_a_recreated_session():
    hook = StopAtStepHook(num_steps=3)
    hook.after_create_session(TrainingRun(10))
    hook.after_create_session(TrainingRun(11))
    assert hook.last_step == 13


def test_n07_the_steps_of_other_workers_count():
    hook = StopAtStepHook(last_step=5)
    session = TrainingRun()
    assert not see(hook, session, 4)
    session.global_step = 5
    assert see(hook, session, 4)


def test_n09_the_rate_is_that_of_all_workers(caplog):
    caplog.set_level(logging.INFO)
    clock = Clock()
    hook = StepCounterHook(every_n_steps=10, clock=clock)
    hook.after_create_session(TrainingRun(100))
    clock.now += 1000  # the first step, which may have to wait and to compile, is none of the rate
    see(hook, TrainingRun(), 100)
    clock.now += 2
    see(hook, TrainingRun(), 105)
    assert hook.steps_per_second is None
    see(hook, TrainingRun(), 140)
    assert hook.steps_per_second == 20
    assert caplog.messages == ["global_step/sec: 20"]


def test_n09_the_rate_counts_from_the_first_step():
    clock, logged = Clock(), []
    hook = StepCounterHook(every_n_steps=100, clock=clock)
    for step in range(1, 302):
        clock.now += 1
        hook.steps_per_second = None
        see(hook, TrainingRun(), step)
        if hook.steps_per_second is not None:
            logged.append((step, hook.steps_per_second))
    assert logged == [(101, 1), (201, 1), (301, 1)]


def test_n09_a_step_that_stands_still_is_warned_about_five_times(caplog):
    hook = StepCounterHook(every_n_secs=1, every_n_steps=None, clock=Clock())
    see(hook, TrainingRun(), *[7] * 1000)
    assert len(caplog.messages) == 5
    assert "worker:1 made 20 steps while the global step stayed at 7" in caplog.messages[0]


@pytest.mark.parametrize(("at_end", "logged"), [(False, [1, 4]), (True, [1, 4, 5])])
def test_n11_logging_counts_local_steps(caplog, at_end, logged):
    caplog.set_level(logging.INFO)
    train(LoggingHook(3, at_end=at_end, clock=Clock()), session=TrainingRun(ends_at=5))
    assert [message.partition(" (")[0] for message in caplog.messages] == [
        f"loss = 0.5, step = {step}" for step in logged
    ]


def test_n11_logging_by_seconds(caplog):
    caplog.set_level(logging.INFO)
    clock = Clock()

    def step(session):
        clock.now += 2
        return session.step()

    train(LoggingHook(None, 5, clock=clock), session=TrainingRun(ends_at=5), step=step)
    assert caplog.messages == ["loss = 0.5, step = 1", "loss = 0.5, step = 4 (6.000 sec)"]


def test_n11_logging_at_the_end_alone(caplog):
    caplog.set_level(logging.INFO)
    train(LoggingHook(None, at_end=True, clock=Clock()), session=TrainingRun(ends_at=5))
    assert [message.partition(" (")[0] for message in caplog.messages] == ["loss = 0.5, step = 5"]


def test_n11_logging_more_values_read_when_a_line_is_due(caplog):
    caplog.set_level(logging.INFO)
    read = []
    values = {"rate": lambda: read.append(1) or 0.1, "norm": lambda: torch.tensor(2.5), "phase": lambda: "warm-up"}
    train(LoggingHook(2, values=values, clock=Clock()), session=TrainingRun(ends_at=3))
    assert caplog.messages[0] == "loss = 0.5, step = 1, rate = 0.1, norm = 2.5, phase = warm-up"
    assert len(read) == 2


def test_n11_logging_in_a_form_of_ones_own(caplog):
    caplog.set_level(logging.INFO)
    form = "{step}: {loss:.1f}, {rate}".format_map
    train(LoggingHook(9, values={"rate": lambda: 3}, formatter=form), session=TrainingRun(ends_at=2))
    assert caplog.messages == ["1: 0.5, 3"]


class Waiting(TrainingRun):
    """A session in which others make a step whenever this worker waits."""

    def __init__(self, start=0, ends_at=None):
        super().__init__(start, ends_at)
        self.clock, self.waits, self.refreshed = Clock(), [], []

    def wait(self, seconds):
        self.waits.append(seconds)
        self.clock.now += seconds

    def read_global_step(self):
        self.global_step = len(self.waits)
        return self.global_step

    def refresh(self):
        self.refreshed.append(self.global_step)
        return self.global_step

    def hook(self, step, **options):
        return GlobalStepWaiterHook(step, clock=self.clock, wait=self.wait, **options)


def see_before(hook, session):
    hook.before_run(RunContext(session))


def test_n11_a_worker_waits_for_a_global_step_and_begins_with_its_values(caplog):
    caplog.set_level(logging.INFO)
    session = Waiting()
    train(session.hook(100), StopAtStepHook(num_steps=102), session=session)
    assert (session.waits, session.refreshed) == ([0.5] * 100, [100])
    assert session.global_step == 102, "the second step was not waited for"
    assert caplog.messages == [f"worker:1 waits for global step 100, now {step}" for step in (0, 60)]


@pytest.mark.parametrize("step", [0, 3])
def test_n11_a_step_that_is_reached_is_not_waited_for(step):
    session = Waiting(start=3)
    see_before(session.hook(step), session)
    assert (session.waits, session.refreshed) == ([], [])


def test_n11_an_evaluation_has_what_a_waiting_hook_asks_for():
    checkpoint = EvaluationSession(global_step=7, task="evaluator:0", model_dir="run")
    see_before(GlobalStepWaiterHook(7), checkpoint)
    assert checkpoint.read_global_step() == checkpoint.refresh() == 7


def test_n11_a_worker_does_not_wait_beyond_the_end_of_the_run():
    session = Waiting(ends_at=10)
    see_before(session.hook(100), session)
    assert session.global_step == 10


def test_n11_a_worker_starts_anyway_after_a_timeout(caplog):
    session = Waiting()
    see_before(session.hook(100, timeout=2), session)
    assert session.refreshed == [4]
    assert "worker:1 starts at global step 4: step 100 did not come within 2 s" in caplog.text


def test_n11_n04_a_wait_that_was_cut_short_goes_on_with_the_next_session():
    lost, session = Waiting(), Waiting()
    hook = session.hook(5)
    lost.read_global_step = fail
    with pytest.raises(ConnectionError):
        see_before(hook, lost)
    see_before(hook, session)
    assert session.refreshed == [5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wait_until_step": -1}, "wait_until_step: expected a whole number of at least 0, got -1"),
        ({"wait_until_step": True}, "wait_until_step: expected a whole number of at least 0, got True"),
        ({"wait_until_step": 1, "timeout": True}, "timeout: expected positive seconds or None, got True"),
        ({"wait_until_step": 1, "timeout": 0}, "timeout: expected positive seconds or None, got 0"),
    ],
)
def test_n11_what_a_waiting_hook_refuses(options, message):
    with pytest.raises(ConfigError, match=message):
        GlobalStepWaiterHook(**options)


def test_n12_an_evaluation_stops_after_n_batches_and_each_one_counts_anew(caplog):
    caplog.set_level(logging.INFO)
    hook = StopAfterNEvalsHook(3)
    for _ in range(2):
        session = TrainingRun(1000)
        assert train(hook, session=session).global_step == 1003
    assert caplog.messages == [f"evaluation [{count}/3]" for count in (1, 2, 3)] * 2


@pytest.mark.parametrize(("num_evals", "shown"), [(50, ["5/50", "10/50"]), (None, ["10/?"])])
def test_n12_progress_is_logged_about_ten_times(caplog, num_evals, shown):
    caplog.set_level(logging.INFO)
    train(StopAfterNEvalsHook(num_evals), session=TrainingRun(ends_at=12))
    assert caplog.messages == [f"evaluation [{each}]" for each in shown]


def test_n12_progress_need_not_be_logged_and_the_number_is_positive(caplog):
    caplog.set_level(logging.INFO)
    train(StopAfterNEvalsHook(2, log_progress=False))
    assert not caplog.messages
    with pytest.raises(ConfigError, match="num_evals: expected a positive number or None, got True"):
        StopAfterNEvalsHook(True)
    with pytest.raises(ConfigError, match="num_evals: expected a positive number or None, got 0"):
        StopAfterNEvalsHook(0)


def test_final_functions_are_called_at_a_clean_end_alone_and_their_values_kept():
    session = TrainingRun(ends_at=3)
    hook = FinalOpsHook({"step": lambda: session.global_step, "pair": [lambda: 1, lambda: "a"]})
    failing = FinalOpsHook(lambda: 1)
    assert hook.final_ops_values is None
    train(hook, session=session)
    assert hook.final_ops_values == {"step": 3, "pair": [1, "a"]}
    with pytest.raises(ConnectionError):
        train(failing, step=fail)
    assert failing.final_ops_values is None
    with pytest.raises(TypeError, match="FinalOpsHook: expected functions without arguments, got 3"):
        FinalOpsHook([3])


def test_n11_q11_a_nan_loss_is_an_error_after_the_users_hooks():
    log = []

    def step(session):
        return session.step()._replace(loss=torch.tensor(float("nan")))

    with pytest.raises(NanLossDuringTrainingError, match="loss of worker:1 is NaN at global step 1") as caught:
        train(Recorder("user", log), NanLossHook(), step=step)
    assert (caught.value.task, caught.value.global_step) == ("worker:1", 1)
    assert log[-1] == "user.after"


def test_n11_a_nan_loss_may_just_stop(caplog):
    assert see(NanLossHook(fail_on_nan_loss=False), TrainingRun(), 1, loss=float("nan"))
    assert "training stops" in caplog.text
    assert not see(NanLossHook(), TrainingRun(), 1, loss=float("inf"))
