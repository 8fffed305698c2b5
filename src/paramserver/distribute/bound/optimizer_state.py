"""The state of a prepared optimizer on the ps tasks, converted to torch's own format and back.

Rules
    * torch keeps a dict of slots for each parameter. A step of the rule on two elements shows which slots are as long
      as the parameter, which are counters, and whether a counter is a tensor or a Python number.
    * The ps tasks have one state for the whole run: only the chief's loads count, and other workers load settings only.
    * Every slot travels as its bytes, so that it stays identical bit for bit.
"""

from __future__ import annotations

import inspect
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from paramserver.client.client import ParameterClient
from paramserver.distribute.bound.plan import ModelVariable
from paramserver.distribute.bound.replica_tensors import ReplicaTensors
from paramserver.errors import ConfigError
from paramserver.layout.settings import setting_names, settings
from paramserver.wire.messages import SlotGroup

logger = logging.getLogger(__name__)

State = dict[torch.Tensor, dict[str, Any]]
"""The form of ``optimizer.state``: the slots of each parameter by their names."""


class OptimizerState:
    """The state of one optimizer on the ps tasks.

    Args:
        optimizer: The user's optimizer; its param groups are read for every call.
        variables: The variables of the model.
        tensors: The replicas' parameters, any of which may be in the param groups.
        client: Connected to every ps; owned by the caller.
        task: The name of this task, for messages.
        is_chief: Whether this task is the chief, whose loads count.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        variables: Sequence[ModelVariable],
        tensors: ReplicaTensors,
        client: ParameterClient,
        *,
        task: str,
        is_chief: bool,
    ) -> None:
        self._optimizer = optimizer
        self._client = client
        self._task = task
        self._is_chief = is_chief
        self._names = {
            id(tensor): variable.spec.name
            for variable in variables
            if variable.group >= 0
            for tensor in tensors.of(variable.tensor)
        }

    def is_there(self) -> bool:
        """Return whether the ps tasks hold any state by now. Blocks."""
        return any(status.slots_bytes for status in self._client.status()) and bool(self.read())

    def read(self) -> State:
        """Gather the state from the ps tasks, in torch's format. Blocks; other workers can push meanwhile.

        Raises:
            UnavailableError: If a ps is lost.
        """
        held: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        names = [name for group in self._optimizer.param_groups for _, name in self._named(group)]
        for key, tensor in self._client.read_slots(names).items():
            variable, _, slot = key.rpartition("/")
            held[variable][slot] = tensor
        state: State = {}
        for form, parameter, name in self._parameters():
            if found := form.in_torch(held.get(name, {}), parameter):
                state[parameter] = found
        return state

    def write(self, state: Mapping[torch.Tensor, Mapping[str, Any]]) -> None:
        """Replace the state on the ps tasks, and send the settings of the param groups. Blocks.

        Parameters without state start anew. On a worker that is not the chief the call does nothing but log that.

        Raises:
            ConfigError: If the state is that of another kind of optimizer; then nothing is changed.
            UnavailableError: If a ps is lost.
        """
        if not self._is_chief:
            logger.info("%s leaves optimizer state to the chief: the parameter servers keep theirs", self._task)
            return
        slots = {
            f"{name}/{slot}": value
            for form, parameter, name in self._parameters()
            for slot, value in form.on_ps(state.get(parameter, {}), parameter, name)
        }
        wanted = setting_names(type(self._optimizer))
        groups = [
            SlotGroup(tuple(name for _, name in self._named(group)), settings(group, wanted))
            for group in self._optimizer.param_groups
        ]
        self._client.load_slots(groups, slots)

    def _parameters(self) -> Iterator[tuple[_Form, torch.Tensor, str]]:
        """Yield each parameter that a rule updates, with the form of its state and the name of its variable."""
        for group in self._optimizer.param_groups:
            form = _Form.of(self._optimizer, group)
            for parameter, name in self._named(group):
                yield form, parameter, name

    def _named(self, group: Mapping[str, Any]) -> Iterator[tuple[torch.Tensor, str]]:
        for parameter in group["params"]:
            if (name := self._names.get(id(parameter))) is not None:
                yield parameter, name


class _Form(NamedTuple):
    """The form of a parameter's state.

    Attributes:
        rule: The name of the optimizer's class, for messages.
        first: The state of a sample parameter of two elements before the first update.
        slots: The state of the sample after it.
    """

    rule: str
    first: Mapping[str, Any]
    slots: Mapping[str, Any]

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> _Form:
        """Return the form of the state with the settings of a param group."""
        kind, takes_sparse = type(optimizer), isinstance(optimizer, torch.optim.SparseAdam)
        numbers: dict[str, Any] = dict(settings(group, setting_names(kind)))
        if "initial_accumulator_value" in numbers:  # as in `rules`
            numbers["initial_accumulator_value"] = optimizer.defaults["initial_accumulator_value"]
        sample = torch.nn.Parameter(torch.zeros(2, 1, device="cpu"), requires_grad=False)
        probe = kind([sample], **numbers)
        first = {name: slot.clone() for name, slot in probe.state.get(sample, {}).items()}
        gradient = torch.zeros_like(sample)
        # As in `row_rule`; without the hooks that a program has registered for all optimizers.
        with torch.no_grad(), torch.sparse.check_sparse_tensor_invariants(False):  # type: ignore[no-untyped-call]
            sample.grad = gradient.to_sparse(1) if takes_sparse else gradient
            inspect.unwrap(kind.step)(probe)
        return cls(kind.__name__, first, probe.state.get(sample, {}))

    def in_torch(self, held: Mapping[str, torch.Tensor], parameter: torch.Tensor) -> dict[str, Any]:
        """Return the state of a parameter in torch's form, from the slots that the ps tasks hold."""
        if not held:
            return {name: _expanded(slot, parameter) for name, slot in self.first.items()}
        order = [*self.slots, *(name for name in held if name not in self.slots)]
        return {name: self._value(name, held[name], parameter) for name in order if name in held}

    def _value(self, name: str, slot: torch.Tensor, parameter: torch.Tensor) -> Any:
        if slot.ndim:
            return slot.view(parameter.shape).to(parameter.device)
        example = self.slots.get(name)
        return slot if example is None or isinstance(example, torch.Tensor) else type(example)(slot.item())

    def on_ps(self, state: Mapping[str, Any], parameter: torch.Tensor, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the slots of a variable as the ps tasks hold them, from a parameter's state in torch.

        Raises:
            ConfigError: If the state does not have this form.
        """
        present = {slot: value for slot, value in state.items() if value is not None}
        if not present:
            return
        if present.keys() != self.slots.keys():
            raise ConfigError(
                f"optimizer state of {name!r}: {self.rule} with its settings keeps {', '.join(self.slots) or 'none'}, "
                f"got {', '.join(present)}; was it saved with another optimizer, or with other settings?"
            )
        for slot, value in present.items():
            yield slot, self._fitted(slot, value, parameter, name)

    def _fitted(self, slot: str, value: Any, parameter: torch.Tensor, name: str) -> torch.Tensor:
        example = self.slots[slot]
        is_counter = not isinstance(example, torch.Tensor) or not example.ndim
        tensor = torch.as_tensor(value, dtype=None if isinstance(value, torch.Tensor) else torch.float32)
        expected = torch.Size() if is_counter else parameter.shape
        if tensor.shape != expected:
            raise ConfigError(
                f"optimizer state of {name!r}: slot {slot!r} must have shape {list(expected)}, "
                f"got {list(tensor.shape)}; was it saved with another model?"
            )
        shape = expected if is_counter else parameter.shape or (1,)  # one dimension tells a scalar's slot apart
        dtype = tensor.dtype if is_counter else parameter.dtype
        return tensor.detach().to("cpu", dtype).contiguous().view(shape)


def _expanded(slot: Any, parameter: torch.Tensor) -> Any:
    """Return a slot of a parameter without updates, from that of the sample."""
    if not isinstance(slot, torch.Tensor) or not slot.ndim:
        return slot
    return torch.full(parameter.shape, slot.flatten()[0].item(), dtype=parameter.dtype, device=parameter.device)


def carried(optimizer: torch.optim.Optimizer) -> State:
    """Return the state that an optimizer brings to `prepare`; empty if it has made no step.

    State that some rules make when they are constructed, at step 0, does not count: the ps tasks make it themselves.
    """
    state = {parameter: dict(slots) for parameter, slots in optimizer.state.items() if slots}
    return state if any(float(slots.get("step", 1)) for slots in state.values()) else {}
