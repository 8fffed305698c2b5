"""The script that `benchmarks.cases.startup` launches: take a step, print its time, and wait to be ended."""

from __future__ import annotations

import signal
import time

import torch

import paramserver as ps

CONNECT_LIMIT = 60.0

strategy = ps.ParameterServerStrategy(session_creation_timeout=CONNECT_LIMIT)
with strategy.scope():
    module = torch.nn.Linear(8, 1)
    model, optimizer = strategy.prepare(module, torch.optim.SGD(module.parameters(), lr=0.1))
model(torch.ones(1, 8)).sum().backward()
optimizer.step()
print("first step at", time.monotonic(), flush=True)  # noqa: T201  # the launcher passes it on
signal.pause()
