"""The record of an evaluation: a line in the log, and summaries for TensorBoard, early stopping and exporters."""

from __future__ import annotations

import logging

from paramserver.estimator.evaluate.results import EvalResult, scalars, shown, unwritten
from paramserver.estimator.uploading import going_on_without, summary_writer

logger = logging.getLogger(__name__)


def write_results(eval_dir: str, results: EvalResult, checkpoint: str | None) -> None:
    """Log results and write them as event files, at their global step.

    Args:
        eval_dir: The folder, such as ``model_dir/eval``, a path or URL.
        results: The results of the evaluation, including ``global_step``.
        checkpoint: The path of the evaluated checkpoint; None without one.
    """
    step = int(results["global_step"])
    found = {name: value for name, value in results.items() if name != "global_step"}
    with going_on_without(f"summaries of the evaluation in {eval_dir}"), summary_writer(eval_dir) as writer:
        for name, value in scalars(found).items():
            writer.scalar(name, value, step)
        if checkpoint is not None:
            writer.text("checkpoint_path", checkpoint, step)
    logger.info("evaluated step %d: %s", step, ", ".join(f"{name} = {shown(value)}" for name, value in found.items()))
    if many := unwritten(found):
        logger.warning("no summary is written of %s: too many numbers", ", ".join(many))
