"""A task of torch.distributed.rpc, as in a tutorial of PyTorch.

As in "Implementing Batch RPC Processing Using Asynchronous Executions", a trainer sends its gradients to the ps and
gets the updated model. A batch of updates here has the gradients of one trainer, so that no trainer waits for another.

PyTorch's older tutorial of a parameter server has the model compute on the ps. With two trainers at once that fails:
"one of the variables needed for gradient computation has been modified by an inplace operation".
"""

from __future__ import annotations

import functools
import itertools
import threading

import torch.distributed.rpc as rpc
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.harness.participant import take_part
from benchmarks.models.catalogue import MODELS
from benchmarks.peers.assignment import Assignment, read_assignment

SERVER = "ps:0"


class ParameterServer:
    """The model and its optimizer."""

    def __init__(self, name: str) -> None:
        self.model = MODELS[name].build()
        self._optimizer = MODELS[name].optimizer(self.model)
        self._lock = threading.Lock()

    def update(self, gradients: list[Tensor]) -> None:
        """Apply gradients, in the order of the parameters. Thread-safe."""
        with self._lock:
            for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            self._optimizer.step()


@functools.cache
def parameter_server(model: str) -> ParameterServer:
    """Return the parameter server of this process, which all trainers share."""
    return ParameterServer(model)


def fetch_model(model: str) -> nn.Module:
    """Run on the ps: return the present model, of which the caller gets a copy."""
    return parameter_server(model).model


def update_and_fetch_model(model: str, gradients: list[Tensor]) -> nn.Module:
    """Run on the ps: apply gradients, then return the model as `fetch_model` does."""
    parameter_server(model).update(gradients)
    return fetch_model(model)


class Trainer:
    """A worker, with the loop of the tutorial."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._model: nn.Module = rpc.rpc_sync(SERVER, fetch_model, args=(name,))
        self._batches = itertools.cycle(MODELS[name].batches())
        self.loss = 0.0

    def step(self) -> int:
        """Take a step."""
        features, labels = next(self._batches)
        loss = functional.cross_entropy(self._model(features), labels)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        gradients = [parameter.grad for parameter in self._model.parameters()]
        self._model = rpc.rpc_sync(SERVER, update_and_fetch_model, args=(self._name, gradients))
        self.loss = loss.item()
        return 0


def main(assignment: Assignment) -> None:
    """Take part as a trainer until the input ends, or serve as the ps until all trainers are done."""
    if assignment.task == SERVER:
        parameter_server(assignment.model)  # before two trainers ask for it at once
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{assignment.folder}/meeting")
    rank, world_size = assignment.tasks.index(assignment.task), len(assignment.tasks)
    rpc.init_rpc(  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        assignment.task, rank=rank, world_size=world_size, rpc_backend_options=options
    )
    if assignment.task != SERVER:
        trainer = Trainer(assignment.model)
        take_part(trainer.step, lambda: trainer.loss)
    rpc.shutdown()


if __name__ == "__main__":
    main(read_assignment())
