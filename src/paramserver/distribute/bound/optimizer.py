"""The optimizer that `Strategy.prepare` gives back: its step pushes gradients and pulls values."""

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
    """What an optimizer asks of the model that was prepared with it."""

    def hold(self, owner: int, groups: Sequence[dict[str, Any]]) -> None:
        """Go on with the parameters that these param groups hold."""

    def step(self, owner: int) -> PushResult:
        """Push the gradients of all replicas and pull fresh values."""

    def on_each_replica(self, parameter: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Every replica's tensor in the place of the first one's ``parameter``."""


class _Elsewhere(defaultdict[torch.Tensor, Any]):
    """The state that is kept here, which is empty; it is true where the parameter servers hold one.

    torch.distributed.checkpoint makes a step with zero gradients where an optimizer has no state yet, to have some.

    Args:
        is_there: Tells whether they do.
        state: What is to be seen here for a moment.
    """

    def __init__(self, is_there: Callable[[], bool], state: Mapping[torch.Tensor, Any] = MappingProxyType({})) -> None:
        super().__init__(dict, state)
        self._is_there = is_there

    def __bool__(self) -> bool:
        return len(self) > 0 or self._is_there()


class RemoteState(Protocol):
    """What an optimizer asks of the parameter servers that hold its state; see `OptimizerState`."""

    def is_there(self) -> bool:
        """Whether there is any."""

    def read(self) -> dict[torch.Tensor, dict[str, Any]]:
        """Gather it, as ``optimizer.state`` would be."""

    def write(self, state: Mapping[torch.Tensor, Mapping[str, Any]]) -> None:
        """Replace it."""


class PreparedOptimizer(torch.optim.Optimizer):
    """Stands for the user's optimizer; the rule itself runs on the parameter servers.

    It shares the param groups and the hooks of the optimizer that it was made from, so learning-rate schedulers and
    hooks work whether they were given that one or this one. Optimizer state lives on the parameter servers: ``state``
    is empty here, ``state_dict()`` gathers it from them, and ``load_state_dict()`` brings it to them.

    With several replicas, `step` belongs into the function that runs on them, as computing the gradients does: it
    waits for all of them, and their gradients become one update.

    Args:
        optimizer: The user's optimizer; not changed.
        model: What it updates.
        owner: Which of the model's optimizers it is.
        num_replicas: How many replicas the model has.
        remote: Its state on the parameter servers; without one there is none.

    Attributes:
        last_push: What came of the last `step`: the global step and the staleness; None before the first.
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
        self.state = self._seen({})
        self.last_push: PushResult | None = None
        self._original = optimizer
        # Methods, as schedulers expect that were given the original.
        vars(optimizer).update({name: types.MethodType(refuse, optimizer) for name, refuse in _REFUSALS.items()})
        self._model = model
        self._owner = owner
        self._num_replicas = num_replicas

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Push the gradients to the parameter servers, which apply them, and pull fresh values. Blocks.

        Args:
            closure: Computes the loss and the gradients first, if it is given.

        Returns:
            What the closure returned.

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
        """Forget the gradients of the replica that this is called on, outside of replicas those of all of them."""
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
        stands for, which can load it. Blocks; pushes of other workers go on meanwhile.

        All state of a block of elements is of one moment. It is in tensors of its own: later steps do not change it.

        Raises:
            UnavailableError: If a ps is lost.
        """  # noqa: D205
        if self._remote is not None:
            self.state = self._seen(self._remote.read())
        try:
            return super().state_dict()
        finally:
            self.state = self._seen({})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what ``state_dict()`` of this optimizer, or of the ``torch.optim`` one, returned. Blocks.

        The settings of the param groups, such as learning rates, are this worker's. The state goes to the parameter
        servers from the chief; on other workers a call changes the settings only, and the log says so. Other workers
        may go on training meanwhile.

        Raises:
            ConfigError: If the state is that of another kind of optimizer; then nothing is changed.
            ValueError: If its groups are others.
            UnavailableError: If a ps is lost.
        """
        groups = self.param_groups
        before = [dict(group) for group in groups]
        super().load_state_dict(state_dict)
        state, self.state = self.state, self._seen({})
        # The groups themselves are shared with schedulers and with what is pushed: they must stay the same objects.
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
        """Refused: the variables of a run are fixed when it starts."""
        raise ConfigError(
            "add_param_group: a prepared optimizer cannot take more parameters; "
            "give them to the optimizer before prepare, with requires_grad=False if they are to be trained later"
        )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a prepared optimizer cannot be copied or pickled: its state lives on the parameter servers")

    def _seen(self, state: Mapping[torch.Tensor, Any]) -> _Elsewhere:
        return _Elsewhere(self._remote.is_there if self._remote else lambda: False, state)

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._model.hold(self._owner, self.param_groups)
        self.last_push = self._model.step(self._owner) if self._num_replicas == 1 else self._merged_step()
        self._original._opt_called = True  # type: ignore[attr-defined]  # schedulers look whether a step was taken
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
"""What the original cannot do any more: it would have no effect on the model, and know nothing of its state."""

_step_with_hooks = torch.optim.Optimizer.profile_hook_step(PreparedOptimizer._step)
