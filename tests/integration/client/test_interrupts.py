"""An exception at every line of what a worker does with its ps tasks: afterwards all is whole, and the next step works.

As Ctrl-C in a notebook, a time limit of a search, or a signal handler that raises: it may come between any two lines.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.integration.counting import CountingModel, CountingTrainer
from torch import nn

import paramserver as ps
from paramserver.layout.blocks import BLOCK
from paramserver.testing.local_cluster import LocalCluster

PACKAGE = str(Path(ps.__file__).parent)


class Interrupt(BaseException):
    """What comes in between."""


class Interrupter:
    """Raises `Interrupt` before a line of the package, counted from 0, that this thread is about to execute.

    Attributes:
        lines: How many lines were counted.
    """

    def __init__(self, at: int) -> None:
        self.lines = 0
        self._at = at

    def __enter__(self) -> Interrupter:
        self._before = sys.gettrace()
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _enter(self, frame: FrameType, event: str, _: object) -> Any:
        return self._count if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _count(self, frame: FrameType, event: str, _: object) -> Any:
        if event == "line":
            self.lines += 1
            if self.lines == self._at + 1:
                raise Interrupt(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return self._count


def interrupted(act: Callable[[], object], every: int = 1) -> Iterator[str]:
    """Do something again and again, interrupted some lines later each time, until it gets to its end; where it was."""
    at = 0
    while True:
        try:
            with Interrupter(at):
                act()
        except Interrupt as where:
            yield str(where).removeprefix(PACKAGE)
        else:
            return
        at += every


def model(features: int) -> CountingModel:
    return CountingModel(large=nn.Linear(features, 700), middle=nn.Parameter(torch.zeros(70, 70)))


class Trainer(CountingTrainer):
    """Counts what it has done."""

    def __init__(self, cluster: LocalCluster, *, pipeline: bool = False, features: int = 3) -> None:
        super().__init__(cluster, model(features), pipeline=pipeline)
        self.steps = self.interrupts = 0

    def step(self) -> None:
        super().step()
        self.steps += 1

    def check(self, where: str) -> None:
        """Every update was made once and whole, or not at all."""
        self.step()
        self.strategy.refresh()
        made = self.strategy.global_step
        assert self.steps <= made <= self.steps + self.interrupts, where
        self.check_values(made, f"after an interrupt at {where}")


@pytest.fixture
def cluster(lane: str) -> Iterator[LocalCluster]:
    with LocalCluster(ps=2, workers=1) as cluster:
        yield cluster


@pytest.mark.parametrize("pipeline", [False, True], ids=["", "pipelined"])
def test_a_step(cluster: LocalCluster, lane: str, pipeline: bool) -> None:
    # With a direct gradient, and where a frame can be cut in the middle, of two blocks.
    features = 3 if pipeline else 380 if lane == "auto" else 760
    trainer = Trainer(cluster, pipeline=pipeline, features=features)
    trainer.step()
    trainer.backward()
    places = 0
    for where in interrupted(trainer.optimizer.step):
        places += 1
        trainer.interrupts += 1
        trainer.check(where)
        trainer.backward()
    trainer.steps += 1
    trainer.check("the end")
    assert places > 100
    trainer.strategy.close()


def test_a_lookup_and_a_refresh(cluster: LocalCluster) -> None:
    trainer = Trainer(cluster)
    trainer.step()

    def look() -> None:
        assert (trainer.model.table(torch.arange(8)) == -trainer.strategy.global_step).all()
        trainer.strategy.refresh()

    for where in interrupted(look):
        trainer.check(where)
    trainer.strategy.close()


@pytest.mark.parametrize("size", [3, 3 * BLOCK // 2], ids=["one block", "two blocks"])
def test_a_variable_of_the_programs_own(cluster: LocalCluster, size: int) -> None:
    strategy = ps.ParameterServerStrategy(cluster.resolver("chief:0"))
    with strategy.scope():
        variable = ps.Variable(torch.zeros(size), name="v")

    def act() -> None:
        variable.assign_add(torch.ones(size))

    for count, where in enumerate(interrupted(act, every=1 if size < BLOCK else 11), start=1):
        act()
        (found,) = variable.read_value().unique().tolist()
        assert count <= found <= 2 * count, where
    strategy.close()


def test_a_variable_that_is_created(cluster: LocalCluster) -> None:
    strategy = ps.ParameterServerStrategy(cluster.resolver("chief:0"))
    made: list[ps.Variable] = []

    def create() -> None:
        made.append(ps.Variable(torch.full((BLOCK + 5,), 7.0), name=f"v{len(made)}"))

    again = 0
    with strategy.scope():
        for where in interrupted(create, every=3):
            create()
            # What was made by then, and only never handed to the program, is not made under the same name again.
            again += made[-1].name == f"v{len(made) - 1}_1"
            assert made[-1].name.removesuffix("_1") == f"v{len(made) - 1}", where
            if not again:
                assert made[-1].device == f"/job:ps/task:{(len(made) - 1) % 2}/device:CPU:0", "no turn is taken twice"
            assert (made[-1].read_value() == 7).all(), where
    assert again <= 6
    strategy.close()


@pytest.mark.filterwarnings(r"ignore:(?s).*unclosed file:pytest.PytestUnraisableExceptionWarning")  # just being opened
def test_a_save(cluster: LocalCluster, tmp_path: Path) -> None:
    """What is named the latest is whole, the next save works, and training is as if nothing had been saved."""
    trainer = Trainer(cluster)
    trainer.step()
    folder = str(tmp_path / "run")

    def save() -> None:
        trainer.strategy.save(folder)

    save()
    for where in interrupted(save, every=41):
        latest = trainer.strategy.latest_checkpoint(folder)
        assert latest, where
        shards = sorted(Path(latest).glob("model*.safetensors"))
        values = {name: value for shard in shards for name, value in load_file(shard).items()}
        assert (values["middle"] == values["large.bias"][0]).all(), where
        assert len(values) == len(trainer.model.state_dict()), where
        trainer.check(where)
        save()
        assert trainer.strategy.latest_checkpoint(folder) == str(tmp_path / "run" / f"ckpt-{trainer.steps}"), where
    trainer.strategy.close()
