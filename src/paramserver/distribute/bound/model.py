"""A model whose parameters, gradients and buffers are in the memory that lanes read and write.

Rules
    * A step says only which parts of the memory count: one message to each ps, for any number of variables and
      replicas.
    * Each of several optimizers pushes its own parameters. Buffers, and the count of the global step, go with the first
      one.
    * In a pipelined model, push and pull go on while the next step computes from values without this step's update; the
      fresh values arrive when that next step ends. Its global step counts the update that is under way.
    * Values belong to the ps tasks: if a program changes a parameter by hand after `prepare`, the next step refuses it.
    * A step that fails before its push begins has changed nothing. Once the push has begun, any exception leaves it
      under way: the next step, or any other request to the ps tasks, first makes sure that every ps has applied it.
"""

from __future__ import annotations

import operator
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from paramserver.client.client import ParameterClient, PushResult, PushTemplate
from paramserver.distribute.bound import device_copies
from paramserver.distribute.bound.arenas import Binding, BoundArena, PushedMemory, TrainedArena
from paramserver.distribute.bound.buffers import BufferArena, ConstantArena, LocalBufferArena, Sharing
from paramserver.distribute.bound.device_copies import DeviceCopies
from paramserver.distribute.bound.gradient_place import Gate, GradientPlace
from paramserver.distribute.bound.held_parameters import Groups, HeldParameters
from paramserver.distribute.bound.plan import ArenaPlan, Kind, ModelVariable
from paramserver.distribute.bound.replica_tensors import ReplicaTensors
from paramserver.distribute.bound.step_times import StepClock, StepTimes
from paramserver.distribute.bound.tables.bound_table import BoundTable, by_table
from paramserver.distribute.reduce.reduction import ReduceOp
from paramserver.errors import ConfigError
from paramserver.memory import heap
from paramserver.transport.lane import TableRows, WorkerMemory
from paramserver.wire.messages import Part


@dataclass(frozen=True, kw_only=True)
class ModelBinding:
    """The parts that a model is bound to.

    Attributes:
        arenas: The plans of the arenas, for each ps.
        memories: The memory, for each ps.
        optimizers: The optimizers, whose param groups are read for every push.
        tensors: The parameters and buffers of all replicas.
        reduction: The way to combine the replicas' gradients.
        client: The client, owned by the caller.
        first_rows: The first values of tables by name, used only if this task initializes.
        sharing: The workers that share the buffers.
    """

    arenas: Sequence[Sequence[ArenaPlan]]
    memories: Sequence[WorkerMemory]
    optimizers: Sequence[torch.optim.Optimizer]
    tensors: ReplicaTensors
    reduction: ReduceOp
    client: ParameterClient
    first_rows: Mapping[str, torch.Tensor]
    sharing: Sharing = field(default_factory=Sharing)


class BoundModel:
    """All arenas of a model, and the client that pushes and pulls them.

    Attributes:
        tables: The tables of the model by name.
        begin_state: Writes the state that optimizers had before `prepare` to the ps tasks, with the first values.
        gate: See `arenas.PushedMemory`.
    """

    is_pipelined = False

    def __init__(self, binding: ModelBinding) -> None:
        self.gate = Gate()
        self.begin_state: Callable[[], None] = _nothing
        self._client = client = binding.client
        self._tensors = binding.tensors
        self._first_rows = dict(binding.first_rows)
        self._under_way: _UnderWay | None = None
        self._copies = device_copies.choose(binding.memories, binding.tensors.devices)
        self._clock = StepClock(client.push_times)
        optimizers = binding.optimizers
        groups = [(owner, group) for owner, each in enumerate(optimizers) for group in each.param_groups]
        is_mean = binding.reduction is ReduceOp.MEAN
        self._arenas = [
            [
                self._bound(binding, plan, memory, groups[plan.group][1] if plan.group >= 0 else {}, mean=is_mean)
                for plan in plans
                if plan.kind is not Kind.TABLE
            ]
            for plans, memory in zip(binding.arenas, binding.memories, strict=True)
        ]
        tables = [
            BoundTable(plans, binding.memories, binding.tensors, groups[plans[0].group][1], client, mean=is_mean)
            for plans in by_table(plan for each in binding.arenas for plan in each)
        ]
        self.tables = {table.name: table for table in tables}
        self._steps = [
            _Step(self._arenas, tables, owner, groups, self._copies, client.plan)
            for owner in range(max(len(optimizers), 1))
        ]
        names = {id(each.tensor): each.spec.name for each in _variables(binding.arenas)}
        self._held = [HeldParameters(each.param_groups, names, binding.tensors.of) for each in optimizers]
        self._copies.lock([memory for arena in self._each() for memory in arena.copied_memory()])

    def _bound(
        self, binding: ModelBinding, plan: ArenaPlan, memory: WorkerMemory, group: dict[str, object], *, mean: bool
    ) -> BoundArena:
        own = Binding(
            plan=plan, memory=memory, tensors=binding.tensors, copies=self._copies, is_apart=self.is_pipelined
        )
        match plan.kind:
            case Kind.TRAINED | Kind.FROZEN:
                pushed: PushedMemory = weakref.proxy(self)  # a circle would hold connections until a collection
                return TrainedArena(own, group, pushed, mean=mean)
            case Kind.CONSTANT:
                return ConstantArena(own)
            case _ if memory.direct:
                return LocalBufferArena(replace(own, is_apart=False))
            case _:
                return BufferArena(own, binding.sharing)

    def assign(self) -> None:
        """Write the model's present values to the ps tasks.

        Raises:
            ConfigError: If the values of a table are no longer here.
        """
        for name, table in self.tables.items():
            if name not in self._first_rows:
                raise ConfigError(  # only after the loss of a ps
                    f"variable {name!r} is a table, whose values workers do not hold: after the loss of a ps it "
                    "can only be restored from a checkpoint; call strategy.save(directory) regularly, or pass "
                    "recover(initialize=...) a function that restores one"
                )
            table.assign(self._first_rows.pop(name))
        self.assign_arenas()
        self.begin_state()

    def assign_arenas(self) -> None:
        """Write the present values of everything except tables to the ps tasks; see `assign`."""
        self.settle()
        self._copies.finish()
        for arena in self._each():
            arena.offer_values()
        parts = [[Part(arena.plan.index, "assign") for arena in arenas] for arenas in self._arenas]
        plans = self._client.plan(parts, [() for _ in self._arenas])
        self.gate.is_shut = True
        self._client.push_pull(plans, counts=False)
        self.gate.is_shut = False

    def assign_present(self) -> None:
        """Write the present values to the ps tasks, and regard them as fresh."""
        self.settle()
        if all(arena.is_direct for arena in self._each()):
            for arena in self._each():
                arena.bring_home()
        else:
            self.assign_arenas()
        self.refresh()

    def bind(self) -> None:
        """Move the model's tensors into the memory, and fill it with the ps tasks' values."""
        self._first_rows.clear()
        self.begin_state = _nothing
        for table in self.tables.values():
            table.bind()
        for arena in self._each():
            arena.bind()  # before the values come, so that the model's own memory is free by then
        heap.give_back()
        heap.keep_for_steps()
        self.refresh()
        self._clock = StepClock(self._client.push_times)

    def refresh(self) -> None:
        """Read all values from the ps tasks. Changes of buffers since the last step are lost."""
        self._client.finish_push()
        self._under_way = None
        self._copies.finish()
        self._client.pull([[arena.plan.index for arena in arenas] for arenas in self._arenas])
        for arena in self._each():
            arena.refreshed()
        self.gate.is_shut = False

    def settle(self) -> None:
        """Wait until no push is under way, as one may be in a pipelined model or after an interrupt."""
        self._arrive()

    def renew(self, ps: int) -> None:
        """See `arenas.PushedMemory`."""
        memory = self._client.renew_gradients(ps)
        for arena in self._arenas[ps]:
            arena.use_gradients(memory.gradients[arena.plan.index])

    def gradient_places(self) -> dict[int, GradientPlace]:
        """Return each parameter's gradient place, by the id of the parameter."""
        trained = (arena for arena in self._each() if isinstance(arena, TrainedArena))
        return {id(place.parameter): place for arena in trained for place in arena.gradient_places()}

    def hold(self, owner: int, groups: Groups) -> None:
        """Push only the parameters that an optimizer's param groups hold now; see `HeldParameters`.

        Raises:
            ConfigError: If a group holds a parameter that it did not hold at `prepare`; the message names it.
        """
        held = self._held[owner].changed(groups)
        if held is not None:
            self._steps[owner].hold(held)

    def step(self, owner: int = 0) -> PushResult:
        """Push gradients and changes of buffers, and pull fresh values: one message to each ps.

        Args:
            owner: The index of the optimizer that makes the step.
        """
        entered = self._clock.entered()
        self._arrive()
        step = self._steps[owner]
        plans, rows = step.request()
        reducing = time.perf_counter() - entered
        number = self._client.next_number()
        # Noted before anything is sent, so that an interrupt at any later moment leaves a step to be completed.
        self._under_way, self.gate.is_shut = _UnderWay(step, plans, number), True
        try:
            result = self._client.push_pull(
                plans, counts=owner == 0, rows=rows, meanwhile=step.meanwhile, number=number
            )
            step.pulled(plans)
        except BaseException:
            step.evict()  # the program may add to gradients that a ps has yet to read
            raise
        self._under_way, self.gate.is_shut = None, False
        self._clock.left(entered, reducing, counts=owner == 0)
        return result

    def _arrive(self) -> PushResult | None:
        """Complete the step that is under way; return None if there is none, or if no ps will ever receive it."""
        if self._under_way is None and not self.gate.is_shut:
            return None
        result = self._client.finish_push()
        if self._under_way and self._client.has_begun(self._under_way.number):
            self._under_way.step.pulled(self._under_way.plans, self._client.refusing)
            self._under_way.step.take_for_fresh()
        self._under_way, self.gate.is_shut = None, False
        return result

    def times(self) -> StepTimes:
        """Return where the time of this model's steps has gone."""
        return self._clock.times()

    def activate(self, replica: int) -> None:
        """Put a replica's tensors into the model's modules."""
        self._tensors.activate(replica)

    def on_each_replica(self, parameter: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return every replica's tensor for the first replica's ``parameter``."""
        return self._tensors.of(parameter)

    def _each(self) -> list[BoundArena]:
        return [arena for arenas in self._arenas for arena in arenas]


def _nothing() -> None:
    """Do nothing: no optimizer had state before `prepare`."""


def _variables(arenas: Sequence[Sequence[ArenaPlan]]) -> Iterator[ModelVariable]:
    return (member.variable for each in arenas for plan in each for member in plan.members)


class PipelinedModel(BoundModel):
    """A `BoundModel` whose step returns while its push and pull are under way. The arguments are the same.

    A step computes from the values that the step before the last one has pulled. The result of `step`, and its errors,
    are those of the previous step.
    """

    is_pipelined = True

    def step(self, owner: int = 0) -> PushResult:
        entered = self._clock.entered()
        computed_from = self._client.local_step
        before = self._arrive()
        step, arrived = self._steps[owner], time.perf_counter()
        plans, rows = step.request()
        reducing = time.perf_counter() - arrived
        number = self._client.next_number()
        self._under_way = _UnderWay(step, plans, number)
        self._client.begin_push_pull(plans, counts=owner == 0, computed_from=computed_from, rows=rows, number=number)
        step.meanwhile()
        self._clock.left(entered, reducing, counts=owner == 0)
        return PushResult(self._client.global_step, before.staleness if before else 0)


class _UnderWay(NamedTuple):
    """A step that was handed to the lanes, or was about to be; `ParameterClient.has_begun` distinguishes the two."""

    step: _Step
    plans: Sequence[PushTemplate]
    number: int


class _Step:
    """The arenas and tables of one optimizer's steps, for each ps.

    Attributes:
        arenas: The arenas that may be pushed.
        tables: The tables whose rows may be pushed.
        always_pulled: The indices of arenas that are pulled even if nothing is pushed, since other workers change them.
    """

    def __init__(
        self,
        arenas: Sequence[Sequence[BoundArena]],
        tables: Sequence[BoundTable],
        owner: int,
        groups: Sequence[tuple[int, dict[str, object]]],
        copies: DeviceCopies,
        plan: Callable[[Sequence[Sequence[Part]], Sequence[Sequence[int]]], list[PushTemplate]],
    ) -> None:
        def takes_part(group: int) -> bool:
            return (groups[group][0] if group >= 0 else 0) == owner  # variables of no group go with the first one

        self.arenas = [[arena for arena in each if takes_part(arena.plan.group)] for each in arenas]
        self.tables = [table for table in tables if takes_part(table.group)]
        self.always_pulled = [
            {arena.plan.index for arena in each if arena.plan.kind not in (Kind.FROZEN, Kind.CONSTANT, Kind.OWN)}
            for each in self.arenas
        ]
        self._copies = copies
        self._plan = plan
        self._parts: list[list[Part]] = []
        self._plans: list[PushTemplate] = []

    def hold(self, held: set[int]) -> None:
        """Push only these parameters, given by the ids of the first replica's tensors."""
        for arena in self._each():
            arena.hold(held)
        for table in self.tables:
            table.hold(held)

    def request(self) -> tuple[list[PushTemplate], list[list[TableRows]] | None]:
        """Return what to push and pull, and the rows of tables to push, for each ps."""
        arenas = self._each()
        for arena in arenas:
            arena.check()
        memory = [arena.gradients for arena in arenas]
        for arena in arenas:
            arena.gather()
        if any(map(operator.is_not, memory, [arena.gradients for arena in arenas])):
            for arena in arenas:
                arena.gather()  # one of them has moved the gradients of all, also of those gathered before
        self._copies.finish()
        parts = [[part for arena in arenas for part in arena.parts()] for arenas in self.arenas]
        rows = self._add_rows(parts) if self.tables else None
        if parts != self._parts:  # in nearly every step they equal those of the previous step
            self._parts, self._plans = parts, self._plan(parts, self._pulled_with(parts))
        return self._plans, rows

    def meanwhile(self) -> None:
        """Do the work that must be done before values come, while the ps tasks apply the push."""
        for arena in self._each():
            arena.meanwhile()

    def pulled(self, plans: Sequence[PushTemplate], refusing: Collection[int] = ()) -> None:
        """Use the values that these plans have pulled, except those of ps tasks that have refused."""
        for ps, (arenas, plan) in enumerate(zip(self.arenas, plans, strict=True)):
            for arena in arenas:
                if arena.plan.index in plan.pull and ps not in refusing:
                    arena.pulled()

    def take_for_fresh(self) -> None:
        """Regard the present values as the ps tasks': after an interrupt the counts of writes are uncertain."""
        for arena in self._each():
            arena.take_for_fresh()

    def evict(self) -> None:
        """Replace each gradient in the lanes' memory by a copy that the program owns."""
        for arena in self._each():
            arena.evict()

    def _each(self) -> list[BoundArena]:
        return [arena for arenas in self.arenas for arena in arenas]

    def _add_rows(self, parts: list[list[Part]]) -> list[list[TableRows]]:
        """Append the tables' parts to ``parts``, and return the rows of tables to push to each ps."""
        rows: list[list[TableRows]] = [[] for _ in parts]
        for table in self.tables:
            for ps, part, each in table.parts():
                parts[ps].append(part)
                rows[ps].append(each)
        return rows

    def _pulled_with(self, parts: Sequence[Sequence[Part]]) -> list[list[int]]:
        """Return the indices of the arenas to pull with these parts; tables are never pulled."""
        return [
            sorted({*always, *(part.arena for part in ps_parts if part.rows is None)})
            for always, ps_parts in zip(self.always_pulled, parts, strict=True)
        ]
