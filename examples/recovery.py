"""Digits on machines that fail: what is lost is started again, and training goes on from the last checkpoint.

python examples/recovery.py                                                            one process
paramserver launch --ps 2 --workers 3 --evaluator --restarts 2 examples/recovery.py    a cluster
python examples/recovery.py --kill-all 7                                               the same, under fire

The last one kills each process of the cluster once, at random steps that the number decides.
"""

import argparse
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import paramserver as ps
from paramserver.estimator import (
    Estimator,
    EstimatorSpec,
    EvalSpec,
    FinalExporter,
    ModeKeys,
    RunConfig,
    TrainSpec,
    train_and_evaluate,
)

LAUNCH = ["-m", "paramserver", "launch", "--ps", "2", "--workers", "3", "--evaluator", "--restarts", "2"]
TASKS = ["ps:0", "ps:1", "chief:0", "worker:0", "worker:1", "evaluator:0"]
STEP = re.compile(r"\bstep (?:= )?(\d+)")


def model_fn(mode: ModeKeys) -> EstimatorSpec:
    """A small convolutional network."""
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 10)),
    )
    return EstimatorSpec(
        mode,
        model=model,
        loss_fn=lambda model, features, labels: F.cross_entropy(model(features), labels),
        optimizer=torch.optim.Adagrad(model.parameters(), lr=0.02),
        eval_metrics={"accuracy": MulticlassAccuracy(10, average="micro")},
    )


def train(model_dir: str, max_steps: int) -> None:
    """Play this task's part of the run."""
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target))
    training, test = torch.utils.data.random_split(data, [1500, 297], torch.Generator().manual_seed(0))

    def train_input() -> Iterator[tuple[Tensor, Tensor]]:
        while True:  # training stops at max_steps
            yield from DataLoader(training, batch_size=32, shuffle=True)

    config = RunConfig(
        model_dir=model_dir,
        save_checkpoints_steps=100,  # what a lost ps costs at most, while there is a chief
        log_step_count_steps=20,
        train_distribute=ps.ParameterServerStrategy(),
    )
    evaluation = EvalSpec(
        lambda: DataLoader(test, batch_size=99),
        steps=None,
        start_delay_secs=0,
        throttle_secs=1,
        exporters=FinalExporter("final"),
    )
    results = train_and_evaluate(
        Estimator(model_fn, config=config), TrainSpec(train_input, max_steps=max_steps), evaluation
    )
    if results:
        print(f"test accuracy {results[0]['accuracy']:.3f}")  # noqa: T201


def kill_all(seed: int, max_steps: int, arguments: list[str]) -> int:
    """Run this script as a cluster, and kill each of its processes once; the exit code."""
    chance = random.Random(seed)  # noqa: S311  # no secret
    # One that is due below 0 is killed as soon as anything is heard of the run, before there is a checkpoint.
    doomed = {task: chance.randrange(-max_steps // 10, max_steps * 3 // 4) for task in TASKS}
    reached = -1
    command = [sys.executable, *LAUNCH, __file__, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as launcher:
        for line in launcher.stdout or ():
            print(line, end="", flush=True)  # noqa: T201
            reached = max([reached, *map(int, STEP.findall(line))])
            for task in [task for task, step in doomed.items() if step <= reached]:
                print(f"{task} is killed, due at step {doomed.pop(task)}", flush=True)  # noqa: T201
                os.kill(process_of(task, launcher.pid), signal.SIGKILL)
    return launcher.returncode


def process_of(task: str, launcher: int) -> int:
    """The living process of a task, which has the task's name; the launcher's child forks them."""
    for server in children(launcher):
        for child in children(server):
            with contextlib.suppress(OSError):  # one that has ended and is no more
                name, _, rest = Path(f"/proc/{child}/stat").read_text().rpartition(")")
                if name.endswith(f"({task}") and not rest.startswith(" Z"):
                    return child
    raise LookupError(f"{task} has no process")


def children(process: int) -> list[int]:
    """What a process of one thread has started."""
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def main() -> None:
    """Train, or have it done by processes that are killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-dir", default="run")
    parser.add_argument("--max-steps", type=int, default=4000)
    parser.add_argument("--kill-all", type=int, metavar="SEED", help="run a cluster, and kill each of its processes")
    args = parser.parse_args()
    if args.kill_all is None:
        train(args.model_dir, args.max_steps)
    else:
        options = ["--model-dir", args.model_dir, "--max-steps", str(args.max_steps)]
        sys.exit(kill_all(args.kill_all, args.max_steps, options))


if __name__ == "__main__":
    main()
