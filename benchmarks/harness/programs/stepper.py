"""Programs of one host: a worker that makes steps when it is told to, and the least that moves the same bytes.

``python -m benchmarks.harness.programs.stepper train NBYTES`` is a task of the cluster in TF_CONFIG that trains a model
without computing anything. ``serve NBYTES PORT`` and ``ask NBYTES HOST PORT`` are two ends of a bare connection: one
sends as many bytes as the model has, then receives as many. For each number of seconds on its standard input, ``train``
and ``ask`` say how many steps they make in a second.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable

READY, LISTENS, RATE = "ready", "listens", "rate"
PARAMETERS = 8


def _train(nbytes: str) -> None:
    import torch  # the bare ends need no torch

    import paramserver as ps

    torch.set_num_threads(1)
    strategy = ps.ParameterServerStrategy()
    model = torch.nn.ParameterList([torch.zeros(int(nbytes) // (4 * PARAMETERS)) for _ in range(PARAMETERS)])
    model, optimizer = strategy.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-3))

    def step() -> None:
        for parameter in model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    step()
    _make_steps(step)


def _serve(nbytes: str, port: str) -> None:
    content = memoryview(bytearray(int(nbytes)))
    with socket.create_server(("", int(port))) as listening:
        _say(LISTENS)
        connection, _ = listening.accept()
        while _receive(connection, content):
            connection.sendall(content)


def _ask(nbytes: str, host: str, port: str) -> None:
    content = memoryview(bytearray(int(nbytes)))
    with socket.create_connection((host, int(port))) as connection:

        def step() -> None:
            connection.sendall(content)
            _receive(connection, content)

        _make_steps(step)


def _receive(connection: socket.socket, content: memoryview) -> bool:
    done = 0
    while done < content.nbytes:
        received = connection.recv_into(content[done:])
        if not received:
            return False
        done += received
    return True


def _make_steps(step: Callable[[], None]) -> None:
    _say(READY)
    for line in sys.stdin:
        begun, count, seconds = time.perf_counter(), 0, 0.0
        while seconds < float(line):
            step()
            count += 1
            seconds = time.perf_counter() - begun
        _say(f"{RATE} {count / seconds}")


def _say(words: str) -> None:
    sys.stdout.write(f"{words}\n")
    sys.stdout.flush()


ACTIONS: dict[str, Callable[..., None]] = {"train": _train, "serve": _serve, "ask": _ask}

if __name__ == "__main__":
    ACTIONS[sys.argv[1]](*sys.argv[2:])
