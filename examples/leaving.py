"""A loop of one's own that saves when it is asked to leave, and goes on from there when it is started again.

paramserver launch --ps 2 --workers 2 examples/leaving.py --model-dir run     stop it with Ctrl-C, and start it again
"""

import argparse
import signal
import sys
import threading

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paramserver as ps

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model-dir", default="run")
parser.add_argument("--epochs", type=int, default=1000)
args = parser.parse_args()

digits = load_digits()
train = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
loader = DataLoader(train, batch_size=32, shuffle=True, num_workers=1, persistent_workers=True)

asked_to_leave = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: asked_to_leave.set())  # instead of an exception in the middle of a step

strategy = ps.ParameterServerStrategy()
strategy.restore(args.model_dir)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters())
model, optimizer = strategy.prepare(model, optimizer)
print(f"begins at step {strategy.global_step}", flush=True)  # noqa: T201

batches = strategy.distribute_dataset(loader)
for _ in range(args.epochs):
    for features, labels in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(features), labels)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        optimizer.step()
        strategy.report(loss)
        if asked_to_leave.is_set():
            strategy.save(args.model_dir)  # the chief saves; the ps tasks leave after the workers
            strategy.leave()  # without a goodbye, which would end the run
            sys.exit(128 + signal.SIGTERM)  # not 0: the training is not finished

strategy.wait_for_workers()
strategy.save(args.model_dir)
