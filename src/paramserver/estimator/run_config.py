"""The configuration of a run: seconds, steps, folders, strategies; and the task of the run that this process is."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import InitVar, dataclass, field, fields, replace
from typing import Any, Protocol, runtime_checkable

from paramserver.cluster import ClusterSpec, Role, TaskId
from paramserver.cluster.spec import expected_one_of
from paramserver.errors import ConfigError
from paramserver.estimator.cluster_view import ClusterView

DEFAULT_SAVE_SECS = 600
START_DELAY_STEP_SECS = 5
MAX_START_DELAY_SECS = 60


class _Default:
    """The value "not given" where None means "off"."""

    def __repr__(self) -> str:
        return "<default>"


_DEFAULT: Any = _Default()  # Any, so that the fields have the type of their values after construction


@runtime_checkable
class Strategy(Protocol):
    """The part of a strategy that RunConfig checks; training needs more."""

    def scope(self) -> AbstractContextManager[object]:
        """Return the context in which the model is built."""


@dataclass(frozen=True, kw_only=True)
class DistributeConfig:
    """The strategies of a run, in the form that older programs use. See `RunConfig`."""

    train_distribute: Strategy | None = None
    eval_distribute: Strategy | None = None
    remote_cluster: object = None
    """Must be None: a client outside of the cluster that drives its tasks is not supported."""

    def __post_init__(self) -> None:
        if self.remote_cluster is not None:
            raise ConfigError(
                "DistributeConfig: remote_cluster: a client that drives the tasks of a cluster from outside is not "
                f"supported, got {self.remote_cluster!r}; run the program on every task, as TF_CONFIG or "
                "'paramserver launch' does"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The configuration of a run. Immutable; `replace` makes a changed copy.

    The environment variable TF_CONFIG is read once, at construction, and names the task that this process is; without
    TF_CONFIG the run is local.

    Args:
        experimental_distribute: The strategies in the form that older programs use; each strategy may be given either
            here or by its own argument.

    Raises:
        ConfigError: If a field or TF_CONFIG has an invalid value.
        TypeError: If an object passed as a strategy is not one.
    """

    model_dir: str | None = None
    """The place of checkpoints and summaries: a folder, or a URL that fsspec knows, such as ``s3://bucket/run``. Paths
    of any kind become strings. None takes TF_CONFIG's ``model_dir``, if it has one."""
    seed: int | None = None
    """Seed of every task, set before input and model are built (tf.estimator's ``tf_random_seed``); None leaves torch's
    seed unchanged."""
    save_summary_steps: int | None = 100
    """Global steps between two points of a summary; None or 0 writes none."""
    save_checkpoints_steps: int | None = _DEFAULT
    """Global steps between two checkpoints. If neither this nor ``save_checkpoints_secs`` is given, the default of
    the latter counts; if one is given, the other is None; both cannot be set. None for both saves no checkpoints."""
    save_checkpoints_secs: float | None = _DEFAULT
    """Seconds between two checkpoints; 600 if neither is given."""
    keep_checkpoint_max: int | None = 5
    """Number of the newest checkpoints to keep; None or 0 keeps all."""
    keep_checkpoint_every_n_hours: float | None = 10_000
    """Length of the periods in hours of each of which one checkpoint is kept for good; None keeps none for good."""
    log_step_count_steps: int | None = 100
    """Steps between two log lines of loss and speed; None logs neither."""
    session_creation_timeout_secs: float = 7200
    """Seconds that a worker waits for the ps tasks, and for the chief to initialize the variables."""
    max_worker_delay_secs: int | None = 0
    """Longest delay in seconds by which workers start one after the other, see ``start_delay_secs``; 0 starts all at
    once, None allows up to 60 seconds."""
    train_distribute: Strategy | None = None
    """The strategy of training."""
    eval_distribute: Strategy | None = None
    """The strategy on whose devices evaluation and prediction compute, a batch on each at a time; its cluster and its
    variables are not used. Metrics get predictions and labels on the CPU. None computes where model_fn has put the
    model."""
    experimental_distribute: InitVar[DistributeConfig | None] = None
    _view: ClusterView = field(default_factory=ClusterView.from_environment, repr=False)

    def __post_init__(self, experimental_distribute: DistributeConfig | None) -> None:
        final = {
            **_saving(self.save_checkpoints_steps, self.save_checkpoints_secs),
            "model_dir": _agreed_model_dir(self.model_dir, self._view.model_dir),
            "_view": replace(self._view, model_dir=None),  # a model_dir that replaces this one need not agree with it
            **_strategies(experimental_distribute, self.train_distribute, self.eval_distribute),
        }
        for name, value in final.items():
            # The only way in which a frozen dataclass can have fields whose values depend on other arguments.
            object.__setattr__(self, name, value)
        self._check()

    def replace(self, **changes: object) -> RunConfig:
        """Return a copy with other values; the cluster stays the one that was read at construction.

        Setting one of ``save_checkpoints_steps`` and ``save_checkpoints_secs`` clears the other.

        Raises:
            ConfigError: If there is no such field, or a value is not allowed.
        """
        known = [each.name for each in fields(self) if each.name != "_view"] + ["experimental_distribute"]
        for name in changes:
            if name not in known:
                raise ConfigError(f"replacing {name} is not supported: {expected_one_of(known, name)}")
        distribute = changes.pop("experimental_distribute", None)
        changes |= _strategies(distribute, changes.get("train_distribute"), changes.get("eval_distribute"))
        return replace(self, **{**_cleared_by(changes), **changes})  # type: ignore[arg-type]  # see _check

    @property
    def cluster_spec(self) -> ClusterSpec:
        """The training cluster; empty without a cluster, and on the evaluator."""
        return self._view.cluster_spec

    @property
    def task(self) -> TaskId:
        """The task that this process is; ``worker:0`` without a cluster."""
        return self._view.task

    @property
    def task_type(self) -> Role:
        """The role of this process; a plain string if its job is not a role and takes no part in a run."""
        return self._view.task.role

    @property
    def task_id(self) -> int:
        """The index of this process among the tasks of its role."""
        return self._view.task.index

    @property
    def is_chief(self) -> bool:
        """Whether this process initializes, checkpoints and writes summaries."""
        return self._view.is_chief

    @property
    def num_ps_replicas(self) -> int:
        """Number of ps tasks of the training cluster."""
        return self._view.num_ps_replicas

    @property
    def num_worker_replicas(self) -> int:
        """Number of tasks that compute gradients, including the chief; 0 if it is not known."""
        return self._view.num_worker_replicas

    @property
    def global_id_in_cluster(self) -> int | None:
        """The number of this process: chief 0, then the other jobs by name, ps last.

        None on the evaluator, and if the number of workers is not known.
        """
        return self._view.global_id_in_cluster

    @property
    def master(self) -> str:
        """The address of this task, with ``grpc://`` as tools that read it expect; ``""`` if it is alone.

        Nothing in paramserver connects to this address: tasks choose their lane in a handshake.
        """
        return self._view.master

    @property
    def evaluation_master(self) -> str:
        """TF_CONFIG's ``eval_session_master``; ``""`` if it has none."""
        return self._view.evaluation_master

    @property
    def service(self) -> Mapping[str, object] | None:
        """TF_CONFIG's ``service``, unchanged; None if it has none."""
        return self._view.service

    @property
    def saves_checkpoints(self) -> bool:
        """Whether checkpoints are written at all."""
        return bool(self.save_checkpoints_steps or self.save_checkpoints_secs)

    @property
    def start_delay_secs(self) -> float:
        """Seconds that this task waits before it trains: 5 for worker:0, 10 for worker:1, up to the limit."""
        if self.is_chief or self.task_type is not Role.WORKER:
            return 0
        limit = MAX_START_DELAY_SECS if self.max_worker_delay_secs is None else self.max_worker_delay_secs
        return min(limit, (self.task_id + 1) * START_DELAY_STEP_SECS)

    def _check(self) -> None:
        for name, (is_allowed, expected) in _RULES.items():
            if not is_allowed(value := getattr(self, name)):
                raise ConfigError(f"RunConfig: {name}: expected {expected}, got {value!r}")
        if self.save_checkpoints_steps is not None and self.save_checkpoints_secs is not None:
            raise _both_saves(self.save_checkpoints_steps, self.save_checkpoints_secs)
        for name in ("train_distribute", "eval_distribute"):
            strategy = getattr(self, name)
            if strategy is not None and (isinstance(strategy, type) or not isinstance(strategy, Strategy)):
                raise TypeError(f"RunConfig: {name}: expected a strategy or None, got {strategy!r}")
        if self._view.lacks_chief and self.train_distribute is None:
            raise ConfigError(
                'TF_CONFIG: the cluster must have one "chief" node without a train_distribute, got none; '
                "add a chief, or pass train_distribute: then worker:0 is the chief"
            )


def _saving(steps: object, secs: object) -> dict[str, object]:
    """Return the values of the two fields that say when checkpoints are saved."""
    default_secs = DEFAULT_SAVE_SECS if steps is _DEFAULT else None
    return {
        "save_checkpoints_steps": None if steps is _DEFAULT else steps,
        "save_checkpoints_secs": default_secs if secs is _DEFAULT else secs,
    }


def _strategies(distribute: object, train: object, evaluation: object) -> dict[str, Strategy]:
    """Return the strategies of ``distribute`` by field; ``train`` and ``evaluation`` are those given directly."""
    if distribute is None:
        return {}
    if not isinstance(distribute, DistributeConfig):
        raise TypeError(f"RunConfig: experimental_distribute: expected DistributeConfig, got {distribute!r}")
    found = {"train_distribute": distribute.train_distribute, "eval_distribute": distribute.eval_distribute}
    for name, direct in (("train_distribute", train), ("eval_distribute", evaluation)):
        if found[name] is not None and direct is not None:
            raise ConfigError(f"RunConfig: {name}: given directly and in experimental_distribute; give it once")
    return {name: strategy for name, strategy in found.items() if strategy is not None}


def _is_int(value: object, least: int | None = None) -> bool:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    return is_int and (least is None or value >= least)  # type: ignore[operator]  # is_int holds here


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _or_none(is_allowed: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_allowed(value)


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (_or_none(_is_int), "a whole number or None"),
    "save_summary_steps": (_or_none(lambda v: _is_int(v, 0)), "a whole number of at least 0 or None"),
    "save_checkpoints_steps": (_or_none(lambda v: _is_int(v, 0)), "a whole number of at least 0 or None"),
    "save_checkpoints_secs": (_or_none(lambda v: _is_number(v) and v >= 0), "seconds of at least 0 or None"),
    "keep_checkpoint_max": (_or_none(lambda v: _is_int(v, 0)), "a whole number of at least 0 or None"),
    "keep_checkpoint_every_n_hours": (_or_none(lambda v: _is_number(v) and v > 0), "positive hours or None"),
    "log_step_count_steps": (_or_none(lambda v: _is_int(v, 1)), "a positive whole number or None"),
    "session_creation_timeout_secs": (lambda v: _is_number(v) and v > 0, "a positive number of seconds"),
    "max_worker_delay_secs": (_or_none(lambda v: _is_int(v, 0)), "whole seconds of at least 0 or None"),
}


def _both_saves(steps: object, secs: object) -> ConfigError:
    return ConfigError(
        "RunConfig: save_checkpoints_steps and save_checkpoints_secs cannot be both set: "
        f"got {steps!r} steps and {secs!r} seconds; give one of them"
    )


def _cleared_by(changes: Mapping[str, object]) -> dict[str, object]:
    """Return the fields that become None because their counterparts are set."""
    pair = ("save_checkpoints_steps", "save_checkpoints_secs")
    return {
        other: None for name, other in (pair, reversed(pair)) if changes.get(name) is not None and other not in changes
    }


def _path_text(path: object, where: str) -> str | None:
    if path is None:
        return None
    if not isinstance(path, (str, os.PathLike)) or not (text := os.fspath(path)) or isinstance(text, bytes):
        raise ConfigError(f"{where}: expected a path that is not empty, got {path!r}")
    return text


def _agreed_model_dir(given: object, configured: object) -> str | None:
    """Return the model_dir that was passed, or else TF_CONFIG's; they must not differ."""
    ours = _path_text(given, "RunConfig: model_dir")
    theirs = _path_text(configured, "TF_CONFIG: 'model_dir'")
    if ours is not None and theirs is not None and ours != theirs:
        raise ConfigError(
            f"RunConfig: model_dir: {ours!r} was passed, but TF_CONFIG says {theirs!r}; "
            "make them the same, or give one of them"
        )
    return theirs if ours is None else ours
