"""How a dataset is distributed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """Options of `Strategy.distribute_dataset`."""
