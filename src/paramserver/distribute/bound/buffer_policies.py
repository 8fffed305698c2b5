"""The policies for a buffer that several workers change, and the choice of each buffer's policy.

Rules
    * A buffer whose name says that it counts or averages (BatchNorm's statistics, counters) is ``sum``: every worker's
      batches count in it. Every other buffer is ``last``: a flag, a pointer, a queue or a computed scale is a value
      that some worker has set, and a sum of such changes would be a value that no worker has set.
    * A program chooses another policy by the buffer's name in ``state_dict()``, or by a pattern of names. A name takes
      precedence over patterns, and an earlier pattern over a later one.
    * With one worker every policy gives the same result as plain PyTorch.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch

from paramserver.errors import ConfigError, did_you_mean

SUMMED_NAMES = (
    *("running_*", "num_*", "moving_*", "ema_*"),
    *("*count", "*counts", "*_total", "*_sum", "*avg", "*average", "*averaged", "*_ema", "cluster_size"),
)
"""Patterns for the names, within their module, of buffers that count or average."""


class BufferPolicy(enum.Enum):
    """The way to combine several workers' changes of a buffer."""

    SUM = "sum"
    """The change of each worker is added."""
    MEAN = "mean"
    """The change of each worker is divided by the number of workers and added."""
    LAST = "last"
    """The value that a worker has set is assigned, the whole buffer at once."""
    OWN = "own"
    """Each worker keeps its own value; checkpoints hold the chief's."""


def choose(
    dtypes: Mapping[str, torch.dtype], chosen: Mapping[str, str | BufferPolicy] | None = None
) -> dict[str, BufferPolicy]:
    """Return the policy of each buffer.

    Args:
        dtypes: The dtype of each buffer by name.
        chosen: Policies by buffer name, or by a pattern of `fnmatch`.

    Raises:
        ConfigError: If a name or pattern fits no buffer, or a policy is unknown or unsuitable for a buffer.

    >>> found = choose({"norm.running_mean": torch.float32, "queue": torch.float32, "seen": torch.bool}, {"q*": "mean"})
    >>> {name: policy.value for name, policy in found.items()}
    {'norm.running_mean': 'sum', 'queue': 'mean', 'seen': 'last'}
    """
    parsed = {pattern: _parsed(pattern, policy) for pattern, policy in (chosen or {}).items()}
    for pattern in parsed:
        if pattern not in dtypes and not any(fnmatchcase(name, pattern) for name in dtypes):
            raise ConfigError(f"prepare: buffers: {pattern!r} fits no buffer of the model; {_known(pattern, dtypes)}")
    policies = {name: _policy_of(name, dtype, parsed) for name, dtype in dtypes.items()}
    for name, policy in policies.items():
        if policy is BufferPolicy.MEAN and not dtypes[name].is_floating_point:
            raise ConfigError(
                f"prepare: buffers: {name!r} is {str(dtypes[name]).removeprefix('torch.')}, and a mean needs a "
                "floating point dtype; choose 'sum', 'last' or 'own'"
            )
        if policy is BufferPolicy.SUM and dtypes[name] is torch.bool:
            raise ConfigError(f"prepare: buffers: {name!r} is bool and cannot be summed; choose 'last' or 'own'")
    return policies


def _policy_of(name: str, dtype: torch.dtype, parsed: Mapping[str, BufferPolicy]) -> BufferPolicy:
    if name in parsed:
        return parsed[name]
    for pattern, policy in parsed.items():
        if fnmatchcase(name, pattern):
            return policy
    own_name = name.rpartition(".")[2]
    is_summed = dtype is not torch.bool and any(fnmatchcase(own_name, pattern) for pattern in SUMMED_NAMES)
    return BufferPolicy.SUM if is_summed else BufferPolicy.LAST


def _parsed(pattern: str, policy: str | BufferPolicy) -> BufferPolicy:
    try:
        return BufferPolicy(policy)
    except ValueError:
        expected = ", ".join(repr(each.value) for each in BufferPolicy)
        raise ConfigError(f"prepare: buffers: {pattern!r}: expected one of {expected}, got {policy!r}") from None


def _known(pattern: str, names: Iterable[str], limit: int = 8) -> str:
    """Return the end of a message about a pattern that fits no buffer."""
    each = sorted(names)
    more = f" and {len(each) - limit} others" if len(each) > limit else ""
    return f"persistent buffers are {', '.join(map(repr, each[:limit])) or 'none'}{more}{did_you_mean(pattern, each)}"
