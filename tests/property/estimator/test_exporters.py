"""BestExporter over whole runs: what lies in its folder is the best there was, whatever is evaluated and restarted."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from paramserver.estimator import BestExporter
from paramserver.summary import SummaryWriter

LOSSES = st.sampled_from([0.5, 1.0, 2.0, 3.0, math.nan, math.inf])
PROCESSES = st.lists(st.lists(LOSSES, max_size=4), min_size=1, max_size=4)
"""What each process of an evaluator, started again after the one before, evaluates."""


class Evaluator:
    """Writes each evaluation before it exports, and makes an export that holds nothing but its loss."""

    def __init__(self, folder: str) -> None:
        self.model_dir = folder
        self._exports = 1_700_000_000
        self._loss = math.nan

    def export_model(
        self,
        export_path: str,
        serving_input_fn: Callable[..., Any] | None,
        checkpoint_path: str,
        assets_extra: Mapping[str, str] | None,
    ) -> str:
        self._exports += 1
        exported = Path(export_path, str(self._exports))
        exported.mkdir(parents=True)
        (exported / "loss").write_text(str(self._loss))
        return str(exported)

    def evaluate(self, exporter: BestExporter, loss: float, step: int) -> None:
        self._loss = loss
        writer = SummaryWriter(f"{self.model_dir}/eval")
        writer.scalar("loss", loss, step)
        writer.close()
        exporter.export(self, f"{self.model_dir}/best", "ckpt", {"loss": loss, "global_step": step}, False)

    def exported(self) -> list[float]:
        return [float(path.read_text()) for path in Path(self.model_dir).glob("best/*/loss")]


@settings(max_examples=40, deadline=None)
@given(processes=PROCESSES, evaluates_last_again=st.booleans())
def test_j04_the_only_export_is_the_best_evaluation_so_far(
    processes: list[list[float]], evaluates_last_again: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        evaluator, step, seen = Evaluator(folder), 0, list[float]()
        for losses in processes:
            exporter = BestExporter(exports_to_keep=1)
            if evaluates_last_again and seen:  # as after a restart, of the checkpoint that is still the latest
                losses = [seen[-1], *losses]
                step -= 1
            for loss in losses:
                evaluator.evaluate(exporter, loss, step)
                step += 1
                seen.append(loss)
                numbers = [each for each in seen if not math.isnan(each)]
                assert evaluator.exported() == ([min(numbers)] if numbers else [])
