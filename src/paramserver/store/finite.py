"""The check that values are finite, and so fit for a checkpoint: no restart recovers from NaN or infinity.

Rules
    * Trained values and their slots have to be finite: no later update makes them finite again.
    * Untrained values may hold infinity, such as a mask of ``-inf``: frozen parameters, buffers, the program's own
      variables. Buffers and the program's own variables may hold NaN, too.
    * One reduction is made of each block, outside of any lock; more reductions only where its result is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch

from paramserver.errors import NotFiniteError
from paramserver.layout.blocks import BLOCK, Range
from paramserver.store.blocks import BlockCopy, StoredBlocks
from paramserver.store.shards.parts import StoredPart


def check_finite(
    task: str, arena: StoredBlocks, block: int, here: Iterable[tuple[StoredPart, Range]], copy: BlockCopy
) -> None:
    """Check the trained values and the slots of one block.

    Args:
        task: The ps, for the message.
        arena: The arena of the block.
        block: The index of the block in the arena.
        here: The parts of variables in the block, and their elements of the arena.
        copy: The copy of the block.

    Raises:
        NotFiniteError: If a value or slot is NaN or infinite; the message names its variable.
    """
    if arena.layout.rule is None:
        return
    is_fit = is_finite if arena.is_trained else is_number
    for slot, start, tensor in _tensors(block, copy):
        if is_fit(tensor):
            continue
        for place, (first, last) in here:
            part = tensor[max(first - start, 0) : max(last - start, 0)]
            if not is_fit(part):
                raise _not_finite(task, place, slot, max(first, start), part)


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether no element is NaN or infinite.

    >>> is_finite(torch.tensor([1.0, 2.0])), is_finite(torch.tensor([1.0, math.inf, -math.inf]))
    (True, False)
    >>> is_finite(torch.tensor([3e38, 3e38]))  # although their sum is infinite
    True
    """
    return _has_finite_sum(tensor) or all(math.isfinite(extreme.item()) for extreme in torch.aminmax(tensor))


def is_number(tensor: torch.Tensor) -> bool:
    """Return whether no element is NaN.

    >>> is_number(torch.tensor([math.inf, -math.inf])), is_number(torch.tensor([math.nan]))
    (True, False)
    """
    return _has_finite_sum(tensor) or not tensor.isnan().any()


def _has_finite_sum(tensor: torch.Tensor) -> bool:
    """Return whether one quick pass shows that all elements are finite."""
    return not tensor.numel() or not tensor.is_floating_point() or math.isfinite(tensor.sum().item())


def _tensors(block: int, copy: BlockCopy) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Yield name, first element and content of the values and slots of a block, without counters, which are scalars."""
    yield "", block * BLOCK, copy.values
    for start, _, state in copy.runs:
        yield from ((name, start, slot) for name, slot in state.items() if slot.ndim)


def _not_finite(task: str, place: StoredPart, slot: str, first: int, part: torch.Tensor) -> NotFiniteError:
    faults = part.isnan() if part.isnan().any() else ~part.isfinite()
    at = int(faults.nonzero()[0])
    element = place.skipped + first - place.span[0] + at
    index = [int(each) for each in torch.unravel_index(torch.tensor(element), place.slot_shape)]
    what = f"slot {slot!r} of variable {place.variable!r}" if slot else f"variable {place.variable!r}"
    return NotFiniteError(
        f"{what} on {task} is {part[at].item()} at {index}; expected finite numbers: no update makes it finite again, "
        "so it is not checkpointed",
        "",
        place.variable,
    )
