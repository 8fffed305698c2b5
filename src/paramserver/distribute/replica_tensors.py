"""The tensors that a model's modules hold, for each replica of a worker.

A model has one set of modules and, for each replica, a set of parameters and buffers; before a replica has its turn,
its own are put into the modules. So whatever a program does with the model (call it, read a weight, clip gradients)
it does with those of the replica that it runs on.

Rules
    * The first replica's tensors are the ones that the model came with; the others' are made here.
    * A parameter of another replica follows the first one's ``requires_grad``.
    * What a module puts in the place of a buffer is taken over into the replica's own when its turn ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn


class ReplicaTensors:
    """Every replica's parameters and buffers of one model.

    Args:
        model: Its tensors are moved to the first replica's device; its modules are changed when another replica is
            activated.
        devices: Where each replica computes.
    """

    def __init__(self, model: nn.Module, devices: Sequence[torch.device]) -> None:
        self.devices = tuple(devices)
        self._active = 0
        self._sets: dict[int, tuple[torch.Tensor, ...]] = {}
        self._parameters = [
            (module, name, self._set_of(parameter)) for module, name, parameter in _own_parameters(model)
        ]
        self._buffers = [(module, name, self._set_of(buffer)) for module, name, buffer in _own_buffers(model)]
        if len(self.devices) == 1:
            self._parameters, self._buffers = [], []  # nothing will ever be exchanged

    def of(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Every replica's tensor in the place of the first one's ``tensor``."""
        return self._sets.get(id(tensor), (tensor,))

    def activate(self, replica: int) -> None:
        """Put a replica's tensors into the modules."""
        if replica == self._active:
            return
        for module, name, tensors in self._parameters:
            tensor, first = tensors[replica], tensors[0]
            if tensor.requires_grad is not first.requires_grad:
                tensor.requires_grad_(first.requires_grad)
            _put(module, name, tensor)
        for module, name, tensors in self._buffers:
            keep_buffer(module, name, tensors[self._active])
            module._buffers[name] = tensors[replica]
        self._active = replica

    def __repr__(self) -> str:
        return f"<ReplicaTensors: {len(self._sets)} tensors on {len(self.devices)} replicas, {self._active} is active>"

    def _set_of(self, first: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The same set for the same tensor, so that tied weights are tied on every replica."""
        if id(first) not in self._sets:
            first.data = first.detach().to(self.devices[0])
            others = [_copy_for(first, device) for device in self.devices[1:]]
            self._sets[id(first)] = (first, *others)
        return self._sets[id(first)]


def keep_buffer(module: nn.Module, name: str, buffer: torch.Tensor) -> None:
    """Where a module has put another tensor in a buffer's place, take over its values and put the buffer back.

    Args:
        module: Whose buffer it is.
        name: Its name there.
        buffer: What is to be in the place; the tensor that is there instead has its shape and dtype.
    """
    found = module._buffers[name]
    if found is not buffer:
        if found is None or found.shape != buffer.shape:
            return  # a buffer of another shape is refused with its name by the next step
        buffer.copy_(found.detach())
        module._buffers[name] = buffer


def _own_parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield module, name, parameter


def _own_buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield module, name, buffer


def _copy_for(first: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A parameter that may share its values with the first one until it is bound; a buffer of its own."""
    if isinstance(first, nn.Parameter):
        return nn.Parameter(first.detach().to(device), requires_grad=first.requires_grad)
    return first.detach().to(device, copy=True)


def _put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    if type(module).__setattr__ is nn.Module.__setattr__:
        module._parameters[name] = tensor  # type: ignore[assignment]  # a parameter, as what was there
    else:
        setattr(module, name, tensor)  # an LSTM keeps a list of its weights beside them
