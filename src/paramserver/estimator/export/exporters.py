"""Exporters: the treatment of evaluated checkpoints.

Each exporter of an EvalSpec has a folder of its own, ``model_dir/export/NAME``; see `folder` for the rules of the
models in it.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from paramserver.errors import ConfigError
from paramserver.estimator.calling import accepts, check_arguments
from paramserver.estimator.evaluate.results import EvalResult, Watched, rebuilt, scalars
from paramserver.estimator.event_files import read_metrics
from paramserver.estimator.export.folder import delete_old_exports, has_exports

logger = logging.getLogger(__name__)

_COMPARED = ("best_eval_result", "current_eval_result")


class ExportingEstimator(Protocol):
    """The part of an estimator that an exporter uses."""

    @property
    def model_dir(self) -> str:
        """The folder of checkpoints and summaries."""

    def export_model(
        self,
        export_path: str,
        serving_input_fn: Callable[..., Any] | None,
        checkpoint_path: str,
        assets_extra: Mapping[str, str] | None,
    ) -> str:
        """Write the model of a checkpoint into a new folder in ``export_path``, and return the new folder's path."""


class Exporter(ABC):
    """Exports evaluated models. Called after each evaluation, by the evaluator or by a local training."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of this exporter's folder in ``model_dir/export``; unique among those of one EvalSpec."""

    @abstractmethod
    def export(
        self,
        estimator: ExportingEstimator,
        export_path: str,
        checkpoint_path: str,
        eval_result: EvalResult,
        is_the_final_export: bool,
    ) -> str | None:
        """Export the evaluated model, or choose not to. Blocks; called on one thread.

        Args:
            estimator: The estimator, which writes the model.
            export_path: ``model_dir/export/NAME``; need not exist.
            checkpoint_path: The checkpoint that was evaluated.
            eval_result: Its metrics, including ``loss`` and ``global_step``.
            is_the_final_export: Whether training is over and no newer checkpoint will come.

        Returns:
            The path of the exported model; None if nothing was exported.

        Raises:
            CheckpointError: If the checkpoint cannot be read.
            ConfigError: If the model cannot be exported.
            OSError: If ``export_path`` cannot be written.
        """


class _ModelExporter(Exporter):
    """An exporter that writes the model itself.

    Args:
        name: The name of the folder in ``model_dir/export``.
        serving_input_fn: Returns one example batch of features; see `Estimator.export_model`. None exports the weights
            only.
        assets_extra: Files to put beside the model: the source path of each by name.

    Raises:
        ConfigError: If the name is empty, not a string, or a path.
        TypeError: If serving_input_fn is not a function.
    """

    def __init__(
        self,
        name: str,
        serving_input_fn: Callable[..., Any] | None = None,
        *,
        assets_extra: Mapping[str, str] | None = None,
    ) -> None:
        kind = type(self).__name__
        self._name = check_exporter_name(name, f"{kind}: name")
        if serving_input_fn is not None and not callable(serving_input_fn):
            raise TypeError(f"{kind}: serving_input_fn: expected a function or None, got {serving_input_fn!r}")
        self._serving_input_fn = serving_input_fn
        self._assets_extra = None if assets_extra is None else dict(assets_extra)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._name!r})"

    @property
    def name(self) -> str:
        """The name of the folder in ``model_dir/export``."""
        return self._name

    def _write(self, estimator: ExportingEstimator, export_path: str, checkpoint_path: str) -> str:
        return estimator.export_model(
            export_path,
            serving_input_fn=self._serving_input_fn,
            checkpoint_path=checkpoint_path,
            assets_extra=self._assets_extra,
        )


class FinalExporter(_ModelExporter):
    """Exports once, at the end of the training.

    Args:
        name: The name of the folder in ``model_dir/export``.
        serving_input_fn: Returns one example batch of features; see `Estimator.export_model`. None exports the weights
            only.
        assets_extra: Files to put beside the model: the source path of each by name.

    Raises:
        ConfigError: If the name is empty, not a string, or a path.
        TypeError: If serving_input_fn is not a function.
    """

    def export(
        self,
        estimator: ExportingEstimator,
        export_path: str,
        checkpoint_path: str,
        eval_result: EvalResult,
        is_the_final_export: bool,
    ) -> str | None:
        """Export the final model only; see `Exporter.export`."""
        if not is_the_final_export:
            return None
        return self._write(estimator, export_path, checkpoint_path)


class LatestExporter(_ModelExporter):
    """Exports after every evaluation, and keeps the newest exports.

    Args:
        name: The name of the folder in ``model_dir/export``.
        serving_input_fn: Returns one example batch of features; see `Estimator.export_model`. None exports the weights
            only.
        assets_extra: Files to put beside the model: the source path of each by name.
        exports_to_keep: Number of exports to keep; older ones are deleted after each export. None keeps all.

    Raises:
        ConfigError: If the name is empty, not a string, or a path, or ``exports_to_keep`` is not positive.
        TypeError: If serving_input_fn is not a function.
    """

    def __init__(
        self,
        name: str,
        serving_input_fn: Callable[..., Any] | None = None,
        *,
        assets_extra: Mapping[str, str] | None = None,
        exports_to_keep: int | None = 5,
    ) -> None:
        super().__init__(name, serving_input_fn, assets_extra=assets_extra)
        self._exports_to_keep = _checked_count(exports_to_keep, "LatestExporter")

    def export(
        self,
        estimator: ExportingEstimator,
        export_path: str,
        checkpoint_path: str,
        eval_result: EvalResult,
        is_the_final_export: bool,
    ) -> str | None:
        """Export the model, and delete old exports; see `Exporter.export`."""
        exported = self._write(estimator, export_path, checkpoint_path)
        delete_old_exports(export_path, self._exports_to_keep)
        return exported


def loss_smaller(best_eval_result: EvalResult, current_eval_result: EvalResult) -> bool:
    """Return whether the present evaluation has a smaller loss than the best one; an equal loss is not better.

    Raises:
        ConfigError: If one of the results has no ``loss``.

    >>> loss_smaller({"loss": 0.5}, {"loss": 0.25}), loss_smaller({"loss": 0.5}, {"loss": 0.5})
    (True, False)
    """
    for name, result in zip(_COMPARED, (best_eval_result, current_eval_result), strict=True):
        if not result or "loss" not in result:
            has = ", ".join(sorted(result or ())) or "nothing"
            raise ConfigError(f"loss_smaller: {name} has no 'loss', only {has}; give the exporter another compare_fn")
    return bool(current_eval_result["loss"] < best_eval_result["loss"])


class BestExporter(_ModelExporter):
    """Exports when an evaluation is better than all before it, and keeps the newest exports.

    The best evaluation of earlier processes is read from the event files, so that after a restart, too, only better
    evaluations are exported. If the folder holds no export yet, the first evaluation is exported, whatever earlier runs
    have reached. An evaluation is never the best if a number that ``compare_fn`` reads of it is NaN.

    Args:
        name: The name of the folder in ``model_dir/export``.
        serving_input_fn: Returns one example batch of features; see `Estimator.export_model`. None exports the weights
            only.
        assets_extra: Files to put beside the model: the source path of each by name.
        event_file_pattern: The event files of earlier evaluations, below model_dir; for an EvalSpec with a name they
            are ``"eval_NAME/*.tfevents.*"``. None reads no files.
        compare_fn: ``(best_eval_result, current_eval_result) -> bool``, called with these names: returns whether the
            present evaluation is better.
        exports_to_keep: Number of exports to keep; older ones are deleted after each export. None keeps all.

    Raises:
        ConfigError: If the name is empty, not a string, or a path, ``exports_to_keep`` is not positive, or compare_fn
            cannot be called with its two arguments.
        TypeError: If serving_input_fn is not a function.
    """

    def __init__(
        self,
        name: str = "best_exporter",
        serving_input_fn: Callable[..., Any] | None = None,
        *,
        assets_extra: Mapping[str, str] | None = None,
        event_file_pattern: str | None = "eval/*.tfevents.*",
        compare_fn: Callable[..., bool] = loss_smaller,
        exports_to_keep: int | None = 5,
    ) -> None:
        super().__init__(name, serving_input_fn, assets_extra=assets_extra)
        self._exports_to_keep = _checked_count(exports_to_keep, "BestExporter")
        self._compare_fn = _checked_compare_fn(compare_fn)
        self._pattern = event_file_pattern
        self._model_dir: str | None = None
        self._best: EvalResult | None = None

    def export(
        self,
        estimator: ExportingEstimator,
        export_path: str,
        checkpoint_path: str,
        eval_result: EvalResult,
        is_the_final_export: bool,
    ) -> str | None:
        """Export the best evaluation, or the first one without an export; delete old ones. See `Exporter.export`."""
        if not isinstance(eval_result, Mapping):
            raise ConfigError(f"{self!r}: eval_result: expected the metrics of an evaluation, got {eval_result!r}")
        is_first = self._model_dir != estimator.model_dir
        if is_first:
            self._best = self._best_before(estimator.model_dir, eval_result)
        lacks_any = is_first and not has_exports(export_path)
        if is_first and not lacks_any and self._best is None:
            self._warn_of_unknown(export_path)
        is_best = self._is_better(self._best, eval_result)
        exported = None
        if is_best or (lacks_any and not self._reads_nan(eval_result)):
            exported = self._write(estimator, export_path, checkpoint_path)
            delete_old_exports(export_path, self._exports_to_keep)
        self._model_dir = estimator.model_dir
        if is_best:
            self._best = dict(eval_result)
        return exported

    def _best_before(self, model_dir: str, like: EvalResult) -> EvalResult | None:
        """Return the best of the earlier evaluations in the event files, which also hold the present one.

        An evaluation that lacks a metric is of another kind, and is ignored.
        """
        best: EvalResult | None = None
        earlier = read_metrics(model_dir, self._pattern) if self._pattern else {}
        for step, metrics in earlier.items():
            result = rebuilt(like, {**metrics, "global_step": step})
            if result is not None and not _is_same(like, result) and self._is_better(best, result):
                best = result
        return best

    def _is_better(self, best: EvalResult | None, current: EvalResult) -> bool:
        if best is None:
            return not self._reads_nan(current)
        was, now = Watched(best), Watched(current)
        is_better = bool(self._compare_fn(best_eval_result=was, current_eval_result=now))
        return is_better and not now.has_given_nan

    def _reads_nan(self, result: EvalResult) -> bool:
        """Return whether a number that ``compare_fn`` reads is NaN."""
        watched = Watched(result)
        self._compare_fn(best_eval_result=watched, current_eval_result=watched)
        return watched.has_given_nan

    def _warn_of_unknown(self, export_path: str) -> None:
        logger.warning(
            "%r: there are exports in %s, and no earlier evaluation in %r to compare with, so this one counts as the "
            "best; event_file_pattern must match the event files of this EvalSpec",
            self,
            export_path,
            self._pattern,
        )


def _is_same(result: EvalResult, written: EvalResult) -> bool:
    """Return whether the written numbers are those of a result, stored as float32."""
    known = scalars(written)
    with np.errstate(over="ignore"):  # numbers beyond the range of float32 were written as infinity
        return "global_step" in result and all(
            float(np.float32(value)) == float(np.float32(known[name])) for name, value in scalars(result).items()
        )


def check_exporter_name(name: object, where: str) -> str:
    """Return ``name`` if it can name a folder. Raises ConfigError if it is empty, not a string, or a path."""
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{where}: expected a string that is not empty, got {name!r}")
    if "/" in name or "\\" in name or name in (".", ".."):
        raise ConfigError(f"{where}: expected the name of a folder, not a path, got {name!r}")
    return name


def _checked_count(exports_to_keep: int | None, kind: str) -> int | None:
    if exports_to_keep is not None and exports_to_keep <= 0:
        raise ConfigError(
            f"{kind}: exports_to_keep: expected a positive number, or None to keep all, got {exports_to_keep}"
        )
    return exports_to_keep


def _checked_compare_fn(compare_fn: Callable[..., bool]) -> Callable[..., bool]:
    if not callable(compare_fn):
        raise ConfigError(f"BestExporter: compare_fn: expected a function, got {compare_fn!r}")
    check_arguments(compare_fn, _COMPARED)
    for name in _COMPARED:
        if not accepts(compare_fn, name):
            raise ConfigError(
                f"BestExporter: compare_fn must take arguments named {' and '.join(_COMPARED)}; it has no {name!r}"
            )
    return compare_fn
