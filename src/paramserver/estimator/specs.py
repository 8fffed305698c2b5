"""The specifications that a user passes to the Estimator: the model for one mode, its training, its evaluation."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from paramserver.distribute.bound.buffer_policies import BufferPolicy
from paramserver.distribute.core.nest import described
from paramserver.errors import ConfigError
from paramserver.estimator.export.exporters import Exporter, check_exporter_name
from paramserver.estimator.hooks.hook import TrainingHook, as_tuple
from paramserver.estimator.hooks.saving import CheckpointSaverListener

T = TypeVar("T")

Several: TypeAlias = T | Sequence[T] | Mapping[str, T] | None
"""One, several in order, or several by name."""

RESERVED_METRICS = ("loss", "global_step")
"""Results that every evaluation contains without being asked."""


class ModeKeys(enum.StrEnum):
    """The purpose that a model is built for. The values are tf.estimator's."""

    TRAIN = "train"
    EVAL = "eval"
    PREDICT = "infer"


@runtime_checkable
class Metric(Protocol):
    """An evaluation metric, in the form of torchmetrics. The user's model determines the types."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Take one batch into account."""

    def compute(self) -> Any:
        """Return the value over all batches since the last reset."""

    def reset(self) -> Any:
        """Forget all batches."""


@dataclass(frozen=True)
class EstimatorSpec:
    """The result of a ``model_fn``: the model for one mode, and the functions of each step.

    TRAIN needs ``model``, ``loss_fn`` and ``optimizer``; EVAL ``model`` and ``loss_fn``; PREDICT ``model``.
    More than a mode needs may be given, so a ``model_fn`` need not ask for the mode.

    Raises:
        ConfigError: If a field that the mode needs is missing, or a metric has a reserved name.
        TypeError: If a field has an invalid type.
    """

    mode: ModeKeys
    _: KW_ONLY
    model: torch.nn.Module | None = None
    loss_fn: Callable[[Any, Any, Any], torch.Tensor] | None = None
    """``(model, features, labels) -> loss``, a tensor of one element. Labels are None for batches of features alone."""
    optimizer: Several[torch.optim.Optimizer] = None
    """One optimizer, or several that hold different parameters, in a list or by name. All make a step after each
    backward pass; the global step counts the steps of the first one."""
    eval_metrics: Mapping[str, Metric] = field(default_factory=dict)
    """Metrics by name; ``loss`` and ``global_step`` are always reported."""
    scheduler: Several[LRScheduler] = None
    """One scheduler, or several in a list or by name, each for one of the optimizers. Schedulers follow the global
    step: each is stepped once for each update of the model, up to ``max_steps``."""
    buffers: Mapping[str, str | BufferPolicy] = field(default_factory=dict)
    """The way to combine several workers' changes of each persistent buffer; as for ``strategy.prepare``."""
    predict_fn: Callable[[Any, Any], Any] | None = None
    """``(model, features) -> predictions``; None calls the model."""
    training_hooks: Sequence[TrainingHook] = ()
    """Run on the chief and all workers."""
    training_chief_hooks: Sequence[TrainingHook] = ()
    """Run on the chief only."""
    evaluation_hooks: Sequence[TrainingHook] = ()
    """Run around each evaluation."""
    prediction_hooks: Sequence[TrainingHook] = ()
    """Run around each prediction, with a loss of NaN."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "mode", _checked_mode(self.mode))
        _check_type("EstimatorSpec", "model", self.model, (torch.nn.Module, type(None)))
        for name, kind in _SEVERAL.items():
            _check_several(name, getattr(self, name), kind)
        for name in ("loss_fn", "predict_fn"):
            _check_callable("EstimatorSpec", name, getattr(self, name), optional=True)
        self._check_complete()
        self._check_schedulers()
        _check_metrics(self.eval_metrics)
        for name in ("training_hooks", "training_chief_hooks", "evaluation_hooks", "prediction_hooks"):
            _make_tuple(self, name, TrainingHook)

    @property
    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """All optimizers, in the order in which they were given."""
        return tuple(optimizer for _, optimizer in _labelled("optimizer", self.optimizer))

    @property
    def schedulers(self) -> tuple[LRScheduler, ...]:
        """All schedulers, in the order in which they were given."""
        return tuple(scheduler for _, scheduler in _labelled("scheduler", self.scheduler))

    def _check_complete(self) -> None:
        needs = _NEEDED[self.mode]
        missing = [name for name in needs if getattr(self, name) is None]
        if missing:
            raise ConfigError(
                f"EstimatorSpec: missing {' and '.join(missing)}: mode {self.mode.name} needs "
                f"{', '.join(needs)}; pass them in model_fn"
            )

    def _check_schedulers(self) -> None:
        for where, scheduler in _labelled("scheduler", self.scheduler):
            if isinstance(scheduler, ReduceLROnPlateau):
                raise ConfigError(
                    f"EstimatorSpec: {where}: ReduceLROnPlateau needs a metric at each step, which a "
                    "worker does not have; expected a scheduler whose step() takes no argument"
                )
            if all(scheduler.optimizer is not optimizer for optimizer in self.optimizers):
                raise ConfigError(f"EstimatorSpec: {where}: made for another optimizer than the spec's; pass both")


@dataclass(frozen=True)
class TrainSpec:
    """The specification of a training.

    Raises:
        ConfigError: If ``max_steps`` is not positive.
        TypeError: If a field has an invalid type.
    """

    input_fn: Callable[..., Any]
    """Returns the batches; may ask for input_context, mode, params, config by name."""
    _: KW_ONLY
    max_steps: int | None = None
    """The global step to stop at, of all workers together; None trains until the input ends."""
    hooks: Sequence[TrainingHook] = ()
    """Run on the chief and all workers."""
    saving_listeners: Sequence[CheckpointSaverListener] = ()
    """Run on the chief only."""

    def __post_init__(self) -> None:
        _check_callable("TrainSpec", "input_fn", self.input_fn)
        _check_count("TrainSpec", "max_steps", self.max_steps)
        _make_tuple(self, "hooks", TrainingHook)
        _make_tuple(self, "saving_listeners", CheckpointSaverListener)


@dataclass(frozen=True, init=False)
class EvalSpec:
    """The specification of an evaluation.

    Args:
        input_fn: Returns the batches; may ask for input_context, mode, params, config by name.
        steps: Number of batches of an evaluation; None evaluates until the input ends.
        name: Distinguishes evaluations on different data; their summaries are in ``eval_NAME``.
        hooks: Run around each evaluation.
        exporters: One exporter, several, or None.
        start_delay_secs: Seconds that the evaluator waits before its first evaluation.
        throttle_secs: Least number of seconds from the start of one evaluation to the start of the next.

    Raises:
        ConfigError: If a number is out of range, or two exporters have the same name.
        TypeError: If an argument has an invalid type.
    """

    input_fn: Callable[..., Any]
    steps: int | None
    name: str | None
    hooks: tuple[TrainingHook, ...]
    exporters: tuple[Exporter, ...]
    start_delay_secs: float
    throttle_secs: float

    def __init__(
        self,
        input_fn: Callable[..., Any],
        *,
        steps: int | None = 100,
        name: str | None = None,
        hooks: Iterable[TrainingHook] | None = None,
        exporters: Exporter | Iterable[Exporter] | None = None,
        start_delay_secs: float = 120,
        throttle_secs: float = 600,
    ) -> None:
        _check_callable("EvalSpec", "input_fn", input_fn)
        _check_count("EvalSpec", "steps", steps)
        _check_type("EvalSpec", "name", name, (str, type(None)))
        _check_seconds("EvalSpec", "start_delay_secs", start_delay_secs)
        _check_seconds("EvalSpec", "throttle_secs", throttle_secs)
        values = {
            "input_fn": input_fn,
            "steps": steps,
            "name": name,
            "hooks": as_tuple(hooks, TrainingHook, "EvalSpec: hooks"),
            "exporters": _checked_exporters(exporters),
            "start_delay_secs": start_delay_secs,
            "throttle_secs": throttle_secs,
        }
        for field_name, value in values.items():
            object.__setattr__(self, field_name, value)


_SEVERAL: dict[str, type] = {"optimizer": torch.optim.Optimizer, "scheduler": LRScheduler}

_NEEDED: dict[ModeKeys, tuple[str, ...]] = {
    ModeKeys.TRAIN: ("model", "loss_fn", "optimizer"),
    ModeKeys.EVAL: ("model", "loss_fn"),
    ModeKeys.PREDICT: ("model",),
}


def _checked_mode(mode: object) -> ModeKeys:
    """Return the mode; a text is accepted as well, since tf.estimator's modes are strings."""
    if not isinstance(mode, str):
        raise TypeError(f"EstimatorSpec: mode: expected ModeKeys, got {described(mode)}")
    if mode not in tuple(ModeKeys):
        known = ", ".join(repr(str(each)) for each in ModeKeys)
        raise ConfigError(f"EstimatorSpec: mode: expected one of {known}, got {mode!r}")
    return ModeKeys(mode)


def _check_type(where: str, name: str, value: object, kinds: type | tuple[type, ...]) -> None:
    if not isinstance(value, kinds):
        first = kinds[0] if isinstance(kinds, tuple) else kinds
        raise TypeError(f"{where}: {name}: expected {first.__qualname__}, got {described(value)}")


def _labelled(name: str, given: Several[T]) -> list[tuple[str, T]]:
    """Return the given objects (one, a sequence or a mapping), each with its name in messages."""
    if given is None:
        return []
    if isinstance(given, Mapping):
        return [(f"{name}[{key!r}]", item) for key, item in given.items()]
    if isinstance(given, Sequence):
        return [(f"{name}[{index}]", item) for index, item in enumerate(given)]
    return [(name, given)]


def _check_several(name: str, given: object, kind: type) -> None:
    found = _labelled(name, given)
    if given is not None and not found:
        raise ConfigError(f"EstimatorSpec: {name}: expected one or several, got an empty {type(given).__name__}")
    first: dict[int, str] = {}
    for where, item in found:
        _check_type("EstimatorSpec", where, item, kind)
        if first.setdefault(id(item), where) != where:
            raise ConfigError(f"EstimatorSpec: {where}: the same as {first[id(item)]}; give each once")


def _check_callable(where: str, name: str, value: object, optional: bool = False) -> None:
    if not callable(value) and not (optional and value is None):
        raise TypeError(f"{where}: {name}: expected a function, got {described(value)}")


def _check_count(where: str, name: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{where}: {name}: expected a whole number or None, got {described(value)}")
    if value <= 0:
        raise ConfigError(f"{where}: {name}: expected a positive number or None, got {value}")


def _check_seconds(where: str, name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{where}: {name}: expected a number of seconds, got {described(value)}")
    if not value >= 0:
        raise ConfigError(f"{where}: {name}: expected seconds of at least 0, got {value!r}")


def _check_metrics(metrics: object) -> None:
    if not isinstance(metrics, Mapping):
        raise TypeError(f"EstimatorSpec: eval_metrics: expected a dict of metrics, got {described(metrics)}")
    for name, metric in metrics.items():
        if not isinstance(name, str):
            raise TypeError(f"EstimatorSpec: eval_metrics: expected names that are strings, got {described(name)}")
        if name in RESERVED_METRICS:
            raise ConfigError(f"EstimatorSpec: eval_metrics: {name!r} is reported anyway; choose another name")
        if isinstance(metric, type) or not isinstance(metric, Metric):
            raise TypeError(
                f"EstimatorSpec: eval_metrics[{name!r}]: expected an object with update, compute and reset, "
                f"got {described(metric)}"
            )


def _make_tuple(spec: object, name: str, kind: type) -> None:
    items = as_tuple(getattr(spec, name), kind, f"{type(spec).__name__}: {name}")
    object.__setattr__(spec, name, items)


def _checked_exporters(exporters: Exporter | Iterable[Exporter] | None) -> tuple[Exporter, ...]:
    found = (exporters,) if isinstance(exporters, Exporter) else exporters
    checked = as_tuple(found, Exporter, "EvalSpec: exporters")  # type: ignore[type-abstract]  # isinstance only
    names: set[str] = set()
    for index, exporter in enumerate(checked):
        name = check_exporter_name(exporter.name, f"EvalSpec: exporters[{index}]: name")
        if name in names:
            raise ConfigError(f"EvalSpec: exporters: two have the name {name!r}; give each one its own")
        names.add(name)
    return checked
