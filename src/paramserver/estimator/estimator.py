"""The Estimator: a model function and a configuration, and what can be done with them."""

from __future__ import annotations

import copy
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from paramserver.cluster import Role, SimpleClusterResolver
from paramserver.cluster.spec import ClusterSpec
from paramserver.distribute.input.context import InputContext
from paramserver.distribute.parameter_server import ParameterServerStrategy
from paramserver.errors import ConfigError
from paramserver.estimator import evaluation, training
from paramserver.estimator.basic_hooks import CheckpointSaverListener
from paramserver.estimator.calling import Batch, accepts, batches_of, call_with_named, check_arguments
from paramserver.estimator.checkpoint import load_model, read_values
from paramserver.estimator.checkpoint_state import checkpoint_step, latest_checkpoint
from paramserver.estimator.hooks import TrainingHook, as_tuple
from paramserver.estimator.run_config import RunConfig
from paramserver.estimator.specs import EstimatorSpec, ModeKeys
from paramserver.estimator.summary import SummaryWriter

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "model.safetensors"
MODEL_FN_ARGUMENTS = ("mode", "params", "config")


class Estimator:
    """Trains, evaluates and exports the model that a function builds. Not thread-safe.

    Args:
        model_fn: Builds the model for one mode and returns an `EstimatorSpec`; may ask for ``mode``, ``params`` and
            ``config`` by name.
        model_dir: Where checkpoints and summaries go, if the config does not say; else a temporary folder.
        config: Of the run.
        params: Passed to the functions that ask for them.

    Raises:
        ConfigError: If model_fn is none or asks for something else, the config is none, or model_dir is given twice
            and differs.
    """

    def __init__(
        self,
        model_fn: Callable[..., EstimatorSpec],
        model_dir: str | None = None,
        config: RunConfig | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        if not callable(model_fn):
            raise ConfigError(f"Estimator: model_fn: expected a function returning an EstimatorSpec, got {model_fn!r}")
        if config is not None and not isinstance(config, RunConfig):
            raise ConfigError(f"Estimator: config: expected a RunConfig, got a {type(config).__name__}")
        _check_model_fn(model_fn, params)
        self._model_fn = model_fn
        self._config = _with_model_dir(config or RunConfig(), model_dir)
        self._params = copy.deepcopy(dict(params or {}))

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
        """Where checkpoints and summaries lie."""
        return str(self._config.model_dir)

    def latest_checkpoint(self) -> str | None:
        """The path of the newest checkpoint, None if there is none."""
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
            steps: How many steps to make, beyond those of the checkpoint.
            max_steps: The global step to stop at; nothing is done if the checkpoint has it already.
            saving_listeners: Told of every checkpoint.

        Raises:
            ConfigError: In a cluster, or if the arguments cannot work together.
            NanLossDuringTrainingError: If the loss is NaN.
            CheckpointError: If the checkpoint is cut short or belongs to another model, or model_dir cannot be written.
        """
        if self._config.cluster_spec or self._config.task_type is Role.EVALUATOR:
            raise ConfigError(
                f"Estimator.train on {self._config.task}: a task of a cluster trains with train_and_evaluate"
            )
        _check_steps("train", steps=steps, max_steps=max_steps)
        strategy = self._config.train_distribute or ParameterServerStrategy(SimpleClusterResolver(ClusterSpec({})))
        self.train_on(
            _parameter_server(strategy), input_fn, hooks=hooks or (), steps=steps, max_steps=max_steps,
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
        """Train as the task of ``strategy``: what `train` does in one process and train_and_evaluate in a cluster."""
        checkpoint = self.latest_checkpoint() if strategy.is_chief else None
        if max_steps is not None and checkpoint is not None and checkpoint_step(checkpoint) >= max_steps:
            logger.info("training is skipped: %s has reached step %d already", checkpoint, max_steps)
            strategy.leave_unstarted()
            return
        made = training.train(
            strategy,
            self._config,
            lambda: self._build(ModeKeys.TRAIN),
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
    ) -> dict[str, float]:
        """The metrics of a checkpoint, with ``loss`` and ``global_step``. Blocks; changes no random state.

        Args:
            input_fn: Returns the batches.
            steps: How many batches; None evaluates until the input ends.
            hooks: Called around every batch; may end the evaluation early.
            checkpoint_path: Which; the latest by default. Without any, the model is evaluated as model_fn makes it.
            name: Tells evaluations on different data apart.

        Raises:
            ConfigError: If the input is empty, or ``steps`` is not positive.
            CheckpointError: If the checkpoint is cut short or belongs to another model.
        """
        _check_steps("evaluate", steps=steps)
        own_hooks = as_tuple(hooks, TrainingHook, "evaluate: hooks")
        path = checkpoint_path or self.latest_checkpoint()
        session = evaluation.EvaluationSession(
            global_step=0 if path is None else checkpoint_step(path),
            task=str(self._config.task),
            model_dir=self.model_dir,
        )
        with torch.random.fork_rng(devices=[]):
            if self._config.seed is not None:
                torch.manual_seed(self._config.seed)
            spec = self._filled(path)
            batches = batches_of(self._call(input_fn, ModeKeys.EVAL, InputContext()), _name(input_fn))
            results = evaluation.evaluate(spec, batches, steps, session, (*own_hooks, *spec.evaluation_hooks))
        results["global_step"] = session.global_step
        self._write_summary(name, results)
        shown = ", ".join(f"{key} = {value:.6g}" for key, value in results.items() if key != "global_step")
        logger.info("evaluated step %d: %s", session.global_step, shown)
        return results

    def export_model(self, export_path: str, checkpoint_path: str | None = None) -> str:
        """Write the weights of a checkpoint as one plain safetensors file into a new folder; the folder's path.

        Args:
            export_path: Where the folder, named by the time in seconds, is made.
            checkpoint_path: Which; the latest by default.

        Raises:
            ConfigError: If there is no checkpoint.
            CheckpointError: If it is cut short.
        """
        path = checkpoint_path or self.latest_checkpoint()
        if path is None:
            raise ConfigError(f"export: there is no checkpoint in {self.model_dir}; train first")
        values = read_values(path)
        Path(export_path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=export_path) as aside:
            folder = Path(aside, "model")
            folder.mkdir()
            save_file(values, folder / WEIGHTS_FILE, metadata={"format": "pt"})
            target = _free_timestamp(Path(export_path))
            folder.rename(target)
        return str(target)

    def __repr__(self) -> str:
        return f"<Estimator in {self.model_dir}, latest checkpoint {self.latest_checkpoint()}>"

    def _build(self, mode: ModeKeys) -> EstimatorSpec:
        offered = {"mode": mode, "params": self.params, "config": self._config}
        spec = call_with_named(self._model_fn, offered)
        if not isinstance(spec, EstimatorSpec):
            raise ConfigError(f"model_fn must return an EstimatorSpec, got a {type(spec).__name__}")
        return spec

    def _filled(self, checkpoint: str | None) -> EstimatorSpec:
        """The model for an evaluation, with the values of a checkpoint if there is one."""
        spec = self._build(ModeKeys.EVAL)
        assert spec.model is not None  # noqa: S101  # EstimatorSpec has checked it
        if checkpoint is None:
            logger.info("there is no checkpoint in %s: evaluating the model as it is built", self.model_dir)
        else:
            load_model(spec.model, checkpoint)
        return spec

    def _training_input(self, input_fn: Callable[..., Any], strategy: ParameterServerStrategy) -> Iterator[Batch]:
        """What the input_fn gives, a batch for each replica in turn."""
        data = strategy.distribute_datasets_from_function(
            lambda context: self._call(input_fn, ModeKeys.TRAIN, context)
        )
        return batches_of(data, _name(input_fn))

    def _call(self, input_fn: Callable[..., Any], mode: ModeKeys, context: InputContext) -> Any:
        offered = {"mode": mode, "params": self.params, "config": self._config, "input_context": context}
        return call_with_named(input_fn, offered)

    def _write_summary(self, name: str | None, results: Mapping[str, float]) -> None:
        writer = SummaryWriter(str(Path(self.model_dir, f"eval_{name}" if name else "eval")))
        for key, value in results.items():
            if key != "global_step":
                writer.scalar(key, value, int(results["global_step"]))
        writer.close()


def _check_model_fn(model_fn: Callable[..., EstimatorSpec], params: Mapping[str, Any] | None) -> None:
    check_arguments(model_fn, MODEL_FN_ARGUMENTS)
    takes_params = accepts(model_fn, "params")
    if params is not None and not takes_params:
        raise ConfigError("Estimator: params are given, but model_fn has no argument 'params' to take them")
    if params is None and takes_params:
        logger.warning("model_fn asks for params, and the Estimator got none: it is called with an empty dict")


def _with_model_dir(config: RunConfig, model_dir: str | None) -> RunConfig:
    if model_dir is not None and config.model_dir not in (None, str(model_dir)):
        raise ConfigError(f"Estimator: model_dir is {model_dir!r}, but the config says {config.model_dir!r}; set one")
    chosen = model_dir or config.model_dir
    if chosen is None:
        chosen = tempfile.mkdtemp(prefix="paramserver-")
        logger.warning("no model_dir is set: this run writes to the temporary folder %s", chosen)
    return config.replace(model_dir=str(chosen))


def _name(input_fn: Callable[..., object]) -> str:
    return getattr(input_fn, "__name__", "input_fn")


def _parameter_server(strategy: object) -> ParameterServerStrategy:
    if not isinstance(strategy, ParameterServerStrategy):
        raise ConfigError(f"train_distribute: expected a ParameterServerStrategy, got a {type(strategy).__name__}")
    return strategy


def _check_steps(where: str, **counts: int | None) -> None:
    given = {name: value for name, value in counts.items() if value is not None}
    if len(given) > 1:
        raise ConfigError(f"{where}: {' and '.join(given)} cannot both be set")
    for name, value in given.items():
        if value <= 0:
            raise ConfigError(f"{where}: {name}: expected a positive number, got {value}")


def _free_timestamp(folder: Path) -> Path:
    stamp = int(time.time())
    while (folder / str(stamp)).exists():
        stamp += 1
    return folder / str(stamp)
