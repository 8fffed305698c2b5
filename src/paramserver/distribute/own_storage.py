"""The tensors of a prepared model, each with a storage of its own over the memory that lanes read and write.

The values of many variables lie in one block of memory. Code that writes tensors down looks at their storage, not at
their shape: of views of one block, ``torch.save`` would write the whole block, deepcopy would copy it for each buffer,
and safetensors refuse to write any.
"""

from __future__ import annotations

import torch

from paramserver.arena import tensor_bytes


def separate(tensor: torch.Tensor) -> None:
    """Give a parameter or buffer that is part of a larger storage one of its own, over the same memory.

    Does nothing on other devices than the CPU, whose memory torch cannot be lent by others.

    Example:
        >>> block = torch.zeros(1000)
        >>> weight = torch.nn.Parameter(torch.empty(2, 2))
        >>> weight.data = block[:4].view(2, 2)
        >>> separate(weight)
        >>> block[3] = 1.0
        >>> weight[1, 1].item(), weight.untyped_storage().nbytes()
        (1.0, 16)
    """
    if tensor.is_cpu and _is_dense(tensor) and tensor.untyped_storage().nbytes() > tensor.nbytes > 0:
        flat = tensor.detach().as_strided((tensor.numel(),), (1,))
        apart = torch.frombuffer(tensor_bytes(flat), dtype=tensor.dtype)
        tensor.data = apart.as_strided(tensor.shape, tensor.stride())


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether it is strided, and its elements lie one beside the other, in whatever order."""
    if tensor.layout is not torch.strided or 0 in tensor.stride():
        return False
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) < tensor.numel()
