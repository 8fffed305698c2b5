"""N04: a ps or a connection is lost, and a worker goes on with the same model over new lanes."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.patience import patience
from torch import Tensor, nn, optim

import paramserver as ps
from paramserver.errors import ConfigError, UnavailableError
from paramserver.estimator import Estimator, EstimatorSpec, ModeKeys, RunConfig
from paramserver.estimator.checkpoint import read_values
from paramserver.estimator.hooks.hook import RunContext, RunValues, TrainingHook, TrainingSession

pytestmark = pytest.mark.usefixtures("each_strategy_is_a_process", "lane")

PATIENCE = patience(30.0)


class Cluster:
    """ps tasks that can be lost and started again at their addresses, as a launcher does it."""

    def __init__(self, num_ps: int, num_workers: int) -> None:
        self._sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(num_ps)]
        workers = [f"127.0.0.1:{index + 1}" for index in range(num_workers)]  # nobody listens there
        addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in self._sockets]
        self.spec = ps.ClusterSpec({"worker": workers, "ps": addresses})
        self.servers = [self._serve(index) for index in range(num_ps)]
        self._strategies: list[ps.ParameterServerStrategy] = []

    def strategy(self, worker: int = 0, *, pipeline: bool = False) -> ps.ParameterServerStrategy:
        resolver = ps.SimpleClusterResolver(self.spec, task_type="worker", task_id=worker)
        self._strategies.append(
            ps.ParameterServerStrategy(resolver, pipeline=pipeline, session_creation_timeout=PATIENCE)
        )
        return self._strategies[-1]

    def lose(self, index: int) -> None:
        """End a ps and all that it holds, and start it again."""
        self.servers[index].stop()
        self.servers[index] = self._serve(index)

    def close(self) -> None:
        for strategy in self._strategies:
            strategy.close()
        for server in self.servers:
            server.stop()
        for each in self._sockets:
            each.close()

    def _serve(self, index: int) -> ps.Server:
        return ps.Server(self.spec, "ps", index, descriptor=self._sockets[index].dup().detach())


@contextlib.contextmanager
def a_cluster(num_ps: int = 2, num_workers: int = 1) -> Iterator[Cluster]:
    cluster = Cluster(num_ps, num_workers)
    try:
        yield cluster
    finally:
        cluster.close()


def prepared(strategy: ps.ParameterServerStrategy) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    return strategy.prepare(model, optim.SGD(model.parameters(), lr=0.1))


def step(model: Any, optimizer: Any) -> None:
    optimizer.zero_grad()
    model(torch.arange(12.0).view(4, 3)).square().sum().backward()
    optimizer.step()


def contents(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_z16_the_chief_brings_back_what_a_lost_ps_held() -> None:
    with a_cluster() as cluster:
        strategy = cluster.strategy()
        model, optimizer = prepared(strategy)
        step(model, optimizer)
        before = contents(model)
        cluster.lose(1)
        with pytest.raises(UnavailableError, match="ps:1"):
            step(model, optimizer)
        strategy.recover()
        biases = [name for name in before if name.endswith("bias")]  # round robin has put them on ps:1
        assert all(torch.equal(contents(model)[name], before[name]) for name in biases)
        step(model, optimizer)
        assert strategy.global_step >= 2
        assert [status.global_step for status in strategy.client.status()] == [strategy.global_step] * 2  # type: ignore[union-attr]


def test_a_pipelined_worker_goes_on_from_the_values_that_it_had() -> None:
    """The step after the loss learns of it; the update that was under way is lost with the ps."""
    with a_cluster() as cluster:
        strategy = cluster.strategy(pipeline=True)
        model, optimizer = prepared(strategy)
        for _ in range(3):
            step(model, optimizer)
        strategy.refresh()
        before = contents(model)
        cluster.lose(1)
        step(model, optimizer)
        with pytest.raises(UnavailableError, match="ps:1"):
            step(model, optimizer)
        strategy.recover()
        lost = [name for name in before if name.endswith("bias")]  # round robin has put them on ps:1
        assert all(torch.equal(contents(model)[name], before[name]) for name in lost)
        for _ in range(2):
            step(model, optimizer)
        strategy.refresh()
        assert not any(torch.equal(contents(model)[name], before[name]) for name in lost[1:])


def test_every_parameter_still_trains() -> None:
    with a_cluster() as cluster:
        strategy = cluster.strategy()
        model, optimizer = prepared(strategy)
        step(model, optimizer)
        for index in range(2):
            cluster.lose(index)
        strategy.recover()
        before = contents(model)
        step(model, optimizer)
        changed = {name for name, value in contents(model).items() if not torch.equal(value, before[name])}
        assert changed >= {name for name, _ in model.named_parameters()} - {"0.bias"}  # a norm takes that one back


def test_other_workers_wait_for_the_chief() -> None:
    with a_cluster(num_workers=2) as cluster, ThreadPoolExecutor(1) as pool:
        chief, other = cluster.strategy(0), cluster.strategy(1)
        joining = pool.submit(prepared, other)
        model, optimizer = prepared(chief)
        theirs, their_optimizer = joining.result(PATIENCE)
        cluster.lose(0)
        recovering = pool.submit(other.recover)
        chief.recover()
        recovering.result(PATIENCE)
        step(model, optimizer)
        step(theirs, their_optimizer)
        assert other.global_step == chief.global_step + 1


def test_a_connection_that_is_lost_loses_nothing() -> None:
    with a_cluster() as cluster:
        strategy = cluster.strategy()
        model, optimizer = prepared(strategy)
        step(model, optimizer)
        before = contents(model)
        assert strategy.client is not None
        strategy.client.lanes.close()
        strategy.recover(initialize=lambda *_: pytest.fail("the ps tasks still hold the values"))
        torch.testing.assert_close(contents(model), before)
        assert strategy.global_step == 1


def test_the_programs_own_variables_are_there_again() -> None:
    with a_cluster(num_workers=2) as cluster, ThreadPoolExecutor(1) as pool:
        chief, other = cluster.strategy(0), cluster.strategy(1)

        def program(strategy: ps.ParameterServerStrategy) -> tuple[ps.Variable, Any]:
            with strategy.scope():
                seen = ps.Variable([1, 2], name="seen")
            return seen, prepared(strategy)

        joining = pool.submit(program, other)
        mine, _keep = program(chief)
        theirs, _keep_too = joining.result(PATIENCE)
        mine.assign_add(torch.tensor([10, 10]))
        cluster.lose(0)
        cluster.lose(1)
        recovering = pool.submit(other.recover)
        chief.recover()
        recovering.result(PATIENCE)
        theirs.assign_add(torch.tensor([1, 1]))
        assert mine.value().tolist() == [2, 3], "with the values that they were made with"


def adam(model: nn.Module) -> optim.Optimizer:
    return optim.Adam(model.parameters(), lr=0.1)


def test_all_comes_back_from_what_was_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Parameters, optimizer state and the program's own variables, also those of ps tasks that were not lost."""
    with a_cluster(num_workers=2) as cluster, ThreadPoolExecutor(1) as pool:
        chief, other = cluster.strategy(0), cluster.strategy(1)

        def program(strategy: ps.ParameterServerStrategy) -> tuple[ps.Variable, Any, Any]:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
            with strategy.scope():
                seen = ps.Variable([1, 2], name="seen")
            return seen, *strategy.prepare(model, adam(model))

        joining = pool.submit(program, other)
        seen, model, optimizer = program(chief)
        _, theirs, their_optimizer = joining.result(PATIENCE)
        step(model, optimizer)
        seen.assign_add([10, 10])
        chief.save(tmp_path)
        saved, state = contents(model), optimizer.state_dict()
        for _ in range(2):
            step(model, optimizer)
        step(theirs, their_optimizer)
        seen.assign_add([10, 10])
        for index in range(2):
            cluster.lose(index)
        recovering = pool.submit(other.recover)
        chief.recover()
        recovering.result(PATIENCE)
        assert chief.global_step == other.global_step == 1
        assert seen.value().tolist() == [11, 12]
        for each in (model, theirs):
            torch.testing.assert_close(contents(each), saved, rtol=0, atol=0)
        for each in (optimizer, their_optimizer):
            torch.testing.assert_close(each.state_dict(), state, rtol=0, atol=0)
    assert f"ps:0, ps:1 came back empty; all ps tasks go back to {tmp_path / 'ckpt-1'}" in caplog.text
    assert "2 updates are lost (back from step 3 to 1)" in caplog.text
    assert "worker:1: 3 updates are lost (back from step 4 to 1)" in caplog.text


def test_without_a_checkpoint_it_is_said_what_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    with a_cluster(num_workers=2) as cluster, ThreadPoolExecutor(1) as pool:
        chief, other = cluster.strategy(0), cluster.strategy(1)

        def program(strategy: ps.ParameterServerStrategy) -> tuple[ps.Variable, ps.Variable, Any, Any]:
            with strategy.scope():
                one, two = ps.Variable(1, name="one"), ps.Variable(2, name="two")
            return one, two, *prepared(strategy)

        joining = pool.submit(program, other)
        one, two, model, optimizer = program(chief)
        *_, theirs, their_optimizer = joining.result(PATIENCE)
        step(model, optimizer)
        for _ in range(3):
            step(theirs, their_optimizer)
        one.assign(10)
        two.assign(20)
        cluster.lose(1)
        recovering = pool.submit(other.recover)
        chief.recover()
        recovering.result(PATIENCE)
        assert (one.value(), two.value()) == (10, 2)
    assert "ps:1 came back empty, and this run has saved no checkpoint" in caplog.text
    assert "the chief's values of step 1, and 3 later updates are lost" in caplog.text
    assert "1 ps.Variables go back to their first values: two." in caplog.text
    assert "the optimizer state of 4 variables there starts anew" in caplog.text


def test_a_chief_that_has_restored_goes_back_to_that(tmp_path: Path) -> None:
    source = ps.ParameterServerStrategy()
    model, optimizer = prepared(source)
    step(model, optimizer)
    source.save(tmp_path)
    with a_cluster() as cluster:
        strategy = cluster.strategy()
        strategy.restore(tmp_path)
        other, other_optimizer = prepared(strategy)
        step(other, other_optimizer)
        cluster.lose(0)
        strategy.recover()
        assert strategy.global_step == 1
        torch.testing.assert_close(contents(other), contents(model), rtol=0, atol=0)


def test_recover_is_for_a_cluster() -> None:
    with pytest.raises(RuntimeError, match="recover: .* has no prepared model on the ps tasks of a cluster"):
        ps.ParameterServerStrategy().recover()


# --- tables, of which workers hold no values

ROWS = 30
sparse = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # torch's own


class Net(nn.Module):
    """A table and a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(ROWS, 4, sparse=True)
        self.head = nn.Linear(4, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids)).squeeze(1)  # type: ignore[no-any-return]


def adagrad(model: nn.Module) -> optim.Optimizer:
    return optim.Adagrad(model.parameters(), lr=0.1)


def batch(at: int) -> tuple[Tensor, Tensor]:
    ids = torch.arange(at, at + 12) % ROWS
    return ids, ids / ROWS


def train(model: Any, optimizer: Any, at: int) -> None:
    ids, labels = batch(at)
    optimizer.zero_grad()
    F.mse_loss(model(ids), labels).backward()
    optimizer.step()


def trained(count: int) -> Net:
    """What plain PyTorch comes to."""
    model = Net()
    optimizer = adagrad(model)
    for at in range(count):
        train(model, optimizer, at)
    return model


@sparse
def test_a_connection_that_is_lost_loses_no_rows() -> None:
    with a_cluster() as cluster:
        strategy, model = cluster.strategy(), Net()
        model, optimizer = strategy.prepare(model, adagrad(model))
        for at in range(6):
            if at == 3:
                assert strategy.client is not None
                strategy.client.lanes.close()
                strategy.recover(initialize=lambda *_: pytest.fail("the ps tasks still hold the values"))
            train(model, optimizer, at)
        torch.testing.assert_close(dict(model.state_dict()), dict(trained(6).state_dict()))


@sparse
def test_a_table_comes_back_from_what_was_saved(tmp_path: Path) -> None:
    with a_cluster() as cluster:
        strategy, model = cluster.strategy(), Net()
        model, optimizer = strategy.prepare(model, adagrad(model))
        for at in range(3):
            train(model, optimizer, at)
        strategy.save(tmp_path)
        train(model, optimizer, 20)
        for index in range(2):
            cluster.lose(index)
        strategy.recover()
        for at in range(3, 6):
            train(model, optimizer, at)
        torch.testing.assert_close(dict(model.state_dict()), dict(trained(6).state_dict()))


@sparse
def test_a_table_that_was_never_saved_is_refused_with_the_way() -> None:
    with a_cluster() as cluster:
        strategy, model = cluster.strategy(), Net()
        kept = strategy.prepare(model, adagrad(model))
        for index in range(2):
            cluster.lose(index)
        with pytest.raises(ConfigError, match=r"'table.weight' is a table.*strategy.save"):
            strategy.recover()
        assert kept


class Loses(TrainingHook):
    """Loses all ps tasks after a step."""

    def __init__(self, cluster: Cluster, step: int) -> None:
        self._cluster, self._step = cluster, step

    def after_run(self, context: RunContext, values: RunValues) -> None:
        if values.global_step == self._step:
            self._step = -1
            for index in range(2):
                self._cluster.lose(index)


def model_fn(mode: ModeKeys) -> EstimatorSpec:
    model = Net()
    return EstimatorSpec(
        mode,
        model=model,
        loss_fn=lambda model, ids, labels: F.mse_loss(model(ids), labels),
        optimizer=adagrad(model),
    )


@sparse
def test_the_estimator_brings_a_table_back_from_a_checkpoint(tmp_path: Path) -> None:
    """With its slots: as each step is saved, nothing is lost but the batch of the step that was not made."""
    seen: list[int] = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for at in range(100):
            seen.append(at)
            yield batch(at)

    with a_cluster() as cluster:
        config = RunConfig(model_dir=str(tmp_path), save_checkpoints_steps=1, train_distribute=cluster.strategy())
        Estimator(model_fn, config=config).train(batches, max_steps=10, hooks=[Loses(cluster, 6)])
    assert seen == list(range(11)), "one of them was for a step that found no ps"
    plain = Net()
    optimizer = adagrad(plain)
    for at in [*range(6), *range(7, 11)]:
        train(plain, optimizer, at)
    torch.testing.assert_close(read_values(str(tmp_path / "ckpt-10")), dict(plain.state_dict()))


class LosesWhileTold(TrainingHook):
    """Loses a ps again while the hooks are told of a session: of the first one, or of one that was recreated."""

    def __init__(self, cluster: Cluster, session: int) -> None:
        self._cluster, self._left = cluster, session

    def after_create_session(self, session: TrainingSession) -> None:
        self._left -= 1
        if self._left == 0:
            self._cluster.lose(0)
            session.read_global_step()
            pytest.fail("the loss was not noticed")


@sparse
@pytest.mark.parametrize("session", [1, 2, 3])
def test_a_ps_that_is_lost_again_while_hooks_are_told_of_the_recovery_is_waited_for_too(
    tmp_path: Path, session: int
) -> None:
    """Session 1 is the training's first one, 2 the one after a loss, 3 the one after a loss in telling of a loss."""
    with a_cluster() as cluster:
        told = [LosesWhileTold(cluster, which) for which in {2, session}]
        config = RunConfig(model_dir=str(tmp_path), save_checkpoints_steps=1, train_distribute=cluster.strategy())
        Estimator(model_fn, config=config).train(
            lambda: map(batch, range(100)), max_steps=10, hooks=[Loses(cluster, 6), *told]
        )
    assert read_values(str(tmp_path / "ckpt-10"))


def tables_and_dense(model: nn.Module) -> list[optim.Optimizer]:
    net: Any = model
    return [adagrad(net.table), optim.Adam(net.head.parameters(), lr=0.1)]


def two_fn(mode: ModeKeys) -> EstimatorSpec:
    spec = model_fn(mode)
    assert spec.model is not None
    return EstimatorSpec(mode, model=spec.model, loss_fn=spec.loss_fn, optimizer=tables_and_dense(spec.model))


@sparse
def test_tables_by_one_optimizer_and_layers_by_another_come_back_from_a_checkpoint(tmp_path: Path) -> None:
    """With the slots of both."""
    with a_cluster() as cluster:
        config = RunConfig(model_dir=str(tmp_path), save_checkpoints_steps=1, train_distribute=cluster.strategy())
        Estimator(two_fn, config=config).train(lambda: map(batch, range(100)), max_steps=10, hooks=[Loses(cluster, 6)])
    plain = Net()
    optimizers = tables_and_dense(plain)
    for at in [*range(6), *range(7, 11)]:
        ids, labels = batch(at)
        plain.zero_grad()
        F.mse_loss(plain(ids), labels).backward()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(read_values(str(tmp_path / "ckpt-10")), dict(plain.state_dict()))


@sparse
@pytest.mark.parametrize("until", ["steps", "max_steps"])
def test_a_ps_that_is_lost_after_the_last_step_costs_no_step(tmp_path: Path, until: str) -> None:
    """What it held is restored from before, and the steps from there on are made again, on the batches that follow."""
    with a_cluster() as cluster:
        config = RunConfig(model_dir=str(tmp_path), save_checkpoints_steps=4, train_distribute=cluster.strategy())
        estimator = Estimator(model_fn, config=config)
        estimator.train(lambda: map(batch, range(100)), **{until: 10}, hooks=[Loses(cluster, 10)])
    plain = Net()
    optimizer = adagrad(plain)
    for at in [*range(8), 10, 11]:
        train(plain, optimizer, at)
    torch.testing.assert_close(read_values(str(tmp_path / "ckpt-10")), dict(plain.state_dict()))


@sparse
def test_a_ps_that_is_lost_after_the_end_of_the_input_ends_the_training_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """There is nothing to make the lost steps from."""
    with a_cluster() as cluster:
        config = RunConfig(model_dir=str(tmp_path), save_checkpoints_steps=4, train_distribute=cluster.strategy())
        estimator = Estimator(model_fn, config=config)
        estimator.train(lambda: map(batch, range(10)), hooks=[Loses(cluster, 10)])
    torch.testing.assert_close(read_values(estimator.latest_checkpoint() or ""), dict(trained(8).state_dict()))
    assert "had finished at step 10, but lost updates put it back at step 8" in caplog.text


@sparse
def test_what_was_trained_with_a_table_is_evaluated_and_warms_a_start_up(tmp_path: Path) -> None:
    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        return map(batch, range(5))

    with a_cluster() as cluster:
        config = RunConfig(model_dir=str(tmp_path / "run"), train_distribute=cluster.strategy())
        Estimator(model_fn, config=config).train(batches)
    plain = trained(5)
    expected = torch.stack([F.mse_loss(plain(ids), labels) for ids, labels in batches()]).mean()
    metrics = Estimator(model_fn, config=RunConfig(model_dir=str(tmp_path / "run"))).evaluate(batches)
    assert (metrics["global_step"], metrics["loss"]) == (5, pytest.approx(expected.item(), rel=1e-5))

    config = RunConfig(model_dir=str(tmp_path / "warm"))
    Estimator(model_fn, config=config, warm_start_from=str(tmp_path / "run")).train(batches, max_steps=1)
    train(plain, adagrad(plain), 0)
    torch.testing.assert_close(read_values(str(tmp_path / "warm" / "ckpt-1")), dict(plain.state_dict()))
