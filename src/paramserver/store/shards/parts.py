"""The places of a checkpoint's variables in a store."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from paramserver.checkpoint.tensor_file import TensorSpec
from paramserver.layout.blocks import Range
from paramserver.layout.variables import Shard, VariableSpec
from paramserver.store.blocks import StoredBlocks
from paramserver.store.store import Store


class StoredPart(NamedTuple):
    """The place of a variable, or of a part of one, in a store."""

    arena: StoredBlocks
    spec: VariableSpec
    span: Range

    @property
    def shard(self) -> Shard | None:
        """The part of the variable; None for a whole variable."""
        return self.spec.shard

    @property
    def variable(self) -> str:
        """The name of the whole variable."""
        return self.shard.variable if self.shard else self.spec.name

    @property
    def whole(self) -> TensorSpec:
        """Dtype and shape of the whole variable."""
        shape = (self.shard.rows, *self.spec.shape[1:]) if self.shard else self.spec.shape
        return TensorSpec(self.spec.dtype, shape)

    @property
    def slot_shape(self) -> tuple[int, ...]:
        """Shape of the elementwise slots; ``(1,)`` for a scalar variable, as its slots would look like counters."""
        return self.whole.shape or (1,)

    @property
    def skipped(self) -> int:
        """Number of elements of the whole variable before those of this part."""
        if self.shard is None or not self.shard.rows:
            return 0
        return self.shard.start * (self.whole.nbytes // self.whole.itemsize // self.shard.rows)

    @property
    def is_first(self) -> bool:
        """Whether the first row is here.

        The part with the first row writes the counters; those of other parts differ only by updates under way.
        """
        return self.shard is None or self.shard.index == 0


def stored_parts(store: Store) -> list[StoredPart]:
    """Return all parts in a store, arena by arena."""
    return [
        StoredPart(arena, spec, span)
        for arena in store.held
        for spec, span in zip(arena.layout.variables, arena.layout.ranges, strict=True)
    ]


def by_variable(store: Store) -> dict[str, list[StoredPart]]:
    """Return the parts by the name of the whole variable; a ps may hold several parts of one variable."""
    found: dict[str, list[StoredPart]] = defaultdict(list)
    for place in stored_parts(store):
        found[place.variable].append(place)
    return dict(found)


def overlaps(spans: Sequence[Range], runs: Sequence[Range]) -> Iterator[tuple[int, int, Range]]:
    """Yield the overlaps of two sorted sequences of ranges: both indices and the common range.

    >>> list(overlaps([(0, 4), (8, 12)], [(2, 10), (10, 20)]))
    [(0, 0, (2, 4)), (1, 0, (8, 10)), (1, 1, (10, 12))]
    """
    first = 0
    for index, (start, stop) in enumerate(spans):
        while first < len(runs) and runs[first][1] <= start:
            first += 1
        at = first
        while at < len(runs) and runs[at][0] < stop:
            yield index, at, (max(start, runs[at][0]), min(stop, runs[at][1]))
            at += 1
