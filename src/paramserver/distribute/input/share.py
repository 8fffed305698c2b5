"""The share of a dataset that a worker reads, and the seed of its order."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """Every ``count``-th element of a dataset, starting with the ``index``-th."""

    index: int = 0
    count: int = 1

    def start(self, skip: int) -> int:
        """Return the index at which the share continues after its first ``skip`` elements.

        >>> Share(1, 3).start(0), Share(1, 3).start(2)
        (1, 7)
        """
        return self.index + skip * self.count

    def length(self, total: int) -> int:
        """Return how many of ``total`` elements belong to the share.

        >>> Share(0, 2).length(5), Share(1, 2).length(5)
        (3, 2)
        """
        return len(range(self.index, total, self.count))


WHOLE = Share()


@dataclass(frozen=True)
class Seed:
    """The seed of an order, used together with the epoch. Workers with the same ``stream`` draw the same order."""

    value: int
    stream: int = 0
