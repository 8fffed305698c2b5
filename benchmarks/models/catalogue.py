"""The models that have names."""

from __future__ import annotations

from benchmarks.models.mlp import Mlp
from benchmarks.models.null import Parameters, Rows
from benchmarks.models.shapes import CLASSES, MLPS, SPARSES, MlpShape
from benchmarks.models.sparse import Sparse
from benchmarks.models.transformer import Transformer

AnyModel = Mlp | Sparse | Transformer | Rows | Parameters
"""Any `benchmarks.models.model.Model` that can be sent to a process."""

MODELS: dict[str, Mlp | Sparse] = {
    **{name: Mlp(shape) for name, shape in MLPS.items()},
    **{name: Sparse(shape) for name, shape in SPARSES.items()},
}
"""The models whose training is measured beside plain PyTorch and beside peers."""

IDLE = Mlp(MlpShape(sizes=(784, 1, CLASSES)))
"""The model of a process that has next to nothing to hold: the zero of memory."""
