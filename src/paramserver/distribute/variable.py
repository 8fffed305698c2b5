"""Variables of a program's own: named states on parameter servers."""

from __future__ import annotations

import enum


class VariableAggregation(enum.Enum):
    """What becomes of the values that the replicas of a worker assign to one variable."""

    NONE = "NONE"
    SUM = "SUM"
    MEAN = "MEAN"
    ONLY_FIRST_REPLICA = "ONLY_FIRST_REPLICA"


class Variable:
    """A named state on a ps."""
