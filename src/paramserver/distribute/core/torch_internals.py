"""What torch does not offer under a public name, each with the reason why it is needed.

A test of each fails first when torch changes it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._jit_internal import is_scripting as is_scripting  # torch.jit has it, where no type checker sees it
from torch.utils.dlpack import from_dlpack


def alias(tensor: Tensor) -> Tensor:
    """Return a tensor over the same memory with a storage and a version counter of its own.

    The memory lives as long as either tensor does. `torch.from_dlpack` does the same in ten times as long.

    >>> both = torch.zeros(4)
    >>> part = alias(both[2:])
    >>> part.data_ptr() == both[2:].data_ptr(), part.untyped_storage().nbytes()
    (True, 8)
    """
    return from_dlpack(torch._C._to_dlpack(tensor))  # torch.utils.dlpack.to_dlpack, which type checkers do not know


def storage_uses(tensor: Tensor) -> int:
    """Return how many tensors and other holders refer to the storage of a tensor; only to be compared.

    >>> tensor = torch.zeros(4)
    >>> alone = storage_uses(tensor)
    >>> view = tensor[1:]
    >>> storage_uses(tensor) - alone
    1
    """
    return uses_of_storage(tensor.untyped_storage()._cdata)


def uses_of_storage(address: int) -> int:
    """Return the same for the storage at an address, its ``_cdata``. It has to be alive."""
    return torch._C._storage_Use_Count(address)


def is_tracing() -> bool:
    """Return whether `torch.jit.trace` is at work in this thread; `torch.jit.is_tracing` also asks another one."""
    return torch._C._get_tracing_state() is not None


def is_transformed() -> bool:
    """Return whether a torch.func transform is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_batched(gradient: Tensor) -> bool:
    """Return whether a gradient stands for many at once, as with ``is_grads_batched`` and vectorized jacobians."""
    return torch._C._functorch.is_legacy_batchedtensor(gradient)
