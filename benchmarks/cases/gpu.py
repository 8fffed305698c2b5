"""A step on one GPU with a ps in host memory, beside the same step without a ps.

Each of three models is trained by one worker, with one ps on the same host by shared memory, and beside it by plain
PyTorch on the same GPU. A step is over when the GPU has done it. Without a GPU there is nothing to measure.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness.case import Case
from benchmarks.harness.cluster import start_cluster, start_plain, start_trainer
from benchmarks.harness.crew import crew
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.figure import Figure, Subject
from benchmarks.harness.options import Effort
from benchmarks.harness.programs.trainer import Job
from benchmarks.harness.window import sides, slowest_step
from benchmarks.models.catalogue import AnyModel
from benchmarks.models.mlp import Mlp
from benchmarks.models.shapes import SPARSES, MlpShape, SparseShape
from benchmarks.models.sparse import Sparse
from benchmarks.models.transformer import Transformer

MLP, TRANSFORMER, SPARSE = "MLP of 100 M parameters", "transformer of 27 M parameters", "sparse"

MODELS: dict[str, AnyModel] = {
    MLP: Mlp(MlpShape(sizes=(1024, 8192, 8192, 3072), batch=512)),
    TRANSFORMER: Transformer(words=8192, width=512, layers=6, length=128, batch=32),
    SPARSE: Sparse(SPARSES["sparse"]),
}
TINY: dict[str, AnyModel] = {
    MLP: Mlp(MlpShape(sizes=(8, 8, 2), batch=4)),
    TRANSFORMER: Transformer(words=16, width=16, layers=1, length=4, batch=2),
    SPARSE: Sparse(SparseShape(rows=20, width=2, ids=3, numbers=2, hidden=(4,), batch=4, learning_rate=0.01)),
}
"""Models that stand in for the others where the CPU stands in for the GPU."""


def measure(options: Effort) -> Iterator[Figure]:
    """Measure all models; the least that can be measured is a tiny one on the CPU. Blocks for about two minutes.

    Raises:
        BenchmarkError: If there is no GPU.
    """
    is_tiny = options.sizes == "least"
    if not is_tiny and not torch.cuda.is_available():
        raise BenchmarkError("there is no GPU that torch can use here, and nothing was measured")
    device, name = ("cpu", "the CPU in its place") if is_tiny else ("cuda:0", torch.cuda.get_device_name())
    for model in options.pick(tuple(MODELS), tuple(MODELS)):
        job = Job(model=(TINY if is_tiny else MODELS)[model], device=device)
        yield _measure(f"{model}, {name}", job, options)


def _measure(case: str, job: Job, options: Effort) -> Figure:
    with crew() as its_crew:
        worker = start_trainer(its_crew, "the worker", job, start_cluster(its_crew).env("chief:0", "auto"))
        plain = start_plain(its_crew, job)
        ours, other = sides(options, slowest_step([worker, plain]), [worker], [plain])
        return Subject(case=case, size_unit="GPU", beside="plain PyTorch").measure(ours, other, options.repeats)


CASE = Case(title="Training on one GPU", options=Effort, measure=measure, is_in_suite=False)
