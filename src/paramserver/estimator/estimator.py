"""The Estimator: a model function and a configuration, and the operations on them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from paramserver.checkpoint.model_dir import checkpoint_step, latest_checkpoint
from paramserver.checkpoint.saved_values import SavedValues
from paramserver.checkpoint.storage import join
from paramserver.cluster import Role
from paramserver.distribute.bound.plan import load_values
from paramserver.distribute.checkpoints import say_left_out
from paramserver.distribute.core.input_context import InputContext
from paramserver.distribute.parameter_server import ParameterServerStrategy
from paramserver.errors import ConfigError
from paramserver.estimator import progress
from paramserver.estimator.arguments import check_model_fn, check_steps, training_strategy, with_model_dir
from paramserver.estimator.calling import Batch, batches_of, call_with_named, features_of, name_of
from paramserver.estimator.checkpoint import load_model
from paramserver.estimator.evaluate import evaluation, prediction
from paramserver.estimator.evaluate.inference import input_context, own_strategy, replicas_of
from paramserver.estimator.evaluate.summary import write_results
from paramserver.estimator.export.export import write_export
from paramserver.estimator.hooks.hook import TrainingHook, as_tuple
from paramserver.estimator.hooks.saving import CheckpointSaverListener
from paramserver.estimator.isolated_context import IsolatedContext
from paramserver.estimator.run_config import RunConfig
from paramserver.estimator.specs import EstimatorSpec, ModeKeys
from paramserver.estimator.train import training
from paramserver.estimator.train.warm_start import WarmStartSettings, as_settings, warm_start

logger = logging.getLogger(__name__)


class Estimator:
    """Trains and evaluates the model that a function builds, predicts with it and exports it. Not thread-safe.

    Args:
        model_fn: Builds the model for one mode and returns an `EstimatorSpec`; may ask for ``mode``, ``params`` and
            ``config`` by name.
        model_dir: The folder of checkpoints and summaries, a path or URL, if the config does not name it; a temporary
            folder if neither does.
        config: The configuration of the run.
        params: The parameters for the functions that ask for them.
        warm_start_from: The source of the model's first values while model_dir has no checkpoint: a path, or
            `WarmStartSettings`.

    Raises:
        ConfigError: If model_fn is not a function or needs another argument, the config is not a RunConfig, or two
            different model_dirs are given; and for a subclass that overrides a method that train_and_evaluate uses.
    """

    def __init__(
        self,
        model_fn: Callable[..., EstimatorSpec],
        model_dir: str | None = None,
        config: RunConfig | None = None,
        params: Mapping[str, Any] | None = None,
        warm_start_from: str | WarmStartSettings | None = None,
    ) -> None:
        check_model_fn(model_fn, params)
        self._warm_start_from = as_settings(warm_start_from)
        self._model_fn = model_fn
        self._config = with_model_dir(config, model_dir)
        self._params = copy.deepcopy(dict(params or {}))
        self._left_out: list[str] = []

    def __init_subclass__(cls) -> None:
        public = {name for name in vars(Estimator) if not name.startswith("_")}
        if overridden := sorted(public & vars(cls).keys()):
            raise ConfigError(
                f"{cls.__name__} overrides {', '.join(overridden)} of Estimator, which train_and_evaluate relies on; "
                "change what the model does in model_fn, and what happens around it in hooks"
            )
        super().__init_subclass__()

    @property
    def config(self) -> RunConfig:
        """The configuration; immutable."""
        return self._config

    @property
    def params(self) -> dict[str, Any]:
        """A copy of the parameters."""
        return copy.deepcopy(self._params)

    @property
    def model_dir(self) -> str:
        """The folder of checkpoints and summaries."""
        return str(self._config.model_dir)

    def latest_checkpoint(self) -> str | None:
        """Return the path of the newest checkpoint; None if there is none."""
        return latest_checkpoint(self.model_dir)

    def train(
        self,
        input_fn: Callable[..., object],
        hooks: Sequence[TrainingHook] | None = None,
        steps: int | None = None,
        max_steps: int | None = None,
        saving_listeners: Sequence[CheckpointSaverListener] | None = None,
    ) -> Estimator:
        """Train in this process, from the latest checkpoint if there is one. Blocks.

        Args:
            input_fn: Returns the batches.
            hooks: Called around every step.
            steps: Number of steps to make, beyond those of the checkpoint.
            max_steps: The global step to stop at, counting earlier runs; nothing is done if the checkpoint has reached
                it.
            saving_listeners: Called for every checkpoint.

        Raises:
            ConfigError: In a cluster, or if the arguments cannot work together.
            NanLossDuringTrainingError: If the loss is NaN.
            CheckpointError: If the checkpoint is truncated or belongs to another model, or model_dir cannot be written.
        """
        if self._config.cluster_spec or self._config.task_type is Role.EVALUATOR:
            raise ConfigError(
                f"Estimator.train on {self._config.task}: a task of a cluster trains with train_and_evaluate"
            )
        check_steps("train", steps=steps, max_steps=max_steps)
        self.train_on(
            training_strategy(self._config.train_distribute),
            input_fn,
            hooks=hooks or (),
            steps=steps,
            max_steps=max_steps,
            saving_listeners=saving_listeners or (),
        )
        return self

    def train_on(
        self,
        strategy: ParameterServerStrategy,
        input_fn: Callable[..., object],
        *,
        hooks: Sequence[TrainingHook] = (),
        steps: int | None = None,
        max_steps: int | None = None,
        saving_listeners: Sequence[CheckpointSaverListener] = (),
    ) -> None:
        """Train as the task of ``strategy``: for `train` in one process, and for train_and_evaluate in a cluster."""
        checkpoint = self.latest_checkpoint() if strategy.is_chief else None
        if max_steps is not None and checkpoint is not None and checkpoint_step(checkpoint) >= max_steps:
            logger.info("training is skipped: %s has reached step %d already", checkpoint, max_steps)
            strategy.leave_unstarted()
            return
        made = training.train(
            strategy,
            self._config,
            lambda: self._build(ModeKeys.TRAIN, is_first=strategy.is_chief and checkpoint is None),
            lambda: self._training_input(input_fn, strategy),
            hooks=as_tuple(hooks, TrainingHook, "train: hooks"),
            saving_listeners=as_tuple(saving_listeners, CheckpointSaverListener, "train: saving_listeners"),
            steps=steps,
            max_steps=max_steps,
        )
        if not made:
            logger.warning("training made no steps: the input of %s was empty, or others made them", strategy.task)

    def evaluate(
        self,
        input_fn: Callable[..., object],
        steps: int | None = None,
        hooks: Sequence[TrainingHook] | None = None,
        checkpoint_path: str | None = None,
        name: str | None = None,
    ) -> dict[str, Any]:
        """Evaluate a checkpoint; return its metrics, with ``loss`` and ``global_step``. Blocks; keeps random states.

        A metric that computes several numbers gives a nest of them: a dict, list or tuple as it is, a tensor as a NumPy
        array. Summaries, exporters and early stopping refer to each number by a name such as ``accuracy/0``.

        With ``RunConfig.eval_distribute`` each of its replicas takes a batch at a time; the results equal those of one
        replica.

        Args:
            input_fn: Returns the batches.
            steps: Number of batches; None evaluates until the input ends.
            hooks: Called around every batch; may end the evaluation early.
            checkpoint_path: The checkpoint; the latest by default. Without any, the model is evaluated as model_fn
                builds it, or as it is warm-started.
            name: Distinguishes evaluations on different data.

        Raises:
            ConfigError: If the input is empty, or ``steps`` is not positive.
            CheckpointError: If the checkpoint is truncated or belongs to another model.
        """
        check_steps("evaluate", steps=steps)
        own_hooks = as_tuple(hooks, TrainingHook, "evaluate: hooks")
        path = checkpoint_path or self.latest_checkpoint()
        fill = partial(self._filled, path, ModeKeys.EVAL)
        return self._evaluated(fill, input_fn, steps, own_hooks, self._session(path), name, path)

    def evaluate_values(
        self,
        values: Mapping[str, torch.Tensor],
        global_step: int,
        input_fn: Callable[..., object],
        steps: int | None = None,
        hooks: Sequence[TrainingHook] | None = None,
        name: str | None = None,
    ) -> dict[str, Any]:
        """Evaluate values that are in no checkpoint, and return their metrics; for `InMemoryEvaluatorHook`.

        Args:
            values: The values by name, as in checkpoints; RuntimeError if they do not fit the model.
            global_step: The global step of the values.
            input_fn: As for `evaluate`.
            steps: As for `evaluate`.
            hooks: As for `evaluate`.
            name: As for `evaluate`.
        """
        check_steps("evaluate_values", steps=steps)

        def fill() -> EstimatorSpec:
            spec = self._build(ModeKeys.EVAL)
            assert spec.model is not None  # noqa: S101  # EstimatorSpec has checked it
            load_values(spec.model, values)
            return spec

        session = replace(self._session(None), global_step=global_step)
        around = as_tuple(hooks, TrainingHook, "evaluate_values: hooks")
        return self._evaluated(fill, input_fn, steps, around, session, name, None)

    def predict(
        self,
        input_fn: Callable[..., object],
        predict_keys: str | Sequence[str] | None = None,
        hooks: Sequence[TrainingHook] | None = None,
        checkpoint_path: str | None = None,
        yield_single_examples: bool = True,
    ) -> Generator[Any, None, None]:
        """Yield the predictions for each example by the model of a checkpoint, on the CPU. Keeps random states.

        Arguments are checked at once; everything else happens when the first prediction is asked for, and then blocks
        for each batch. Predictions are the result of ``predict_fn``, or else of the model: a tensor or a nest of them.

        Args:
            input_fn: Returns batches of features, or of ``(features, labels)``, whose labels are ignored.
            predict_keys: The names of the wanted predictions in a dict of predictions; None selects all.
            hooks: Called around every batch, with a loss of NaN; may end the prediction early.
            checkpoint_path: The checkpoint; the latest by default. Without any, the model predicts as model_fn builds
                it, or as it is warm-started.
            yield_single_examples: Whether to yield each example's row of the predictions instead of whole batches.

        Raises:
            ConfigError: If a key names no prediction, or the predictions have no common number of rows.
            CheckpointError: If the checkpoint is truncated or belongs to another model.

        >>> import paramserver as ps
        >>> def model_fn(mode):
        ...     return ps.estimator.EstimatorSpec(mode, model=torch.nn.Flatten(0))
        >>> estimator = ps.estimator.Estimator(model_fn, model_dir="none")
        >>> [row.item() for row in estimator.predict(lambda: [torch.tensor([[1.0], [2.0]])])]
        [1.0, 2.0]
        """
        keys = prediction.checked_keys(predict_keys)
        own_hooks = as_tuple(hooks, TrainingHook, "predict: hooks")
        return self._predictions(input_fn, keys, own_hooks, checkpoint_path, yield_single_examples)

    def get_variable_names(self) -> list[str]:
        """Return the names of all values in the latest checkpoint, sorted; for tied weights, every name.

        Raises:
            ConfigError: If there is no checkpoint.
            CheckpointError: If the checkpoint is truncated.
        """
        return self._saved("get_variable_names").names

    def get_variable_value(self, name: str) -> torch.Tensor:
        """Return a value in the latest checkpoint; a partitioned variable is returned whole.

        Raises:
            ConfigError: If there is no checkpoint.
            CheckpointError: If the checkpoint is truncated, or holds no value of this name.
        """
        return self._saved("get_variable_value").read(name)

    def export_model(
        self,
        export_path: str,
        serving_input_fn: Callable[..., Any] | None = None,
        checkpoint_path: str | None = None,
        assets_extra: Mapping[str, str] | None = None,
    ) -> str:
        """Write the model of a checkpoint into a new folder; return its path. Blocks; keeps random states.

        See `paramserver.estimator.export.export` for the contents of the folder.

        Args:
            export_path: The folder, a path or URL, in which the new folder is made; the new one's name is the time in
                seconds.
            serving_input_fn: Returns one example batch of features for the model: a tensor, an array or a nest of them;
                may ask for ``mode``, ``params`` and ``config`` by name. The model, built for PREDICT, is traced with
                it, and runs without this library for batches of any size. None exports the weights only.
            checkpoint_path: The checkpoint; the latest by default. Without any, the model is exported as it is
                warm-started.
            assets_extra: Files to put beside the model: the source of each, a path or URL, by name.

        Raises:
            ConfigError: If there is neither a checkpoint nor ``warm_start_from``, the model cannot be traced, or an
                asset is missing. Then nothing is written.
            CheckpointError: If the checkpoint is truncated or belongs to another model.
        """
        path = checkpoint_path or self.latest_checkpoint()
        if path is None and self._warm_start_from is None:
            raise ConfigError(f"export: there is no checkpoint in {self.model_dir}; train first")
        with IsolatedContext(self._config.seed).entered():
            spec = self._filled(path, ModeKeys.PREDICT)
            serving_input = serving_input_fn and partial(self._call, serving_input_fn, ModeKeys.PREDICT, InputContext())
            step = 0 if path is None else checkpoint_step(path)
            return write_export(export_path, spec, step, serving_input, assets_extra)

    def __repr__(self) -> str:
        return f"<Estimator in {self.model_dir}, latest checkpoint {self.latest_checkpoint()}>"

    def _build(self, mode: ModeKeys, *, is_first: bool = False) -> EstimatorSpec:
        """Build the model for a mode; ``is_first`` if no checkpoint will replace its first values."""
        offered = {"mode": mode, "params": self.params, "config": self._config}
        spec = call_with_named(self._model_fn, offered)
        if not isinstance(spec, EstimatorSpec):
            raise ConfigError(f"model_fn must return an EstimatorSpec, got a {type(spec).__name__}")
        if is_first and self._warm_start_from is not None and spec.model is not None:
            warm_start(spec.model, self._warm_start_from)
        return spec

    def _filled(self, checkpoint: str | None, mode: ModeKeys) -> EstimatorSpec:
        """Build the model with the values of a checkpoint if there is one, else with its first values."""
        spec = self._build(mode, is_first=checkpoint is None)
        assert spec.model is not None  # noqa: S101  # EstimatorSpec has checked it
        if checkpoint is None:
            begins = "as it is built" if self._warm_start_from is None else "as it is warm-started"
            logger.info("there is no checkpoint in %s: %s the model %s", self.model_dir, _DOING[mode], begins)
        else:
            left_out = load_model(spec.model, checkpoint)
            if left_out != self._left_out:  # say it once, not for each checkpoint
                say_left_out(checkpoint, left_out)
            self._left_out = left_out
        return spec

    def _evaluated(
        self,
        fill: Callable[[], EstimatorSpec],
        input_fn: Callable[..., object],
        steps: int | None,
        hooks: tuple[TrainingHook, ...],
        session: evaluation.EvaluationSession,
        name: str | None,
        path: str | None,
    ) -> dict[str, Any]:
        """Evaluate the model that ``fill`` makes; write, log and return the results."""
        strategy = own_strategy(self._config.eval_distribute)
        with (
            IsolatedContext(self._config.seed, strategy).entered(),
            progress.shown(_doing("evaluating", path), steps) as line,
        ):
            spec = fill()
            batches = batches_of(self._call(input_fn, ModeKeys.EVAL, input_context(strategy)), name_of(input_fn))
            around = (*hooks, *spec.evaluation_hooks)
            watched, replicas = line.watch(batches), replicas_of(spec, strategy)
            results = evaluation.evaluate(spec, watched, steps, session, around, replicas)
        results["global_step"] = session.global_step
        write_results(join(self.model_dir, f"eval_{name}" if name else "eval"), results, path)
        return results

    def _predictions(
        self,
        input_fn: Callable[..., object],
        keys: tuple[str, ...] | None,
        hooks: tuple[TrainingHook, ...],
        checkpoint_path: str | None,
        yield_rows: bool,
    ) -> Generator[Any, None, None]:
        path, strategy = self._source(checkpoint_path)

        def batches() -> Generator[Any, None, None]:
            spec = self._filled(path, ModeKeys.PREDICT)
            features = features_of(self._call(input_fn, ModeKeys.PREDICT, input_context(strategy)), name_of(input_fn))
            watched = line.watch(features)
            around = (*hooks, *spec.prediction_hooks)
            yield from prediction.predict(spec, watched, self._session(path), around, replicas_of(spec, strategy))

        with progress.shown(_doing("predicting with", path)) as line:
            for made in IsolatedContext(self._config.seed, strategy).iterate(batches()):
                line.clear()  # the program may print the prediction, which must not run into the line
                chosen = prediction.selected(made, keys)
                yield from prediction.rows(chosen) if yield_rows else (chosen,)

    def _source(self, checkpoint_path: str | None) -> tuple[str | None, ParameterServerStrategy | None]:
        """Return the checkpoint to read, and the strategy to compute with."""
        return checkpoint_path or self.latest_checkpoint(), own_strategy(self._config.eval_distribute)

    def _session(self, checkpoint: str | None) -> evaluation.EvaluationSession:
        step = 0 if checkpoint is None else checkpoint_step(checkpoint)
        return evaluation.EvaluationSession(global_step=step, task=str(self._config.task), model_dir=self.model_dir)

    def _saved(self, call: str) -> SavedValues:
        path = self.latest_checkpoint()
        if path is None:
            raise ConfigError(f"{call}: there is no checkpoint in {self.model_dir}; train first")
        return SavedValues.at(path)

    def _training_input(self, input_fn: Callable[..., Any], strategy: ParameterServerStrategy) -> Iterator[Batch]:
        """Return the batches of the input_fn, one for each replica in turn."""
        data = strategy.distribute_datasets_from_function(lambda context: self._call(input_fn, ModeKeys.TRAIN, context))
        return batches_of(data, name_of(input_fn))

    def _call(self, input_fn: Callable[..., Any], mode: ModeKeys, context: InputContext) -> Any:
        offered = {"mode": mode, "params": self.params, "config": self._config, "input_context": context}
        return call_with_named(input_fn, offered)


_DOING = {ModeKeys.EVAL: "evaluating", ModeKeys.PREDICT: "predicting with"}


def _doing(verb: str, checkpoint: str | None) -> str:
    return f"{verb} {Path(checkpoint).name if checkpoint else 'a model without a checkpoint'}"
