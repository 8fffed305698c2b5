"""Chief and workers in one process, on real ps tasks: who waits for whom (N05), who writes (W08, B05)."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.patience import patience
from torch import nn

import paramserver as ps
from paramserver.errors import DeadlineError
from paramserver.estimator import EstimatorSpec, GlobalStepWaiterHook, ModeKeys, RunConfig, TrainingHook
from paramserver.estimator.train.training import train
from paramserver.testing.local_cluster import LocalCluster

PATIENCE = patience(60.0)


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(ps=1, workers=2) as cluster:
        yield cluster


def build(*chief_hooks: TrainingHook) -> EstimatorSpec:
    """A model that records a summary."""
    model = nn.Linear(2, 1)

    def loss_fn(model: nn.Module, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        ps.summary.scalar("recorded", 1)
        return (model(features) - labels).square().mean()  # type: ignore[no-any-return]

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return EstimatorSpec(
        ModeKeys.TRAIN, model=model, loss_fn=loss_fn, optimizer=optimizer, training_chief_hooks=chief_hooks
    )


def work(
    cluster: LocalCluster,
    task: str,
    model_dir: Path,
    *hooks: TrainingHook,
    chief_hooks: Sequence[TrainingHook] = (),
    **options: Any,
) -> int:
    """Train as a task of the cluster, on 20 batches; the steps that were made."""
    config = RunConfig(model_dir=str(model_dir), save_summary_steps=1, log_step_count_steps=None, **options)
    batches = [(torch.ones(4, 2), torch.zeros(4, 1))] * 20
    strategy = ps.ParameterServerStrategy(cluster.resolver(task))
    return train(strategy, config, lambda: build(*chief_hooks), lambda: iter(batches), hooks=hooks)


def together(*works: Callable[[], int]) -> list[int]:
    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result(PATIENCE) for future in [pool.submit(work) for work in works]]


class Tasks(TrainingHook):
    """Writes down which tasks it ran on, once for each."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def after_create_session(self, session: Any) -> None:
        self.seen.append(session.task)


def test_n05_w08_a_worker_without_a_chief_gives_up_after_its_time(cluster: LocalCluster, tmp_path: Path) -> None:
    with pytest.raises(DeadlineError, match="chief has not initialized the variables on ps:0 within 0.1 s"):
        work(cluster, "worker:0", tmp_path / "run", session_creation_timeout_secs=0.1)
    assert not (tmp_path / "run").exists()


def test_b05_w08_q12_the_chief_alone_writes_and_has_the_hooks_for_the_chief(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    for_all, for_chief = Tasks(), Tasks()
    made = together(
        *(
            functools.partial(work, cluster, task, tmp_path / task, for_all, chief_hooks=[for_chief])
            for task in ("chief:0", "worker:0")
        )
    )
    assert made == [20, 20]
    assert (sorted(for_all.seen), for_chief.seen) == (["chief:0", "worker:0"], ["chief:0"])
    assert not (tmp_path / "worker:0").exists()
    # Of which steps there are checkpoints is a matter of chance: the worker may be ahead of the chief's first one.
    kinds = {re.split(r"[-.]", path.name)[0] for path in (tmp_path / "chief:0").iterdir()}
    assert kinds == {"checkpoint", "ckpt", "events"}
    written = EventAccumulator(str(tmp_path / "chief:0")).Reload()
    assert [event.step for event in written.Scalars("recorded")] == [event.step for event in written.Scalars("loss")]
    assert len(written.Scalars("loss")) <= 20


def test_n11_a_worker_that_waited_for_a_step_begins_with_its_values(cluster: LocalCluster, tmp_path: Path) -> None:
    first: list[tuple[int, int]] = []

    class First(TrainingHook):
        def after_run(self, context: Any, values: Any) -> None:
            first.append((values.global_step, values.staleness))

    waits = GlobalStepWaiterHook(20, wait=lambda seconds: None)
    made = together(
        functools.partial(work, cluster, "chief:0", tmp_path / "chief"),
        functools.partial(work, cluster, "worker:0", tmp_path / "worker", waits, First()),
    )
    assert made == [20, 20]
    assert first[0] == (21, 0), "at the initial values the staleness would be 20"
