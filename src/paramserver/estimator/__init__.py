"""The Estimator: a model function, its specs, hooks, checkpoints, and the loop that runs them in every role."""

from paramserver.checkpoint.model_dir import latest_checkpoint
from paramserver.estimator.basic_hooks import (
    FinalOpsHook,
    GlobalStepWaiterHook,
    SecondOrStepTimer,
    StopAfterNEvalsHook,
    StopAtStepHook,
)
from paramserver.estimator.early_stopping import (
    make_early_stopping_hook,
    stop_if_higher_hook,
    stop_if_lower_hook,
    stop_if_no_decrease_hook,
    stop_if_no_increase_hook,
)
from paramserver.estimator.estimator import Estimator
from paramserver.estimator.event_files import read_eval_metrics
from paramserver.estimator.exporters import BestExporter, Exporter, FinalExporter, LatestExporter, loss_smaller
from paramserver.estimator.hooks import RunContext, RunValues, TrainingHook, TrainingSession
from paramserver.estimator.in_memory_evaluator import InMemoryEvaluatorHook
from paramserver.estimator.profiler_hook import ProfilerHook
from paramserver.estimator.run_config import DistributeConfig, RunConfig
from paramserver.estimator.saving_hooks import CheckpointSaverHook, CheckpointSaverListener, SummarySaverHook
from paramserver.estimator.specs import EstimatorSpec, EvalSpec, ModeKeys, TrainSpec
from paramserver.estimator.train_and_evaluate import train_and_evaluate
from paramserver.estimator.warm_start import WarmStartSettings
from paramserver.estimator.watching_hooks import (
    LoggingHook,
    NanLossDuringTrainingError,
    NanLossHook,
    StepCounterHook,
)

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
