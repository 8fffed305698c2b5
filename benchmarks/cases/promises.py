"""The promises about speed and memory: the case `step` with all models on both lanes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from benchmarks.cases import step
from benchmarks.harness.case import Case
from benchmarks.harness.options import LANES, Options
from benchmarks.models.catalogue import MODELS


def measure(options: Options) -> Iterator[step.Result]:
    """Measure all models on both lanes. Blocks for about four minutes."""
    for lane, model in itertools.product(LANES, MODELS):
        yield from step.measure(
            step.StepOptions(model=model, lane=lane, seconds=options.seconds, repeats=options.repeats)
        )


CASE = Case(
    title="The promises about training speed and memory",
    options=Options,
    measure=measure,
    is_in_suite=False,
)
