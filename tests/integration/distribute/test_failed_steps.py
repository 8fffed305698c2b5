"""Steps that are refused, that fail while they are applied, that a ps still applies, and those of forked children."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from typing import Any

import pytest
import torch
from tests.integration.counting import CountingModel, CountingTrainer
from tests.patience import patience
from torch import nn

from paramserver.errors import LocalProtocolError, RefusedError, UnavailableError
from paramserver.layout.blocks import BLOCK
from paramserver.server.push_plans import PushPlans
from paramserver.store.arena import StoredArena
from paramserver.store.block_rule import BlockRule
from paramserver.testing.local_cluster import LocalCluster
from paramserver.transport.shared_memory import SharedMemoryLane
from paramserver.transport.tcp import TcpLane

PATIENCE = patience(60)
WIDTH = BLOCK // 256 + 8


class Trainer(CountingTrainer):
    """Of a model with a parameter of two blocks."""

    def __init__(self, cluster: LocalCluster) -> None:
        model = CountingModel(large=nn.Parameter(torch.zeros(WIDTH, 256)), small=nn.Parameter(torch.zeros(5)))
        super().__init__(cluster, model)


@pytest.fixture(params=[1, 2])
def cluster(request: pytest.FixtureRequest, lane: str) -> Iterator[LocalCluster]:
    with LocalCluster(ps=request.param, workers=1) as cluster:
        yield cluster


@pytest.fixture
def trainer(cluster: LocalCluster) -> Iterator[Trainer]:
    trainer = Trainer(cluster)
    trainer.step()
    yield trainer
    trainer.strategy.close()


def once(act: Callable[..., Any], when: Callable[..., bool], instead: Callable[..., Any]) -> Callable[..., Any]:
    """A function, but for the first call for which ``when`` holds."""
    left = [1]

    def call(*args: Any, **options: Any) -> Any:
        if left and when(*args, **options):
            left.clear()
            return instead(*args, **options)
        return act(*args, **options)

    return call


def always(*_: object, **__: object) -> bool:
    return True


def test_buffers_of_a_step_that_every_ps_refuses_are_pushed_with_the_next(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RefusedError("not today", "ps:0")

    with monkeypatch.context() as patch:
        patch.setattr(PushPlans, "plan", refuse)
        for _ in range(2):
            with pytest.raises(RefusedError, match="not today"):
                trainer.step()
    trainer.step()
    assert trainer.strategy.global_step == 2
    trainer.check_values(updates=2)


@pytest.mark.parametrize("cluster", [1], indirect=True)
def test_an_update_that_fails_in_the_middle_says_so(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no room for a slot")

    apply = once(BlockRule.apply, lambda rule, *_: rule._size < BLOCK, fail)  # the second block
    monkeypatch.setattr(BlockRule, "apply", apply)
    with pytest.raises(RefusedError, match=r"failed on ps:0 after 2 of \d parts, which stay applied.*MemoryError"):
        trainer.step()
    assert trainer.strategy.global_step == 1
    trainer.step()
    trainer.strategy.refresh()
    assert trainer.strategy.global_step == 2
    assert trainer.model.large.unique().tolist() == [-3.0, -2.0], "one block has an update more"
    assert trainer.model.count == trainer.forwards


@pytest.mark.parametrize("cluster", [1], indirect=True)
def test_a_step_waits_until_the_ps_has_let_go_of_the_one_before(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker was interrupted while it waited; its gradients must not change under the hands of the ps."""
    arrived, go_on = threading.Event(), threading.Event()

    def slowly(*args: Any) -> None:
        arrived.set()
        assert go_on.wait(PATIENCE)
        apply(*args)

    def interrupt(*_: object) -> None:
        assert arrived.wait(PATIENCE)
        raise KeyboardInterrupt

    trainer.optimizer.zero_grad()
    trainer.model().backward()
    apply = StoredArena.apply
    monkeypatch.setattr(StoredArena, "apply", once(apply, always, slowly))
    for kind in (SharedMemoryLane, TcpLane):
        monkeypatch.setattr(kind, "finish", once(kind.finish, always, interrupt))
    with pytest.raises(KeyboardInterrupt):
        trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    trainer.model.large.sum().backward()
    trainer.model.large.grad.mul_(100)
    with ThreadPoolExecutor(1) as pool:
        stepping = pool.submit(trainer.optimizer.step)
        with pytest.raises(NotYet):
            stepping.result(0.2)
        go_on.set()
        stepping.result(PATIENCE)
    trainer.strategy.refresh()
    assert (trainer.model.large == -102).all()
    assert (trainer.model.small == -2).all()


def test_a_lost_connection_costs_no_update(trainer: Trainer) -> None:
    """The ps goes on; the worker's connections are cut, as by a network that drops them."""
    for updates in range(2, 5):
        trainer.optimizer.zero_grad()
        trainer.forwards += 1
        trainer.model().backward()
        for lane in trainer.strategy.client.lanes.each():
            lane.close()
        with pytest.raises(UnavailableError):
            trainer.optimizer.step()
        trainer.strategy.recover()
        trainer.check_values(updates)


# --- forks


def in_a_child(act: Callable[[], object]) -> str:
    """What an act raises in a forked child, or "" if nothing; the child ends without cleaning up, as a DataLoader's."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)  # the others are not there, either
            act()
            os.write(writer, b"-")
        except BaseException as error:  # noqa: BLE001  # whatever it is, the parent is told
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read().decode().removeprefix("-")
    os.waitpid(pid, 0)
    return told


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_changes_nothing(trainer: Trainer) -> None:
    before = trainer.strategy.global_step

    def look() -> None:
        trainer.model.table(torch.arange(6))

    trainer.optimizer.zero_grad()
    trainer.forwards += 1
    trainer.model().backward()  # autograd's threads are not there in a child
    for act in (trainer.optimizer.step, look, trainer.strategy.refresh):
        told = in_a_child(act)
        assert told.startswith(LocalProtocolError.__name__), told
        assert "was forked from the task that is connected" in told
    for act in (trainer.strategy.close, trainer.strategy.client.close):
        assert in_a_child(act) == ""
    trainer.optimizer.step()
    assert trainer.strategy.global_step == before + 1
    trainer.check_values(updates=2)


# --- a ps that is gone


@pytest.mark.parametrize("lane", ["auto"], indirect=True)
def test_a_lookup_notices_that_its_ps_is_gone(lane: str) -> None:
    with LocalCluster(ps=1, workers=1) as cluster:
        trainer = Trainer(cluster)
        trainer.step()
        cluster.servers[0].stop()
        for act in (lambda: trainer.model.table(torch.arange(6)), trainer.model.state_dict):
            with pytest.raises(UnavailableError, match="ps:0"):
                act()
        with contextlib.suppress(UnavailableError):
            trainer.strategy.close()
