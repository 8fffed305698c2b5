"""The options for the distribution of a dataset."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from paramserver.errors import ConfigError

SHARDINGS = ("none", "static")


class InputReplicationMode(enum.StrEnum):
    """The owner of an input pipeline: a worker, whose replicas share it, or each replica, which is refused."""

    PER_WORKER = "PER_WORKER"
    PER_REPLICA = "PER_REPLICA"


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """Options of `Strategy.distribute_dataset` and `Strategy.distribute_datasets_from_function`.

    >>> InputOptions(sharding="static", seed=3).replication_mode.name
    'PER_WORKER'

    Attributes:
        prefetch: Whether batches are moved to the compute devices, without waiting for the copy if their memory is
            pinned; False leaves them where the dataset makes them. On CPU devices nothing is moved.
        sharding: ``"none"``: every worker reads the whole dataset; ``"static"``: worker i of n reads every n-th part
            of it, starting with the i-th. For a torch ``DataLoader`` over a map-style dataset, parts are examples;
            otherwise parts are batches, and all workers must see them in the same order.
        seed: Determines, with the epoch, the order of a ``DataLoader`` that shuffles, so that a restarted worker
            repeats its order. Without sharding, each worker still has an order of its own. None leaves the order to
            torch; with static sharding, where all workers must shuffle alike, None means 0.
        replication_mode: A mode or its name; only ``PER_WORKER`` is supported.
        place_on_device: Whether the pipeline itself runs on devices; needs ``PER_REPLICA``.

    Raises:
        ConfigError: If a field has an invalid value, or two fields contradict each other.
    """

    prefetch: bool = True
    sharding: str = "none"
    seed: int | None = None
    replication_mode: InputReplicationMode = InputReplicationMode.PER_WORKER
    place_on_device: bool = False

    def __post_init__(self) -> None:
        for field in ("prefetch", "place_on_device"):
            if not isinstance(getattr(self, field), bool):
                raise _wrong(field, getattr(self, field), "True or False")
        if self.sharding not in SHARDINGS:
            raise _wrong("sharding", self.sharding, " or ".join(map(repr, SHARDINGS)))
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0):
            raise _wrong("seed", self.seed, "an int from 0 on, or None")
        if self.replication_mode not in tuple(InputReplicationMode):
            raise _wrong("replication_mode", self.replication_mode, " or ".join(InputReplicationMode))
        object.__setattr__(self, "replication_mode", InputReplicationMode(self.replication_mode))
        self._check_consistent()

    def _check_consistent(self) -> None:
        is_per_replica = self.replication_mode is InputReplicationMode.PER_REPLICA
        if self.place_on_device and not is_per_replica:
            raise ConfigError("InputOptions: place_on_device=True needs replication_mode='PER_REPLICA'")
        if self.place_on_device and self.prefetch:
            raise ConfigError(
                "InputOptions: place_on_device=True makes batches on the devices, so that there is nothing to bring "
                "there; set prefetch=False"
            )


def _wrong(field: str, value: object, expected: str) -> ConfigError:
    return ConfigError(f"InputOptions: {field}: expected {expected}, got {value!r}")
