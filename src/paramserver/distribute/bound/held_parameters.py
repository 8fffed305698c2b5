"""Detection of parameters that a program has taken out of the param groups of a prepared optimizer.

Rules
    * A parameter that no group holds any more is not updated, as with any torch optimizer. One that comes back is.
    * The set of groups, and the group of each parameter, are fixed: each group has its place on the ps tasks, and its
      settings are read for every push.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from paramserver.errors import ConfigError

Groups = Sequence[Mapping[str, Any]]


class HeldParameters:
    """The parameters that one optimizer holds. Not thread-safe.

    Args:
        groups: The optimizer's param groups at `prepare`.
        names: The names of all parameters of the model by id.
        replicas_of: Returns every replica's tensor for a parameter.
    """

    def __init__(
        self,
        groups: Groups,
        names: Mapping[int, str],
        replicas_of: Callable[[torch.Tensor], tuple[torch.Tensor, ...]],
    ) -> None:
        self._groups = {id(group): group for group in groups}
        self._names = names
        self._places = {
            id(each): (id(first), id(group))
            for group in groups
            for first in group["params"]
            for each in replicas_of(first)
        }
        self._held = {id(parameter) for group in groups for parameter in group["params"]}
        self._snapshot = _snapshot(groups)

    def changed(self, groups: Groups) -> set[int] | None:
        """Return the ids of the parameters that are held now; None if nothing has changed since the last call.

        Args:
            groups: The param groups as they are now, holding any replica's tensors.

        Raises:
            ConfigError: If a parameter or group was added, moved or replaced; the message names it.
        """
        if self._is_unchanged(groups):
            return None
        held = {self._found(parameter, group) for group in groups for parameter in group["params"]}
        for group in groups:
            if id(group) not in self._groups:
                raise ConfigError(
                    "optimizer.step: a param group was replaced by another dict, whose settings would not be seen; "
                    "change the settings of the prepared optimizer's groups in place"
                )
        self._snapshot = _snapshot(groups)
        if held == self._held:
            return None
        self._held = held
        return held

    def _is_unchanged(self, groups: Groups) -> bool:
        if len(groups) != len(self._snapshot):
            return False
        for group, (before, ids, _) in zip(groups, self._snapshot, strict=True):
            if group is not before or [*map(id, group["params"])] != ids:
                return False
        return True

    def _found(self, parameter: torch.Tensor, group: Mapping[str, Any]) -> int:
        first, home = self._places.get(id(parameter), (0, 0))
        if not first:
            name = self._names.get(id(parameter))
            shown = repr(name) if name else f"of shape {list(parameter.shape)}, which the prepared model does not have,"
            raise ConfigError(
                f"optimizer.step: parameter {shown} was put into a param group after prepare, and no ps updates it; "
                "give it to the optimizer before prepare, with requires_grad=False if it is to be trained later"
            )
        if id(group) in self._groups and id(group) != home:
            raise ConfigError(
                f"optimizer.step: parameter {self._names[first]!r} was moved to another param group after prepare; "
                "give it a group of its own before prepare, and change the settings of that"
            )
        return first


def _snapshot(groups: Groups) -> list[tuple[Mapping[str, Any], list[int], list[torch.Tensor]]]:
    """Note the groups and the ids of their parameters, which are kept so that no other gets one of these ids."""
    return [(group, [*map(id, group["params"])], list(group["params"])) for group in groups]
