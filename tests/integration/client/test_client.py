"""The client against real ps tasks: every call, several workers at once, refusals, losses, and the last word."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tests.patience import patience

from paramserver.cluster import Role, TaskId
from paramserver.distribute import connection
from paramserver.errors import (
    CheckpointError,
    DeadlineError,
    LocalProtocolError,
    ModelMismatchError,
    RefusedError,
    UnavailableError,
)
from paramserver.layout.arena import ArenaLayout
from paramserver.layout.blocks import BLOCK
from paramserver.layout.rules import describe
from paramserver.layout.variables import VariableSpec
from paramserver.testing.local_cluster import LocalCluster
from paramserver.wire.messages import Part

SGD = describe(torch.optim.SGD([torch.zeros(1)], lr=1.0), 0)
PATIENCE = patience(30.0)


def layout(name, *shape, rule=SGD):
    return ArenaLayout("float32", rule, (VariableSpec(name, shape, "float32"),))


# Two ps: the first holds a trained variable and a counted one, the second a variable of several blocks.
MODEL = [[layout("w", 4), layout("n", rule=None)], [layout("large", 2 * BLOCK + 3)]]
WHOLE = [(0, 1), (0,)]
NOTHING = [(), ()]


@pytest.fixture(params=["auto", "tcp"])
def cluster(request):
    with LocalCluster(ps=2, workers=4, lane=request.param) as cluster:
        yield cluster


def start(cluster, task="chief:0"):
    """A client that has its memory, and the memory."""
    client = cluster.client(task)
    if task == "chief:0":
        client.create(MODEL)
        client.mark_ready(0)
    else:
        client.await_ready(PATIENCE)
        client.join(MODEL)
    return client, client.open()


def each(operation):
    return [[Part(0, operation), Part(1, "add")], [Part(0, operation)]]


def test_the_lane_is_the_one_that_was_asked_for(cluster):
    lane = cluster.client("worker:0").lanes.each()[0]
    assert lane.name == {"auto": "shared memory", "tcp": "tcp"}[cluster.environment("worker:0")["PARAMSERVER_LANE"]]


def test_assign_push_and_pull_go_to_the_ps_that_holds_the_variable(cluster):
    client, memories = start(cluster)
    for memory in memories:
        for gradients in memory.gradients:
            gradients.copy_(torch.arange(gradients.numel()))
    assert client.push_pull(client.plan(each("assign"), WHOLE), counts=False) == (0, 0)
    assert client.push_pull(client.plan(each("rule"), NOTHING), counts=True) == (1, 0)
    memories[1].values[0].fill_(7)
    assert client.pull(WHOLE) == 1
    assert not memories[0].values[0].any()
    assert not memories[1].values[0].any()


def test_a_worker_sees_what_the_chief_wrote_and_how_stale_it_is(cluster):
    (chief, memories), (worker, theirs) = start(cluster), start(cluster, "worker:0")
    memories[0].gradients[0].fill_(1)
    assert chief.push_pull(chief.plan(each("rule"), WHOLE), counts=True) == (1, 0)
    assert worker.push_pull(worker.plan(NOTHING, WHOLE), counts=True) == (2, 1)
    assert theirs[0].values[0].tolist() == [-1] * 4
    assert worker.push_pull(worker.plan(NOTHING, WHOLE), counts=True) == (3, 0)
    assert chief.read_global_step() == 3
    assert chief.push_pull(chief.plan(NOTHING, WHOLE), counts=True) == (4, 2), "asking for the step brings no values"


def test_four_workers_at_once_lose_nothing(cluster):
    steps, tasks = 50, [str(task) for task in cluster.tasks]
    clients = [start(cluster, task) for task in tasks]
    failures = []

    def work(client, memories):
        for memory in memories:
            for gradients in memory.gradients:
                gradients.fill_(1)
        try:
            for _ in range(steps):
                client.push_pull(client.plan(each("add"), WHOLE), counts=True)
        except Exception as error:  # noqa: BLE001  # the test shows it
            failures.append(error)

    threads = [threading.Thread(target=work, args=client) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE * 2)
    assert failures == []
    total = steps * len(tasks)
    chief, memories = clients[0]
    assert chief.pull(WHOLE) == total
    for memory in memories:
        for values in memory.values:
            assert values.unique().tolist() == [total]
    for status in chief.status():
        assert (status.updates, status.global_step, status.joined) == (total, total, tuple(tasks))


def test_status_tells_what_each_ps_holds(cluster):
    client, _ = start(cluster)
    first, second = client.status()
    assert (first.task, first.num_variables, first.values_bytes) == ("ps:0", 2, 20)
    assert (second.task, second.num_variables, second.values_bytes) == ("ps:1", 1, 4 * (2 * BLOCK + 3))
    assert first.joined == ("chief:0",)


def test_waiting_for_a_chief_that_does_not_come_ends_in_time(cluster):
    with pytest.raises(DeadlineError, match=r"ps:0 within 0 s") as caught:
        cluster.client("worker:0").await_ready(0)
    assert caught.value.timeout == 0


def test_save_and_restore_meet_errors_of_the_ps(cluster, tmp_path):
    client, memories = start(cluster)
    saved = client.save(str(tmp_path))
    assert [set(shard.weight_map) for shard in saved] == [{"w", "n"}, {"large"}]
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        client.restore(str(tmp_path))
    with pytest.raises(CheckpointError, match="model_dir"):
        client.save(str(tmp_path / "missing"))
    assert client.pull(WHOLE) == 0
    assert memories[0].values[0].tolist() == [0] * 4


# --- refusals


def test_another_model_is_refused_and_the_others_go_on(cluster):
    chief, _ = start(cluster)
    worker = cluster.client("worker:0")
    with pytest.raises(ModelMismatchError, match=r"'w' on ps:0") as caught:
        worker.join([[layout("w", 5), layout("n", rule=None)], MODEL[1]])
    assert (caught.value.variable, caught.value.task) == ("w", "ps:0")
    worker.goodbye()
    assert chief.push_pull(chief.plan(NOTHING, WHOLE), counts=True) == (1, 0)


@pytest.mark.parametrize(
    "parts",
    [
        [[Part(0, "rule", None, {"lr": None})], [Part(0, "add")]],
        [[Part(1, "rule")], [Part(0, "add")]],
        [[Part(0, "rule", None, {"params": 1.0})], [Part(0, "add")]],
    ],
    ids=["a bad setting", "no rule", "no such setting"],
)
def test_a_refused_push_leaves_the_client_usable(cluster, parts):
    client, memories = start(cluster)
    with pytest.raises(RefusedError, match="ps:0") as caught:
        client.push_pull(client.plan(parts, WHOLE), counts=True)
    assert caught.value.task == "ps:0"
    memories[1].gradients[0].fill_(1)
    assert client.push_pull(client.plan([[], [Part(0, "add")]], WHOLE), counts=True).global_step >= 1
    assert memories[1].values[0][0] == 1


# --- losses and last words


def test_a_ps_that_is_lost_is_named_and_the_other_hears_the_goodbye(cluster):
    client, _ = start(cluster)
    worker = cluster.client("worker:0")
    cluster.servers[1].stop()
    for _ in range(2):
        with pytest.raises(UnavailableError, match="ps:1") as caught:
            client.push_pull(client.plan(NOTHING, WHOLE), counts=True)
        assert caught.value.task == "ps:1"
    client.goodbye("ps:1 was lost")
    with pytest.raises(RefusedError, match=r"chief:0 failed.*ps:1 was lost"):
        worker.await_ready(PATIENCE)


def test_after_the_goodbye_a_client_says_so(cluster):
    client, _ = start(cluster)
    client.goodbye()
    client.goodbye()
    client.close()
    for call in (lambda: client.pull(WHOLE), client.status, client.read_global_step, lambda: client.open()):
        with pytest.raises(LocalProtocolError, match="said goodbye"):
            call()


@pytest.mark.parametrize("where", ["start", "finish"])
def test_a_lane_that_was_interrupted_is_closed_without_a_word(where):
    """The ps must not take the goodbye for the rest of a payload. It sees a chief that was lost, not one that left."""
    with LocalCluster(ps=1, lane="tcp", grace=0) as cluster:
        client = cluster.client("chief:0")

        def interrupt(*_):
            raise KeyboardInterrupt

        setattr(client.lanes.each()[0], where, interrupt)
        with pytest.raises(KeyboardInterrupt):
            client.status()
        client.goodbye()
        with pytest.raises(UnavailableError, match="chief:0 was lost"):
            cluster.servers[0].join()


def test_a_client_that_is_dropped_says_goodbye():
    with LocalCluster(ps=1, workers=1) as cluster:
        client = connection.to_cluster(cluster.spec, TaskId(Role.CHIEF, 0), PATIENCE)
        assert client.status()[0].joined == ("chief:0",)
        del client
        gc.collect()
        cluster.servers[0].join()


def test_who_waits_for_the_others_notices_the_loss_of_any_ps():
    with LocalCluster(ps=2, workers=2) as cluster:
        chief, _ = start(cluster)
        worker = cluster.client("worker:0")
        with ThreadPoolExecutor(1) as pool:
            told = threading.Event()
            waiting = pool.submit(chief.await_workers, lambda tasks: told.set())
            assert told.wait(PATIENCE)
            cluster.servers[1].stop()
            with pytest.raises(UnavailableError, match="ps:1"):
                waiting.result(PATIENCE)
        worker.close()
