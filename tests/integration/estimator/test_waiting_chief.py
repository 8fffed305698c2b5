"""A chief whose input ends before the others' goes on with its duties while it waits for them (Z11)."""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tests.integration.distribute.test_recovery import Cluster, a_cluster
from tests.patience import patience
from torch import Tensor, nn

from paramserver.checkpoint.model_dir import checkpoint_step, latest_checkpoint
from paramserver.estimator import (
    CheckpointSaverListener,
    Estimator,
    EstimatorSpec,
    ModeKeys,
    RunConfig,
    StepCounterHook,
    read_eval_metrics,
)
from paramserver.estimator.hooks.basic import SecondOrStepTimer
from paramserver.estimator.hooks.early_stopping import _AskingHook, _ObeyingHook
from paramserver.estimator.hooks.hook import TrainingHook, TrainingSession

PATIENCE = patience(60.0)
Batches = Callable[[], Iterator[tuple[Tensor, Tensor]]]


def model_fn(mode: ModeKeys) -> EstimatorSpec:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    return EstimatorSpec(
        mode,
        model=model,
        loss_fn=lambda model, x, y: (model(x)[:, 0] - y).square().mean(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
    )


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    return itertools.repeat((torch.ones(4, 3), torch.ones(4)))


def short() -> Iterator[tuple[Tensor, Tensor]]:
    return itertools.islice(batches(), 3)


def until(is_over: Callable[[], bool]) -> Batches:
    """Batches until something has happened, which the training has to bring about."""

    def read() -> Iterator[tuple[Tensor, Tensor]]:
        deadline = time.monotonic() + PATIENCE
        while not is_over():
            assert time.monotonic() < deadline, "what the chief was to do was never done"
            yield next(batches())

    return read


class Run:
    """A chief and a worker on two threads of this process, and a ps."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.cluster = Cluster(num_ps=1, num_workers=2)
        self._worker_reads = threading.Event()

    def train(
        self,
        inputs: tuple[Batches, Batches],
        hooks: tuple[list[TrainingHook], list[TrainingHook]] = ([], []),
        listeners: tuple[CheckpointSaverListener, ...] = (),
        **config: object,
    ) -> None:
        def task(index: int) -> None:
            strategy = self.cluster.strategy(index)
            options = {"save_checkpoints_steps": 20, "log_step_count_steps": None, **config}
            estimator = Estimator(model_fn, self.folder, RunConfig(**options))  # type: ignore[arg-type]
            told = listeners if index == 0 else ()
            read = (self._chief_reads, self._worker_begins)[index]
            estimator.train_on(strategy, lambda: read(inputs[index]), hooks=hooks[index], saving_listeners=told)

        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(task, index) for index in range(2)]:
                done.result(2 * PATIENCE)

    def _chief_reads(self, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches that end when the worker trains: a chief does not wait for a worker that was never seen."""
        yield from batches()
        assert self._worker_reads.wait(PATIENCE)

    def _worker_begins(self, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
        self._worker_reads.set()
        yield from batches()

    def close(self) -> None:
        self.cluster.close()
        del self.cluster  # pytest keeps this object for longer than the memory of the ps may stay


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path)
    yield run
    run.close()


class Steps(CheckpointSaverListener):
    """The steps of all checkpoints."""

    def __init__(self) -> None:
        self.saved: list[int] = []

    def after_save(self, session: TrainingSession, step: int) -> None:
        self.saved.append(step)


def test_it_saves_checkpoints(run: Run) -> None:
    def is_saved() -> bool:
        latest = latest_checkpoint(run.folder)
        return latest is not None and checkpoint_step(latest) >= 100

    steps = Steps()
    run.train((short, until(is_saved)), listeners=(steps,))
    assert steps.saved[0] < 20, "the worker may have begun before the chief's first save"
    assert any(step >= 100 for step in steps.saved[1:-1]), "before the last one, which the end brings"


def test_it_stops_the_others_early(run: Run) -> None:
    """Its predicate is asked while it waits, and the worker, whose input has no end, obeys."""
    strategy_steps: list[int] = []

    def should_stop() -> bool:
        latest = latest_checkpoint(run.folder)
        strategy_steps.append(checkpoint_step(latest) if latest else 0)
        return strategy_steps[-1] >= 50

    asking = _AskingHook(should_stop, SecondOrStepTimer(every_steps=10), True)
    run.train((short, batches), ([asking], [_ObeyingHook()]))
    assert strategy_steps[-1] >= 50


def test_it_counts_steps_and_writes_summaries(run: Run) -> None:
    counter = StepCounterHook(every_n_steps=30)

    def is_counted() -> bool:
        return counter.steps_per_second is not None

    run.train((short, until(is_counted)), ([counter], []), save_summary_steps=10)
    written = read_eval_metrics(run.folder)
    assert any(step > 10 and "global_step/sec" in metrics for step, metrics in written.items())


def test_a_users_hook_is_told_while_it_waits_with_a_step_that_is_fresh(run: Run) -> None:
    class Waits(TrainingHook):
        seen = 0

        def while_waiting(self, context: object) -> None:
            self.seen = context.session.global_step  # type: ignore[attr-defined]

    waits = Waits()
    run.train((short, until(lambda: waits.seen > 5)), ([waits], []))
    assert waits.seen > 5


def test_a_ps_that_is_lost_meanwhile_costs_the_steps_since_the_last_of_its_checkpoints(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    def saved() -> int:
        latest = latest_checkpoint(run.folder)
        return checkpoint_step(latest) if latest else 0

    def input_with_a_loss() -> Iterator[tuple[Tensor, Tensor]]:
        yield from until(lambda: saved() >= 100)()
        run.cluster.lose(0)
        reached = saved()
        yield from until(lambda: saved() > reached)()

    run.train((short, input_with_a_loss))
    (restored,) = re.findall(r"restores .*ckpt-(\d+)", caplog.text)
    assert int(restored) >= 100


@pytest.mark.parametrize("num_ps", [1, 2])
@pytest.mark.usefixtures("each_strategy_is_a_process")
def test_workers_that_are_not_back_on_a_lost_ps_are_waited_for(num_ps: int) -> None:
    """A chief that is back first does not take itself for the last one."""
    with a_cluster(num_ps, num_workers=2) as cluster:
        chief, worker = cluster.strategy(0), cluster.strategy(1)
        for strategy in (chief, worker):
            model = nn.Linear(3, 1)
            strategy.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        assert chief.client is not None
        cluster.lose(0)
        chief.recover()
        waited_for: list[tuple[str, ...]] = []

        def on_wait(tasks: tuple[str, ...]) -> None:
            waited_for.append(tasks)
            if len(waited_for) == 1:
                worker.recover()
                worker.close()

        chief.client.await_workers(on_wait)
        assert waited_for[0] == ("worker:1",)
