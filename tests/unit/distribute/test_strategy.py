"""ParameterServerStrategy: what it finds out about the cluster, and the scope and run of every strategy."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import paramserver as ps

CLUSTER = {"chief": ["a:1"], "worker": ["b:1", "c:1"], "ps": ["d:1", "e:1", "f:1"]}


def strategy(
    cluster: dict[str, list[str]] | None = None, task_type: str | None = "worker", task_id: int | None = 0
) -> ps.ParameterServerStrategy:
    spec = ps.ClusterSpec(CLUSTER if cluster is None else cluster)
    return ps.ParameterServerStrategy(ps.SimpleClusterResolver(spec, task_type=task_type, task_id=task_id))


# --- construction


def test_tf_config_says_who_we_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """C01, C03."""
    task = {"type": "worker", "index": 1}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": CLUSTER, "task": task}))
    found = ps.ParameterServerStrategy()
    assert (str(found.task), found.num_ps, found.cluster) == ("worker:1", 3, ps.ClusterSpec(CLUSTER))
    assert isinstance(found.cluster_resolver, ps.TFConfigClusterResolver)


@pytest.mark.parametrize("text", [None, "{}", '{"cluster": {}}'])
def test_without_a_cluster_everything_is_in_one_process(text: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """C02."""
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if text is not None:
        monkeypatch.setenv("TF_CONFIG", text)
    found = ps.ParameterServerStrategy()
    assert (found.task, found.is_chief, bool(found.cluster), found.num_ps) == (None, True, False, 1)


@pytest.mark.parametrize(("task_type", "task_id"), [(None, 0), ("", 0), ("worker", None)])
def test_a_cluster_needs_a_task(task_type: str | None, task_id: int | None) -> None:
    """C04."""
    with pytest.raises(ValueError, match="task_type and task_id"):
        strategy(task_type=task_type, task_id=task_id)


def test_task_0_is_a_task() -> None:
    """C04."""
    assert str(strategy(task_type="worker", task_id=0).task) == "worker:0"


@pytest.mark.parametrize(
    ("cluster", "task", "message"),
    [
        ({"worker": ["a:1"]}, ("worker", 0), "ps"),  # C05
        ({"worker": ["a:1"], "ps": ["b:1"], "cook": ["c:1"]}, ("worker", 0), "cook"),  # C07
        (CLUSTER, ("cook", 0), "cook"),  # C08
        ({"worker": ["a:1"], "ps": ["b:1"]}, ("chief", 0), "chief"),  # C09
        ({"chief": ["a:1", "b:1"], "ps": ["c:1"]}, ("chief", 0), "chief"),  # C10
        (CLUSTER, ("worker", 2), "worker"),  # C11
    ],
)
def test_a_cluster_that_cannot_work_is_refused(
    cluster: dict[str, list[str]], task: tuple[str, int], message: str
) -> None:
    """C05 to C11, V2-01."""
    with pytest.raises(ValueError, match=message):
        strategy(cluster, *task)


@pytest.mark.parametrize(
    ("cluster", "task", "expected"),
    [
        (CLUSTER, ("chief", 0), True),
        (CLUSTER, ("worker", 0), False),
        (CLUSTER, ("ps", 0), False),
        (CLUSTER, ("evaluator", 0), True),
        ({"worker": ["a:1", "b:1"], "ps": ["c:1"]}, ("worker", 0), True),
        ({"worker": ["a:1", "b:1"], "ps": ["c:1"]}, ("worker", 1), False),
        ({"worker": ["a:1", "b:1"], "ps": ["c:1"]}, ("ps", 0), False),
    ],
)
def test_who_is_the_chief(cluster: dict[str, list[str]], task: tuple[str, int], expected: bool) -> None:
    """C12; W08: only the chief initializes, checkpoints and writes summaries."""
    found = strategy(cluster, *task)
    extended = found.extended
    assert found.is_chief is expected
    assert (extended.should_init, extended.should_checkpoint, extended.should_save_summary) == (expected,) * 3


@pytest.mark.parametrize("gpus", [0, 1, 3])
def test_devices_of_a_cluster(gpus: int) -> None:
    """C13, C14, C15: the accelerators that the resolver counts, as devices of this worker."""
    resolver = ps.SimpleClusterResolver(
        ps.ClusterSpec(CLUSTER), task_type="worker", task_id=1, num_accelerators={"GPU": gpus, "TPU": 8}
    )
    extended = ps.ParameterServerStrategy(resolver).extended
    assert extended.parameter_devices == ("/job:ps/task:0", "/job:ps/task:1", "/job:ps/task:2")
    kind = "GPU" if gpus else "CPU"
    devices = tuple(f"/job:worker/task:1/device:{kind}:{index}" for index in range(gpus or 1))
    assert extended.worker_devices == devices
    assert extended.worker_devices_by_replica == tuple((device,) for device in devices)


def test_tf_config_counts_the_devices_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """C14: whatever the resolver itself would say."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(ps.TFConfigClusterResolver, "num_accelerators", lambda *_: {"GPU": 9})
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": CLUSTER, "task": {"type": "chief", "index": 0}}))
    devices = ps.ParameterServerStrategy().extended.worker_devices
    assert devices == ("/job:chief/task:0/device:GPU:0", "/job:chief/task:0/device:GPU:1")


@pytest.mark.parametrize(
    ("gpus", "compute", "variables"),
    [
        (0, ("/device:CPU:0",), "/device:CPU:0"),
        (1, ("/device:GPU:0",), "/device:GPU:0"),
        (2, ("/device:GPU:0", "/device:GPU:1"), "/device:CPU:0"),
    ],
)
@pytest.mark.parametrize("make", [ps.ParameterServerStrategy, ps.CentralStorageStrategy])
def test_devices_of_one_process(
    gpus: int,
    compute: tuple[str, ...],
    variables: str,
    make: type[ps.ParameterServerStrategy],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """C17."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    extended = make().extended
    assert (extended.worker_devices, extended.parameter_devices) == (compute, (variables,))
    assert make().num_replicas_in_sync == len(compute)


@pytest.mark.parametrize(
    ("named", "compute", "variables"),
    [
        ({"compute_devices": ["cuda:1"]}, ("/device:GPU:1",), "/device:GPU:1"),
        ({"compute_devices": ["cpu:0", "gpu:1"]}, ("/device:CPU:0", "/device:GPU:1"), "/device:CPU:0"),
        ({"parameter_device": "cpu:3"}, ("/device:GPU:0",), "/device:CPU:3"),
        ({"compute_devices": ["cuda:1"], "parameter_device": "cuda:0"}, ("/device:GPU:1",), "/device:GPU:0"),
    ],
)
@pytest.mark.parametrize("make", [ps.ParameterServerStrategy, ps.CentralStorageStrategy])
def test_devices_that_are_named(
    named: dict[str, Any],
    compute: tuple[str, ...],
    variables: str,
    make: type[ps.ParameterServerStrategy],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """C18: exactly those; a named parameter device wins."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    extended = make(**named).extended
    assert (extended.worker_devices, extended.parameter_devices) == (compute, (variables,))


def test_construction_logs_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """C19."""
    with caplog.at_level("INFO", logger="paramserver"):
        strategy(task_type="chief")
    (record,) = caplog.records
    for part in ("chief:0 (chief)", "3 ps", "variables on /job:ps", "/job:chief/task:0/device:CPU:0"):
        assert part in record.getMessage()


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (
            ps.ParameterServerStrategy,
            "<ParameterServerStrategy in one process; computing on /device:CPU:0, variables on /device:CPU:0>",
        ),
        (
            lambda: ps.CentralStorageStrategy(["cuda:0", "cuda:1"], "cpu:2"),
            "<CentralStorageStrategy in one process; computing on /device:GPU:0, /device:GPU:1, "
            "variables on /device:CPU:2>",
        ),
    ],
)
def test_construction_in_one_process_logs_one_line(
    make: Callable[[], object], line: str, caplog: pytest.LogCaptureFixture
) -> None:
    """C19."""
    with caplog.at_level("INFO", logger="paramserver"):
        make()
    assert [record.getMessage() for record in caplog.records] == [line]


@pytest.mark.parametrize("cluster", [None, {}])
def test_every_worker_runs_the_same_program(cluster: dict[str, list[str]] | None) -> None:
    """W01: also in one process."""
    assert strategy(cluster).extended.between_graph is True


@pytest.mark.parametrize("devices", [["cpu:0"], ["cpu:0", "cpu:1"]])
def test_replicas_are_those_of_this_worker(devices: list[str]) -> None:
    """W06: never workers times replicas."""
    resolver = ps.SimpleClusterResolver(ps.ClusterSpec(CLUSTER), task_type="worker", task_id=1)
    found = ps.ParameterServerStrategy(resolver, compute_devices=devices)
    assert found.num_replicas_in_sync == found.input_context.num_replicas_in_sync == len(devices)


def test_nothing_that_is_passed_in_is_changed() -> None:
    """F01."""
    cluster = ps.ClusterSpec(CLUSTER)
    resolver = ps.SimpleClusterResolver(cluster, task_type="worker", task_id=0)
    ps.ParameterServerStrategy(resolver)
    assert (cluster, resolver.task_type, resolver.task_id) == (ps.ClusterSpec(CLUSTER), "worker", 0)


# --- scope and run


def test_inside_a_scope_and_inside_it_again() -> None:
    """X02, X03."""
    entered = ps.ParameterServerStrategy()
    with entered.scope() as same:
        assert same is entered
        with entered.scope():
            assert ps.get_strategy() is entered
        assert ps.get_strategy() is entered
    assert not ps.has_strategy()


def test_strategies_do_not_mix() -> None:
    """X04, X08."""
    one, other = ps.ParameterServerStrategy(), ps.ParameterServerStrategy()
    with one.scope():
        with pytest.raises(RuntimeError, match="Mixing different strategies"), other.scope():
            pytest.fail("a second strategy was entered")
        with pytest.raises(RuntimeError, match="Mixing different strategies"):
            other.run(lambda: None)
        assert ps.get_strategy() is one


def test_a_scope_is_left_by_an_exception() -> None:
    """X11."""
    with pytest.raises(KeyError), ps.ParameterServerStrategy().scope():
        raise KeyError
    assert not ps.has_strategy()


def test_run_returns_what_the_function_returns() -> None:
    """R05, R07: it needs no Estimator, and no scope."""
    runner = ps.ParameterServerStrategy()
    assert runner.run(lambda a, b: (a, b, ps.get_strategy()), args=(1,), kwargs={"b": 2}) == (1, 2, runner)
    assert runner.run(lambda a: a, [3]) == 3


@pytest.mark.parametrize("args", [torch.zeros(1), 3, "ab", {"a": 1}])
def test_run_takes_a_list_or_a_tuple(args: Any) -> None:
    """E04."""
    with pytest.raises(ValueError, match="positional args must be a list or tuple"):
        ps.ParameterServerStrategy().run(lambda a: a, args)


# --- prepare


@pytest.mark.parametrize("task", [("ps", 0), ("evaluator", 0)])
def test_prepare_is_for_tasks_that_train(task: tuple[str, int]) -> None:
    """C16."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ps.errors.ConfigError, match=f"this task is {task[0]}:0, which does not train"):
        strategy(None, *task).prepare(model, optimizer)


def test_a_prepare_that_was_refused_may_be_made_again() -> None:
    """Its model was the mistake, not that there was one before."""
    trainer = strategy()
    model = nn.Linear(2, 2)
    for _ in range(2):
        with pytest.raises(ps.errors.UnsupportedOptimizerError, match="LBFGS cannot run on a parameter server"):
            trainer.prepare(model, torch.optim.LBFGS(model.parameters()))


@pytest.mark.parametrize(("reduction", "error"), [("max", ValueError), (None, TypeError)])
def test_gradients_are_averaged_or_added_up(reduction: Any, error: type[Exception]) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(error, match="'sum'"):
        ps.ParameterServerStrategy().prepare(model, optimizer, gradient_reduction=reduction)


@pytest.mark.parametrize("sequence", [list, tuple])
def test_a_sequence_of_optimizers_comes_back_as_a_tuple(sequence: Callable[[Any], Any]) -> None:
    model = nn.Linear(2, 2)
    optimizers = [torch.optim.SGD([model.weight], lr=0.1), torch.optim.Adam([model.bias])]
    _, prepared = ps.ParameterServerStrategy().prepare(model, sequence(optimizers))
    assert isinstance(prepared, tuple)
    assert [each.param_groups for each in prepared] == [each.param_groups for each in optimizers]


def test_in_one_process_a_strategy_may_prepare_again() -> None:
    runner = ps.ParameterServerStrategy()
    for _ in range(2):
        model = nn.Linear(2, 2)
        model, optimizer = runner.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        assert runner.global_step == 1


def test_the_model_that_comes_back_is_the_one_that_was_given() -> None:
    model = nn.Linear(2, 2)
    prepared, _ = ps.ParameterServerStrategy().prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert prepared is model


def test_closing_is_idempotent() -> None:
    runner = ps.ParameterServerStrategy()
    runner.close()
    model = nn.Linear(2, 2)
    runner.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    runner.close()
    runner.close()


def test_the_global_step_counts_steps() -> None:
    runner = ps.ParameterServerStrategy()
    assert runner.global_step == 0
    model = nn.Linear(2, 2)
    model, optimizer = runner.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert optimizer.last_push is None
    for step in range(1, 4):
        optimizer.step()
        assert (runner.global_step, optimizer.last_push) == (step, (step, 0))


def test_the_values_of_several_dtypes_can_be_saved(tmp_path):
    """One storage with views of several dtypes is what torch.save refuses."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    ps.ParameterServerStrategy().prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("make", [ps.ParameterServerStrategy, ps.CentralStorageStrategy])
def test_a_loop_of_ones_own_is_legal(make: Callable[[], ps.ParameterServerStrategy]) -> None:
    """R01, R06, R07: PyTorch is eager, so scope, run, the datasets and prepare need no Estimator around them."""
    strategy = make()
    with strategy.scope():
        model = nn.Linear(2, 1)
        model, optimizer = strategy.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))

    def step(batch: torch.Tensor) -> None:
        model(batch).sum().backward()
        optimizer.step()

    for batch in strategy.distribute_dataset([torch.ones(2, 2)]):
        strategy.run(step, args=(batch,))
    for batch in strategy.distribute_datasets_from_function(lambda context: [torch.ones(2, 2)]):
        strategy.run(step, args=(batch,))
    assert strategy.global_step == 2
