"""Functions that torch does not offer under a public name, each with the reason why it is needed.

For each of them there is a test that fails first when torch changes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch._C._profiler import _ExperimentalConfig as ProfilerConfig
from torch._jit_internal import is_scripting as is_scripting  # torch.jit has it, where no type checker sees it
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.dlpack import from_dlpack

fused_adagrad = torch._fused_adagrad_  # an optimizer's step spends 20 us until it calls one of these
fused_adam = torch._fused_adam_
fused_adamw = torch._fused_adamw_
foreach_add = torch._foreach_add_
foreach_copy = torch._foreach_copy_

version_of = attrgetter("_version")
"""The number of writes to a tensor, which torch counts for autograd."""


@contextlib.contextmanager
def one_thread_here() -> Iterator[None]:
    """Return a context in which torch uses one thread for an operator on this thread. Without OpenMP it does nothing.

    ``torch.set_num_threads`` would change it for other threads, too.
    """
    count, openmp = torch.get_num_threads(), _openmp()  # torch sets the number of a thread when it is first asked for
    if count == 1 or openmp is None:
        yield
        return
    openmp.omp_set_num_threads(1)
    try:
        yield
    finally:
        openmp.omp_set_num_threads(count)


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """Return a library in which names of torch's own OpenMP are found; None if it has none.

    Other packages bring another OpenMP into the process. A name is looked for in a library and in those that it needs.
    """
    library = ctypes.CDLL(torch._C.__file__)
    return library if hasattr(library, "omp_set_num_threads") else None


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return a module's own parameters by name; replacing them here avoids the work of ``__setattr__``."""
    return module._parameters


def modules_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return a module's own submodules by name."""
    return module._modules


def non_persistent_buffers(module: nn.Module) -> set[str]:
    """Return the names of a module's own buffers that ``state_dict`` leaves out."""
    return module._non_persistent_buffers_set


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Return a module's own buffers by name, to be replaced."""
    return module._buffers


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether any hook runs before or after a step of this optimizer, or of all optimizers."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )


def all_threads() -> ProfilerConfig | None:
    """Return the setting that makes a profile include the threads of replicas; None if torch has no such setting."""
    try:
        return ProfilerConfig(profile_all_threads=True)
    except TypeError:  # an older torch
        return None


def alias(tensor: Tensor) -> Tensor:
    """Return a tensor over the same memory with its own storage and version counter.

    The memory lives as long as either tensor does. `torch.from_dlpack` does the same, but takes ten times as long.

    >>> both = torch.zeros(4)
    >>> part = alias(both[2:])
    >>> part.data_ptr() == both[2:].data_ptr(), part.untyped_storage().nbytes()
    (True, 8)
    """
    return from_dlpack(torch._C._to_dlpack(tensor))  # torch.utils.dlpack.to_dlpack, which type checkers do not know


def storage_uses(tensor: Tensor) -> int:
    """Return the number of references to the storage of a tensor, only for comparison with another such number.

    >>> tensor = torch.zeros(4)
    >>> alone = storage_uses(tensor)
    >>> view = tensor[1:]
    >>> storage_uses(tensor) - alone
    1
    """
    return uses_of_storage(tensor.untyped_storage()._cdata)


def uses_of_storage(address: int) -> int:
    """Return the same number for the storage at an address, its ``_cdata``. The storage has to be alive."""
    return torch._C._storage_Use_Count(address)


def is_tracing() -> bool:
    """Return whether `torch.jit.trace` is running in this thread; `torch.jit.is_tracing` also checks other things."""
    return torch._C._get_tracing_state() is not None


def is_transformed() -> bool:
    """Return whether a torch.func transform is running."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_batched(gradient: Tensor) -> bool:
    """Return whether a gradient stands for a batch of them, as with ``is_grads_batched`` or vectorized jacobians."""
    return torch._C._functorch.is_legacy_batchedtensor(gradient)
