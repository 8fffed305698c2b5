"""The Estimator: a model function, its specs, hooks, checkpoints, and the loop that runs them in every role."""

from paramserver.estimator.basic_hooks import (
    CheckpointSaverHook,
    CheckpointSaverListener,
    LoggingHook,
    NanLossDuringTrainingError,
    NanLossHook,
    SecondOrStepTimer,
    StepCounterHook,
    StopAtStepHook,
    SummarySaverHook,
)
from paramserver.estimator.checkpoint_state import latest_checkpoint
from paramserver.estimator.estimator import Estimator
from paramserver.estimator.exporters import Exporter, FinalExporter
from paramserver.estimator.hooks import RunContext, RunValues, TrainingHook, TrainingSession
from paramserver.estimator.run_config import DistributeConfig, RunConfig
from paramserver.estimator.specs import EstimatorSpec, EvalSpec, ModeKeys, TrainSpec
from paramserver.estimator.train_and_evaluate import train_and_evaluate

__all__ = [
    "CheckpointSaverHook",
    "CheckpointSaverListener",
    "DistributeConfig",
    "Estimator",
    "EstimatorSpec",
    "EvalSpec",
    "Exporter",
    "FinalExporter",
    "LoggingHook",
    "ModeKeys",
    "NanLossDuringTrainingError",
    "NanLossHook",
    "RunConfig",
    "RunContext",
    "RunValues",
    "SecondOrStepTimer",
    "StepCounterHook",
    "StopAtStepHook",
    "SummarySaverHook",
    "TrainSpec",
    "TrainingHook",
    "TrainingSession",
    "latest_checkpoint",
    "train_and_evaluate",
]
