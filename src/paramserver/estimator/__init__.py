"""The Estimator: a model function, its specs, hooks, checkpoints, and the loop that runs them in every role."""

from paramserver.checkpoint.model_dir import latest_checkpoint
from paramserver.estimator.estimator import Estimator
from paramserver.estimator.evaluate.in_memory import InMemoryEvaluatorHook
from paramserver.estimator.event_files import read_eval_metrics
from paramserver.estimator.export.exporters import BestExporter, Exporter, FinalExporter, LatestExporter, loss_smaller
from paramserver.estimator.hooks.basic import (
    FinalOpsHook,
    GlobalStepWaiterHook,
    SecondOrStepTimer,
    StopAfterNEvalsHook,
    StopAtStepHook,
)
from paramserver.estimator.hooks.early_stopping import (
    make_early_stopping_hook,
    stop_if_higher_hook,
    stop_if_lower_hook,
    stop_if_no_decrease_hook,
    stop_if_no_increase_hook,
)
from paramserver.estimator.hooks.hook import RunContext, RunValues, TrainingHook, TrainingSession
from paramserver.estimator.hooks.profiler import ProfilerHook
from paramserver.estimator.hooks.saving import CheckpointSaverHook, CheckpointSaverListener, SummarySaverHook
from paramserver.estimator.hooks.watching import LoggingHook, NanLossDuringTrainingError, NanLossHook, StepCounterHook
from paramserver.estimator.run_config import DistributeConfig, RunConfig
from paramserver.estimator.specs import EstimatorSpec, EvalSpec, ModeKeys, TrainSpec
from paramserver.estimator.train.warm_start import WarmStartSettings
from paramserver.estimator.train_and_evaluate import train_and_evaluate

__all__ = [
    "BestExporter",
    "CheckpointSaverHook",
    "CheckpointSaverListener",
    "DistributeConfig",
    "Estimator",
    "EstimatorSpec",
    "EvalSpec",
    "Exporter",
    "FinalExporter",
    "FinalOpsHook",
    "GlobalStepWaiterHook",
    "InMemoryEvaluatorHook",
    "LatestExporter",
    "LoggingHook",
    "ModeKeys",
    "NanLossDuringTrainingError",
    "NanLossHook",
    "ProfilerHook",
    "RunConfig",
    "RunContext",
    "RunValues",
    "SecondOrStepTimer",
    "StepCounterHook",
    "StopAfterNEvalsHook",
    "StopAtStepHook",
    "SummarySaverHook",
    "TrainSpec",
    "TrainingHook",
    "TrainingSession",
    "WarmStartSettings",
    "latest_checkpoint",
    "loss_smaller",
    "make_early_stopping_hook",
    "read_eval_metrics",
    "stop_if_higher_hook",
    "stop_if_lower_hook",
    "stop_if_no_decrease_hook",
    "stop_if_no_increase_hook",
    "train_and_evaluate",
]
