"""The optimizer that `Strategy.prepare` returns: its step pushes gradients and pulls values."""

from __future__ import annotations

import types
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn, Protocol

import torch

from paramserver.client.client import PushResult
from paramserver.distribute.core import context
from paramserver.errors import ConfigError
from paramserver.memory.torch_internals import has_step_hooks


class Prepared(Protocol):
    """The part of a prepared model that its optimizer uses."""

    def hold(self, owner: int, groups: Sequence[dict[str, Any]]) -> None:
        """Push only the parameters that these param groups hold."""

    def step(self, owner: int) -> PushResult:
        """Push the gradients of all replicas and pull fresh values."""

    def on_each_replica(self, parameter: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return every replica's tensor for the first replica's ``parameter``."""


class _LocalState(defaultdict[torch.Tensor, Any]):
    """The local optimizer state: empty, but true if the parameter servers hold state.

    If an optimizer has no state, torch.distributed.checkpoint makes a step with zero gradients to create some; being
    true avoids that step.

    Args:
        is_there: Returns whether the parameter servers hold state.
        state: The state to show here for a moment.
    """

    def __init__(self, is_there: Callable[[], bool], state: Mapping[torch.Tensor, Any] = MappingProxyType({})) -> None:
        super().__init__(dict, state)
        self._is_there = is_there

    def __bool__(self) -> bool:
        return len(self) > 0 or self._is_there()


class RemoteState(Protocol):
    """The state of an optimizer on the parameter servers, as far as the optimizer uses it; see `OptimizerState`."""

    def is_there(self) -> bool:
        """Return whether there is any state."""

    def read(self) -> dict[torch.Tensor, dict[str, Any]]:
        """Gather the state in the form of ``optimizer.state``."""

    def write(self, state: Mapping[torch.Tensor, Mapping[str, Any]]) -> None:
        """Replace the state."""


class PreparedOptimizer(torch.optim.Optimizer):
    """Replacement of the user's optimizer; the update rule runs on the parameter servers.

    It shares the param groups and the hooks of the user's optimizer, so learning-rate schedulers and hooks work on
    either of the two. Optimizer state lives on the parameter servers: ``state`` is empty here, ``state_dict()`` gathers
    it from them, and ``load_state_dict()`` sends it to them.

    With several replicas, call `step` in the function that runs on them, like the computation of the gradients: it
    waits for all replicas, and their gradients become one update.

    Args:
        optimizer: The user's optimizer. Its ``step``, ``state_dict`` and ``load_state_dict`` raise from now on.
        model: The model that it updates.
        owner: The index of this optimizer among the model's.
        num_replicas: Number of replicas of the model.
        remote: The state on the parameter servers; None if there is none.

    Attributes:
        last_push: The global step and the staleness of the last `step`; None before the first.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: Prepared,
        owner: int = 0,
        num_replicas: int = 1,
        remote: RemoteState | None = None,
    ) -> None:
        # The groups, defaults and registered hooks are the user's optimizer's own, so its constructor is not run.
        self.__dict__.update({name: value for name, value in optimizer.__dict__.items() if name not in _REFUSALS})
        self._remote = remote
        self.state = self._local_state({})
        self.last_push: PushResult | None = None
        self._original = optimizer
        # Methods, because schedulers that hold the original expect its `step` to be one.
        vars(optimizer).update({name: types.MethodType(refuse, optimizer) for name, refuse in _REFUSALS.items()})
        self._model = model
        self._owner = owner
        self._num_replicas = num_replicas

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Push the gradients to the parameter servers, which apply them, and pull fresh values. Blocks.

        Args:
            closure: Computes the loss and the gradients first, if given.

        Returns:
            The result of the closure; None without one.

        Raises:
            UnavailableError: If a ps is lost; the message names it.
            RuntimeError: With several replicas, outside of them.
        """
        if has_step_hooks(self):
            return _step_with_hooks(self, closure)
        return self._step(closure)

    # torch would otherwise wrap the method for hooks and the profiler, which costs more than a small update.
    step.hooked = True  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the replica that this is called on; outside of replicas, those of all replicas."""
        if self._num_replicas > 1 and context.current_replica() is None:
            self._forget_other_replicas()
        if set_to_none:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        else:
            super().zero_grad(set_to_none=False)

    def state_dict(self) -> dict[str, Any]:
        """Gather the state from the parameter servers, in the format of the ``torch.optim`` optimizer that this one
        stands for, which can load it. Blocks; other workers can push meanwhile.

        All state of a block of elements is from one moment. The tensors are copies: later steps do not change them.

        Raises:
            UnavailableError: If a ps is lost.
        """  # noqa: D205
        if self._remote is not None:
            self.state = self._local_state(self._remote.read())
        try:
            return super().state_dict()
        finally:
            self.state = self._local_state({})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of ``state_dict()`` of this optimizer, or of the ``torch.optim`` one. Blocks.

        Settings of the param groups, such as learning rates, change on this worker only. The chief sends the state to
        the parameter servers; on other workers a call changes the settings only, and the log says so. Other workers may
        go on training meanwhile.

        Raises:
            ConfigError: If the state is that of another kind of optimizer; then nothing is changed.
            ValueError: If the param groups differ.
            UnavailableError: If a ps is lost.
        """
        groups = self.param_groups
        before = [dict(group) for group in groups]
        super().load_state_dict(state_dict)
        state, self.state = self.state, self._local_state({})
        # Schedulers and the push read the present group dicts, so these must stay the same objects.
        for group, loaded in zip(groups, self.param_groups, strict=True):
            group.update(loaded)
        self.param_groups = groups
        try:
            if self._remote is not None:
                self._remote.write(state)
        except ConfigError:
            for group, settings in zip(groups, before, strict=True):
                group.clear()
                group.update(settings)
            raise

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse the parameters: the variables of a run are fixed when it starts."""
        raise ConfigError(
            "add_param_group: a prepared optimizer cannot take more parameters; "
            "give them to the optimizer before prepare, with requires_grad=False if they are to be trained later"
        )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a prepared optimizer cannot be copied or pickled: its state lives on the parameter servers")

    def _local_state(self, state: Mapping[torch.Tensor, Any]) -> _LocalState:
        return _LocalState(self._remote.is_there if self._remote else lambda: False, state)

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._model.hold(self._owner, self.param_groups)
        self.last_push = self._model.step(self._owner) if self._num_replicas == 1 else self._merged_step()
        self._original._opt_called = True  # type: ignore[attr-defined]  # schedulers check that a step was taken
        return loss

    def _merged_step(self) -> PushResult:
        replica = context.current_replica()
        if replica is None:
            raise RuntimeError(
                f"optimizer.step: this worker has {self._num_replicas} replicas, and each has gradients of its own; "
                "call it inside the function that strategy.run() runs on them"
            )
        push: PushResult = replica.merge_call(lambda _: self._model.step(self._owner))
        return push

    def _forget_other_replicas(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                for other in self._model.on_each_replica(parameter)[1:]:
                    other.grad = None


def _refuse_step(optimizer: torch.optim.Optimizer, closure: Callable[[], Any] | None = None) -> NoReturn:
    raise ConfigError(
        f"{type(optimizer).__name__}.step: this optimizer was given to prepare, and the parameter servers make its "
        "updates; call step() of the one that prepare returned: model, optimizer = strategy.prepare(model, optimizer)"
    )


_refuse_step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # or schedulers warn that they cannot count steps


def _refuse_state(optimizer: torch.optim.Optimizer, *_: object) -> NoReturn:
    raise ConfigError(
        f"{type(optimizer).__name__}: this optimizer was given to prepare, and its state is on the parameter servers; "
        "call state_dict() or load_state_dict() of the one that prepare returned: "
        "model, optimizer = strategy.prepare(model, optimizer)"
    )


_REFUSALS: dict[str, Callable[..., NoReturn]] = {
    "step": _refuse_step,
    "state_dict": _refuse_state,
    "load_state_dict": _refuse_state,
}
"""Replacements of the original's methods, which would have no effect on the model and know nothing of its state."""

_step_with_hooks = torch.optim.Optimizer.profile_hook_step(PreparedOptimizer._step)
