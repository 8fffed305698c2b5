"""RunConfig: its fields (G01 to G05, G14), and the cluster that TF_CONFIG describes (G06 to G13, G17)."""

import contextlib
import copy
import json
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from paramserver.cluster import ClusterSpec, TaskId
from paramserver.estimator import Estimator, EvalSpec, TrainSpec, train_and_evaluate
from paramserver.estimator.run_config import DistributeConfig, RunConfig

CLUSTER = {
    "chief": ["host0:2222"],
    "ps": ["host1:2222", "host2:2222"],
    "worker": ["host3:2222", "host4:2222", "host5:2222"],
}
WITHOUT_CHIEF = {"ps": ["host0:1"], "worker": ["host1:1", "host2:1"]}


class FakeStrategy:
    """As little as a RunConfig asks of a strategy."""

    def scope(self):
        return contextlib.nullcontext()


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)


@pytest.fixture
def tf_config(monkeypatch):
    def set_to(task_type=None, index=None, cluster=CLUSTER, **more):
        task = {key: value for key, value in (("type", task_type), ("index", index)) if value is not None}
        config = {"task": task, **more} if cluster is None else {"cluster": cluster, "task": task, **more}
        monkeypatch.setenv("TF_CONFIG", json.dumps(config))

    return set_to


def test_g01_defaults():
    config = RunConfig()
    assert (config.save_summary_steps, config.log_step_count_steps) == (100, 100)
    assert (config.save_checkpoints_secs, config.save_checkpoints_steps) == (600, None)
    assert (config.keep_checkpoint_max, config.keep_checkpoint_every_n_hours) == (5, 10_000)
    assert (config.session_creation_timeout_secs, config.model_dir, config.seed) == (7200, None, None)


@pytest.mark.parametrize(
    ("given", "steps", "secs", "saves"),
    [
        ({"save_checkpoints_steps": 9}, 9, None, True),
        ({"save_checkpoints_secs": 9}, None, 9, True),
        ({"save_checkpoints_steps": None, "save_checkpoints_secs": 9}, None, 9, True),
        ({"save_checkpoints_steps": None, "save_checkpoints_secs": None}, None, None, False),
        ({"save_checkpoints_steps": None}, None, None, False),
        ({"save_checkpoints_secs": 0}, None, 0, False),
    ],
)
def test_g02_steps_and_secs_exclude_each_other(given, steps, secs, saves):
    config = RunConfig(**given)
    assert (config.save_checkpoints_steps, config.save_checkpoints_secs) == (steps, secs)
    assert config.saves_checkpoints is saves


def test_g02_both_are_refused():
    with pytest.raises(ValueError, match="cannot be both set"):
        RunConfig(save_checkpoints_steps=1, save_checkpoints_secs=1)


def test_g03_replace_makes_a_new_object():
    original = RunConfig(model_dir="run", seed=1)
    new = original.replace(seed=2, log_step_count_steps=None)
    assert (new.seed, new.log_step_count_steps, new.model_dir) == (2, None, "run")
    assert (original.seed, original.log_step_count_steps) == (1, 100)
    with pytest.raises(FrozenInstanceError):
        original.seed = 3


def test_g03_setting_one_save_key_clears_the_other():
    by_steps = RunConfig().replace(save_checkpoints_steps=7)
    assert (by_steps.save_checkpoints_steps, by_steps.save_checkpoints_secs) == (7, None)
    by_secs = by_steps.replace(save_checkpoints_secs=8)
    assert (by_secs.save_checkpoints_steps, by_secs.save_checkpoints_secs) == (None, 8)
    off = by_secs.replace(save_checkpoints_steps=None, save_checkpoints_secs=None)
    assert not off.saves_checkpoints
    with pytest.raises(ValueError, match="cannot be both set"):
        by_secs.replace(save_checkpoints_steps=1, save_checkpoints_secs=1)


def test_g03_unknown_keys_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"replacing save_sumary_steps is not supported.*'save_summary_steps'"):
        RunConfig().replace(save_sumary_steps=1)
    with pytest.raises(ValueError, match="replacing task_type is not supported"):
        RunConfig().replace(task_type="ps")


def test_g03_replace_keeps_the_cluster_that_was_read(tf_config, monkeypatch):
    tf_config("worker", 1)
    config = RunConfig()
    monkeypatch.delenv("TF_CONFIG")
    assert config.replace(seed=1).task == copy.deepcopy(config).task == TaskId("worker", 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_dir", ""),
        ("model_dir", 3),
        ("save_summary_steps", -1),
        ("save_summary_steps", "1"),
        ("save_checkpoints_steps", -1),
        ("save_checkpoints_secs", -1),
        ("keep_checkpoint_max", -1),
        ("keep_checkpoint_every_n_hours", 0),
        ("log_step_count_steps", 0),
        ("seed", 1.0),
        ("seed", True),
        ("max_worker_delay_secs", 0.5),
        ("session_creation_timeout_secs", 0),
        ("session_creation_timeout_secs", float("nan")),
    ],
)
def test_g04_values_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}: expected .*, got {value!r}"):
        RunConfig(**{field: value})
    with pytest.raises(ValueError, match=f"{field}: expected .*, got {value!r}"):
        RunConfig().replace(**{field: value})


def test_g05_model_dir_comes_from_the_argument_or_from_tf_config(tf_config):
    assert RunConfig(model_dir=Path("a") / "b").model_dir == "a/b"
    tf_config(cluster=None, model_dir="theirs")
    assert RunConfig().model_dir == RunConfig(model_dir="theirs").model_dir == "theirs"
    with pytest.raises(ValueError, match="'ours' was passed, but TF_CONFIG says 'theirs'"):
        RunConfig(model_dir="ours")
    tf_config(cluster=None, model_dir="")
    with pytest.raises(ValueError, match="TF_CONFIG: 'model_dir'"):
        RunConfig()


def test_g06_without_a_cluster_the_run_is_local(tf_config):
    config = RunConfig()
    assert (config.task_type, config.task_id, config.is_chief) == ("worker", 0, True)
    assert (config.num_ps_replicas, config.num_worker_replicas, config.global_id_in_cluster) == (0, 1, 0)
    assert (config.master, config.evaluation_master, config.cluster_spec) == ("", "", ClusterSpec({}))
    tf_config("worker", 0, cluster=None, session_master="a", eval_session_master="b")
    assert (RunConfig().master, RunConfig().evaluation_master) == ("a", "b")


@pytest.mark.parametrize(("task_type", "index"), [("ps", 0), ("evaluator", 0), ("worker", 1)])
def test_g06_a_local_run_is_worker_0(tf_config, task_type, index):
    tf_config(task_type, index, cluster=None)
    with pytest.raises(ValueError, match="must be WORKER"):
        RunConfig()


@pytest.mark.parametrize(
    ("task_type", "index", "cluster", "message"),
    [
        ("worker", 0, WITHOUT_CHIEF, 'must have one "chief"'),
        ("evaluator", 0, WITHOUT_CHIEF, 'must have one "chief"'),
        ("chief", 0, {"chief": ["a:1", "b:1"]}, "must have only one chief, got 2"),
        (None, 0, CLUSTER, "task_type None"),
        ("worker", None, CLUSTER, "task_id None"),
        ("evaluator", None, CLUSTER, "'task.index' is missing"),
        ("worker", -1, CLUSTER, "got -1"),
        ("evaluator", -1, CLUSTER, "got -1"),
        ("wroker", 0, CLUSTER, "did you mean 'worker'"),
        ("worker", 0, {"chief": ["a:1"], "ps": ["b:1"]}, "not found in the cluster"),
        ("worker", 3, CLUSTER, "worker:3 is not in the cluster"),
    ],
)
def test_g07_g11_clusters_and_tasks_that_do_not_fit(tf_config, task_type, index, cluster, message):
    tf_config(task_type, index, cluster=cluster)
    with pytest.raises(ValueError, match=message):
        RunConfig()


def test_g08_the_example_of_the_contract(tf_config):
    tf_config("worker", 1)
    config = RunConfig()
    assert (config.master, config.num_ps_replicas, config.num_worker_replicas) == ("grpc://host4:2222", 2, 4)
    assert (config.is_chief, config.global_id_in_cluster) == (False, 2)
    assert config.cluster_spec == ClusterSpec(CLUSTER)


@pytest.mark.parametrize(
    ("task_type", "index", "global_id"),
    [("chief", 0, 0), ("worker", 0, 1), ("worker", 2, 3), ("ps", 0, 4), ("ps", 1, 5)],
)
def test_g09_ids_count_chief_then_others_then_ps(tf_config, task_type, index, global_id):
    tf_config(task_type, index)
    config = RunConfig()
    assert config.global_id_in_cluster == global_id
    assert config.is_chief is (task_type == "chief")


@pytest.mark.parametrize(
    ("task_type", "index", "global_id", "task"),
    [("chief", 0, 0, "chief:0"), ("gateway", 1, 2, "gateway:1"), ("worker", 2, 5, "worker:2"), ("ps", 1, 7, "ps:1")],
)
def test_g09_a_job_that_is_no_role_has_ids_and_takes_no_part(tf_config, task_type, index, global_id, task):
    tf_config(task_type, index, cluster={**CLUSTER, "gateway": ["g:1", "g:2"]})
    config = RunConfig()
    assert (config.global_id_in_cluster, str(config.task), config.task_type) == (global_id, task, task_type)
    assert (config.num_ps_replicas, config.num_worker_replicas) == (2, 4)
    assert config.is_chief is (task_type == "chief")
    assert config.master.startswith("grpc://")


@pytest.mark.parametrize(("index", "message"), [(2, "no task with index 2"), (None, "'task.index' is missing")])
def test_a_task_of_such_a_job_is_one_of_the_cluster(tf_config, index, message):
    tf_config("gateway", index, cluster={**CLUSTER, "gateway": ["g:1", "g:2"]})
    with pytest.raises(ValueError, match=message):
        RunConfig()


def test_t06_a_task_of_such_a_job_has_no_part_to_play(tf_config, tmp_path):
    tf_config("gateway", 0, cluster={**CLUSTER, "gateway": ["g:1"]})
    estimator = Estimator(lambda mode: None, str(tmp_path), RunConfig())
    specs = TrainSpec(list), EvalSpec(list)
    with pytest.raises(ValueError, match="train_and_evaluate on gateway:0: expected one of 'chief', .*got 'gateway'"):
        train_and_evaluate(estimator, *specs)


def test_none_switches_off():
    config = RunConfig(save_summary_steps=None, keep_checkpoint_every_n_hours=None)
    assert (config.save_summary_steps, config.keep_checkpoint_every_n_hours) == (None, None)
    replaced = RunConfig().replace(save_summary_steps=None, keep_checkpoint_every_n_hours=None)
    assert (replaced.save_summary_steps, replaced.keep_checkpoint_every_n_hours) == (None, None)


def test_g10_a_cluster_of_one_has_no_master(tf_config):
    tf_config("chief", 0, cluster={"chief": ["a:1"]})
    assert RunConfig().master == ""
    tf_config("worker", 1, session_master="elsewhere:1")
    assert RunConfig().master == "elsewhere:1"


def test_g11_the_evaluator_stands_outside(tf_config):
    tf_config("evaluator", 12, eval_session_master="b")
    config = RunConfig()
    assert (config.task, config.is_chief, config.master) == (TaskId("evaluator", 12), False, "")
    assert (config.num_ps_replicas, config.num_worker_replicas) == (0, 0)
    assert (config.global_id_in_cluster, config.cluster_spec) == (None, ClusterSpec({}))
    assert config.evaluation_master == "b"


def test_g12_master_is_an_old_word_for_chief(tf_config):
    cluster = {"master": ["a:1"], "ps": ["b:1"], "worker": ["c:1"]}
    tf_config("master", 0, cluster=cluster)
    with pytest.warns(DeprecationWarning, match="old spelling"):
        config = RunConfig()
    assert (config.task_type, config.is_chief, config.num_worker_replicas) == ("chief", True, 2)
    tf_config("worker", 0, cluster={**cluster, "chief": ["d:1"]})
    with (
        pytest.warns(DeprecationWarning, match="old spelling"),
        pytest.raises(ValueError, match="'chief' is given twice"),
    ):
        RunConfig()


def test_g13_service_is_a_dict_and_passed_on(tf_config):
    tf_config("chief", 0, service={"a": 1})
    assert RunConfig().service == {"a": 1}
    tf_config("chief", 0, service="a")
    with pytest.raises(TypeError, match="'service': expected a JSON object"):
        RunConfig()


@pytest.mark.parametrize("name", ["train_distribute", "eval_distribute"])
def test_g14_a_strategy_is_given_once(name):
    strategy, other = FakeStrategy(), FakeStrategy()
    config = RunConfig(experimental_distribute=DistributeConfig(**{name: strategy}))
    assert getattr(config, name) is strategy
    with pytest.raises(ValueError, match=f"{name}: given directly and in experimental_distribute"):
        RunConfig(**{name: strategy}, experimental_distribute=DistributeConfig(**{name: strategy}))
    assert getattr(config.replace(**{name: None}), name) is None
    replaced = config.replace(experimental_distribute=DistributeConfig(**{name: other}))
    assert getattr(replaced, name) is other


@pytest.mark.parametrize("wrong", [FakeStrategy, "ps", 1])
def test_a_strategy_is_an_object_with_a_scope(wrong):
    with pytest.raises(TypeError, match="train_distribute: expected a strategy"):
        RunConfig(train_distribute=wrong)
    with pytest.raises(TypeError, match="experimental_distribute: expected DistributeConfig"):
        RunConfig(experimental_distribute=wrong)


def test_g16_a_client_outside_of_the_cluster_is_refused():
    """T24."""
    with pytest.raises(ValueError, match="remote_cluster: a client that drives .* run the program on every task"):
        DistributeConfig(remote_cluster=CLUSTER)
    assert DistributeConfig(remote_cluster=None) == DistributeConfig()


def test_g16_a_strategy_of_the_evaluation_makes_no_chief(tf_config):
    tf_config("worker", 0, cluster=WITHOUT_CHIEF)
    with pytest.raises(ValueError, match='must have one "chief"'):
        RunConfig(eval_distribute=FakeStrategy())


@pytest.mark.parametrize(("index", "is_chief"), [(0, True), (1, False)])
def test_g17_with_a_strategy_worker_0_may_be_the_chief(tf_config, index, is_chief):
    tf_config("worker", index, cluster=WITHOUT_CHIEF)
    config = RunConfig(train_distribute=FakeStrategy())
    assert (config.is_chief, config.num_worker_replicas, config.global_id_in_cluster) == (is_chief, 2, index)
    with pytest.raises(ValueError, match='must have one "chief"'):
        config.replace(train_distribute=None)


@pytest.mark.parametrize(
    ("task_type", "index", "limit", "delay"),
    [
        ("worker", 1, None, 10),
        ("worker", 1, 7, 7),
        ("worker", 1, 0, 0),
        ("chief", 0, None, 0),
        ("ps", 1, None, 0),
    ],
)
def test_t09_workers_may_start_one_after_the_other(tf_config, task_type, index, limit, delay):
    tf_config(task_type, index)
    assert RunConfig(max_worker_delay_secs=limit).start_delay_secs == delay
    assert RunConfig().start_delay_secs == 0
