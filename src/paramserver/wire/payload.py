"""The content of a push's payload, and its order.

Rows of tables come first, part by part: the ids, then the values. All other parts follow, piece by piece. Both ends of
a lane use the functions of this file, so the order itself need not be sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from paramserver.layout.arena import ArenaLayout
from paramserver.layout.blocks import Range, pieces
from paramserver.wire.messages import Part

EARLY_BYTES = 1 << 20
"""Least size of a push's payload for which a ps may send values before all of it has come in. The worker of a smaller
push may wait until all of it is sent, before it reads anything."""


def parts_of_rows(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Return the parts of a push that concern rows of tables, in the order of their payload."""
    return tuple(part for part in parts if part.rows is not None)


def dense_pieces(parts: Sequence[Part], layouts: Sequence[ArenaLayout]) -> Iterator[tuple[Part, Range]]:
    """Yield the pieces of all other parts of a push, each with its part, in the order of their payload.

    >>> from paramserver.layout.variables import VariableSpec
    >>> layouts = [ArenaLayout("float32", None, (VariableSpec("w", (4,), "float32"),))]
    >>> [span for _, span in dense_pieces([Part(0, "add"), Part(0, "add", ((1, 3),))], layouts)]
    [(0, 4), (1, 3)]
    """
    for part in parts:
        if part.rows is None:
            for span in layouts[part.arena].pieces if part.ranges is None else pieces(part.ranges):
                yield part, span
