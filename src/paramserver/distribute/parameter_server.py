"""ParameterServerStrategy: variables live on ps tasks, workers push gradients without waiting for each other."""

from __future__ import annotations

import contextlib
import copy
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, TypeVar, overload

import torch
from torch import nn

from paramserver.client.client import ParameterClient
from paramserver.cluster import (
    ClusterLike,
    ClusterResolver,
    ClusterSpec,
    Role,
    SimpleClusterResolver,
    TFConfigClusterResolver,
    id_in_cluster,
    is_chief,
    normalize_cluster_spec,
    validate_cluster,
    worker_count,
)
from paramserver.distribute import checkpoints, connection
from paramserver.distribute.bound import optimizer_state, plan
from paramserver.distribute.bound.buffer_policies import BufferPolicy
from paramserver.distribute.bound.buffers import Sharing
from paramserver.distribute.bound.direct_gradients import make_direct
from paramserver.distribute.bound.model import BoundModel, ModelBinding, PipelinedModel
from paramserver.distribute.bound.optimizer import PreparedOptimizer
from paramserver.distribute.bound.optimizer_state import OptimizerState, State
from paramserver.distribute.bound.replica_tensors import ReplicaTensors
from paramserver.distribute.bound.step_times import StepTimes
from paramserver.distribute.bound.tables.bound_table import take_tables
from paramserver.distribute.core.devices import Device, DeviceChoice
from paramserver.distribute.core.input_context import InputContext
from paramserver.distribute.reduce.reduction import ReduceOp
from paramserver.distribute.saving import SavingStrategy
from paramserver.errors import ConfigError, LocalProtocolError, RunOverError, UnavailableError
from paramserver.layout.arena import ArenaLayout
from paramserver.layout.blocks import Range
from paramserver.layout.variables import VariableSpec
from paramserver.placement import Partitioner, Placement, as_placement, row_ranges

logger = logging.getLogger(__name__)

SESSION_CREATION_TIMEOUT = 7200.0

M = TypeVar("M", bound=nn.Module)


class ParameterServerStrategy(SavingStrategy):
    """Asynchronous training with parameter servers; without a cluster, the same in one process.

    Every worker runs the same program. `prepare` puts the model's variables onto the ps tasks; from then on
    ``optimizer.step()`` pushes this worker's gradients, the ps tasks apply them at once, and fresh values come back.
    The task that the resolver names must be a worker or the chief for that; on a ps, ``paramserver server`` or
    ``Server(...).join()`` serves.

    Not thread-safe: one thread prepares and trains.

    Args:
        cluster_resolver: Says who is where; by default TF_CONFIG does. An empty cluster means one process.
        compute_devices: A replica runs on each; by default all GPUs of this worker, or the CPU where there are none.
            ``cpu:0``, ``cpu:1`` and so on are logical devices: replicas that share the CPU.
        parameter_device: Where the variables lie without a cluster; by default the one compute device, or the CPU if
            there are several.
        variable_placement: Which ps holds which variable: a policy of `paramserver.placement`, or a function of a
            variable and the number of ps tasks; round robin by default.
        variable_partitioner: Which variables are divided by rows among ps tasks, and into how many parts: one of
            `paramserver.placement`, or a function of a shape and a dtype; none by default. A worker needs memory for
            the values and gradients of a divided parameter once more.
        pipeline: Whether a step's push and pull go on while the next one computes, so that a slow network costs
            little. The next one computes without this one's update, then: one step of staleness more. A worker needs
            memory for values and gradients once more. Without a cluster nothing is waited for, and it changes nothing.
        session_creation_timeout: Seconds to wait for the ps tasks to come up and for the chief to initialize.

    Raises:
        ValueError: If the cluster or this task's place in it cannot work.
    """

    def __init__(
        self,
        cluster_resolver: ClusterResolver | None = None,
        *,
        compute_devices: Sequence[str] | None = None,
        parameter_device: str | None = None,
        variable_placement: Placement | Callable[[VariableSpec, int], int] | None = None,
        variable_partitioner: Partitioner | None = None,
        pipeline: bool = False,
        session_creation_timeout: float = SESSION_CREATION_TIMEOUT,
    ) -> None:
        self._resolver = cluster_resolver or TFConfigClusterResolver()
        self._devices = DeviceChoice.of(self._resolver, compute_devices, parameter_device)
        self._placement = as_placement(variable_placement)
        self._partitioner = variable_partitioner
        self._pipeline = pipeline
        self._timeout = session_creation_timeout
        self._enter_cluster(self._resolver.cluster_spec(), self._resolver.task_type, self._resolver.task_id)

    def configure(
        self, cluster_spec: ClusterLike | None = None, task_type: str | None = None, task_id: int | None = None
    ) -> None:
        """Make a strategy that was built for one process a part of a cluster. Does nothing without a cluster.

        Args:
            cluster_spec: The cluster, as a dict, a ClusterSpec or a ClusterDef.
            task_type: The role of this task in it.
            task_id: Its index.

        Raises:
            ValueError: If the cluster or this task's place in it cannot work.
            RuntimeError: If the strategy has connected to ps tasks already.
        """
        if not cluster_spec:
            return
        if self.client is not None:
            raise RuntimeError(f"configure: {self!r} has variables on parameter servers already; configure it before")
        cluster = normalize_cluster_spec(cluster_spec)
        self._enter_cluster(cluster, task_type, task_id)
        self._resolver = SimpleClusterResolver(cluster, task_type=task_type, task_id=task_id)

    def _enter_cluster(self, cluster: ClusterSpec, task_type: str | None, task_id: int | None) -> None:
        self.task = validate_cluster(cluster, task_type, task_id) if cluster else None
        self.cluster = cluster
        self._begin()

    def _begin(self) -> None:
        self.client = None
        self._has_prepared = self._is_preparing = False
        self._models = weakref.WeakSet()
        self._bound: weakref.WeakKeyDictionary[nn.Module, weakref.ref[BoundModel]] = weakref.WeakKeyDictionary()
        self._begin_saving()
        self._place = self._placement.start(self.num_ps)
        logger.info("%r", self)

    @property
    def cluster_resolver(self) -> ClusterResolver:
        return self._resolver

    @property
    def session_creation_timeout(self) -> float:
        """Seconds to wait for the ps tasks to come up, and for the chief to initialize."""
        return self._timeout

    @property
    def compute_devices(self) -> tuple[Device, ...]:
        """The devices of this worker that compute, one for each replica."""
        return self._devices.of_task(self.task)

    @property
    def parameter_device(self) -> Device:
        """Where the variables lie without a cluster."""
        return self._devices.parameter

    @property
    def worker_devices(self) -> tuple[str, ...]:
        return tuple(map(str, self.compute_devices))

    @property
    def parameter_devices(self) -> tuple[str, ...]:
        if self.task is None:
            return (str(self.parameter_device),)
        return tuple(f"/job:ps/task:{task.index}" for task in self.cluster.tasks(Role.PS))

    @property
    def num_replicas_in_sync(self) -> int:
        return len(self._devices.compute)

    @property
    def is_chief(self) -> bool:
        """Whether this task initializes, checkpoints and writes summaries; true in one process."""
        return self.task is None or is_chief(self.cluster, *self.task)

    @property
    def num_ps(self) -> int:
        """How many ps tasks there are; one process plays one."""
        return self.cluster.num_tasks(Role.PS) if self.cluster else 1

    @property
    def _num_workers(self) -> int:
        return worker_count(self.cluster, self.task.role) if self.task else 1

    @property
    def input_context(self) -> InputContext:
        """Which part of the input this task reads.

        Raises:
            ValueError: On a task that does not train.
        """
        if self.task is None:
            return InputContext(num_replicas_in_sync=self.num_replicas_in_sync)
        return InputContext(
            num_input_pipelines=self._num_workers,
            input_pipeline_id=id_in_cluster(self.cluster, *self.task),
            num_replicas_in_sync=self.num_replicas_in_sync,
        )

    @overload
    def prepare(
        self,
        model: M,
        optimizer: torch.optim.Optimizer,
        *,
        gradient_reduction: str | ReduceOp = ...,
        buffers: Mapping[str, str | BufferPolicy] | None = ...,
    ) -> tuple[M, PreparedOptimizer]: ...

    @overload
    def prepare(
        self,
        model: M,
        optimizer: Sequence[torch.optim.Optimizer],
        *,
        gradient_reduction: str | ReduceOp = ...,
        buffers: Mapping[str, str | BufferPolicy] | None = ...,
    ) -> tuple[M, tuple[PreparedOptimizer, ...]]: ...

    def prepare(
        self,
        model: M,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        gradient_reduction: str | ReduceOp = ReduceOp.MEAN,
        buffers: Mapping[str, str | BufferPolicy] | None = None,
    ) -> tuple[M, PreparedOptimizer | tuple[PreparedOptimizer, ...]]:
        """Put the model's variables onto the ps tasks and bind the model to them.

        The chief's initial values become everyone's, those of a checkpoint if `restore` was called before; so does the
        state that its optimizer has made or loaded. The model is the same object afterwards, its parameters in
        other memory; the optimizer that comes back pushes and pulls where the given one would update. Blocks until
        all ps tasks are up and the chief has initialized them. Afterwards every worker but the first has a random
        stream of torch's of its own, so that shuffling and dropout differ between them.

        From then on a parameter changes by its optimizer only. After a program has written other values into it (as
        ``load_state_dict`` does) the next step raises `EditedError`, until `assign` or `refresh` is called.

        With several replicas each has parameters and buffers of its own in the model's modules, and in the optimizer's
        param groups, while it runs, and ``optimizer.step()`` makes one update of all their gradients. What is done
        once for all of them, such as a step of a learning-rate schedule, is done outside of the replicas.

        Args:
            model: Its tensors are moved to the compute devices.
            optimizer: Holds parameters of the model; or several, which may hold different ones. The first one's steps
                are what the global step counts.
            gradient_reduction: How the replicas' gradients become one: their ``"mean"``, which fits a loss that is the
                mean over a batch, or their ``"sum"``.
            buffers: How several workers' changes of a persistent buffer become one: ``"sum"``, ``"mean"``, ``"last"``
                or ``"own"``, by the buffer's name or a pattern such as ``"*.queue"``; see `BufferPolicy`. By default
                what counts or averages is summed, and of all else the last value counts.

        Returns:
            The model, and what stands for the optimizer: several of them, if a sequence was given.

        Raises:
            ConfigError: On a task that does not train, or for a model or optimizer that cannot be distributed.
            DeadlineError: If a ps or the chief is not up in time.
            ModelMismatchError: If this worker's model differs from the chief's.
            RunOverError: If the run has ended already.
        """
        optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
        prepared = self.prepare_from(
            model,
            optimizers,
            initialize=self._begin_values,
            gradient_reduction=ReduceOp.parse(gradient_reduction),
            buffers=buffers,
        )
        begin, self._checkpoints.begin = self._checkpoints.begin, None
        if begin and self._found_step is not None:
            self._keep_newer(begin, begin)
        return model, prepared[0] if isinstance(optimizer, torch.optim.Optimizer) else prepared

    def prepare_from(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        initialize: Callable[[ParameterClient, BoundModel], int],
        gradient_reduction: ReduceOp = ReduceOp.MEAN,
        buffers: Mapping[str, str | BufferPolicy] | None = None,
        timeout: float | None = None,
        on_wait: Callable[[float], None] = lambda _: None,
    ) -> tuple[PreparedOptimizer, ...]:
        """`prepare`, with the chief's way to give the variables their first values.

        Args:
            model: As for `prepare`.
            optimizers: As for `prepare`.
            initialize: Fills the variables of the ps tasks and returns the global step that they belong to.
            gradient_reduction: As for `prepare`.
            buffers: As for `prepare`.
            timeout: Seconds to wait in all; the strategy's by default.
            on_wait: Called about every second while the chief is waited for.
        """
        self._check_can_prepare()
        limit = self._timeout if timeout is None else timeout
        collected = plan.collect(model, optimizers, buffers)
        arenas = plan.plan(collected, optimizers, self._place, self.num_ps, self.row_ranges)
        self._has_prepared = self._is_preparing = True
        layouts = [[arena.layout for arena in ps_arenas] for ps_arenas in arenas]
        client = self.connect(limit)
        is_ready = client.create(layouts) if self.is_chief else self._join(client, layouts, limit, on_wait)
        carried = [optimizer_state.carried(optimizer) for optimizer in optimizers]  # before tables let go of theirs
        lookups = take_tables(model, collected, optimizers)
        tensors = ReplicaTensors(model, optimizers, [device.torch_device for device in self.compute_devices])
        kind = PipelinedModel if self._pipeline and self.task is not None else BoundModel
        bound = kind(
            ModelBinding(
                arenas=arenas,
                memories=client.open(),
                optimizers=optimizers,
                tensors=tensors,
                reduction=gradient_reduction,
                client=client,
                first_rows={name: lookup.values for name, lookup in lookups.items()},
                sharing=Sharing(num_workers=self._num_workers, is_chief=self.is_chief),
            )
        )
        states = [
            OptimizerState(optimizer, collected, tensors, client, task=self._shown_task, is_chief=self.is_chief)
            for optimizer in optimizers
        ]
        bound.begin_state = lambda: _begin_state(states, carried)
        if not is_ready:
            client.mark_ready(initialize(client, bound))
        elif any(carried):
            logger.info("%s: prepare leaves the state of its optimizer: the ps tasks have one already", self.task)
        bound.bind()
        for optimizer in optimizers:
            optimizer.state.clear()  # it is with the ps tasks now, and may be twice as large as the model
        for name, lookup in lookups.items():
            lookup.use(bound.tables[name])
        make_direct(model, bound.gradient_places())
        self._prepared, self._aliases = bound, plan.aliases(model)
        self._found_step = client.local_step if is_ready else None
        self._models.add(bound)
        self._bound[model] = weakref.ref(bound)
        self._separate_random_streams()
        self._is_preparing = False
        return tuple(
            PreparedOptimizer(optimizer, bound, owner, self.num_replicas_in_sync, state)
            for owner, (optimizer, state) in enumerate(zip(optimizers, states, strict=True))
        )

    def recover(
        self,
        *,
        initialize: Callable[[ParameterClient, BoundModel], int] | None = None,
        timeout: float | None = None,
        on_wait: Callable[[float], None] = lambda _: None,
    ) -> None:
        """After an `UnavailableError`: connect again, and go on with the ps tasks' values in the same model.

        Where a ps was started again and holds nothing, the chief initializes all of them, and the other workers wait
        for it. By default it restores the last checkpoint that it has saved or restored: parameters, optimizer state
        and every `Variable` go back to that on all ps tasks. Where there is none, it takes the values that this task
        has; what the ps held beside them begins anew. A warning says what is lost. Blocks for as long as that takes. An
        update that was under way may have been applied or not.

        Args:
            initialize: How the chief fills the variables instead; returns the global step that they belong to.
            timeout: Seconds to wait for the ps tasks, and again for the chief; the strategy's by default.
            on_wait: Called about every second while the chief is waited for.

        Raises:
            RuntimeError: If there is nothing to recover: no cluster, or no prepared model.
            DeadlineError: If a ps or the chief is not up in time.
            UnavailableError: If a ps is lost meanwhile.
        """
        if self.task is None or self.client is None or not self._models:
            raise RuntimeError(f"recover: {self!r} has no prepared model on the ps tasks of a cluster")
        (model,) = self._models
        limit = self._timeout if timeout is None else timeout
        client, reached = self.client, self.client.global_step
        try:
            model.refresh()  # a connection that was cut is made anew, and what was under way made up for
        except (UnavailableError, LocalProtocolError):
            if not client.resume(limit, on_wait, is_chief=self.is_chief):
                client.mark_ready(initialize(client, model) if initialize else self._bring_back(model))
            model.refresh()
        if client.global_step < reached and not self.is_chief:
            logger.warning("%s: %s", self.task, checkpoints.lost_updates(reached, client.global_step))

    def assign(self, model: nn.Module) -> int:
        """Make a prepared model's present values, those of its buffers too, the ps tasks'; the global step. Blocks.

        The chief's values count: a call on another worker takes the ps tasks' values instead, as `refresh` does.
        Updates that others have made since this worker's last step are overwritten. Tables of a cluster stay as they
        are, since workers do not hold their values.

        Args:
            model: What `prepare` was given.

        Raises:
            ConfigError: If it is not prepared by this strategy.
            UnavailableError: If a ps is lost.
        """
        reference = self._bound.get(model)
        bound = reference() if reference else None
        if bound is None:
            raise ConfigError(f"assign: {type(model).__name__} is no model that {self!r} has prepared")
        if self.is_chief:
            bound.assign_present()
        else:
            logger.info("assign: the chief's values count; %s takes those of the ps tasks", self.task)
            bound.refresh()
        return self.global_step

    def statistics(self) -> StepTimes:
        """Where the time of this worker's steps has gone since `prepare`. Does not block, and costs next to nothing.

        Raises:
            RuntimeError: If no model is prepared, or the run is over for this task.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> strategy = ParameterServerStrategy()
            >>> model, optimizer = strategy.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
            >>> model(torch.ones(1, 2)).sum().backward()
            >>> optimizer.step()
            >>> list(strategy.statistics().per_step())
            ['computing', 'reducing', 'blocked', 'ps:0/sending', 'ps:0/waiting', 'ps:0/applying']
        """
        for model in self._models:
            return model.times()
        raise RuntimeError(f"statistics: {self!r} has prepared no model")

    def activate(self, replica: int) -> None:
        for model in self._models:
            model.activate(replica)

    def row_ranges(self, variable: VariableSpec) -> list[Range]:
        """The rows of a variable that lie apart, by the strategy's partitioner; none for one that stays whole."""
        return row_ranges(self._partitioner, variable) if self._partitioner else []

    def connect(self, timeout: float | None = None) -> ParameterClient:
        """The client of the ps tasks; connects when it is first asked for. Blocks until all ps tasks are up.

        Args:
            timeout: Seconds to wait for them, in all; the strategy's by default.

        Raises:
            ConfigError: On a task that does not train.
            DeadlineError: If a ps is not up in time.
        """
        if self.client is None:
            if self.task is None:
                self.client = connection.in_process(self.parameter_device.torch_device)
            else:
                self._check_trains("connecting to the ps tasks")
                limit = self._timeout if timeout is None else timeout
                self.client = connection.to_cluster(self.cluster, self.task, limit)
        return self.client

    def place(self, variable: VariableSpec) -> int:
        return self._place(variable)

    def leave_unstarted(self) -> None:
        """Say goodbye to the ps tasks without training: for a task that finds its work done already.

        Blocks until the ps tasks are up; does nothing in one process.

        Raises:
            DeadlineError: If a ps is not up in time.
        """
        if self.task is not None and self.client is None:
            with contextlib.suppress(RunOverError):  # the chief was faster to leave
                self.connect().goodbye()

    def close(self, failure: str = "") -> None:
        """Say goodbye to the ps tasks: this task has finished, or why it cannot go on. Idempotent.

        Called at the end of the process if it was not before. Blocks until a step that is under way has arrived.

        Raises:
            UnavailableError: If a ps was lost by the last step, with ``pipeline``.
        """
        if not failure:
            self._settle()
        if self.client is not None:
            self.client.goodbye(failure)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        if self.client is not None:
            raise RuntimeError(
                f"deepcopy: {self!r} is connected to its ps tasks, and a connection cannot be copied; "
                "copy a strategy before it prepares a model or makes a variable"
            )
        duplicate = memo[id(self)] = object.__new__(type(self))
        vars(duplicate).update(copy.deepcopy(vars(self), memo))
        duplicate._begin()
        return duplicate

    def __repr__(self) -> str:
        if self.task is None:
            return (
                f"<{type(self).__name__} in one process; computing on {', '.join(self.worker_devices)}, "
                f"variables on {self.parameter_device}>"
            )
        jobs = ", ".join(f"{self.cluster.num_tasks(job)} {job}" for job in self.cluster.jobs)
        return (
            f"<ParameterServerStrategy: {self.task}{' (chief)' if self.is_chief else ''} of {jobs}; "
            f"computing on {', '.join(self.worker_devices)}, variables on /job:ps>"
        )

    def _check_can_prepare(self) -> None:
        self._check_trains("prepare")
        if self._is_preparing and self.task is not None:
            raise ConfigError(
                "prepare: an earlier prepare of this strategy did not get to its end, and the values of its model may "
                "be lost; make the model, the optimizer and the strategy anew"
            )
        if self._has_prepared and self.task is not None:
            raise ConfigError(
                "prepare: this strategy has prepared a model already, and a run trains one; "
                "put several models into one nn.ModuleDict, with an optimizer for each"
            )
        if self._has_prepared:
            self.client = None  # the next model has a ps of its own

    def _check_trains(self, what: str) -> None:
        if self.task is not None and not self.task.role.trains:
            raise ConfigError(
                f"{what}: this task is {self.task}, which does not train; "
                "a ps runs 'paramserver server' or Server(...).join(), an evaluator reads checkpoints"
            )

    def _join(
        self,
        client: ParameterClient,
        layouts: Sequence[Sequence[ArenaLayout]],
        timeout: float,
        on_wait: Callable[[float], None],
    ) -> bool:
        client.await_ready(timeout, on_wait)
        client.join(layouts)
        return True

    def _separate_random_streams(self) -> None:
        index = id_in_cluster(self.cluster, *self.task) if self.task else 0
        if index:
            torch.manual_seed((torch.initial_seed() + index) % 2**63)


def _begin_state(states: Sequence[OptimizerState], carried: Sequence[State]) -> None:
    for remote, state in zip(states, carried, strict=True):
        if state:
            remote.write(state)
