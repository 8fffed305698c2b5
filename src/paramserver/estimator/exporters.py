"""Exporters: what is made of an evaluated checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Protocol

from paramserver.errors import ConfigError


class ExportingEstimator(Protocol):
    """What an exporter asks of an estimator."""

    def export_model(self, export_path: str, checkpoint_path: str) -> str:
        """Write the model of a checkpoint into ``export_path`` and return where it lies."""


class Exporter(ABC):
    """Called by the evaluator after each evaluation, and by a local training after each of its own."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of this exporter's folder in ``model_dir/export``; differs among those of one EvalSpec."""

    @abstractmethod
    def export(
        self,
        estimator: ExportingEstimator,
        export_path: str,
        checkpoint_path: str,
        eval_result: Mapping[str, float],
        is_the_final_export: bool,
    ) -> str | None:
        """Export the evaluated model, or decide not to. Blocks; called on one thread.

        Args:
            estimator: Writes the model.
            export_path: ``model_dir/export/NAME``; need not exist.
            checkpoint_path: The checkpoint that was evaluated.
            eval_result: Its metrics, ``loss`` and ``global_step`` among them.
            is_the_final_export: Whether training is over and no newer checkpoint will come.

        Returns:
            Where the exported model lies, None where nothing was exported.

        Raises:
            CheckpointError: If the checkpoint cannot be read.
            OSError: If ``export_path`` cannot be written.
        """


class FinalExporter(Exporter):
    """Exports once, at the end of the training.

    Args:
        name: The name of the folder in ``model_dir/export``.

    Raises:
        ConfigError: If the name is empty or no string.
    """

    def __init__(self, name: str) -> None:
        self._name = check_exporter_name(name, "FinalExporter: name")

    def __repr__(self) -> str:
        return f"FinalExporter({self._name!r})"

    @property
    def name(self) -> str:
        """The name of the folder in ``model_dir/export``."""
        return self._name

    def export(
        self,
        estimator: ExportingEstimator,
        export_path: str,
        checkpoint_path: str,
        eval_result: Mapping[str, float],
        is_the_final_export: bool,
    ) -> str | None:
        """Export the final model only; see `Exporter.export`."""
        if not is_the_final_export:
            return None
        return estimator.export_model(export_path, checkpoint_path)


def check_exporter_name(name: object, where: str) -> str:
    """``name`` if it can name a folder. Raises ConfigError where it is empty, no string, or a path."""
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{where}: expected a string that is not empty, got {name!r}")
    if "/" in name or "\\" in name or name in (".", ".."):
        raise ConfigError(f"{where}: expected the name of a folder, not a path, got {name!r}")
    return name
