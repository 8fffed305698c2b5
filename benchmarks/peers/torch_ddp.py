"""A worker of DistributedDataParallel over Gloo: synchronous, without a ps.

All workers take every step together, so that of one of them are those of all: worker 0 measures, and the others step
whenever it does.
"""

from __future__ import annotations

from typing import NoReturn

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.harness.participant import take_part
from benchmarks.models.catalogue import MODELS
from benchmarks.models.model import Training
from benchmarks.peers.assignment import Assignment, read_assignment


def main(assignment: Assignment) -> None:
    """Worker 0 takes part until the input ends; another one steps until it is killed."""
    meeting = f"file://{assignment.folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=assignment.index, world_size=assignment.workers)
    model = MODELS[assignment.model]
    module = DistributedDataParallel(model.build())
    training = Training(model, module, model.optimizer(module))
    if assignment.index:
        follow(training)

    def step() -> int:
        training.step()
        return 0

    take_part(step, lambda: training.loss, stride=assignment.workers)


def follow(training: Training) -> NoReturn:
    """Take every step that worker 0 takes."""
    while True:
        training.step()


if __name__ == "__main__":
    main(read_assignment())
