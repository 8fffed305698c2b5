"""A training session: waiting for the chief (N05), what it restores and saves, and what it tells the model_dir."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from paramserver import ParameterServerStrategy, SimpleClusterResolver
from paramserver.checkpoint.model_dir import read_state
from paramserver.cluster import ClusterSpec
from paramserver.cluster.report import Reporter
from paramserver.errors import ConfigError, DeadlineError
from paramserver.estimator import EstimatorSpec, ModeKeys, RunConfig
from paramserver.estimator.train.session import TrainingRun


def alone():
    return ParameterServerStrategy(SimpleClusterResolver(ClusterSpec({})))


def make(tmp_path, max_steps=None, strategy=None, **config):
    model = nn.Linear(2, 1)
    spec = EstimatorSpec(
        ModeKeys.TRAIN,
        model=model,
        loss_fn=lambda model, features, labels: (model(features) - labels).square().mean(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )
    config = RunConfig(model_dir=str(tmp_path), **config)
    return TrainingRun(strategy or alone(), spec, config, max_steps, Reporter("chief:0", None))


def batches(value=1.0):
    return itertools.repeat((torch.full((4, 2), value), torch.zeros(4, 1)))


def test_a_step_gives_the_loss_the_global_step_and_the_staleness(tmp_path):
    session = make(tmp_path)
    values = session.step(batches())
    assert (values.global_step, values.staleness) == (1, 0)
    assert not values.loss.requires_grad
    session.close()


def test_the_input_ends_with_stop_iteration(tmp_path):
    session = make(tmp_path)
    with pytest.raises(StopIteration):
        session.step(iter([]))
    session.close()


def test_a_loss_that_is_nan_is_not_pushed(tmp_path):
    session = make(tmp_path)
    before = [parameter.clone() for parameter in session.model.parameters()]
    values = session.step(batches(math.nan))
    assert math.isnan(values.loss)
    assert session.global_step == 0
    assert all(map(torch.equal, before, session.model.parameters()))
    session.close()


def test_it_ends_at_max_steps(tmp_path):
    session = make(tmp_path, max_steps=2)
    steps = 0
    while not session.should_stop():
        session.step(batches())
        steps += 1
    assert steps == 2
    session.close()


def test_a_step_is_saved_once(tmp_path):
    session = make(tmp_path)
    session.step(batches())
    path = session.save()
    written = Path(path).stat().st_mtime_ns
    assert session.save() == path
    assert Path(path).stat().st_mtime_ns == written
    session.close()


def test_leftovers_are_cleared_away(tmp_path):
    (tmp_path / "ckpt-3.tmp-abcd1234").mkdir()
    make(tmp_path).close()
    assert not list(tmp_path.glob("ckpt-*"))


def test_the_end_is_written_into_model_dir(tmp_path):
    session = make(tmp_path)
    assert read_state(str(tmp_path)).finished is False
    session.finish()
    session.close()
    assert read_state(str(tmp_path)).finished is True


class Late:
    """The strategy of a worker whose chief does not come."""

    is_chief = False
    task = "worker:1"

    def __init__(self, waits):
        self.waits, self.timeout = waits, None

    def prepare_from(self, model, optimizers, *, initialize, buffers, timeout, on_wait):
        self.timeout = timeout
        for seconds in self.waits:
            on_wait(seconds)
        raise DeadlineError(f"the chief has not initialized the variables within {timeout:g} s", timeout)


def test_n05_w08_a_worker_waits_for_the_chief_for_a_limited_time(tmp_path):
    strategy = Late([1.5 * count for count in range(1, 50)])
    with pytest.raises(DeadlineError, match="has not initialized the variables within 75 s"):
        make(tmp_path / "run", strategy=strategy, session_creation_timeout_secs=75)
    assert strategy.timeout == 75
    assert not (tmp_path / "run").exists(), "B05: it writes nothing"


def test_q13_the_global_step_is_known_without_asking_and_is_one_for_all(tmp_path, monkeypatch):
    strategy = alone()
    session = make(tmp_path, strategy=strategy)
    session.step(batches())
    monkeypatch.setattr(strategy.client.lanes, "run", None)
    assert session.global_step == strategy.global_step == strategy.client.global_step == 1
    monkeypatch.undo()
    assert session.read_global_step() == session.refresh() == 1
    session.close()


def test_the_values_can_be_brought_up_to_date(tmp_path):
    session = make(tmp_path)
    with torch.no_grad():
        expected = [parameter.clone() for parameter in session.model.parameters()]
    assert session.refresh() == 0
    assert all(map(torch.equal, expected, session.model.parameters()))
    session.close()


def test_w08_only_the_chief_saves(tmp_path):
    session = make(tmp_path)
    session.is_chief = False
    with pytest.raises(ConfigError, match="cannot write a checkpoint, only the chief can"):
        session.save()
    session.close()
    assert not list(tmp_path.glob("ckpt-*"))


def test_it_shows_where_it_is(tmp_path):
    session = make(tmp_path)
    assert repr(session) == f"<TrainingRun of worker:0 at global step 0 in {tmp_path}>"
    session.close()
