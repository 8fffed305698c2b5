"""What a ps holds: creation and comparison, readiness, counting, and who has been heard already."""

import threading

import pytest
import torch

from paramserver.errors import ConfigError, ModelMismatchError, RefusedError
from paramserver.layout.arena import ArenaLayout
from paramserver.layout.blocks import BLOCK
from paramserver.layout.rules import Rule, describe
from paramserver.layout.variables import DTYPES, VariableSpec
from paramserver.memory.arena_memory import private_store_memory, shared_store_memory
from paramserver.store.store import Store

SGD = describe(torch.optim.SGD([torch.zeros(1)], lr=0.5), 0)
ADAM = describe(torch.optim.Adam([torch.zeros(1)]), 0)


def layout(*variables, rule=SGD, dtype="float32"):
    return ArenaLayout(dtype, rule, tuple(VariableSpec(name, shape, dtype) for name, shape in variables))


MODEL = [layout(("w", (3, 2)), ("b", (2,))), layout(("steps", ()), rule=None, dtype="int64")]


@pytest.fixture
def store():
    return Store("ps:1", private_store_memory)


def test_creating_gives_zeros_in_the_memory_that_is_offered(store):
    memory = store.create(MODEL)
    assert [values.dtype for values in memory.values] == [torch.float32, torch.int64]
    assert [arena.values.data_ptr() for arena in store.arenas] == [values.data_ptr() for values in memory.values]
    assert not any(values.any() for values in memory.values)


def test_creating_again_keeps_what_is_there(store):
    memory = store.create(MODEL)
    memory.values[0].fill_(3)
    assert store.create(MODEL) is memory
    assert store.arenas[0].values[0] == 3


@pytest.mark.parametrize(
    ("theirs", "variable", "words"),
    [
        ([layout(("w", (3, 2)), ("c", (2,))), MODEL[1]], "c", ["no such variable", "float32[2]"]),
        ([layout(("w", (2, 3)), ("b", (2,))), MODEL[1]], "w", ["float32[3, 2]", "float32[2, 3]"]),
        ([layout(("w", (3, 2)), ("b", (2,)), dtype="float64"), MODEL[1]], "w", ["float32[3, 2]", "float64[3, 2]"]),
        ([layout(("w", (3, 2)), ("b", (2,)), rule=ADAM), MODEL[1]], "w", ["SGD", "Adam"]),
        ([layout(("w", (3, 2)), ("b", (2,)), rule=None), MODEL[1]], "w", ["SGD", "no optimizer"]),
        ([layout(("w", (3, 2))), MODEL[1]], "b", ["float32[2]", "no such variable"]),
        ([MODEL[1]], "w", ["float32[3, 2]", "no such variable"]),
        ([layout(("b", (2,)), ("w", (3, 2))), MODEL[1]], "w", ["another order"]),
        ([layout(("w", (3, 2))), layout(("b", (2,))), MODEL[1]], "b", ["another order"]),
        ([MODEL[1], MODEL[0]], "w", ["another order"]),
    ],
    ids=["name", "shape", "dtype", "optimizer", "frozen", "missing", "first missing", "order", "groups", "arenas"],
)
def test_another_model_is_refused_with_the_name_of_the_first_variable_that_differs(store, theirs, variable, words):
    store.create(MODEL)
    with pytest.raises(ModelMismatchError) as caught:
        store.compare(theirs)
    assert caught.value.variable == variable
    for word in [repr(variable), "ps:1", *words]:
        assert word in str(caught.value)


def test_settings_may_differ_because_they_travel_with_every_push(store):
    store.create(MODEL)
    other = describe(torch.optim.SGD([torch.zeros(1)], lr=0.1), 0)
    store.compare([layout(("w", (3, 2)), ("b", (2,)), rule=other), MODEL[1]])


def test_a_ps_may_hold_nothing(store):
    memory = store.create([])
    assert memory.values == []
    assert store.compare([]) is memory


def test_comparing_with_nothing_is_refused(store):
    with pytest.raises(RefusedError, match="ps:1 holds no variables yet"):
        store.compare(MODEL)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([layout(("w", (2,)), rule=Rule("LBFGS", {}))], "LBFGS"),
        ([layout(("w", (2,)), rule=Rule("SGD", {"lr": -1.0}))], "-1"),
        ([layout(("w", (2,)), rule=Rule("SGD", {"params": 1.0}))], "params"),
        ([ArenaLayout("complex64", None, (VariableSpec("w", (2,), "complex64"),))], "'w'.*complex64"),
        ([ArenaLayout("float32", None, (VariableSpec("w", (2,), "float64"),))], "'w'.*float64"),
        ([ArenaLayout("float32", None, (VariableSpec("w", (2, -1), "float32"),))], "'w'.*-1"),
        ([layout(("w", (2,)), ("w", (2,)))], "'w'.*twice"),
        ([layout(("w", (2,))), layout(("w", (2,)))], "'w'.*twice"),
        ([layout(("n", (2,)), dtype="int64")], "'n'.*int64.*SGD"),
    ],
)
@pytest.mark.parametrize("allocate", [private_store_memory, shared_store_memory])
def test_what_cannot_be_created_is_refused_and_leaves_the_store_empty(allocate, bad, words):
    store = Store("ps:1", allocate)
    with pytest.raises((RefusedError, ConfigError), match=words):
        store.create(bad)
    store.create(MODEL)
    assert len(store.arenas) == len(MODEL)


# --- readiness


def test_nobody_waits_for_a_store_that_is_ready(store):
    assert not store.await_ready(timeout=0)
    store.mark_ready(7)
    assert store.await_ready(timeout=60)
    assert store.is_ready
    assert store.global_step == 7


@pytest.mark.parametrize("act", ["mark_ready", "close"])
def test_a_wait_ends_when_the_store_is_ready_or_closed(store, act):
    answers = []
    thread = threading.Thread(target=lambda: answers.append(store.await_ready(timeout=60)))
    thread.start()
    store.mark_ready(0) if act == "mark_ready" else store.close()
    thread.join(30)
    assert answers == [act == "mark_ready"]


def test_a_failed_run_refuses_with_its_reason(store):
    store.fail("chief:0 failed: no data")
    with pytest.raises(RefusedError, match="no data"):
        store.await_ready(timeout=60)
    with pytest.raises(RefusedError, match="no data"):
        store.check_alive()


# --- counting


def test_staleness_is_what_others_did_between_pull_and_push(store):
    store.mark_ready(10)
    assert [store.count_update(step) for step in (10, 10, 12, 9)] == [(11, 0), (12, 1), (13, 0), (14, 4)]
    statistics = store.statistics()
    assert (statistics.global_step, statistics.updates) == (14, 4)
    assert (statistics.mean_staleness, statistics.largest_staleness) == (1.25, 4)


def test_a_local_step_of_the_future_is_not_stale(store):
    assert store.count_update(5) == (1, 0)


def test_a_new_store_has_no_staleness(store):
    assert store.statistics().mean_staleness == 0


# --- variables of the program's own

TABLE = VariableSpec("table", (3, 2), "float32")
LARGE = VariableSpec("large", (BLOCK + 2,), "int8")


def test_a_variable_is_made_with_its_values(store):
    assert not store.await_variable(TABLE, timeout=0)
    assert store.create_variable(TABLE, 0, torch.arange(6.0))
    assert store.await_variable(TABLE, timeout=60)
    assert store.variable("table").values.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_variable_that_is_there_keeps_its_values(store):
    store.create_variable(TABLE, 0, torch.arange(6.0))
    assert store.create_variable(TABLE, 0, torch.zeros(6))
    assert store.variable("table").values.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_large_variable_is_there_when_its_last_block_has_come(store):
    assert not store.create_variable(LARGE, 0, torch.ones(BLOCK, dtype=torch.int8))
    assert not store.await_variable(LARGE, timeout=0)
    with pytest.raises(RefusedError, match="ps:1 holds no variable 'large'"):
        store.variable("large")
    assert store.held == []
    assert store.create_variable(LARGE, BLOCK, torch.full((2,), 2, dtype=torch.int8))
    assert store.variable("large").values.sum() == BLOCK + 4


def test_a_chief_that_starts_again_begins_a_large_variable_again(store):
    store.create_variable(LARGE, 0, torch.ones(BLOCK, dtype=torch.int8))
    assert not store.create_variable(LARGE, 0, torch.zeros(BLOCK, dtype=torch.int8))
    assert store.create_variable(LARGE, BLOCK, torch.zeros(2, dtype=torch.int8))
    assert not store.variable("large").values.any()


@pytest.mark.parametrize(
    ("variable", "start", "count", "words"),
    [
        (LARGE, BLOCK, 2, "a later block of variable 'large' first"),
        (LARGE, 0, BLOCK + 2, r"'large' on ps:1: \[0, 524290\) is not within one block"),
        (TABLE, 0, 7, r"\[0, 7\) is not within one block of its 6 elements"),
        (TABLE, 0, 0, r"\[0, 0\) is not within one block"),
        (TABLE, -1, 1, "a later block"),
        (VariableSpec("c", (1,), "complex64"), 0, 1, "'c'.*complex64"),
        (VariableSpec("n", (-1,), "int8"), 0, 1, r"'n'.*\[-1\]"),
    ],
)
def test_a_variable_that_cannot_be_made_is_refused(store, variable, start, count, words):
    dtype = DTYPES.get(variable.dtype, torch.int8)
    with pytest.raises(RefusedError, match=words):
        store.create_variable(variable, start, torch.zeros(count, dtype=dtype))
    assert not store.variables


def test_a_variable_of_no_elements_is_one(store):
    nothing = VariableSpec("nothing", (0, 3), "float32")
    assert store.create_variable(nothing, 0, torch.empty(0))
    assert store.await_variable(nothing, timeout=60)


@pytest.mark.parametrize(("shape", "dtype"), [((2, 3), "float32"), ((3, 2), "float64"), ((), "float32")])
def test_another_variable_of_that_name_is_refused(store, shape, dtype):
    store.create_variable(TABLE, 0, torch.arange(6.0))
    other = VariableSpec("table", shape, dtype)
    for call in (lambda: store.create_variable(other, 0, torch.zeros(1)), lambda: store.await_variable(other, 60)):
        with pytest.raises(ModelMismatchError) as caught:
            call()
        assert caught.value.variable == "table"
        for word in ("ps:1", "float32[3, 2]", f"{dtype}{list(shape)}"):
            assert word in str(caught.value)


@pytest.mark.parametrize("act", ["create", "close"])
def test_a_wait_for_a_variable_ends_when_it_is_made_or_the_store_closed(store, act):
    answers = []
    thread = threading.Thread(target=lambda: answers.append(store.await_variable(TABLE, timeout=60)))
    thread.start()
    store.create_variable(TABLE, 0, torch.zeros(6)) if act == "create" else store.close()
    thread.join(30)
    assert answers == [act == "create"]


def test_a_wait_for_a_variable_of_a_failed_run_is_refused(store):
    store.fail("chief:0 failed: no data")
    with pytest.raises(RefusedError, match="no data"):
        store.await_variable(TABLE, timeout=60)


def test_a12_variables_are_held_beside_the_models_arenas_and_do_not_move_them(store):
    store.create_variable(TABLE, 0, torch.zeros(6))
    store.create(MODEL)
    assert [arena.layout for arena in store.arenas] == MODEL
    assert [spec.name for arena in store.held for spec in arena.layout.variables] == ["w", "b", "steps", "table"]
    store.compare(MODEL)


# --- restoring after the variables were made ready


@pytest.mark.parametrize("restored", [7, None])
def test_a_restore_lets_those_go_on_that_wait_for_it(restored):
    store = Store("ps:0", private_store_memory)
    store.mark_ready(3)
    assert not store.await_restored(timeout=0)
    store.mark_restored(restored)
    assert store.await_restored(timeout=60)
    assert store.global_step == (restored or 3)


def test_nobody_waits_for_a_restore_once_training_has_begun():
    store = Store("ps:0", private_store_memory)
    store.mark_ready(0)
    store.count_update(local_step=0)
    assert store.await_restored(timeout=60)


def test_who_waits_for_a_restore_hears_of_a_failure():
    store = Store("ps:0", private_store_memory)
    store.fail("no data")
    with pytest.raises(RefusedError, match="no data"):
        store.await_restored(timeout=60)
