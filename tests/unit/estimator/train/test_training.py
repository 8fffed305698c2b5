"""The loop of one task: hooks (N01, N02), resuming, schedules, summaries (E14, Q11), train_and_evaluate alone."""

import copy
import dataclasses
import itertools
import json
import logging
import math
import warnings
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.optim import lr_scheduler

from paramserver import CentralStorageStrategy, ParameterServerStrategy, SimpleClusterResolver, summary
from paramserver.checkpoint.index import SLOTS_INDEX, read_index
from paramserver.checkpoint.reading import read_tensors
from paramserver.checkpoint.storage import local_copy
from paramserver.cluster import ClusterSpec
from paramserver.cluster.report import Reporter
from paramserver.errors import ConfigError, NotFiniteError
from paramserver.estimator import (
    Estimator,
    EstimatorSpec,
    EvalSpec,
    FinalExporter,
    FinalOpsHook,
    NanLossDuringTrainingError,
    ProfilerHook,
    RunConfig,
    StopAfterNEvalsHook,
    TrainingHook,
    TrainSpec,
    train_and_evaluate,
)
from paramserver.estimator.checkpoint import read_values
from paramserver.estimator.train import schedule as schedule_module
from paramserver.estimator.train import training as training_module
from paramserver.estimator.train.schedule import Schedule


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)


def squared_error(model, features, labels):
    return ((model(features)[:, 0] - labels) ** 2).mean()


def net():
    torch.manual_seed(3)
    # Without a bias before the norm: its gradient is zero but for rounding, which Adam would make large.
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 1))


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.05)


def steady(optimizer):
    return None


def cosine(optimizer):
    return lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)


def one_cycle(optimizer):
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=12)


def warm_up(optimizer):
    parts = [lr_scheduler.LinearLR(optimizer, total_iters=4), lr_scheduler.StepLR(optimizer, 3)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[4])


SCHEDULES = [steady, cosine, one_cycle, warm_up]


def building(schedule):
    def model_fn(mode):
        model = net()
        optimizer = adam(model.parameters())
        return EstimatorSpec(
            mode, model=model, loss_fn=squared_error, optimizer=optimizer, scheduler=schedule(optimizer)
        )

    return model_fn


def batches(start=0):
    for index in itertools.count(start):
        generator = torch.Generator().manual_seed(index)
        features = torch.rand(4, 3, generator=generator)
        yield features, features.sum(1)


def make(model_dir, schedule=steady, **config):
    options = {"save_checkpoints_steps": 100, "log_step_count_steps": None} | config
    return Estimator(building(schedule), str(model_dir), RunConfig(**options))


# --- resuming


def plain(schedule, steps):
    """What PyTorch makes of it by itself."""
    model = net()
    optimizer = adam(model.parameters())
    scheduler = schedule(optimizer)
    for features, labels in itertools.islice(batches(), steps):
        optimizer.zero_grad()
        squared_error(model, features, labels).backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
    return model.state_dict()


def contents(checkpoint):
    """Values and slots."""
    return read_values(checkpoint) | dict(read_tensors(Path(checkpoint), read_index(Path(checkpoint, SLOTS_INDEX))))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_resumed_training_equals_an_uninterrupted_one_and_plain_pytorch(tmp_path, schedule):
    """Values, buffers, Adam's slots and the schedule all go on where they were."""
    whole = make(tmp_path / "whole", schedule).train(batches, max_steps=12)
    parts = make(tmp_path / "parts", schedule)
    for end in (5, 6, 12):
        start = 0 if parts.latest_checkpoint() is None else int(parts.latest_checkpoint().rpartition("-")[2])
        parts.train(lambda start=start: batches(start), max_steps=end)
    ours, theirs = contents(parts.latest_checkpoint()), contents(whole.latest_checkpoint())
    assert "0.weight/exp_avg_sq" in ours
    assert ours.keys() == theirs.keys()
    for name, value in {**theirs, **plain(schedule, 12)}.items():
        torch.testing.assert_close(ours[name], value)  # to rounding: a flat update is vectorised at other places


# --- several optimizers


def two_optimizers(model):
    first = torch.optim.Adagrad(model[2].parameters(), lr=0.05)
    return {"last": first, "others": adam([*model[0].parameters(), *model[1].parameters()])}


def two_schedulers(optimizers):
    return [cosine(optimizers["others"]), lr_scheduler.StepLR(optimizers["last"], 3)]


def two_fn(mode):
    model = net()
    optimizers = two_optimizers(model)
    return EstimatorSpec(
        mode, model=model, loss_fn=squared_error, optimizer=optimizers, scheduler=two_schedulers(optimizers)
    )


def plain_with_two(steps):
    model = net()
    optimizers = two_optimizers(model)
    schedulers = two_schedulers(optimizers)
    for features, labels in itertools.islice(batches(), steps):
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        squared_error(model, features, labels).backward()
        for each in (*optimizers.values(), *schedulers):
            each.step()
    return model.state_dict()


def test_several_optimizers_with_schedules_train_and_resume_as_plain_pytorch_does(tmp_path):
    config = RunConfig(save_checkpoints_steps=100, log_step_count_steps=None)
    whole = Estimator(two_fn, str(tmp_path / "whole"), config).train(batches, max_steps=12)
    parts = Estimator(two_fn, str(tmp_path / "parts"), config)
    for start, end in [(0, 5), (5, 12)]:
        parts.train(lambda start=start: batches(start), max_steps=end)
    ours, theirs = contents(parts.latest_checkpoint()), contents(whole.latest_checkpoint())
    assert {"0.weight/exp_avg_sq", "2.weight/sum"} <= ours.keys() == theirs.keys()
    for name, value in {**theirs, **plain_with_two(12)}.items():
        torch.testing.assert_close(ours[name], value)
    assert parts.evaluate(batches, steps=2)["global_step"] == 12
    counts = []

    class Count(TrainingHook):
        def after_run(self, context, values):
            counts.append(context.session.statistics().steps)

    Estimator(two_fn, str(tmp_path / "counted"), config).train(batches, max_steps=3, hooks=[Count()])
    assert counts == [1, 2, 3], "times are those of a step of both"
    warm = Estimator(two_fn, str(tmp_path / "warm"), config, warm_start_from=str(tmp_path / "parts"))
    warm.train(batches, max_steps=1)
    assert not torch.equal(contents(warm.latest_checkpoint())["2.weight"], net()[2].weight)


def test_several_optimizers_make_one_step_of_all_replicas(tmp_path):
    def joined():
        each = batches()
        while group := list(itertools.islice(each, 2)):
            yield tuple(map(torch.cat, zip(*group, strict=True)))

    def no_norm(mode):
        """Without a norm, whose statistics are those of each replica."""
        spec = linear_fn(mode)
        return dataclasses.replace(
            spec, optimizer=[adam([spec.model.weight]), torch.optim.SGD([spec.model.bias], lr=0.1)]
        )

    found = []
    for devices, data in ((["cpu:0"], joined), (["cpu:0", "cpu:1"], batches)):
        config = RunConfig(train_distribute=CentralStorageStrategy(devices), log_step_count_steps=None)
        estimator = Estimator(no_norm, str(tmp_path / str(len(devices))), config).train(data, max_steps=5)
        found.append(read_values(estimator.latest_checkpoint()))
    torch.testing.assert_close(*found)


# --- several replicas


def linear_fn(mode):
    torch.manual_seed(3)
    model = nn.Linear(3, 1)
    return EstimatorSpec(mode, model=model, loss_fn=squared_error, optimizer=adam(model.parameters()))


def trained_on(num_replicas, data, model_dir, steps):
    strategy = CentralStorageStrategy([f"cpu:{index}" for index in range(num_replicas)])
    config = RunConfig(train_distribute=strategy, log_step_count_steps=None)
    estimator = Estimator(linear_fn, str(model_dir), config).train(data, max_steps=steps)
    return read_values(estimator.latest_checkpoint())


@pytest.mark.parametrize("num_replicas", [2, 3])
def test_u11_each_replica_takes_a_batch_and_a_step_is_that_of_all_of_them_as_one(num_replicas, tmp_path):
    def joined():
        """What one replica would be given."""
        each = batches()
        while group := list(itertools.islice(each, num_replicas)):
            yield tuple(map(torch.cat, zip(*group, strict=True)))

    one = trained_on(1, joined, tmp_path / "one", steps=5)
    torch.testing.assert_close(trained_on(num_replicas, batches, tmp_path / "several", steps=5), one)


def test_i06_w05_a_group_that_is_short_is_dropped_and_steps_are_counted_once(tmp_path):
    strategy = CentralStorageStrategy(["cpu:0", "cpu:1"])
    config = RunConfig(train_distribute=strategy, log_step_count_steps=None)
    Estimator(linear_fn, str(tmp_path), config).train(lambda: itertools.islice(batches(), 5))
    assert strategy.global_step == 2


def test_a_loss_that_is_nan_on_one_replica_is_pushed_by_none(tmp_path):
    def data():
        yield from itertools.islice(batches(), 3)
        yield torch.full((4, 3), math.nan), torch.zeros(4)

    strategy = CentralStorageStrategy(["cpu:0", "cpu:1"])
    config = RunConfig(train_distribute=strategy, log_step_count_steps=None)
    with pytest.raises(NanLossDuringTrainingError):
        Estimator(linear_fn, str(tmp_path), config).train(data)
    assert strategy.global_step == 1


class Poisoned(torch.autograd.Function):
    """The identity, whose gradient is NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan


def test_cp_a_nan_that_reached_the_variables_ends_the_training_and_leaves_the_last_good_checkpoint(tmp_path):
    """The loss is finite, the gradient is not; a restart goes on from before."""

    def model_fn(mode, params):
        model = net()

        def loss_fn(model, features, labels):
            loss = squared_error(model, features, labels)
            return Poisoned.apply(loss) if features.sum() > 100 else loss

        return EstimatorSpec(mode, model=model, loss_fn=loss_fn, optimizer=adam(model.parameters()))

    def poisoned():
        yield from itertools.islice(batches(), 3)
        yield torch.full((4, 3), 100.0) + torch.rand(4, 3), torch.zeros(4)
        yield from batches()

    config = RunConfig(save_checkpoints_steps=1, log_step_count_steps=None)
    estimator = Estimator(model_fn, str(tmp_path), config, params={})
    with pytest.raises(NotFiniteError, match=f"the last good checkpoint is {tmp_path / 'ckpt-3'}: start the run again"):
        estimator.train(poisoned, max_steps=10)
    assert estimator.latest_checkpoint() == str(tmp_path / "ckpt-3")
    assert all(value.isfinite().all() for value in read_values(estimator.latest_checkpoint()).values())
    assert math.isfinite(estimator.train(batches, max_steps=10).evaluate(batches, steps=2)["loss"])


def test_the_same_seed_gives_the_same_model(tmp_path):
    def shuffled():
        features = torch.rand(32, 3)
        return torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(features, features.sum(1)), batch_size=4, shuffle=True
        )

    first, second = (make(tmp_path / name, seed=1).train(shuffled) for name in "ab")
    ours, theirs = read_values(first.latest_checkpoint()), read_values(second.latest_checkpoint())
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


class Counted(lr_scheduler.LambdaLR):
    """A rate that says how often it was stepped."""

    def __init__(self):
        super().__init__(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0), lambda step: 1.0 + step)

    @property
    def rate(self):
        return self.optimizer.param_groups[0]["lr"]


def test_a_schedule_follows_the_steps_of_all_workers():
    scheduler = Counted()
    schedule = Schedule(scheduler, None)
    schedule.resume(3)
    assert scheduler.rate == 4
    schedule.follow(7)
    schedule.follow(6)  # never back
    assert scheduler.rate == 8


def test_a_schedule_ends_with_the_training():
    """The last updates of other workers lead beyond max_steps, where some schedulers refuse to go."""
    scheduler = Counted()
    Schedule(scheduler, 10).resume(12)
    assert scheduler.rate == 11


def test_resuming_a_schedule_warns_of_nothing_and_hides_nothing_else():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        Schedule(Counted(), None).resume(3)
        warnings.warn("another", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["another"]


def optimizer_at(lr):
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr, momentum=0.9)


def every(*parts, milestones):
    """A sequence of schedulers."""
    return lambda optimizer: lr_scheduler.SequentialLR(optimizer, [part(optimizer) for part in parts], milestones)


LONG = 30_000
LONG_SCHEDULES = {
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 1000, 0.9),
    "MultiStepLR": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [100, 100, LONG - 1, LONG + 1]),
    "ConstantLR": lambda optimizer: lr_scheduler.ConstantLR(optimizer, 0.5, LONG),
    "LinearLR": lambda optimizer: lr_scheduler.LinearLR(optimizer, total_iters=LONG + 100),
    "ExponentialLR": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9999),
    "PolynomialLR": lambda optimizer: lr_scheduler.PolynomialLR(optimizer, LONG + 100, power=2.0),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 2 * LONG),
    "WarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 1000, 2),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.1, 0.2, 700),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.2, LONG + 100),
    "SequentialLR": every(
        lambda optimizer: lr_scheduler.LinearLR(optimizer, total_iters=1000),
        lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 2 * LONG),
        milestones=[1000],
    ),
    "the first of a sequence": every(
        lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9999),
        lambda optimizer: lr_scheduler.StepLR(optimizer, 10),
        milestones=[LONG + 1],
    ),
}


@pytest.mark.parametrize("name", LONG_SCHEDULES)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_schedule_that_is_resumed_late_leaps_to_where_step_by_step_comes_to(name):
    """And goes on from there in the same way."""
    leaping, plain = optimizer_at(0.1), optimizer_at(0.1)
    scheduler, stepped = LONG_SCHEDULES[name](leaping), LONG_SCHEDULES[name](plain)
    calls = []
    whole = scheduler.step
    scheduler.step = lambda *args: (calls.append(args), whole(*args))
    schedule = Schedule(scheduler, None)
    schedule.resume(LONG)
    assert len(calls) <= 1
    for _ in range(LONG):
        stepped.step()
    for extra in range(3):
        for setting in ("lr", "momentum"):
            found, expected = (optimizer.param_groups[0][setting] for optimizer in (leaping, plain))
            assert found == pytest.approx(expected, rel=1e-9), (extra, setting)
        assert scheduler.get_last_lr() == pytest.approx(stepped.get_last_lr(), rel=1e-9)
        schedule.follow(LONG + extra + 1)
        stepped.step()


@pytest.mark.parametrize("subclass", [False, True])
def test_a_schedule_that_needs_every_step_makes_them_and_says_so_if_they_are_many(monkeypatch, caplog, subclass):
    monkeypatch.setattr(schedule_module, "FEW_STEPS", 3)
    monkeypatch.setattr(schedule_module, "MANY_STEPS", 7)
    caplog.set_level(logging.INFO)
    optimizer = optimizer_at(1.0)
    if subclass:
        scheduler = type("MyStepLR", (lr_scheduler.StepLR,), {})(optimizer, 1, 0.5)
    else:
        scheduler = lr_scheduler.MultiplicativeLR(optimizer, lambda step: 0.5)
    Schedule(scheduler, None).resume(6)
    assert (optimizer.param_groups[0]["lr"], caplog.messages) == (0.5**6, [])
    Schedule(scheduler, None).resume(8)
    assert caplog.messages == [f"{type(scheduler).__name__} goes through the rates of 8 steps before training goes on"]


# --- hooks


class Recorder(TrainingHook):
    """Writes down its calls."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def begin(self):
        self.log.append(f"{self.name} begin")

    def after_create_session(self, session):
        self.log.append(f"{self.name} created")

    def after_run(self, context, values):
        self.log.append(f"{self.name} step {values.global_step}")

    def end(self, session):
        self.log.append(f"{self.name} end")


def test_n01_q12_the_order_of_hooks(tmp_path):
    log = []

    def model_fn(mode):
        spec = building(steady)(mode)
        return EstimatorSpec(
            mode,
            model=spec.model,
            loss_fn=spec.loss_fn,
            optimizer=spec.optimizer,
            training_hooks=[Recorder("spec", log)],
            training_chief_hooks=[Recorder("chief", log)],
        )

    Estimator(model_fn, str(tmp_path)).train(batches, steps=1, hooks=[Recorder("user", log)])
    moments = ("begin", "created", "step 1", "end")
    assert log == [f"{name} {moment}" for moment in moments for name in ("chief", "user", "spec")]


def test_n02_a_hook_that_stops_ends_the_training_cleanly(tmp_path):
    log = []

    class Stop(Recorder):
        def after_run(self, context, values):
            context.request_stop()

    estimator = make(tmp_path).train(batches, max_steps=50, hooks=[Stop("stop", log)])
    assert log == ["stop begin", "stop created", "stop end"]
    assert estimator.latest_checkpoint().endswith("ckpt-1")


def test_n02_end_is_not_called_after_an_error(tmp_path):
    log = []

    def broken():
        raise LookupError

    with pytest.raises(LookupError):
        make(tmp_path).train(broken, hooks=[Recorder("user", log)])
    assert "user end" not in log


def test_q11_the_loss_is_logged_and_written(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    make(tmp_path, log_step_count_steps=2, save_summary_steps=2).train(batches, steps=5)
    lines = [message for message in caplog.messages if message.startswith("loss = ")]
    assert [line.partition("step = ")[2].split()[0] for line in lines] == ["1", "3", "5"]
    written = events(tmp_path)
    assert [event.step for event in written.Scalars("loss")] == [1, 3, 5]
    assert [event.step for event in written.Scalars("global_step/sec")] == [3, 5]
    assert [(event.step, event.histogram_value.num) for event in written.Histograms("staleness")] == [
        (1, 1),
        (3, 2),
        (5, 2),
    ]


def events(model_dir):
    """What its event files hold."""
    return EventAccumulator(str(model_dir), size_guidance={"histograms": 0}).Reload()


def test_hooks_of_the_users_own_see_the_end_of_a_training(tmp_path):
    optimizers = []

    def model_fn(mode):
        spec = linear_fn(mode)
        optimizers.append(spec.optimizer)
        return spec

    final = FinalOpsHook(lambda: optimizers[0].param_groups[0]["lr"])
    Estimator(model_fn, str(tmp_path)).train(batches, steps=3, hooks=[final, ProfilerHook(save_steps=2)])
    assert final.final_ops_values == 0.05
    assert [path.name for path in tmp_path.glob("*.json")] == ["worker-0.2.pt.trace.json"]


def test_n12_a_hook_ends_an_evaluation_of_endless_input_each_time(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    estimator, hook = make(tmp_path).train(batches, steps=1), StopAfterNEvalsHook(2)
    results = [estimator.evaluate(batches, hooks=[hook]) for _ in range(2)]
    assert results[0] == results[1] == estimator.evaluate(batches, steps=2)
    assert caplog.messages.count("evaluation [2/2]") == 2


# --- summaries


def recording_fn(mode):
    """A model that records its loss, its weights, and how often it is called."""
    spec = linear_fn(mode)

    def loss_fn(model, features, labels):
        loss = squared_error(model, features, labels)
        summary.scalar("model/loss", loss)
        summary.histogram("model/weight", model.weight)
        return loss

    return dataclasses.replace(spec, loss_fn=loss_fn)


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_e14_the_model_records_once_in_the_steps_that_are_written(num_replicas, tmp_path):
    strategy = CentralStorageStrategy([f"cpu:{index}" for index in range(num_replicas)])
    config = RunConfig(train_distribute=strategy, save_summary_steps=3, log_step_count_steps=None)
    estimator = Estimator(recording_fn, str(tmp_path), config).train(batches, steps=5)
    estimator.evaluate(batches, steps=1)
    written = events(tmp_path)
    for points in (written.Scalars("model/loss"), written.Histograms("model/weight"), written.Scalars("loss")):
        assert [point.step for point in points] == [1, 4]
    assert events(tmp_path / "eval").Tags()["histograms"] == []
    recorded, mean = (written.Scalars(name)[0].value for name in ("model/loss", "loss"))
    assert (recorded == mean) is (num_replicas == 1), "the first replica's, and the mean of all"


@pytest.mark.parametrize("url", ["{}", "file://{}", "memory://{}"])
def test_the_launcher_is_told_where_the_summaries_are(tmp_path, monkeypatch, url):
    """In a folder their whole path, at a URL the URL."""
    told = []
    monkeypatch.setattr(Reporter, "is_on", True)
    monkeypatch.setattr(Reporter, "tell", lambda self, **report: told.append(report.get("paths")))
    make(url.format(tmp_path / "run")).train(batches, steps=1)
    place = f"memory://{tmp_path}/run" if "memory" in url else f"{tmp_path}/run"
    assert {"summaries": place} in told
    with local_copy(place, "*.tfevents.*") as folder:
        assert list(folder.glob("*.tfevents.*"))


def test_the_launcher_is_told_how_the_last_step_was(tmp_path, monkeypatch):
    """Also of a training that is over before the first report of its steps is due."""
    told = []
    monkeypatch.setattr(training_module, "REPORT_INTERVAL", math.inf)
    monkeypatch.setattr(Reporter, "is_on", True)
    monkeypatch.setattr(Reporter, "tell", lambda self, **report: told.append(report))
    make(str(tmp_path)).train(batches, steps=3)
    assert [(report["state"], report["global_step"]) for report in told if "loss" in report] == [("training", 3)]


@pytest.mark.parametrize(("name", "folder"), [(None, "eval"), ("test", "eval_test")])
def test_q15_an_evaluation_writes_its_metrics_and_its_checkpoint(name, folder, tmp_path):
    estimator = make(tmp_path).train(batches, steps=2)
    results = estimator.evaluate(batches, steps=1, name=name)
    written = events(tmp_path / folder)
    assert [(event.step, event.value) for event in written.Scalars("loss")] == [(2, pytest.approx(results["loss"]))]
    (checkpoint,) = written.Tensors("checkpoint_path/text_summary")
    assert (checkpoint.step, checkpoint.tensor_proto.string_val) == (2, [str(tmp_path / "ckpt-2").encode()])


def test_without_summaries_nothing_is_recorded(tmp_path):
    config = RunConfig(save_summary_steps=0, log_step_count_steps=None)
    Estimator(recording_fn, str(tmp_path), config).train(batches, steps=2)
    assert not list(tmp_path.glob("*.tfevents.*"))


def test_a_hook_sees_the_mean_loss_of_all_replicas_once_in_a_step(tmp_path):
    seen, of_replicas = [], []

    class Seen(TrainingHook):
        def after_run(self, context, values):
            seen.append((values.global_step, float(values.loss)))

    def model_fn(mode):
        def loss_fn(model, features, labels):
            loss = squared_error(model, features, labels)
            of_replicas.append(loss.item())
            return loss

        return dataclasses.replace(linear_fn(mode), loss_fn=loss_fn)

    config = RunConfig(train_distribute=CentralStorageStrategy(["cpu:0", "cpu:1"]), log_step_count_steps=None)
    Estimator(model_fn, str(tmp_path), config).train(batches, steps=2, hooks=[Seen()])
    means = [sum(of_replicas[step : step + 2]) / 2 for step in (0, 2)]
    assert seen == [(1, pytest.approx(means[0])), (2, pytest.approx(means[1]))]


# --- train_and_evaluate in one process


class Specs:
    """What train_and_evaluate gets, and which steps were evaluated."""

    def __init__(self, tmp_path, *, max_steps=10, throttle_secs=0, save_steps=4, data=batches):
        self.estimator = make(tmp_path / "run", save_checkpoints_steps=save_steps)
        self.evaluated = []
        evaluate = self.estimator.evaluate

        def recorded(*args, **options):
            self.evaluated.append(int(options["checkpoint_path"].rpartition("-")[2]))
            return evaluate(*args, **options)

        self.estimator.evaluate = recorded
        self.train_spec = TrainSpec(data, max_steps=max_steps)
        self.eval_spec = EvalSpec(batches, steps=2, throttle_secs=throttle_secs, exporters=FinalExporter("final"))

    def run(self):
        return train_and_evaluate(self.estimator, self.train_spec, self.eval_spec)


@pytest.mark.parametrize("position", [2, 0, 1])
def test_t04_types_are_checked_first(tmp_path, position):
    specs = Specs(tmp_path)
    arguments = [specs.estimator, specs.train_spec, specs.eval_spec]
    arguments[position] = "wrong"
    names = ("estimator", "train_spec", "eval_spec")
    with pytest.raises(TypeError, match=f"train_and_evaluate: {names[position]}: expected .*, got a str"):
        train_and_evaluate(*arguments)


def test_t06_t07_without_a_cluster_it_trains_evaluates_and_returns(tmp_path):
    specs = Specs(tmp_path)
    metrics, exports = specs.run()
    assert metrics["global_step"] == 10
    assert set(metrics) == {"loss", "global_step"}
    assert [Path(path).parent for path in exports] == [Path(specs.estimator.model_dir, "export", "final")]


def test_v28_every_save_but_the_first_is_evaluated(tmp_path):
    specs = Specs(tmp_path)
    specs.run()
    assert specs.evaluated == [4, 8, 10]


def test_v28_the_throttle_skips_saves_but_not_the_last(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    specs = Specs(tmp_path, throttle_secs=600)
    specs.run()
    assert specs.evaluated == [10]
    assert caplog.text.count("is not evaluated") == 3


def test_v28_an_input_that_ends_is_evaluated_and_exported_at_its_end(tmp_path):
    """Also where the last step was saved, and so evaluated, before anyone knew that it was the last."""
    specs = Specs(tmp_path, max_steps=None, data=lambda: itertools.islice(batches(), 8))
    metrics, exports = specs.run()
    assert specs.evaluated == [4, 8]
    assert metrics["global_step"] == 8
    assert all(exports)


def test_v29_without_checkpoints_there_is_nothing_to_evaluate(tmp_path):
    with pytest.raises(ConfigError, match="no checkpoints are saved"):
        Specs(tmp_path, save_steps=None).run()


def test_t14_a_finished_run_is_only_evaluated(tmp_path):
    Specs(tmp_path).run()
    again = Specs(tmp_path)
    metrics, _ = again.run()
    assert again.evaluated == [10]
    assert metrics["global_step"] == 10


def test_an_evaluation_does_not_change_the_training(tmp_path):
    evaluated, alone = Specs(tmp_path / "a"), make(tmp_path / "b").train(batches, max_steps=10)
    evaluated.run()
    ours = read_values(evaluated.estimator.latest_checkpoint())
    theirs = read_values(alone.latest_checkpoint())
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_strategy_of_the_users_own_is_used(tmp_path):
    strategy = ParameterServerStrategy(SimpleClusterResolver(ClusterSpec({})))
    make(tmp_path, train_distribute=strategy).train(batches, steps=2)
    assert strategy.global_step == 2


def test_another_strategy_is_refused(tmp_path):
    class Other:
        def scope(self):
            raise AssertionError

    with pytest.raises(ConfigError, match="train_distribute: expected a ParameterServerStrategy, got a Other"):
        make(tmp_path, train_distribute=Other()).train(batches, steps=2)


@pytest.mark.parametrize("task", [{"type": "evaluator", "index": 1}])
def test_t05_there_is_one_evaluator(tmp_path, monkeypatch, task):
    cluster = {"chief": ["a:1"], "ps": ["b:1"]}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster, "task": task}))
    with pytest.raises(ConfigError, match="only be one evaluator task, and this one is evaluator:1"):
        Specs(tmp_path).run()


def test_specs_are_not_changed(tmp_path):
    specs = Specs(tmp_path)
    before = copy.copy(vars(specs.eval_spec)), copy.copy(vars(specs.train_spec))
    specs.run()
    assert (vars(specs.eval_spec), vars(specs.train_spec)) == before
