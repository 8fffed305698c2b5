"""The tensors in a model's modules, for each replica of a worker.

A model has one set of modules and, for each replica, a set of parameters and buffers. Before a replica's turn, its
tensors are put into the modules and into the optimizers' param groups. So everything that a program does with the model
or an optimizer (call it, read a weight, clip gradients) applies to the replica that the program runs on.

Rules
    * The first replica's tensors are the model's original ones; those of other replicas are made here.
    * A parameter of another replica follows the first one's ``requires_grad`` and hooks.
    * If a program removes gradients of the first replica outside of replicas, they are removed on all replicas.
    * If a module replaces a buffer, the new values are copied into the replica's buffer when its turn ends; a tensor of
      another shape or dtype becomes the replica's buffer itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from paramserver.memory.torch_internals import alias, buffers_of, parameters_of


class ReplicaTensors:
    """Every replica's parameters and buffers of one model.

    Args:
        model: The model. Its tensors are moved to the first replica's device; its modules are changed whenever another
            replica is activated.
        optimizers: The optimizers, whose param groups are changed likewise.
        devices: The device of each replica.
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
            self._parameters, self._buffers, self._groups = [], [], []  # a single replica is never exchanged

    def of(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return every replica's tensor for the first replica's ``tensor``."""
        return self._sets.get(id(tensor), (tensor,))

    def activate(self, replica: int) -> None:
        """Put a replica's tensors into the modules and param groups. Called even if they are there already."""
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
        """Return the same set for the same tensor, so that tied weights are tied on every replica."""
        if id(first) not in self._sets:
            first.data = first.detach().to(self.devices[0])
            others = [_copy_for(first, device) for device in self.devices[1:]]
            self._sets[id(first)] = (first, *others)
        return self._sets[id(first)]

    def _places_of(self, buffer: torch.Tensor | None) -> list[torch.Tensor | None]:
        """Return the tensor in a buffer's place on each replica; it may be None, and a program may set it later."""
        return [None] * len(self.devices) if buffer is None else list(self._set_of(buffer))

    def _sibling(self, tensor: torch.Tensor, replica: int) -> torch.Tensor:
        """Return a replica's tensor for another replica's; a tensor that the program has added is shared by all."""
        tensors = self._siblings.get(id(tensor))
        return tensor if tensors is None else tensors[replica]

    def _note_gradients(self) -> None:
        self._with_gradient = [tensors for _, _, tensors in self._parameters if tensors[0].grad is not None]

    def _remove_gradients(self) -> None:
        removed = [tensors for tensors in self._with_gradient if tensors[0].grad is None]
        if removed and len(removed) == len(self._with_gradient):  # all were: remove also those it never had
            removed = [tensors for _, _, tensors in self._parameters]
        for _, *others in removed:
            for tensor in others:
                tensor.grad = None
        self._with_gradient = []


def kept(buffer: torch.Tensor | None, found: torch.Tensor | None) -> torch.Tensor | None:
    """Return the tensor for a buffer's place: the buffer with the found values if these fit, else the found tensor.

    Args:
        buffer: The replica's buffer.
        found: The tensor in its place now.
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
    """Copy a tensor to a device. A parameter may share its values with the first one until it is bound."""
    if isinstance(first, nn.Parameter):
        values = alias(first.detach()) if first.device == device else first.detach().to(device)
        return nn.Parameter(values, requires_grad=first.requires_grad)
    return first.detach().to(device, copy=True)


def _put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    if type(module).__setattr__ is nn.Module.__setattr__:
        parameters_of(module)[name] = tensor  # type: ignore[assignment]  # a parameter, like the one it replaces
    else:
        setattr(module, name, tensor)  # an LSTM keeps a list of its weights in addition
