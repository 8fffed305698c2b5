"""The benchmarks run, with the least that they can measure; what they measure then means nothing."""

from __future__ import annotations

import json
import socket
import sys
import time

import pytest
import torch
from benchmarks.harness.crew import crew, standing_by
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.figure import read
from benchmarks.harness.participant import Window
from benchmarks.harness.proxy import Proxy
from tests.multiprocess.warm import Warm

pytestmark = [pytest.mark.multiprocess, pytest.mark.whole_program]

CASES = {
    "null": {
        "null step, shared memory", "null step, TCP", "step of 32 rows, shared memory",
        "step of 32 rows of another table, shared memory",
    },
    "training": {"small, shared memory, 1 ps", "small, TCP, 1 ps"},
    "lanes": {
        f"{lane}, {what}"
        for lane in ("shared memory", "TCP")
        for what in ("round trip of a small message", "pull", "push and apply")
    },
    "growth": {"null step of 16 MB", "memory of a connection to a ps", "updates/s, 1 ps"},
    "gpu": {"MLP of 100 M parameters, the CPU in its place"},
    "latency": {"step", "pipelined step"},
    "startup": {
        "launch to first step", "import paramserver", "from paramserver import ParameterServerStrategy"
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_benchmark_measures_both_sides(name: str, warm: Warm) -> None:
    done = warm.run("benchmarks", name, "--smoke", "--json")
    assert done.returncode == 0, done.stderr
    figures = list(read(done.stdout.splitlines()))
    assert {figure.case for figure in figures} >= CASES[name]
    assert {figure.benchmark for figure in figures} == {name}
    assert all(figure.ratio > 0 and figure.measured > 0 and figure.baseline > 0 for figure in figures)


def test_a_step_is_measured_under_its_short_name(warm: Warm) -> None:
    options = ["--model", "small", "--lane", "auto", "--seconds", "0.02", "--repeats", "1", "--json"]
    done = warm.run("benchmarks.step", *options)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["model"], result["lane"], result["workers"], result["ps"]) == ("small", "auto", 2, 1)
    assert [result["ratio"]] == result["ratios"] == [result["steps_per_second"] / result["plain_steps_per_second"]]
    assert result["worker_memory"]["copy_bytes"] == 4 * 101_770
    assert result["ps_memory"]["copy_bytes"] == 4 * 101_770


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_benchmark_says_so(warm: Warm) -> None:
    done = warm.run("benchmarks", "gpu")
    assert (done.returncode, done.stdout) == (1, "")
    assert "there is no GPU that torch can use here, and nothing was measured" in " ".join(done.stderr.split())


def test_a_process_that_stands_by_does_nothing() -> None:
    with crew() as its_crew:
        child = its_crew.start("a clock", (sys.executable, "-c", "while True: print(input(), flush=True)"), {})
        with standing_by([child]):
            child.order(Window(begin=1, end=2, stop=3))
            with pytest.raises(BenchmarkError, match="a clock said nothing"):
                child.receive(Window, 0.2)
        assert child.receive(Window, 30) == Window(begin=1, end=2, stop=3)


def test_a_proxy_delays_both_ways_and_loses_nothing() -> None:
    sent = bytes(range(256)) * 4096
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        Proxy() as proxy,
    ):
        host, _, port = proxy.toward(listener.getsockname()[1]).rpartition(":")
        with socket.create_connection((host, int(port))) as near, listener.accept()[0] as far:
            for delay in (0.0, 0.02):
                proxy.delay = delay
                begun = time.monotonic()
                for source, target in ((near, far), (far, near)):
                    source.sendall(b"x")
                    assert target.recv(1) == b"x"
                assert time.monotonic() - begun >= 2 * delay
            near.sendall(sent)
            near.shutdown(socket.SHUT_WR)
            with far.makefile("rb") as stream:
                assert stream.read() == sent
