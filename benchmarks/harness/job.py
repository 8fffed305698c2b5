"""The job of a trainer, as its one argument has it."""

from __future__ import annotations

import msgspec

from benchmarks.models.catalogue import AnyModel


class Job(msgspec.Struct, kw_only=True, frozen=True):
    """What `benchmarks.harness.programs.trainer` trains.

    Attributes:
        model: The model.
        device: A GPU that it is trained on; "" for the CPU.
        pipeline: Whether a step does not wait for its own values.
    """

    model: AnyModel
    device: str = ""
    pipeline: bool = False

    def to_argument(self) -> str:
        """Return the job as an argument of a command line."""
        return msgspec.json.encode(self).decode()
