"""Which ps holds a variable, and into how many parts it is divided."""

import itertools

import numpy as np
import pytest

from paramserver.errors import ConfigError
from paramserver.layout.variables import Shard, VariableSpec
from paramserver.placement import (
    FixedShards,
    Greedy,
    MaxSize,
    MinSize,
    Placement,
    Random,
    RoundRobin,
    as_placement,
    byte_size,
    row_ranges,
)

VARIABLES = [VariableSpec(name, (size,), "float32") for name, size in zip("abcde", (1, 1000, 0, 7, 7), strict=True)]


def spec(*shape, name="v", dtype="float32"):
    return VariableSpec(name, shape, dtype)


def places(placement, variables, num_ps=2):
    place = placement.start(num_ps)
    return [place(variable) for variable in variables]


# --- round robin


def test_p01_round_robin_takes_turns_in_the_order_of_creation():
    assert places(RoundRobin(), VARIABLES) == [0, 1, 0, 1, 0]


def test_p01_each_strategy_counts_for_itself():
    policy = RoundRobin()
    first, second = policy.start(2), policy.start(2)
    assert [first(VARIABLES[0]), second(VARIABLES[0]), first(VARIABLES[1])] == [0, 0, 1]


def test_one_ps_holds_everything():
    assert places(RoundRobin(), VARIABLES, num_ps=1) == [0] * 5


def test_there_may_be_more_ps_than_variables():
    assert places(RoundRobin(), VARIABLES, num_ps=9) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("policy", [RoundRobin(), Greedy(), Random(0), lambda variable, num_ps: 0])
@pytest.mark.parametrize("num_ps", [0, -1])
def test_without_a_ps_there_is_no_place(policy, num_ps):
    with pytest.raises(ConfigError, match=f"at least one ps, got {num_ps}"):
        as_placement(policy).start(num_ps)


# --- greedy


def test_p30_greedy_takes_the_least_loaded_and_of_several_the_first():
    assert places(Greedy(), [spec(4), spec(1), spec(1), spec(1), spec(1), spec(9), spec(1)]) == [0, 1, 1, 1, 1, 0, 1]


def test_p30_greedy_depends_on_the_order():
    assert places(Greedy(), [spec(1), spec(1), spec(2)]) == [0, 1, 0]
    assert places(Greedy(), [spec(2), spec(1), spec(1)]) == [0, 1, 1]


@pytest.mark.parametrize("num_ps", [1, 2, 3, 7])
def test_p31_greedy_of_a_constant_load_is_round_robin(num_ps):
    assert places(Greedy(lambda variable: 1), VARIABLES, num_ps) == places(RoundRobin(), VARIABLES, num_ps)


def test_p32_greedy_balances_bytes():
    assert places(Greedy(byte_size), [spec(2, 2), spec(2, 1), spec(2, 2), spec(1, 3)]) == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("variable", "num_bytes"),
    [(spec(), 4), (spec(dtype="float64"), 8), (spec(3, 0), 0), (spec(2, 3, dtype="bfloat16"), 12)],
)
def test_p32_bytes_are_counted_of_scalars_too(variable, num_bytes):
    assert byte_size(variable) == num_bytes


def test_the_bytes_of_a_part_are_its_own():
    part = VariableSpec("v/part_1", (3, 2), "float32", Shard("v", index=1, start=3, rows=1000))
    assert byte_size(part) == 24


@pytest.mark.parametrize("shape", [(-1, 2), (None, 2)])
def test_p33_an_unknown_shape_has_no_size(shape):
    with pytest.raises(ValueError, match="variable 'v' has the shape .*expected known sizes"):
        byte_size(VariableSpec("v", shape, "float32"))


def test_p33_an_unknown_dtype_has_no_size():
    with pytest.raises(ValueError, match="'string' is not known; expected one of float32"):
        byte_size(spec(2, dtype="string"))


@pytest.mark.parametrize("load", [-1, float("nan"), float("inf"), None, "1"])
def test_a_load_must_be_a_number(load):
    with pytest.raises(ConfigError, match="load_fn of 'v': expected a number from 0 on, got"):
        Greedy(lambda variable: load).start(2)(spec(1))


# --- random


def test_p34_random_is_the_same_in_every_process():
    """What was written down by one process is what any other finds; as in the original, by md5 of NAME_SEED."""
    names = ["weight", "bias", "größe", "重み", "🙂", "", "a/part_0"]
    assert places(Random(7), [spec(name=name) for name in names], 5) == [1, 4, 1, 3, 2, 1, 4]


def test_p34_random_depends_on_name_and_seed_and_on_nothing_else():
    variables = [spec(name=f"v{index}") for index in range(50)]
    assert places(Random(1), variables[::-1], 3) == places(Random(1), variables, 3)[::-1]
    assert places(Random(1), variables, 3) != places(Random(2), variables, 3)
    assert set(places(Random(1), variables, 3)) == {0, 1, 2}
    assert places(Random(1), [spec(5, 5, name="w", dtype="int64")], 97) == places(Random(1), [spec(name="w")], 97)


# --- a program's own


def test_a_function_is_a_placement():
    by_length = as_placement(lambda variable, num_ps: len(variable.name) % num_ps)
    assert places(by_length, [spec(name="ab"), spec(name="abc"), spec(name="abcd")], 3) == [2, 0, 1]


def test_none_means_round_robin_and_a_placement_stays_what_it_is():
    greedy = Greedy()
    assert isinstance(as_placement(None), RoundRobin)
    assert as_placement(greedy) is greedy


def test_an_index_may_be_any_whole_number_and_comes_back_as_an_int():
    (ps,) = places(as_placement(lambda variable, num_ps: np.int64(1)), [spec()])
    assert ps == 1
    assert type(ps) is int


@pytest.mark.parametrize("answer", [-1, 3, 1.0, None, "0", True])
def test_an_answer_that_is_no_ps_names_the_variable(answer):
    place = as_placement(lambda variable, num_ps: answer).start(3)
    with pytest.raises(ValueError, match=f"variable 'emb': expected the index of a ps, 0 to 2, got {answer!r} from"):
        place(spec(name="emb"))


@pytest.mark.parametrize("policy", [3, "greedy", [0, 1], RoundRobin])
def test_p22_what_cannot_be_called_is_no_placement(policy):
    with pytest.raises(TypeError, match="variable_placement: expected a placement such as RoundRobin"):
        as_placement(policy)


def test_a_placement_must_say_where():
    with pytest.raises(TypeError, match="start"):
        Placement()


# --- partitioners


@pytest.mark.parametrize(
    ("partitioner", "shape", "expected"),
    [
        pytest.param(FixedShards(2), (10, 3), [2, 1], id="fixed"),
        pytest.param(FixedShards(4), (3,), [3], id="fixed, more than rows"),
        pytest.param(FixedShards(4), (0, 3), [1, 1], id="fixed, without rows"),
        pytest.param(MinSize(4, max_shards=2), (6, 1), [2, 1], id="min, at most 2"),
        pytest.param(MinSize(4, max_shards=10), (6, 1), [6, 1], id="min, at most 10"),
        pytest.param(MinSize(64 << 20, max_shards=10), (6, 1), [1, 1], id="min of 64 MiB"),
        pytest.param(MinSize(), (1 << 20, 1), [1, 1], id="min, by default"),
        pytest.param(MinSize(max_shards=100), (1 << 20, 1), [16, 1], id="min of 256 KiB"),
        pytest.param(MinSize(5, max_shards=10), (5, 3), [5, 1], id="min, rows are larger"),
        pytest.param(MinSize(13, max_shards=10), (5, 3), [2, 1], id="min, whole rows only"),
        pytest.param(MinSize(4, max_shards=10), (6, 0), [1, 1], id="min, without elements"),
        pytest.param(MaxSize(4), (6, 1), [6, 1], id="max"),
        pytest.param(MaxSize(4, max_shards=2), (6, 1), [2, 1], id="max, at most 2"),
        pytest.param(MaxSize(1024), (6, 1), [1, 1], id="max, larger than the variable"),
        pytest.param(MaxSize(1), (6, 1), [6, 1], id="max, smaller than a row"),
        pytest.param(MaxSize(8), (7, 1), [4, 1], id="max, the last part is smaller"),
        pytest.param(MaxSize(8), (0, 1), [1, 1], id="max, without rows"),
    ],
)
def test_v2_04_partitioners(partitioner, shape, expected):
    assert partitioner(shape, "float32") == expected


def test_v2_04_a_dtype_has_a_size():
    assert MaxSize(8)((6,), "float64") == [6]
    assert MaxSize(8)((6,), "bfloat16") == [2]


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (FixedShards, "num_shards"),
        (MinSize, "min_shard_bytes"),
        (lambda value: MinSize(4, value), "max_shards"),
        (MaxSize, "max_shard_bytes"),
    ],
)
def test_v2_04_sizes_and_counts_are_positive(make, argument, value):
    with pytest.raises(ValueError, match=f"{argument}: expected a whole number above 0, got {value!r}"):
        make(value)


def test_v2_04_max_size_of_no_shards_is_refused():
    with pytest.raises(ValueError, match="max_shards: expected a whole number above 0, got 0"):
        MaxSize(4, max_shards=0)


@pytest.mark.parametrize("partitioner", [FixedShards(2), MinSize(), MaxSize(4)])
def test_v2_04_a_scalar_has_no_axis_to_be_divided(partitioner):
    with pytest.raises(ValueError, match="no first axis"):
        partitioner((), "float32")


# --- ranges of rows


def rows(ranges):
    return [stop - start for start, stop in ranges]


@pytest.mark.parametrize(
    ("num_rows", "num_shards", "expected"),
    [(10, 4, [3, 3, 2, 2]), (13, 5, [3, 3, 3, 2, 2]), (4, 2, [2, 2]), (3, 4, [1, 1, 1])],
)
def test_v2_03_the_first_parts_get_one_row_more(num_rows, num_shards, expected):
    ranges = row_ranges(FixedShards(num_shards), spec(num_rows, 5))
    assert rows(ranges) == expected
    assert ranges[0][0] == 0
    assert ranges[-1][1] == num_rows
    assert all(one[1] == other[0] for one, other in itertools.pairwise(ranges))


def test_v2_02_a_partitioner_is_asked_with_shape_and_dtype():
    asked = []

    def partitioner(shape, dtype):
        asked.append((shape, dtype))
        return [2, 1]

    assert row_ranges(partitioner, spec(4, 6, dtype="float64")) == [(0, 2), (2, 4)]
    assert asked == [((4, 6), "float64")]


def test_v2_02_there_are_no_more_parts_than_rows():
    assert rows(row_ranges(lambda shape, dtype: [4, 1], spec(3, 2))) == [1, 1, 1]


@pytest.mark.parametrize("variable", [spec(4, 2), spec(1, 2), spec(0, 2)])
def test_v2_02_one_part_is_none(variable):
    assert row_ranges(lambda shape, dtype: [1, 1], variable) == []
    assert row_ranges(lambda shape, dtype: [5 if shape[0] < 2 else 1, 1], variable) == []


def test_v2_02_a_scalar_stays_whole_unasked():
    assert row_ranges(lambda shape, dtype: pytest.fail("asked"), spec()) == []


@pytest.mark.parametrize(
    "answer", [None, [], (), [0, 1], [-1, 1], [1, 2], [2, 2], [2, 0], [2, 1, 1], [2.0, 1], ["2", "1"], 2, "21"]
)
def test_v2_02_what_is_no_list_of_partitions_names_the_variable(answer):
    with pytest.raises(ValueError, match=r"variable 'emb' of shape \[4, 6\].*such as \[2, 1\]; .*returned") as caught:
        row_ranges(lambda shape, dtype: answer, spec(4, 6, name="emb"))
    assert str(caught.value).endswith(f"returned {answer!r}")


@pytest.mark.parametrize("num_ps", [2, 3, 8])
def test_z17_one_large_and_many_small_variables_are_balanced(num_ps):
    """Round robin gives one ps nearly everything; greedy of parts keeps the most loaded one near the mean (P07)."""
    large, small = spec(100_000, 64, name="table"), [spec(64, size, name=f"{size}") for size in range(1, 200)]
    ranges = row_ranges(FixedShards(4 * num_ps), large)
    parts = [spec(stop - start, 64) for start, stop in ranges]

    def excess(placement, variables):
        loads = np.zeros(num_ps)
        for variable, ps in zip(variables, places(placement, variables, num_ps), strict=True):
            loads[ps] += byte_size(variable)
        return loads.max() / loads.mean()

    assert excess(Greedy(), [*parts, *small]) < 1.1
    assert excess(RoundRobin(), [large, *small]) > 1.5


def test_p07_parts_continue_the_round_robin():
    """A fixed two-way partition on two ps: part i on ps i, for every partitioned variable."""
    place = RoundRobin().start(2)
    for name in ("u", "v"):
        ranges = row_ranges(FixedShards(2), spec(4, 2, name=name))
        assert [place(spec(stop - start, 2)) for start, stop in ranges] == [0, 1]
