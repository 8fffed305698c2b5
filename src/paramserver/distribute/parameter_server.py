"""ParameterServerStrategy: variables live on ps tasks, workers push gradients without waiting for each other."""

from __future__ import annotations

import contextlib
import copy
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
    TaskId,
    TFConfigClusterResolver,
    environment,
    id_in_cluster,
    is_chief,
    normalize_cluster_spec,
    validate_cluster,
    worker_count,
)
from paramserver.cluster.addresses import check_addresses
from paramserver.cluster.report import Reporter
from paramserver.distribute import checkpoints, connection
from paramserver.distribute.bound import optimizer_state, plan
from paramserver.distribute.bound.buffer_policies import BufferPolicy
from paramserver.distribute.bound.buffers import Sharing
from paramserver.distribute.bound.direct_gradients import make_direct
from paramserver.distribute.bound.model import BoundModel, ModelBinding, PipelinedModel
from paramserver.distribute.bound.optimizer import PreparedOptimizer
from paramserver.distribute.bound.optimizer_state import OptimizerState, State
from paramserver.distribute.bound.plan import ArenaPlan
from paramserver.distribute.bound.replica_tensors import ReplicaTensors
from paramserver.distribute.bound.step_times import StepTimes
from paramserver.distribute.bound.tables.bound_table import take_tables
from paramserver.distribute.core.devices import Device, DeviceChoice
from paramserver.distribute.core.input_context import InputContext
from paramserver.distribute.progress import LoopProgress
from paramserver.distribute.reduce.reduction import ReduceOp
from paramserver.distribute.saving import SavingStrategy
from paramserver.errors import ConfigError, LocalProtocolError, RunOverError, UnavailableError
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
    The resolver must name this task a worker or the chief for that; a ps task runs ``paramserver server`` or
    ``Server(...).join()`` instead.

    Not thread-safe: one thread prepares and trains.

    Args:
        cluster_resolver: Names the tasks and their addresses; by default TF_CONFIG does. An empty cluster means one
            process.
        compute_devices: One replica runs on each; by default all GPUs of this worker, or the CPU if there are none.
            ``cpu:0``, ``cpu:1`` and so on are logical devices: replicas that share the CPU.
        parameter_device: The device of the variables without a cluster; by default the one compute device, or the CPU
            if there are several.
        variable_placement: Chooses the ps of each variable: a policy of `paramserver.placement`, or a function of a
            variable and the number of ps tasks; round robin by default.
        variable_partitioner: Chooses which variables are divided by rows among ps tasks, and into how many parts: one
            of `paramserver.placement`, or a function of a shape and a dtype; by default no variable is divided. A
            worker needs additional memory for the values and gradients of a divided parameter.
        pipeline: Whether a step's push and pull overlap with the computation of the next step, which hides a slow
            network. The next step then computes without this step's update: one more step of staleness. A worker needs
            a second copy of values and gradients in memory. Without a cluster there is nothing to hide, and the option
            changes nothing.
        session_creation_timeout: Seconds to wait for the ps tasks to come up and for the chief to initialize the
            variables.
        heartbeat_timeout: Seconds after which a ps that gives no sign of life counts as lost for this task, and this
            task for the ps tasks; 0 for no limit. By default that of the environment, or 30.

    Raises:
        ValueError: If the cluster is invalid, or has no such task.
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
        heartbeat_timeout: float | None = None,
    ) -> None:
        self._resolver = cluster_resolver or TFConfigClusterResolver()
        self._devices = DeviceChoice.of(self._resolver, compute_devices, parameter_device)
        self._placement = as_placement(variable_placement)
        self._partitioner = variable_partitioner
        self._pipeline = pipeline
        self._timeout = session_creation_timeout
        self._heartbeat_timeout = heartbeat_timeout
        self._enter_cluster(self._resolver.cluster_spec(), self._resolver.task_type, self._resolver.task_id)

    def configure(
        self, cluster_spec: ClusterLike | None = None, task_type: str | None = None, task_id: int | None = None
    ) -> None:
        """Make a strategy that was built for one process part of a cluster. Does nothing without a cluster.

        Args:
            cluster_spec: The cluster, as a dict, a ClusterSpec or a ClusterDef.
            task_type: The role of this task in the cluster.
            task_id: The index of this task.

        Raises:
            ValueError: If the cluster is invalid, or has no such task.
            RuntimeError: If the strategy has connected to ps tasks already.
        """
        if not cluster_spec:
            return
        if self.client is not None:
            raise RuntimeError(f"configure: {self!r} has variables on parameter servers already; call it earlier")
        cluster = normalize_cluster_spec(cluster_spec)
        self._enter_cluster(cluster, task_type, task_id)
        self._resolver = SimpleClusterResolver(cluster, task_type=task_type, task_id=task_id)

    def _enter_cluster(self, cluster: ClusterSpec, task_type: str | None, task_id: int | None) -> None:
        self.task = validate_cluster(cluster, task_type, task_id) if cluster else None
        check_addresses(cluster, "cluster")
        self.cluster = cluster
        self._begin()

    def _begin(self) -> None:
        self.client = None
        self._has_prepared = self._is_preparing = False
        self._progress: LoopProgress | None = None
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
        """Seconds to wait for the ps tasks to come up and for the chief to initialize the variables."""
        return self._timeout

    @property
    def compute_devices(self) -> tuple[Device, ...]:
        """The compute devices of this worker, one for each replica."""
        return self._devices.of_task(self.task)

    @property
    def parameter_device(self) -> Device:
        """The device of the variables without a cluster."""
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
        """Whether this task initializes, checkpoints and writes summaries; always true in one process."""
        return self.task is None or is_chief(self.cluster, *self.task)

    @property
    def num_ps(self) -> int:
        """The number of ps tasks; 1 in one process, which plays a ps."""
        return self.cluster.num_tasks(Role.PS) if self.cluster else 1

    @property
    def _num_workers(self) -> int:
        return worker_count(self.cluster, self.task.role) if self.task else 1

    @property
    def input_context(self) -> InputContext:
        """The part of the input that this task reads.

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

        Every worker starts from the chief's initial values, or from a checkpoint's if `restore` was called before; the
        same holds for the state that the chief's optimizer has made or loaded. The model is the same object
        afterwards, with its parameters in other memory. The returned optimizer pushes and pulls where the given one
        would update. Blocks until all ps tasks are up and the chief has initialized them. Afterwards every worker but
        the first has its own torch random stream, so that shuffling and dropout differ between workers.

        From then on a parameter changes only by its optimizer. After a program has written other values into a
        parameter (as ``load_state_dict`` does), the next step raises `EditedError`, until `assign` or `refresh` is
        called.

        With several replicas, each replica has its own parameters and buffers in the model's modules and in the
        optimizer's param groups while it runs, and ``optimizer.step()`` makes one update of all their gradients. Do
        work that is needed once for all replicas, such as a step of a learning-rate schedule, outside of the replicas.

        Args:
            model: The model. Its tensors are moved to the compute devices.
            optimizer: An optimizer of the model's parameters, or several optimizers, which may hold different
                parameters. The global step counts the steps of the first one.
            gradient_reduction: How the replicas' gradients are combined: ``"mean"``, which fits a loss that is the mean
                over a batch, or ``"sum"``.
            buffers: How several workers' changes of a persistent buffer are combined: ``"sum"``, ``"mean"``,
                ``"last"`` or ``"own"``, by the buffer's name or a pattern such as ``"*.queue"``; see `BufferPolicy`.
                By default buffers that count or average are summed, and the last value of all other buffers counts.

        Returns:
            The model, and the optimizer to use instead of the given one; a tuple of them if a sequence was given.

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
        """Prepare a model with a given way to initialize the variables; see `prepare`.

        :meta private:

        Args:
            model: As for `prepare`.
            optimizers: As for `prepare`.
            initialize: Fills the variables of the ps tasks and returns the global step of their values.
            gradient_reduction: As for `prepare`.
            buffers: As for `prepare`.
            timeout: Seconds to wait in all; by default the strategy's.
            on_wait: Called about once a second while this task waits for the chief.
        """
        self._check_can_prepare()
        limit = self._timeout if timeout is None else timeout
        collected = plan.collect(model, optimizers, buffers)
        arenas = plan.plan(collected, optimizers, self._place, self.num_ps, self.row_ranges)
        # Set before anything moves: if a later line fails, the model may have lost its values.
        self._has_prepared = self._is_preparing = True
        client = self.connect(limit)
        is_ready = self._declare(client, arenas, limit, on_wait)
        carried = [optimizer_state.carried(optimizer) for optimizer in optimizers]  # before tables drop their state
        lookups = take_tables(model, collected, optimizers)
        binding = ModelBinding(
            arenas=arenas,
            tensors=ReplicaTensors(model, optimizers, [device.torch_device for device in self.compute_devices]),
            memories=client.open(),
            optimizers=optimizers,
            reduction=gradient_reduction,
            client=client,
            first_rows={name: lookup.values for name, lookup in lookups.items()},
            sharing=Sharing(num_workers=self._num_workers, is_chief=self.is_chief),
        )
        bound = (PipelinedModel if self._pipeline and self.task is not None else BoundModel)(binding)
        task, is_chief = self._shown_task, self.is_chief
        states = [
            OptimizerState(optimizer, collected, binding.tensors, client, task=task, is_chief=is_chief)
            for optimizer in optimizers
        ]
        bound.begin_state = lambda: _begin_state(states, carried)
        if not is_ready:
            client.mark_ready(initialize(client, bound))
        elif any(carried):
            logger.info("%s: prepare leaves the state of its optimizer: the ps tasks have one already", self.task)
        bound.bind()
        for optimizer in optimizers:
            optimizer.state.clear()  # the ps tasks hold it now, and it may be twice as large as the model
        for name, lookup in lookups.items():
            lookup.use(bound.tables[name])
        make_direct(model, bound.gradient_places())
        self._found_step = client.local_step if is_ready else None
        self._keep(model, bound)
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
        """Reconnect after an `UnavailableError`, and continue with the ps tasks' values in the same model.

        If a ps was restarted and holds nothing, the chief initializes all ps tasks, and the other workers wait for the
        chief. By default it restores the last checkpoint that it has saved or restored: parameters, optimizer state
        and every `Variable` go back to that checkpoint on all ps tasks. Without a checkpoint it uses the values that
        this task holds; the other state of the lost ps tasks starts anew. A warning names the loss. Blocks until all of
        this is done. An update that was under way may or may not have been applied.

        Args:
            initialize: Fills the variables on the chief instead, and returns the global step of their values.
            timeout: Seconds to wait for the ps tasks, and again for the chief; by default the strategy's.
            on_wait: Called about once a second while this task waits for the chief.

        Raises:
            RuntimeError: If there is nothing to recover: no cluster, or no prepared model.
            DeadlineError: If a ps or the chief is not up in time.
            UnavailableError: If a ps is lost while this call runs.
        """
        if self.task is None or self.client is None or not self._models:
            raise RuntimeError(f"recover: {self!r} has no prepared model on the ps tasks of a cluster")
        (model,) = self._models
        limit = self._timeout if timeout is None else timeout
        client, reached = self.client, self.client.global_step
        try:
            model.refresh()  # reconnects where a connection was cut, and completes the update that was under way
        except (UnavailableError, LocalProtocolError):
            if not client.resume(limit, on_wait, is_chief=self.is_chief):
                client.mark_ready(initialize(client, model) if initialize else self._bring_back(model))
            model.refresh()
        if client.global_step < reached and not self.is_chief:
            logger.warning("%s: %s", self.task, checkpoints.lost_updates(reached, client.global_step))

    def assign(self, model: nn.Module) -> int:
        """Write a prepared model's present parameters and buffers to the ps tasks, and return the global step. Blocks.

        Only the chief's values count: on another worker the call reads the ps tasks' values instead, as `refresh` does.
        Updates that other workers have made since the chief's last step are overwritten. Tables of a cluster stay
        unchanged, since workers do not hold their values.

        Args:
            model: A model that was passed to `prepare`.

        Raises:
            ConfigError: If this strategy has not prepared the model.
            UnavailableError: If a ps is lost.
        """
        reference = self._bound.get(model)
        bound = reference() if reference else None
        if bound is None:
            raise ConfigError(f"assign: this {type(model).__name__} is not a model that {self!r} has prepared")
        if self.is_chief:
            bound.assign_present()
        else:
            logger.info("assign: the chief's values count; %s takes those of the ps tasks", self.task)
            bound.refresh()
        return self.global_step

    def statistics(self) -> StepTimes:
        """Return where the time of this worker's steps has gone since `prepare`. Does not block, and is cheap.

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

    def report(self, loss: float | torch.Tensor | None = None, *, max_steps: int | None = None) -> None:
        """Report the progress of a training loop; call it once in each step. Does not block, and is cheap.

        Under ``paramserver launch`` the display shows it, at most five times a second. Otherwise a line is logged every
        10 seconds, with the global step and the steps per second. The loss is read only where it is shown.

        Args:
            loss: The loss of the step, one element.
            max_steps: The global step at which the loop ends, for the progress bar.

        Example:
            >>> strategy = ParameterServerStrategy()
            >>> strategy.report(0.25, max_steps=1000)
        """
        if self._progress is None:
            self._progress = LoopProgress(self._shown_task, Reporter(self._shown_task, environment.read().report_fd))
        self._progress.report(self.global_step, loss, max_steps)

    def activate(self, replica: int) -> None:
        for model in self._models:
            model.activate(replica)

    def row_ranges(self, variable: VariableSpec) -> list[Range]:
        """Return the row ranges that the partitioner divides a variable into; empty for one that stays whole.

        :meta private:
        """
        return row_ranges(self._partitioner, variable) if self._partitioner else []

    def connect(self, timeout: float | None = None) -> ParameterClient:
        """Return the client of the ps tasks; the first call connects. Blocks until all ps tasks are up.

        :meta private:

        Args:
            timeout: Seconds to wait for the ps tasks, in all; by default the strategy's.

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
                self.client = connection.to_cluster(
                    self.cluster,
                    self.task,
                    limit,
                    heartbeat_timeout=self._heartbeat_timeout,
                    find_address=partial(_find_address, self._resolver, self.cluster),
                )
        return self.client

    def place(self, variable: VariableSpec) -> int:
        return self._place(variable)

    def leave_unstarted(self) -> None:
        """Say goodbye to the ps tasks without training: for a task that finds the run's work already done.

        :meta private:

        Blocks until the ps tasks are up; does nothing in one process.

        Raises:
            DeadlineError: If a ps is not up in time.
        """
        if self.task is not None and self.client is None:
            with contextlib.suppress(RunOverError):  # the chief left first, and the run is over
                self.connect().goodbye()

    def close(self, failure: str = "") -> None:
        """Say goodbye to the ps tasks. Idempotent.

        The end of the process calls it too. Blocks until a step that is under way has arrived at the ps tasks.

        Args:
            failure: Why this task cannot go on; empty if it has finished.

        Raises:
            UnavailableError: If a ps was lost by the last step, with ``pipeline``.
        """
        if not failure:
            self._settle()
        if self.client is not None:
            self.client.goodbye(failure)

    def leave(self) -> None:
        """Close the connections without a goodbye: this task has not finished, and may come back. Idempotent.

        For a task that is asked to leave. The run goes on without it, and waits for a chief that has left so as for a
        lost one. An update that is under way may or may not be applied.
        """
        if self.client is not None:
            self.client.close()

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
        is_chief = self.is_chief and self.task.role.trains  # an evaluator is its own chief only
        return (
            f"<ParameterServerStrategy: {self.task}{' (chief)' if is_chief else ''} of {jobs}; "
            f"computing on {', '.join(self.worker_devices)}, variables on /job:ps>"
        )

    def _check_can_prepare(self) -> None:
        self._check_trains("prepare")
        if self._is_preparing and self.task is not None:
            raise ConfigError(
                "prepare: an earlier prepare of this strategy has not completed, and the values of its model may be "
                "lost; create a new model, optimizer and strategy"
            )
        if self._has_prepared and self.task is not None:
            raise ConfigError(
                "prepare: this strategy has prepared a model already, and a run trains one; "
                "put several models into one nn.ModuleDict, with an optimizer for each"
            )
        if self._has_prepared:
            self.client = None  # each model of a single process has its own in-process ps

    def _check_trains(self, what: str) -> None:
        if self.task is not None and not self.task.role.trains:
            raise ConfigError(
                f"{what}: this task is {self.task}, which does not train; "
                "a ps runs 'paramserver server' or Server(...).join(), an evaluator reads checkpoints"
            )

    def _declare(
        self,
        client: ParameterClient,
        arenas: Sequence[Sequence[ArenaPlan]],
        timeout: float,
        on_wait: Callable[[float], None],
    ) -> bool:
        """Create the arenas, or wait for the chief and join; return whether the ps tasks hold values already."""
        layouts = [[arena.layout for arena in ps_arenas] for ps_arenas in arenas]
        if self.is_chief:
            return client.create(layouts)
        client.await_ready(timeout, on_wait)
        client.join(layouts)
        return True

    def _keep(self, model: nn.Module, bound: BoundModel) -> None:
        """Note a model that is prepared now."""
        self._prepared, self._aliases = bound, plan.aliases(model)
        self._models.add(bound)
        self._bound[model] = weakref.ref(bound)
        self._separate_random_streams()
        self._is_preparing = False

    def _separate_random_streams(self) -> None:
        index = id_in_cluster(self.cluster, *self.task) if self.task else 0
        if index:
            torch.manual_seed((torch.initial_seed() + index) % 2**63)


def _begin_state(states: Sequence[OptimizerState], carried: Sequence[State]) -> None:
    for remote, state in zip(states, carried, strict=True):
        if state:
            remote.write(state)


def _find_address(resolver: ClusterResolver, known: ClusterSpec, ps: TaskId) -> str:
    """Return the present address of a ps: engines start a ps again on another host."""
    present = resolver.cluster_spec()
    return (present if ps in present.tasks(ps.role) else known).address(ps)
