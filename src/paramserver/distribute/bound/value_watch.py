"""Detection of values that a program writes into parameters whose values belong to the ps tasks.

Rules
    * Autograd counts the writes to each tensor, in place or through a view. The lanes write without autograd's
      knowledge, and a step counts that write itself, so any other count means that the program has written.
    * Writes through ``parameter.data`` or a NumPy array are not counted and therefore not detected.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paramserver.errors import EditedError
from paramserver.memory.torch_internals import version_of


class ValueWatch:
    """Detects writes to the parameters of one arena on one replica. Not thread-safe.

    Args:
        names: The names of the variables, for messages.
        tensors: The parameters.
    """

    def __init__(self, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> None:
        self._names = names
        self._tensors = tensors
        self.reset()

    def reset(self) -> None:
        """Regard the present values as the ps tasks'."""
        self._versions = list(map(version_of, self._tensors))
        self._steps = 0
        self._expected = sum(self._versions)

    def check(self) -> None:
        """Raise `EditedError` if the program has written to one of the parameters."""
        if sum(map(version_of, self._tensors)) != self._expected:
            self._refuse()

    def advance(self, moved: Sequence[torch.Tensor]) -> None:
        """Count a write by the lanes to these tensors.

        Autograd is told as well, so that it refuses a graph that was built on the old values.
        """
        torch.autograd.graph.increment_version(moved)
        if len(moved) == len(self._tensors):
            self._steps += 1
            self._expected += len(moved)
        elif moved:
            self.reset()

    def _refuse(self) -> None:
        for name, tensor, version in zip(self._names, self._tensors, self._versions, strict=True):
            if version_of(tensor) != version + self._steps:
                raise edited(name)


def edited(name: str) -> EditedError:
    """Return the error for a parameter that the program has written to."""
    return EditedError(
        f"optimizer.step: the program has changed parameter {name!r} since the last step, but its values belong to the "
        "parameter servers, whose next values would undo the change. To set values after prepare, change them and call "
        "strategy.assign(model), where the chief's values count; or set them before prepare. strategy.refresh() drops "
        "the change",
        name,
    )
