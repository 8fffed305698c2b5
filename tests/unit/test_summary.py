"""Summaries: what a program records, where and when (E14, B05), and TensorBoard's event files (N10)."""

import logging
import math
import runpy
import sys
import threading
import timeit

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import paramserver as ps
from paramserver import summary
from paramserver.cluster import ClusterSpec
from paramserver.errors import ConfigError
from paramserver.summary import SummaryWriter, recording

CLUSTER = ClusterSpec({"chief": ["a:1"], "worker": ["b:1"], "ps": ["c:1"]})


class Kept:
    """Keeps what it is given."""

    def __init__(self):
        self.points = []

    def scalar(self, name, value, step):
        self.points.append((name, value, step))

    histogram = image = text = scalar


@pytest.fixture
def kept():
    return Kept()


@pytest.fixture
def written(tmp_path):
    """Calls a function with an open writer; what is in its file then."""

    def written(fill):
        with SummaryWriter(str(tmp_path / "run")) as writer:
            fill(writer)
        return EventAccumulator(str(tmp_path / "run")).Reload()

    return written


# --- who records


def test_a_call_outside_of_everything_does_nothing_not_even_look(kept):
    with recording(kept, 1):
        pass
    summary.scalar("loss", "no number")
    summary.histogram("norms", None)
    summary.image("input", None)
    summary.text("sample", None)
    assert not kept.points


def test_a_call_that_records_nothing_costs_next_to_nothing():
    value = torch.zeros(1)
    best = min(timeit.repeat(lambda: summary.scalar("loss", value), number=10_000, repeat=5)) / 10_000
    assert best < 5e-6  # about 0.1 microseconds; a busy machine is forgiven


def test_inside_a_block_all_kinds_are_written_at_once_with_its_step(kept):
    with recording(kept, 7):
        summary.scalar("loss", torch.tensor([0.5], requires_grad=True))
        summary.scalar("rate", 3)
        summary.text("sample", "*a*")
        assert kept.points == [("loss", 0.5, 7), ("rate", 3.0, 7), ("sample", "*a*", 7)]
        summary.histogram("norms", torch.ones(2, 2))
        summary.image("input", torch.zeros(3, 4, 5))
    assert [(name, list(value.shape), step) for name, value, step in kept.points[3:]] == [
        ("norms", [4], 7),
        ("input", [3, 4, 5], 7),
    ]


def test_the_inner_block_records_and_one_without_a_writer_records_nothing(kept):
    inner = Kept()
    with recording(kept, 1):
        with recording(inner, 2):
            summary.scalar("a", 1)
        with recording(None, 3):
            summary.scalar("b", 1)
        summary.scalar("c", 1)
    assert (inner.points, kept.points) == ([("a", 1.0, 2)], [("c", 1.0, 1)])


def test_a_block_that_fails_ends(kept):
    with pytest.raises(LookupError), recording(kept, 1):
        raise LookupError
    summary.scalar("a", 1)
    assert not kept.points


def test_another_thread_does_not_record(kept):
    with recording(kept, 1):
        thread = threading.Thread(target=summary.scalar, args=("a", 1))
        thread.start()
        thread.join()
    assert not kept.points


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_e14_of_several_replicas_the_first_one_records(kept, replicas):
    strategy = ps.CentralStorageStrategy([f"cpu:{index}" for index in range(replicas)])

    def step():
        replica = ps.get_replica_context()
        summary.scalar("replica", replica.replica_id_in_sync_group)
        replica.merge_call(lambda _: summary.scalar("merged", 1))

    with recording(kept, 5):
        strategy.run(step)
    assert kept.points == [("replica", 0.0, 5), ("merged", 1.0, 5)]


@pytest.mark.parametrize(("task", "points"), [("chief", 2), ("worker", 0)])
def test_w08_of_all_workers_the_chief_records(kept, task, points):
    strategy = ps.ParameterServerStrategy(ps.SimpleClusterResolver(CLUSTER, task_type=task, task_id=0))
    with recording(kept, 1):
        strategy.run(lambda: summary.scalar("inside", 1))
        with strategy.scope():
            summary.scalar("in its scope", 1)
    assert len(kept.points) == points


# --- what is recorded


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (lambda: summary.scalar("a", torch.ones(2, 3)), r"'a': expected a single number, got a Tensor of shape \[2"),
        (lambda: summary.scalar("a", None), "scalar 'a': expected a single number, got a NoneType"),
        (lambda: summary.histogram("a", [1.0]), "histogram 'a': expected a tensor, got a list"),
        (lambda: summary.image("a", 1), "image 'a': expected a tensor, got a int"),
        (lambda: summary.image("a", torch.ones(8, 9, 3)), r"image 'a': .* got \[8, 9, 3\]; move the channels"),
        (lambda: summary.image("a", torch.ones(2, 4, 5, 6)), r"got \[2, 4, 5, 6\]"),
        (lambda: summary.image("a", torch.ones(4)), r"got \[4\]"),
        (lambda: summary.text("a", b"b"), "text 'a': expected a str, got a bytes"),
    ],
)
def test_what_cannot_be_recorded_is_refused_where_it_is_recorded(kept, record, message):
    record()
    with recording(kept, 1), pytest.raises(ConfigError, match=message):
        record()
    assert not kept.points


def test_what_is_recorded_is_a_copy(kept):
    tensors = [torch.ones(2), torch.ones(2, 2)]
    with recording(kept, 1):
        summary.histogram("a", tensors[0])
        summary.image("a", tensors[1])
    for tensor in tensors:
        tensor.zero_()
    assert [value.sum() for _, value, _ in kept.points] == [2, 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_a_histogram_takes_tensors_of_every_dtype(written, dtype):
    events = written(lambda writer: record_in(writer, lambda: summary.histogram("a", torch.ones(3, dtype=dtype))))
    assert events.Histograms("a")[0].histogram_value.num == 3


def test_of_a_sparse_tensor_the_elements_count_that_it_holds(kept):
    sparse = torch.sparse_coo_tensor([[1, 1, 5]], [1.0, 2.0, 4.0], (9,), check_invariants=False)
    with recording(kept, 1):
        summary.histogram("a", sparse)
    assert kept.points[0][1].tolist() == [3.0, 4.0]


def record_in(writer, record, step=1):
    with recording(writer, step):
        record()


# --- the files


def test_points_can_be_read_back(tmp_path):
    threads = threading.active_count()
    writer = SummaryWriter(str(tmp_path / "run"))
    for step in (1, 2):
        writer.scalar("loss", 0.5 * step, step)
    writer.flush()
    assert "open" in repr(writer)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 1.0)]
    writer.close()
    writer.close()
    assert threading.active_count() == threads


def test_every_kind_can_be_read_back(written):
    def record():
        summary.histogram("norms", torch.arange(10.0))
        summary.text("sample", "a **b**")
        summary.image("grey", torch.rand(4, 5))
        summary.image("coloured", torch.randint(0, 255, (3, 4, 5), dtype=torch.uint8))
        summary.image("several", torch.rand(4, 1, 4, 5))

    events = written(lambda writer: record_in(writer, record, step=9))
    distribution = events.Histograms("norms")[0]
    assert (distribution.step, distribution.histogram_value.num) == (9, 10)
    assert events.Tensors("sample/text_summary")[0].tensor_proto.string_val == [b"a **b**"]
    images = [events.Images(name)[0] for name in ("grey", "coloured", "several")]
    assert [(image.height, image.width > 4, image.step) for image in images[:2]] == [(4, True, 9)] * 2


def test_what_is_not_finite_is_left_out_and_ends_no_training(written, caplog):
    def fill(writer):
        writer.histogram("some", torch.tensor([1.0, math.nan, math.inf, -math.inf, 1e30]), 1)
        writer.histogram("none", torch.full((3,), math.nan), 2)
        writer.image("nan", torch.full((2, 2), math.nan), 1)

    events = written(fill)
    assert events.Histograms("some")[0].histogram_value.num == 1
    assert "none" not in events.Tags()["histograms"]
    assert caplog.record_tuples == [
        ("paramserver.summary", logging.WARNING, "summary 'none' of step 2 is not written: it has no finite element")
    ]


def test_b05_a_writer_that_is_not_used_leaves_nothing(tmp_path):
    writer = SummaryWriter(str(tmp_path / "run"))
    writer.flush()
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_closed_writer_refuses(tmp_path):
    writer = SummaryWriter(str(tmp_path))
    writer.close()
    with pytest.raises(RuntimeError, match="after its writer was closed"):
        writer.scalar("loss", 1.0, 1)


def test_tensorboard_is_imported_by_the_first_point_only(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    fresh = runpy.run_path(summary.__file__)
    writer = fresh["SummaryWriter"](str(tmp_path))
    with pytest.raises(ImportError):
        writer.scalar("loss", 1.0, 1)
