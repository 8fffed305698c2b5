"""``python -m benchmarks.harness.programs.preparing NBYTES``: a chief that says how many seconds ``prepare`` takes."""

from __future__ import annotations

import sys
import time

import torch

import paramserver as ps

PROGRAM = "benchmarks.harness.programs.preparing"
PARAMETERS = 10

if __name__ == "__main__":
    size = int(sys.argv[1]) // (4 * PARAMETERS)
    model = torch.nn.ParameterList([torch.ones(size) for _ in range(PARAMETERS)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    strategy = ps.ParameterServerStrategy()
    strategy.connect()
    begun = time.perf_counter()
    strategy.prepare(model, optimizer)
    sys.stdout.write(f"{time.perf_counter() - begun}\n")
