"""A model whose parameters, gradients and buffers lie in the memory that lanes read and write.

Rules
    * A step says which parts of the memory count, and nothing else: one message to each ps, whatever the number of
      variables and of replicas.
    * Of several optimizers each pushes what it holds. Buffers, and the count of the global step, go with the first.
    * A pipelined model's push and pull go on while the next step computes, from values without this step's update: they
      come when that step is made. Its global step counts the update that is on its way.
    * Values are the ps tasks': a program that changes a parameter by hand after `prepare` is refused by the next step.
    * A step that fails before its push begins has changed nothing. Once it has begun, an exception of any kind leaves
      it under way: the next step, or any other request to the ps tasks, first makes sure that every ps has applied it.
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
    """What a model is bound to.

    Attributes:
        arenas: The plan, for each ps.
        memories: The memory, for each ps.
        optimizers: The optimizers, whose param groups are read for every push.
        tensors: The parameters and buffers of all replicas.
        reduction: How the replicas' gradients become one.
        client: The client, owned by the caller.
        first_rows: The first values of tables, by name, unless others initialize.
        sharing: Who else changes the buffers.
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
        tables: What is looked up by rows, by name.
        begin_state: Brings the state that optimizers had before to the ps tasks, with the first values.
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
        """Make the model's present values those of the ps tasks.

        Raises:
            ConfigError: If it has none of a table any more.
        """
        for name, table in self.tables.items():
            if name not in self._first_rows:
                raise ConfigError(  # a ps was lost
                    f"variable {name!r} is a table, of which workers hold no values: after the loss of a ps it "
                    "can only be restored from a checkpoint; call strategy.save(directory) now and then, or pass "
                    "recover(initialize=...) a function that restores one"
                )
            table.assign(self._first_rows.pop(name))
        self.assign_arenas()
        self.begin_state()

    def assign_arenas(self) -> None:
        """`assign`, of all but tables."""
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
        """Make the present values the ps tasks', and take them for fresh."""
        self.settle()
        if all(arena.is_direct for arena in self._each()):
            for arena in self._each():
                arena.bring_home()
        else:
            self.assign_arenas()
        self.refresh()

    def bind(self) -> None:
        """Give the model's tensors their place in the memory, holding the ps tasks' values."""
        self._first_rows.clear()
        self.begin_state = _nothing
        for table in self.tables.values():
            table.bind()
        for arena in self._each():
            arena.bind()  # before the values come, so that the model's own are gone by then
        heap.give_back()
        heap.keep_for_steps()
        self.refresh()
        self._clock = StepClock(self._client.push_times)

    def refresh(self) -> None:
        """Bring all values up to date with the ps tasks'. What buffers changed by since the last step is lost."""
        self._client.finish_push()
        self._under_way = None
        self._copies.finish()
        self._client.pull([[arena.plan.index for arena in arenas] for arenas in self._arenas])
        for arena in self._each():
            arena.refreshed()
        self.gate.is_shut = False

    def settle(self) -> None:
        """Wait until nothing is under way any more, as it is with a pipelined model or after an interrupt."""
        self._arrive()

    def renew(self, ps: int) -> None:
        """See `arenas.PushedMemory`."""
        memory = self._client.renew_gradients(ps)
        for arena in self._arenas[ps]:
            arena.use_gradients(memory.gradients[arena.plan.index])

    def gradient_places(self) -> dict[int, GradientPlace]:
        """Where each parameter's gradient belongs, by the id of the parameter."""
        trained = (arena for arena in self._each() if isinstance(arena, TrainedArena))
        return {id(place.parameter): place for arena in trained for place in arena.gradient_places()}

    def hold(self, owner: int, groups: Groups) -> None:
        """Go on with the parameters that an optimizer's param groups hold now; see `HeldParameters`.

        Raises:
            ConfigError: If there is something in them that was not in that group at `prepare`, naming it.
        """
        held = self._held[owner].changed(groups)
        if held is not None:
            self._steps[owner].hold(held)

    def step(self, owner: int = 0) -> PushResult:
        """Push gradients and what buffers changed by, and pull fresh values: one message to each ps.

        Args:
            owner: The index of the optimizer that makes the step.
        """
        entered = self._clock.entered()
        self._arrive()
        step = self._steps[owner]
        plans, rows = step.request()
        reducing = time.perf_counter() - entered
        number = self._client.next_number()
        self._under_way, self.gate.is_shut = _UnderWay(step, plans, number), True
        try:
            result = self._client.push_pull(
                plans, counts=owner == 0, rows=rows, meanwhile=step.meanwhile, number=number
            )
            step.pulled(plans)
        except BaseException:
            step.evict()  # a program may go on to add to gradients that a ps has yet to read
            raise
        self._under_way, self.gate.is_shut = None, False
        self._clock.left(entered, reducing, counts=owner == 0)
        return result

    def _arrive(self) -> PushResult | None:
        """Have the values of a step that is under way; None if there is none, or if no ps will ever hear of it."""
        if self._under_way is None and not self.gate.is_shut:
            return None
        result = self._client.finish_push()
        if self._under_way and self._client.has_begun(self._under_way.number):
            self._under_way.step.pulled(self._under_way.plans, self._client.refusing)
            self._under_way.step.take_for_fresh()
        self._under_way, self.gate.is_shut = None, False
        return result

    def times(self) -> StepTimes:
        """Where the time of its steps has gone."""
        return self._clock.times()

    def activate(self, replica: int) -> None:
        """Put a replica's tensors into the model's modules."""
        self._tensors.activate(replica)

    def on_each_replica(self, parameter: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Every replica's tensor in the place of the first one's ``parameter``."""
        return self._tensors.of(parameter)

    def _each(self) -> list[BoundArena]:
        return [arena for arenas in self._arenas for arena in arenas]


def _nothing() -> None:
    """No optimizer had state before."""


def _variables(arenas: Sequence[Sequence[ArenaPlan]]) -> Iterator[ModelVariable]:
    return (member.variable for each in arenas for plan in each for member in plan.members)


class PipelinedModel(BoundModel):
    """A `BoundModel` whose step returns while its push and pull are under way. The arguments are the same.

    A step computes from the values that the step before the last one has brought. What is told of a step is what came
    of the one before: an error, too.
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
    """A step that was handed to the lanes, or was about to be; `ParameterClient.has_begun` tells which."""

    step: _Step
    plans: Sequence[PushTemplate]
    number: int


class _Step:
    """What a step of one optimizer is about, for each ps.

    Attributes:
        arenas: What may be pushed.
        tables: What may be pushed by rows.
        always_pulled: The indices of what is pulled also where nothing is pushed: others change it.
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
            return (groups[group][0] if group >= 0 else 0) == owner

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
        """Push these parameters only, which are named by the ids of the first replica's."""
        for arena in self._each():
            arena.hold(held)
        for table in self.tables:
            table.hold(held)

    def request(self) -> tuple[list[PushTemplate], list[list[TableRows]] | None]:
        """What to push and to pull, and the rows of tables to push, for each ps."""
        arenas = self._each()
        for arena in arenas:
            arena.check()
        memory = [arena.gradients for arena in arenas]
        for arena in arenas:
            arena.gather()
        if any(map(operator.is_not, memory, [arena.gradients for arena in arenas])):
            for arena in arenas:
                arena.gather()  # one of them was given other memory, and so were those that were gathered before
        self._copies.finish()
        parts = [[part for arena in arenas for part in arena.parts()] for arenas in self.arenas]
        rows = self._add_rows(parts) if self.tables else None
        if parts != self._parts:  # in nearly every step they are the ones of the step before
            self._parts, self._plans = parts, self._plan(parts, self._pulled_with(parts))
        return self._plans, rows

    def meanwhile(self) -> None:
        """What is to be done before values come, and not before the ps tasks are at work."""
        for arena in self._each():
            arena.meanwhile()

    def pulled(self, plans: Sequence[PushTemplate], refusing: Collection[int] = ()) -> None:
        """The values that these plans ask for have come, but for those of ps tasks that have refused."""
        for ps, (arenas, plan) in enumerate(zip(self.arenas, plans, strict=True)):
            for arena in arenas:
                if arena.plan.index in plan.pull and ps not in refusing:
                    arena.pulled()

    def take_for_fresh(self) -> None:
        """Take the present values for the ps tasks': what was counted of an interrupted step is not certain."""
        for arena in self._each():
            arena.take_for_fresh()

    def evict(self) -> None:
        """Give the program gradients of its own in the place of those that lie where the lanes read."""
        for arena in self._each():
            arena.evict()

    def _each(self) -> list[BoundArena]:
        return [arena for arenas in self.arenas for arena in arenas]

    def _add_rows(self, parts: list[list[Part]]) -> list[list[TableRows]]:
        """The rows of tables to push to each ps, and, at the end of ``parts``, what they are."""
        rows: list[list[TableRows]] = [[] for _ in parts]
        for table in self.tables:
            for ps, part, each in table.parts():
                parts[ps].append(part)
                rows[ps].append(each)
        return rows

    def _pulled_with(self, parts: Sequence[Sequence[Part]]) -> list[list[int]]:
        """What is pulled with these parts, which is never a table."""
        return [
            sorted({*always, *(part.arena for part in ps_parts if part.rows is None)})
            for always, ps_parts in zip(self.always_pulled, parts, strict=True)
        ]
