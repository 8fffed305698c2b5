"""The benchmarks' own arithmetic: what a result is worth depends on it."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]

SMAPS = """\
55d0-55d9 r-xp 00000000 fe:01 77 /usr/lib/libtorch_cpu.so
Rss:                 900 kB
Anonymous:            10 kB
VmFlags: rd ex mr mw me
7f00-7f10 rw-p 00000000 00:00 0 [heap]
Rss:                 200 kB
Anonymous:           200 kB
7f20-7f30 rw-s 00000000 00:01 5 /memfd:paramserver (deleted)
Rss:                4000 kB
Anonymous:             0 kB
7f30-7f40 rw-s 00001000 00:01 5 /memfd:paramserver (deleted)
Rss:                4000 kB
Anonymous:             0 kB
7f40-7f50 r--s 00000000 00:01 6 /memfd:paramserver (deleted)
Rss:                8000 kB
Anonymous:             0 kB
"""

KIB = 1024


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of the benchmarks, which are no part of the installed package."""
    monkeypatch.syspath_prepend(ROOT)

    def load(name: str) -> ModuleType:
        return importlib.import_module(f"benchmarks.{name}")

    return load


def test_a_shared_page_counts_for_the_creator_of_its_file_and_once(benchmark) -> None:
    memory = benchmark("harness.memory")
    mappings = list(memory.parse(SMAPS))
    assert len(mappings) == 5
    assert memory.own(mappings) == (10 + 200 + 4000) * KIB
    assert memory.foreign(mappings) == 8000 * KIB


def test_the_peak_is_read_from_the_status(benchmark) -> None:
    assert benchmark("harness.memory").high_water_mark("VmPeak:\t 99 kB\nVmHWM:\t   123 kB\n") == 123 * KIB


@pytest.mark.parametrize(
    ("name", "parameters", "batch"),
    [("small", 101_770, 32), ("large", 36_818_954, 32), ("sparse", 32_000_000 + 143_105, 1024)],
)
def test_the_models_are_as_large_as_documented(benchmark, name: str, parameters: int, batch: int) -> None:
    model = benchmark("models.catalogue").MODELS[name]
    assert model.nbytes == 4 * parameters
    assert model.shape.batch == batch


@pytest.fixture
def tiny(benchmark):
    """Models of both kinds, as small as they can be told apart."""
    shapes = benchmark("models.shapes")
    sparse = shapes.SparseShape(rows=50, width=2, ids=3, numbers=4, hidden=(5,), batch=6, learning_rate=0.1)
    mlp = shapes.MlpShape(sizes=(4, 3, 2), batch=6)
    return [benchmark("models.mlp").Mlp(mlp), benchmark("models.sparse").Sparse(sparse)]


def test_a_built_model_has_the_bytes_that_its_shape_says(tiny) -> None:
    for model in tiny:
        assert sum(parameter.nbytes for parameter in model.build().parameters()) == model.nbytes


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
def test_what_is_trained_on_a_gpu_learns(benchmark) -> None:
    gpu = benchmark("cases.gpu")
    assert gpu.TINY.keys() == gpu.MODELS.keys()
    for model in gpu.TINY.values():
        module = model.build()
        assert sum(parameter.nbytes for parameter in module.parameters()) == model.nbytes
        training = benchmark("models.model").Training(model, module, model.optimizer(module), torch.device("cpu"))
        training.step()
        first = training.loss
        for _ in range(16 * 30):
            training.step()
        assert training.loss < first


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
def test_models_learn_from_their_batches_as_any_program_would(benchmark, tiny) -> None:
    for model in tiny:
        module = model.build()
        training = benchmark("models.model").Training(model, module, model.optimizer(module))
        losses = []
        for _ in range(30 * len(model.batches())):
            training.step()
            losses.append(training.loss)
        assert sum(losses[-16:]) < sum(losses[:16])
        assert [each.is_sparse for each in (p.grad for p in module.parameters())] == [
            isinstance(model, benchmark("models.sparse").Sparse),
            *[False] * (len(list(module.parameters())) - 1),
        ]


def test_a_window_counts_whole_steps_within_it_and_trains_beyond_it(benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    participant = benchmark("harness.participant")
    clock = [0.0]
    monkeypatch.setattr(participant.time, "monotonic", lambda: clock[0])

    def step() -> int:
        clock[0] += 0.4
        return 2

    measured = participant.measure(step, lambda: 0.5, participant.Window(begin=1.0, end=3.0, stop=5.0))
    assert measured.steps == 5  # from 1.2 to 3.2
    assert measured.seconds == pytest.approx(2.0)
    assert (measured.staleness, measured.largest_staleness) == (10, 2)
    assert clock[0] >= 5.0


def test_a_loss_that_is_no_number_is_no_result(benchmark) -> None:
    participant = benchmark("harness.participant")
    window = participant.Window(begin=0.0, end=0.0, stop=0.0)
    with pytest.raises(ValueError, match="the loss became nan"):
        participant.measure(lambda: 0, lambda: float("nan"), window)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "huge"}, "model: expected one of small, large, sparse, got 'huge'"),
        ({"lane": "rdma"}, "lane: expected one of auto, tcp, got 'rdma'"),
        ({"workers": 0}, "workers: expected 1 or more, got 0"),
        ({"workers": 3, "threads": 2}, "threads: expected 3 or more"),
        ({"seconds": 0.0}, "seconds: expected more than 0"),
        ({"repeats": 0}, "repeats: expected 1 or more, got 0"),
    ],
)
def test_options_that_cannot_be_measured_are_refused(benchmark, options: dict[str, object], message: str) -> None:
    error = benchmark("harness.errors").BenchmarkError
    with pytest.raises(error, match=message):
        benchmark("cases.step").StepOptions(**options)
