"""What a push asks of a store is worked out once for all that ask the same."""

from __future__ import annotations

import math

import pytest

from paramserver.errors import RefusedError
from paramserver.layout.arena import ArenaLayout
from paramserver.layout.blocks import BLOCK
from paramserver.layout.rules import Rule
from paramserver.layout.variables import VariableSpec
from paramserver.memory.arena_memory import private_store_memory
from paramserver.server.push_plans import Application, PushPlans
from paramserver.store.store import Store
from paramserver.transport.lane import Piece
from paramserver.wire.messages import AwaitReady, GetStatus, Part, Proceed, Pull, Push

LARGE = BLOCK + 10
LAYOUTS = [ArenaLayout("float32", None, (VariableSpec(f"w{size}", (size,), "float32"),)) for size in (10, 1000, LARGE)]


@pytest.fixture
def store() -> Store:
    made = Store("ps:0", private_store_memory)
    made.create(LAYOUTS)
    return made


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (Pull(()), 0),
        (Pull((0, 1)), 1010),
        (Pull((7,)), 0),
        (Push(1, 0, True, (Part(1, "add"),), ()), 1000),
        (Push(1, 0, True, (Part(1, "add", ((0, 5), (7, 9))), Part(0, "add")), (0,)), 27),
        (Push(1, 0, True, (Part(7, "add"),), (8,)), 0),
        (AwaitReady(0.0), math.inf),
        (Proceed(0.0), math.inf),
        (GetStatus(), math.inf),
    ],
)
def test_elements_of_a_request(store: Store, request_: Pull | Push, expected: float) -> None:
    assert PushPlans(store).elements(request_) == expected


def test_elements_of_a_push_that_was_planned_are_its_own(store: Store) -> None:
    plans = PushPlans(store)
    plans.plan(Push(1, 0, True, (Part(1, "add"),), (1,)))
    assert plans.elements(Push(2, 0, True, (Part(1, "add"),), (1,))) == 2000
    assert plans.elements(Push(2, 0, True, (Part(1, "add"),), ())) == 1000
    assert plans.elements(Push(2, 0, True, (Part(0, "add"),), (1,))) == 1010


def test_a_push_is_planned_piece_by_piece_in_the_order_of_its_payload(store: Store) -> None:
    ranges = ((3, 5), (BLOCK - 1, BLOCK + 1))
    plan = PushPlans(store).plan(Push(1, 0, True, (Part(2, "add", ranges), Part(0, "assign")), (0, 2)))
    large, small = store.arenas[2], store.arenas[0]
    assert plan.applications == (
        Application(large, "add", Piece(2, 3, 5), None),
        Application(large, "add", Piece(2, BLOCK - 1, BLOCK), None),
        Application(large, "add", Piece(2, BLOCK, BLOCK + 1), None),
        Application(small, "assign", Piece(0, 0, 10), None),
    )
    assert plan.pulled == (Piece(0, 0, 10), Piece(2, 0, BLOCK), Piece(2, BLOCK, LARGE))


def test_a_push_that_asks_the_same_is_not_planned_again(store: Store) -> None:
    plans = PushPlans(store)
    first = plans.plan(Push(1, 0, True, (Part(1, "add", None, {"lr": 0.1}),), (1,)))
    assert plans.plan(Push(9, 5, False, (Part(1, "add", None, {"lr": 0.1}),), (1,))) is first


@pytest.mark.parametrize(
    ("parts", "pull"),
    [
        ((Part(1, "add", None, {"lr": 0.2}),), (1,)),
        ((Part(1, "assign", None, {"lr": 0.1}),), (1,)),
        ((Part(1, "add", ((0, 1),), {"lr": 0.1}),), (1,)),
        ((Part(1, "add", None, {"lr": 0.1}),), ()),
        ((), (1,)),
    ],
)
def test_a_push_that_asks_something_else_is(store: Store, parts: tuple[Part, ...], pull: tuple[int, ...]) -> None:
    plans = PushPlans(store)
    plans.plan(Push(1, 0, True, (Part(1, "add", None, {"lr": 0.1}),), (1,)))
    plan = plans.plan(Push(2, 0, True, parts, pull))
    assert (plan.parts, plan.pull) == (parts, pull)
    assert [(each.operation, each.settings) for each in plan.applications] == [
        (part.operation, part.settings) for part in parts
    ]


def test_a_push_that_cannot_be_carried_out_is_refused_and_not_remembered(store: Store) -> None:
    plans = PushPlans(store)
    for _ in range(2):
        with pytest.raises(RefusedError, match=r"push to ps:0 refused: 'rule' on arena 0: no update rule was declared"):
            plans.plan(Push(1, 0, True, (Part(1, "add"), Part(0, "rule")), (1,)))
        with pytest.raises(RefusedError, match="ps:0 has no arena 7"):
            plans.plan(Push(1, 0, True, (Part(1, "add"),), (7,)))


@pytest.mark.parametrize("ranges", [None, ((0, 4),)])
def test_ranges_of_a_table_are_refused(ranges: tuple[tuple[int, int], ...] | None) -> None:
    made = Store("ps:0", private_store_memory)
    table = VariableSpec("table", (4, 2), "float32")
    made.create([ArenaLayout("float32", Rule("SGD", {"lr": 0.1}), (table,), is_table=True)])
    with pytest.raises(RefusedError, match="it is a table, of which rows are pushed"):
        PushPlans(made).plan(Push(1, 0, True, (Part(0, "add", ranges),), ()))


def test_values_go_out_after_the_last_part_that_concerns_their_block(store: Store) -> None:
    whole, ends = Part(2, "add"), Part(2, "add", ((BLOCK, BLOCK + 1),))
    plans = PushPlans(store)
    assert plans.plan(Push(1, 0, True, (whole,), (2,))).answers == (1, 2)
    assert plans.plan(Push(2, 0, True, (whole, ends), (2,))).answers == (1, 1, 2)
    assert plans.plan(Push(3, 0, True, (ends, whole), (2,))).answers == (0, 1, 2)
    assert plans.plan(Push(4, 0, True, (Part(0, "add"), whole), (2, 0))).answers == (0, 1, 3)
    assert plans.plan(Push(5, 0, True, (ends,), (1, 2))).answers == ()  # too small
    assert plans.plan(Push(6, 0, True, (whole,), (1,))).answers == (1, 1)
