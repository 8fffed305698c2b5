"""The tensors that a model's modules hold, for each replica of a worker.

A model has one set of modules and, for each replica, a set of parameters and buffers; before a replica has its turn,
its own are put into the modules and into the optimizers' param groups. So whatever a program does with the model or an
optimizer (call it, read a weight, clip gradients) it does with what belongs to the replica that it runs on.

Rules
    * The first replica's tensors are the ones that the model came with; the others' are made here.
    * A parameter of another replica follows the first one's ``requires_grad`` and hooks.
    * Gradients of the first replica that a program removes outside of replicas are removed on all of them.
    * What a module puts in the place of a buffer is taken over into the replica's own when its turn ends; of another
      shape or dtype, it becomes the replica's own itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from paramserver.memory.torch_internals import alias, buffers_of, parameters_of


class ReplicaTensors:
    """Every replica's parameters and buffers of one model.

    Args:
        model: Its tensors are moved to the first replica's device; its modules are changed when another replica is
            activated.
        optimizers: Their param groups are changed likewise.
        devices: Where each replica computes.
    """

    def __init__(
        self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], devices: Sequence[torch.device]
    ) -> None:
        self.devices = tuple(devices)
        self._active = 0
        self._sets: dict[int, tuple[torch.Tensor, ...]] = {}
        self._parameters = [
            (module, name, self._set_of(parameter)) for module, name, parameter in _own_parameters(model)
        ]
        self._buffers = [(module, name, self._places_of(buffer)) for module, name, buffer in _own_buffers(model)]
        self._groups = [optimizer.param_groups for optimizer in optimizers]
        self._siblings = {id(tensor): tensors for tensors in self._sets.values() for tensor in tensors}
        self._with_gradient: list[tuple[torch.Tensor, ...]] = []
        if len(self.devices) == 1:
            self._parameters, self._buffers, self._groups = [], [], []  # nothing will ever be exchanged

    def of(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Every replica's tensor in the place of the first one's ``tensor``."""
        return self._sets.get(id(tensor), (tensor,))

    def activate(self, replica: int) -> None:
        """Put a replica's tensors into the modules and param groups. Called also where they are there already."""
        if replica == self._active:
            self._remove_gradients()
            return
        for module, name, tensors in self._parameters:
            tensor, first = tensors[replica], tensors[0]
            if tensor.requires_grad is not first.requires_grad:
                tensor.requires_grad_(first.requires_grad)
            if tensor._backward_hooks is not first._backward_hooks:
                tensor._backward_hooks = first._backward_hooks
            _put(module, name, tensor)
        for module, name, places in self._buffers:
            places[self._active] = kept(places[self._active], buffers_of(module).get(name))
            buffers_of(module)[name] = places[replica]
        for group in (each for groups in self._groups for each in groups):
            group["params"][:] = [self._sibling(parameter, replica) for parameter in group["params"]]
        self._active = replica
        if replica == 0:
            self._note_gradients()

    def __repr__(self) -> str:
        return f"<ReplicaTensors: {len(self._sets)} tensors on {len(self.devices)} replicas, {self._active} is active>"

    def _set_of(self, first: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The same set for the same tensor, so that tied weights are tied on every replica."""
        if id(first) not in self._sets:
            first.data = first.detach().to(self.devices[0])
            others = [_copy_for(first, device) for device in self.devices[1:]]
            self._sets[id(first)] = (first, *others)
        return self._sets[id(first)]

    def _places_of(self, buffer: torch.Tensor | None) -> list[torch.Tensor | None]:
        """What is in a buffer's place on each replica; a program may put something there later."""
        return [None] * len(self.devices) if buffer is None else list(self._set_of(buffer))

    def _sibling(self, tensor: torch.Tensor, replica: int) -> torch.Tensor:
        """A replica's tensor in the place of another's; one that a program has put there is nobody's."""
        tensors = self._siblings.get(id(tensor))
        return tensor if tensors is None else tensors[replica]

    def _note_gradients(self) -> None:
        self._with_gradient = [tensors for _, _, tensors in self._parameters if tensors[0].grad is not None]

    def _remove_gradients(self) -> None:
        removed = [tensors for tensors in self._with_gradient if tensors[0].grad is None]
        if removed and len(removed) == len(self._with_gradient):  # then also those that the first replica never had
            removed = [tensors for _, _, tensors in self._parameters]
        for _, *others in removed:
            for tensor in others:
                tensor.grad = None
        self._with_gradient = []


def kept(buffer: torch.Tensor | None, found: torch.Tensor | None) -> torch.Tensor | None:
    """What is to stay in a buffer's place: the buffer with the values of what was found there, if that is its like.

    Args:
        buffer: What was put there.
        found: What is there now.
    """
    if found is buffer or found is None or buffer is None:
        return found
    if found.shape != buffer.shape or found.dtype is not buffer.dtype:
        return found
    return buffer.copy_(found.detach())


def _own_parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    for module in model.modules():
        for name, parameter in parameters_of(module).items():
            if parameter is not None:
                yield module, name, parameter


def _own_buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor | None]]:
    for module in model.modules():
        for name, buffer in buffers_of(module).items():
            yield module, name, buffer


def _copy_for(first: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A parameter that may share its values with the first one until it is bound; a buffer of its own."""
    if isinstance(first, nn.Parameter):
        values = alias(first.detach()) if first.device == device else first.detach().to(device)
        return nn.Parameter(values, requires_grad=first.requires_grad)
    return first.detach().to(device, copy=True)


def _put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    if type(module).__setattr__ is nn.Module.__setattr__:
        parameters_of(module)[name] = tensor  # type: ignore[assignment]  # a parameter, as what was there
    else:
        setattr(module, name, tensor)  # an LSTM keeps a list of its weights beside them
