"""Checks of an Estimator's arguments before it begins."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from typing import Any

from paramserver.cluster import SimpleClusterResolver
from paramserver.cluster.spec import ClusterSpec
from paramserver.distribute.parameter_server import ParameterServerStrategy
from paramserver.errors import ConfigError
from paramserver.estimator.calling import accepts, check_arguments
from paramserver.estimator.hooks.basic import is_positive
from paramserver.estimator.run_config import RunConfig

logger = logging.getLogger(__name__)

MODEL_FN_ARGUMENTS = ("mode", "params", "config")


def check_model_fn(model_fn: object, params: Mapping[str, Any] | None) -> None:
    """Check that a model_fn can be called with the arguments it will get.

    Raises:
        ConfigError: If it is not a function, needs another argument, or has no argument for params that are given.
    """
    if not callable(model_fn):
        raise ConfigError(f"Estimator: model_fn: expected a function returning an EstimatorSpec, got {model_fn!r}")
    check_arguments(model_fn, MODEL_FN_ARGUMENTS)
    takes_params = accepts(model_fn, "params")
    if params is not None and not takes_params:
        raise ConfigError("Estimator: params are given, but model_fn has no argument 'params' to take them")
    if params is None and takes_params:
        logger.warning("model_fn asks for params, and the Estimator got none: it is called with an empty dict")


def with_model_dir(config: RunConfig | None, model_dir: str | None) -> RunConfig:
    """Return the configuration with the given model_dir, else with its own, else with a temporary folder.

    Raises:
        ConfigError: If ``config`` is not a RunConfig, or two different folders are given.
    """
    if config is not None and not isinstance(config, RunConfig):
        raise ConfigError(f"Estimator: config: expected a RunConfig, got a {type(config).__name__}")
    config = config or RunConfig()
    if model_dir is not None and config.model_dir not in (None, str(model_dir)):
        raise ConfigError(f"Estimator: model_dir is {model_dir!r}, but the config says {config.model_dir!r}; set one")
    chosen = model_dir or config.model_dir
    if chosen is None:
        chosen = tempfile.mkdtemp(prefix="paramserver-")
        logger.warning("no model_dir is set: this run writes to the temporary folder %s", chosen)
    return config.replace(model_dir=str(chosen))


def check_steps(where: str, **counts: int | None) -> None:
    """Check that at most one count is given, and that it is positive.

    Raises:
        ConfigError: If not; the message names ``where`` and the count.
    """
    given = {name: value for name, value in counts.items() if value is not None}
    if len(given) > 1:
        raise ConfigError(f"{where}: {' and '.join(given)} cannot both be set")
    for name, value in given.items():
        if not is_positive(value):
            raise ConfigError(f"{where}: {name}: expected a positive number, got {value!r}")


def training_strategy(train_distribute: object) -> ParameterServerStrategy:
    """Return the strategy for training in this process: the given one, or one replica on the CPU.

    Raises:
        ConfigError: If ``train_distribute`` is neither None nor a ParameterServerStrategy.
    """
    if train_distribute is None:
        return ParameterServerStrategy(SimpleClusterResolver(ClusterSpec({})))
    if not isinstance(train_distribute, ParameterServerStrategy):
        raise ConfigError(
            f"train_distribute: expected a ParameterServerStrategy, got a {type(train_distribute).__name__}"
        )
    return train_distribute
