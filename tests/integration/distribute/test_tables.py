"""Tables: embeddings whose rows stay on the ps tasks train as torch's own sparse ones do, over every lane."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from tests.patience import patience
from torch import nn, optim

import paramserver as ps
from paramserver.checkpoint.model_dir import CheckpointManager
from paramserver.client.client import ParameterClient
from paramserver.distribute.bound import parameters as bound_parameters
from paramserver.distribute.bound.tables import lookup
from paramserver.distribute.checkpoints import restore_checkpoint, write_checkpoint
from paramserver.errors import ConfigError, RefusedError, UnsupportedOptimizerError
from paramserver.estimator.checkpoint import read_values
from paramserver.memory import rows
from paramserver.placement import FixedShards
from paramserver.testing.local_cluster import LocalCluster
from paramserver.transport.lane import TableRows
from paramserver.wire.messages import Part

# What torch says, once in a process, of the sparse tensors that its own optimizers make.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")

ROWS, WIDTH = 40, 6
RULES = {
    "SGD": lambda params: optim.SGD(params, lr=0.5),
    "SGD, maximize": lambda params: optim.SGD(params, lr=0.1, maximize=True),
    "Adagrad": lambda params: optim.Adagrad(params, lr=0.3, lr_decay=0.05, initial_accumulator_value=0.1),
    "SparseAdam": lambda params: optim.SparseAdam(params, lr=0.1, betas=(0.8, 0.95)),
}


class Net(nn.Module):
    """Two embeddings, one of them with bags, that share their table if they are tied."""

    def __init__(self, *, tied=False, mode="mean"):
        super().__init__()
        self.words = nn.Embedding(ROWS, WIDTH, sparse=True, padding_idx=3)
        self.bags = nn.EmbeddingBag(ROWS, WIDTH, sparse=True, mode=mode, padding_idx=5)
        if tied:
            self.bags.weight = self.words.weight
        self.head = nn.Linear(2 * WIDTH, 1)

    def forward(self, ids):
        return self.head(torch.cat([self.words(ids).sum(1), self.bags(ids)], 1)).squeeze(1)


def batches(count, batch=16, seed=1):
    """Ids with many duplicates and with both paddings, and targets."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randint(0, ROWS, (batch, 5), generator=generator), torch.rand(batch, generator=generator))
        for _ in range(count)
    ]


def optimizers_of(model, rule):
    tables = list({id(each): each for each in (model.words.weight, model.bags.weight)}.values())
    return [RULES[rule](tables), optim.SGD(model.head.parameters(), lr=0.1)]


def step(model, optimizers, *inputs):
    for optimizer in optimizers:
        optimizer.zero_grad()
    for ids, target in inputs:
        F.mse_loss(model(ids), target).backward()
    for optimizer in optimizers:
        optimizer.step()


def a_net(**options):
    torch.manual_seed(0)
    return Net(**options)


@pytest.fixture(params=["in process", "1 ps auto", "2 ps auto", "2 ps tcp"])
def strategy_with(request, monkeypatch):
    """Makes the strategy of the only worker, in one process and in a cluster."""
    if request.param == "in process":
        yield ps.ParameterServerStrategy
        return
    num_ps, _, lane = request.param.split()
    monkeypatch.setenv("PARAMSERVER_LANE", lane)
    with LocalCluster(ps=int(num_ps), workers=1, lane=lane) as cluster:
        strategies = []

        def make(**options):
            strategies.append(ps.ParameterServerStrategy(cluster.resolver("chief:0"), **options))
            return strategies[-1]

        yield make
        for strategy in strategies:
            strategy.close()


def assert_same_values(model, plain):
    torch.testing.assert_close(dict(model.state_dict()), dict(plain.state_dict()))


@pytest.fixture(params=["many ids", "few ids", "large table"])
def many(request, monkeypatch):
    """What a test looks up counts as many ids, or as few, and its table as large, or as small."""
    if request.param == "many ids":
        monkeypatch.setattr(lookup, "MANY_IDS", 0)
    monkeypatch.setattr(rows, "LARGE", 0 if request.param == "large table" else 1 << 62)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.usefixtures("many")
def test_a_table_trains_as_torch_trains_it(strategy_with, rule, shards):
    plain, model = a_net(), a_net()
    theirs = optimizers_of(plain, rule)
    model, ours = strategy_with(variable_partitioner=FixedShards(shards)).prepare(model, optimizers_of(model, rule))
    for batch in batches(5):
        step(plain, theirs, batch)
        step(model, ours, batch)
        assert_same_values(model, plain)
    assert not torch.equal(plain.words.weight, a_net().words.weight)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_one_table_may_serve_several_modules_and_batches_of_a_step(strategy_with, mode):
    plain, model = a_net(tied=True, mode=mode), a_net(tied=True, mode=mode)
    theirs = optimizers_of(plain, "Adagrad")
    model, ours = strategy_with().prepare(model, optimizers_of(model, "Adagrad"))
    for first, second in zip(batches(3), batches(3, batch=7, seed=2), strict=True):
        step(plain, theirs, first, second)
        step(model, ours, first, second)
        assert_same_values(model, plain)


def test_z21_a_table_follows_a_schedule_and_a_step_without_its_gradient(strategy_with):
    plain, model = a_net(), a_net()
    theirs = optimizers_of(plain, "SparseAdam")
    given = optimizers_of(model, "SparseAdam")
    model, ours = strategy_with().prepare(model, given)
    schedules = [optim.lr_scheduler.ExponentialLR(optimizers[0], 0.5) for optimizers in (theirs, ours)]
    for batch in batches(3):
        for each, optimizers in ((plain, theirs), (model, ours)):
            step(each, optimizers, batch)
            step(each, optimizers)
        for schedule in schedules:
            schedule.step()
        assert_same_values(model, plain)


@pytest.mark.parametrize("ids", [[1, 5, 1, 7, 39], [1, 1, 1, 7]], ids=["few repeats", "mostly repeats"])
@pytest.mark.usefixtures("many")
def test_the_gradient_of_a_lookup_may_be_part_of_the_loss(strategy_with, ids):
    def loss_of(model):
        rows = model(torch.tensor(ids))
        (gradient,) = torch.autograd.grad(rows.pow(2).sum(), model.weight, create_graph=True)
        return rows.sum() + gradient.coalesce().values().square().sum()

    torch.manual_seed(0)
    plain = nn.Embedding(ROWS, WIDTH, sparse=True)
    model, theirs = copy.deepcopy(plain), optim.SGD(plain.parameters(), lr=1e-4)
    model, ours = strategy_with().prepare(model, optim.SGD(model.parameters(), lr=1e-4))
    for _ in range(3):
        for each, optimizer in ((plain, theirs), (model, ours)):
            optimizer.zero_grad()
            loss_of(each).backward()
            optimizer.step()
        assert_same_values(model, plain)


def test_bags_take_offsets_and_weights(strategy_with):
    ids, offsets, weights = torch.tensor([1, 5, 1, 7, 39]), torch.tensor([0, 3]), torch.rand(5)

    def loss_of(model):
        return model(ids, offsets, per_sample_weights=weights).square().sum()

    torch.manual_seed(0)
    plain = nn.EmbeddingBag(ROWS, WIDTH, sparse=True, mode="sum")
    model, theirs = copy.deepcopy(plain), optim.SGD(plain.parameters(), lr=0.5)
    model, ours = strategy_with().prepare(model, optim.SGD(model.parameters(), lr=0.5))
    for _ in range(3):
        for each, optimizer in ((plain, theirs), (model, ours)):
            optimizer.zero_grad()
            loss_of(each).backward()
            optimizer.step()
        torch.testing.assert_close(loss_of(model), loss_of(plain))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_d13_gradients_of_replicas_are_put_together_without_making_them_dense(strategy_with, reduction):
    plain, model = a_net(), a_net()
    theirs = optimizers_of(plain, "Adagrad")
    strategy = strategy_with(compute_devices=["cpu:0", "cpu:1"])
    model, ours = strategy.prepare(model, optimizers_of(model, "Adagrad"), gradient_reduction=reduction)
    for first, second in zip(batches(3), batches(3, seed=2), strict=True):
        strategy.run(lambda batch: step(model, ours, batch), args=(ps.PerReplica((first, second)),))
        for optimizer in theirs:
            optimizer.zero_grad()
        for ids, target in (first, second):
            (F.mse_loss(plain(ids), target) / (2 if reduction == "mean" else 1)).backward()
        for optimizer in theirs:
            optimizer.step()
        assert_same_values(model, plain)


def test_only_the_rows_of_a_batch_travel(strategy_with, monkeypatch):
    pulled, pushed = [], []
    client_class = ParameterClient
    pull_rows, push_pull = client_class.pull_rows, client_class.push_pull

    def note_pull(self, wanted):
        pulled.extend(row for _, _, rows in wanted for row in rows.ids)
        pull_rows(self, wanted)

    def note_push(self, *args, rows=None, **options):
        pushed.extend(row for each in rows or () for one in each for row in one.ids)
        return push_pull(self, *args, rows=rows, **options)

    model, optimizer = a_table(strategy_with())
    monkeypatch.setattr(client_class, "pull_rows", note_pull)
    monkeypatch.setattr(client_class, "push_pull", note_push)
    model(torch.tensor([[7, 2, 7], [2, 39, 7]])).sum().backward()
    optimizer.step()
    assert pulled == pushed == [2, 7, 39]


def embedding():
    torch.manual_seed(0)
    return nn.Embedding(ROWS, WIDTH, sparse=True)


def a_table(strategy):
    return prepared(strategy, embedding())


def prepared(strategy, model):
    return strategy.prepare(model, optim.SGD(model.parameters(), lr=1.0))


def test_a_worker_of_a_cluster_holds_no_values_and_state_dict_has_them_all():
    with LocalCluster(ps=2, workers=1) as cluster:
        strategy = ps.ParameterServerStrategy(
            cluster.resolver("chief:0"), variable_partitioner=FixedShards(2), session_creation_timeout=30
        )
        model, _ = a_table(strategy)
        torch.manual_seed(0)
        assert model.weight.isnan().all()
        assert model.weight.untyped_storage().nbytes() == 4
        assert torch.equal(model.state_dict()["weight"], nn.Embedding(ROWS, WIDTH).weight)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(torch.tensor([4])), model(torch.tensor([4])))
        strategy.close()


def test_a_row_that_is_not_there_is_named(strategy_with):
    model, _ = a_table(strategy_with())
    for wrong in (ROWS, -1):
        with pytest.raises(IndexError, match=rf"rows of 'weight': expected ids from 0 to {ROWS - 1}, got {wrong}"):
            model(torch.tensor([1, wrong]))
    assert model(torch.empty(0, 3, dtype=torch.int32)).shape == (0, 3, WIDTH)


def test_pushes_of_many_workers_to_one_table_all_count():
    rounds, ids = 30, torch.arange(0, ROWS, 3)
    with LocalCluster(ps=1, workers=3) as cluster:
        strategies = [
            ps.ParameterServerStrategy(cluster.resolver(task), session_creation_timeout=patience(30))
            for task in cluster.tasks
        ]

        def train(strategy, table):
            model, optimizer = prepared(strategy, table)
            for _ in range(rounds):
                optimizer.zero_grad()
                model(ids).sum().backward()
                optimizer.step()
            models.append(model)

        models, tables = [], [embedding() for _ in strategies]  # one by one: threads share the random numbers
        threads = [threading.Thread(target=train, args=each) for each in zip(strategies, tables, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        whole = models[0].state_dict()["weight"]
        for strategy in strategies:
            strategy.close()
    expected = embedding().weight.detach().clone()
    expected[ids] -= rounds * len(strategies)
    torch.testing.assert_close(whole, expected)


@pytest.mark.parametrize("lane", ["auto", "tcp"])
def test_a_pipelined_step_loses_no_row(monkeypatch, lane):
    monkeypatch.setenv("PARAMSERVER_LANE", lane)
    with LocalCluster(ps=1, workers=1) as cluster:
        strategy = ps.ParameterServerStrategy(
            cluster.resolver("chief:0"), pipeline=True, session_creation_timeout=patience(30)
        )
        model, optimizer = a_table(strategy)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.tensor([1, 2, 1])).sum().backward()
            optimizer.step()
        strategy.refresh()
        torch.manual_seed(0)
        expected = nn.Embedding(ROWS, WIDTH).weight.detach().clone()
        expected[1] -= 10
        expected[2] -= 5
        torch.testing.assert_close(model.state_dict()["weight"], expected)
        strategy.close()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda params: optim.Adam(params), UnsupportedOptimizerError, "Adam cannot update 'weight', whose gradient"),
        (lambda params: optim.SGD(params, momentum=0.9), UnsupportedOptimizerError, "momentum=0.9 would move rows"),
        (lambda params: optim.Adagrad(params, weight_decay=0.1), UnsupportedOptimizerError, "weight_decay=0.1 would"),
    ],
)
def test_what_cannot_update_rows_is_refused_when_it_is_prepared(make, error, message):
    model = nn.Embedding(ROWS, WIDTH, sparse=True)
    with pytest.raises(error, match=message):
        ps.ParameterServerStrategy().prepare(model, make(model.parameters()))
    assert not model.weight.isnan().any()


def test_an_embedding_that_changes_rows_when_they_are_looked_up_is_refused():
    model = nn.Embedding(ROWS, WIDTH, sparse=True, max_norm=1.0)
    with pytest.raises(ConfigError, match=r"max_norm=1.0, which changes rows"):
        ps.ParameterServerStrategy().prepare(model, optim.SGD(model.parameters(), lr=0.1))


def test_a_dense_gradient_of_a_table_is_refused():
    model, optimizer = a_table(ps.ParameterServerStrategy())
    model.weight.sum().backward()
    with pytest.raises(ConfigError, match=r"'weight' is a table .* use its weight in nn.Embedding only"):
        optimizer.step()


@pytest.mark.parametrize("late_bytes", [0, bound_parameters.LATE_BYTES])
def test_a_weight_that_something_else_uses_is_no_table(monkeypatch, late_bytes):
    monkeypatch.setattr(bound_parameters, "LATE_BYTES", late_bytes)

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(ROWS, WIDTH, sparse=True)
            self.out = nn.Linear(WIDTH, ROWS, bias=False)
            self.out.weight = self.words.weight

    model = Tied()
    model, optimizer = ps.ParameterServerStrategy().prepare(model, optim.SGD(model.parameters(), lr=0.1))

    def step():
        model.words(torch.tensor([1])).sum().backward()
        optimizer.step()  # whose part it is where gradients come home late

    with pytest.raises(NotImplementedError, match=r"'words.weight' got a sparse gradient but is not a table"):
        step()
    optimizer.zero_grad()
    model.out(model.words(torch.tensor([1]))).sum().backward()  # a sum of a sparse and a dense one is dense
    optimizer.step()


def push_rows(client, rows):
    """Add to rows of the only table."""
    plans = client.plan([[Part(0, "add", rows=len(rows.ids))]], [()])
    client.push_pull(plans, counts=False, rows=[[rows]])


@pytest.mark.parametrize("lane", ["auto", "tcp"])
@pytest.mark.parametrize("ids", [[3, 2], [2, 2], [-1, 2], [2, ROWS]])
def test_rows_that_are_none_are_refused_and_change_nothing(monkeypatch, lane, ids):
    monkeypatch.setenv("PARAMSERVER_LANE", lane)
    with LocalCluster(ps=1, workers=1) as cluster:
        strategy = ps.ParameterServerStrategy(cluster.resolver("chief:0"), session_creation_timeout=patience(30))
        model, _ = a_table(strategy)
        before = model.state_dict()["weight"]
        rows = TableRows(torch.tensor(ids).numpy(), torch.ones(2, WIDTH))
        with pytest.raises(RefusedError, match=r"rows of 'weight' on ps:0 refused: the ids of its 40 rows must ascend"):
            push_rows(strategy.client, rows)
        with pytest.raises(RefusedError, match=r"it has 40 rows, and 41 different ones were named"):
            push_rows(strategy.client, TableRows(torch.arange(41).numpy(), torch.ones(41, WIDTH)))
        assert torch.equal(model.state_dict()["weight"], before)
        strategy.close()


@pytest.mark.parametrize("rule", ["Adagrad", "SparseAdam"])
@pytest.mark.parametrize(("before", "after"), [((2, 3), (1, 1)), ((1, 1), (2, 2)), ((2, 2), (2, 3))])
def test_b06_training_goes_on_from_a_checkpoint_with_another_division(tmp_path, rule, before, after):
    plain = a_net()
    theirs = optimizers_of(plain, rule)
    checkpoint = ""
    for num_ps, shards in (before, after):
        with LocalCluster(ps=num_ps, workers=1) as cluster:
            strategy = ps.ParameterServerStrategy(
                cluster.resolver("chief:0"), variable_partitioner=FixedShards(shards), session_creation_timeout=30
            )
            model = a_net()
            model, ours = strategy.prepare(model, optimizers_of(model, rule))
            if checkpoint:
                restore_checkpoint(strategy.client, checkpoint)
                strategy.refresh()
                assert_same_values(model, plain)
            for batch in batches(4, seed=num_ps + shards):
                step(plain, theirs, batch)
                step(model, ours, batch)
            assert_same_values(model, plain)
            checkpoint = write_checkpoint(strategy.client, CheckpointManager(str(tmp_path)), strategy.global_step, {})
            torch.testing.assert_close(read_values(checkpoint), dict(plain.state_dict()))
            strategy.close()


def test_after_the_loss_of_a_ps_a_table_needs_a_checkpoint():
    with LocalCluster(ps=1, workers=1) as cluster:
        strategy = ps.ParameterServerStrategy(cluster.resolver("chief:0"), session_creation_timeout=patience(30))
        kept = a_table(strategy)
        (bound,) = strategy._models
        with pytest.raises(ConfigError, match=r"'weight' is a table, whose values workers do not hold"):
            bound.assign()
        del kept
        strategy.close()


def test_a_worker_whose_embedding_is_not_sparse_is_told_so():
    with LocalCluster(ps=1, workers=2) as cluster:
        chief, worker = (
            ps.ParameterServerStrategy(cluster.resolver(task), session_creation_timeout=patience(30))
            for task in cluster.tasks
        )
        a_table(chief)
        model = nn.Embedding(ROWS, WIDTH)
        with pytest.raises(ps.errors.ModelMismatchError, match=r"has SGD by rows, this worker's has SGD"):
            worker.prepare(model, optim.SGD(model.parameters(), lr=1.0))
        worker.close()
        chief.close()
