"""Which share of a dataset a worker reads, and what its order is drawn from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """Every ``count``-th of something, from the ``index``-th on."""

    index: int = 0
    count: int = 1

    def start(self, skip: int) -> int:
        """Where the share goes on after its first ``skip``.

        >>> Share(1, 3).start(0), Share(1, 3).start(2)
        (1, 7)
        """
        return self.index + skip * self.count

    def length(self, total: int) -> int:
        """How many of ``total`` there are in it.

        >>> Share(0, 2).length(5), Share(1, 2).length(5)
        (3, 2)
        """
        return len(range(self.index, total, self.count))


WHOLE = Share()


@dataclass(frozen=True)
class Seed:
    """What an order is drawn from, beside the epoch. Workers of the same ``stream`` draw the same."""

    value: int
    stream: int = 0
