"""Embeddings whose tables stay on the ps tasks: only the rows that a batch asks for come, and only their gradients go.

Rules
    * A table is a weight that only modules look rows up in: ``nn.Embedding`` and ``nn.EmbeddingBag`` with
      ``sparse=True``. A weight that anything else uses as well (a tied output layer) is a parameter like others.
    * A lookup fetches each row once, however often the batch names it, and the module's own function is computed on
      what has come. So the gradient has each row once, too, and is sparse as torch's own would be.
    * On a worker of a cluster the weight holds no values: all of it reads as NaN, and takes no memory.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paramserver.errors import ConfigError

Ids = npt.NDArray[np.int64]
Embedding = nn.Embedding | nn.EmbeddingBag

_FORWARDS = (nn.Embedding.forward, nn.EmbeddingBag.forward)


class Table(Protocol):
    """Where the rows come from."""

    name: str

    def pull(self, ids: Ids) -> Tensor:
        """The rows ``[ids, width]``, on the CPU or where the table lies. Blocks.

        Args:
            ids: Ascending, none twice.
        """

    def whole(self) -> Tensor | None:
        """All rows; None where the weight itself holds them. Blocks."""


def tables_of(model: nn.Module) -> dict[int, list[Embedding]]:
    """The modules that look rows up in each table, by the id of the weight.

    Raises:
        ConfigError: If one of them changes rows when it looks them up.
    """
    holders: dict[int, list[Embedding | None]] = defaultdict(list)
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders[id(parameter)].append(_as_sparse_embedding(module))
    tables = {
        key: [module for module in modules if module is not None]
        for key, modules in holders.items()
        if None not in modules
    }
    for modules in tables.values():
        for module in modules:
            if module.max_norm is not None:
                raise ConfigError(
                    f"prepare: {module} has max_norm={module.max_norm}, which changes rows when they are looked up, "
                    "and its table lives on parameter servers, where only the optimizer does; leave max_norm out"
                )
    return tables


def placeholder(weight: Tensor) -> Tensor:
    """What stands in the place of a table's values: of the same shape, all NaN, and without memory for it."""
    return torch.full((1, 1), torch.nan, dtype=weight.dtype, device=weight.device).expand(weight.shape)


def look_up_in(module: Embedding, table: Table) -> None:
    """From now on a module gets its rows from ``table``, and ``state_dict()`` all of them. The module is changed."""
    forward: Callable[..., Tensor] = _embed if isinstance(module, nn.Embedding) else _embed_bags
    module.forward = functools.partial(forward, module, table)  # type: ignore[method-assign]
    read_whole = functools.partial(_read_whole, table)
    module.register_state_dict_post_hook(read_whole)  # type: ignore[no-untyped-call]  # torch leaves it unannotated


def _read_whole(table: Table, module: nn.Module, state: dict[str, Tensor], prefix: str, _: object) -> None:
    if (weight := table.whole()) is not None:
        state[f"{prefix}weight"] = weight


def _as_sparse_embedding(module: nn.Module) -> Embedding | None:
    """The module, if it looks rows up as torch does, and has sparse gradients."""
    if not isinstance(module, nn.Embedding | nn.EmbeddingBag) or not module.sparse:
        return None
    return None if type(module).forward not in _FORWARDS or "forward" in vars(module) else module


def _embed(module: nn.Embedding, table: Table, ids: Tensor) -> Tensor:
    rows, places, _ = _fetched(module, table, ids)
    # What F.embedding does; the gradient of this one takes a ninth of the time.
    return rows.index_select(0, places.flatten()).view(*ids.shape, rows.shape[1])


def _embed_bags(
    module: nn.EmbeddingBag,
    table: Table,
    input: Tensor,  # noqa: A002  # the name that nn.EmbeddingBag gives it
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    rows, places, padding = _fetched(module, table, input)
    return F.embedding_bag(
        places,
        rows,
        offsets,
        mode=module.mode,
        per_sample_weights=per_sample_weights,
        include_last_offset=module.include_last_offset,
        padding_idx=padding,
    )


def _fetched(module: Embedding, table: Table, ids: Tensor) -> tuple[Tensor, Tensor, int | None]:
    """The rows of a batch, where each of its ids is among them, and where the padding is."""
    flat = ids.detach().cpu().numpy().reshape(-1).astype(np.int64, copy=False)
    count = len(module.weight)
    if len(flat) and not 0 <= (least := flat.min()) <= (most := flat.max()) < count:
        worst = most if least >= 0 else least
        raise IndexError(f"looking up rows of {table.name!r}: expected ids from 0 to {count - 1}, got {worst}")
    wanted, places = unique(flat)
    padding = _place_of(module.padding_idx, wanted)
    rows: Tensor = _Rows.apply(module.weight, table, wanted, padding)  # type: ignore[no-untyped-call]
    return rows, torch.from_numpy(places).view(ids.shape).to(rows.device), padding


def unique(ids: Ids) -> tuple[Ids, Ids]:
    """What ``np.unique(ids, return_inverse=True)`` returns, in about half of the time: numbers are sorted, not places.

    Args:
        ids: ``[ids]``, not negative; the bits of the largest and of their count are 63 at most.

    Example:
        >>> wanted, places = unique(np.array([7, 2, 7]))
        >>> wanted.tolist(), places.tolist()
        ([2, 7], [1, 0, 1])
    """
    bits = len(ids).bit_length()
    keys = (ids << bits) | np.arange(len(ids))  # an id, and behind it where it stood
    keys.sort()
    ascending = keys >> bits
    is_new = np.ones(len(ids), dtype=bool)
    np.not_equal(ascending[1:], ascending[:-1], out=is_new[1:])
    places = np.empty_like(keys)
    places[keys & ((1 << bits) - 1)] = np.cumsum(is_new) - 1
    return ascending[is_new], places


def _place_of(wanted: int | None, ids: Ids) -> int | None:
    if wanted is None:
        return None
    at = int(np.searchsorted(ids, wanted))
    return at if at < len(ids) and ids[at] == wanted else None


class _Rows(torch.autograd.Function):
    """Rows of a table, whose gradient is a sparse one of the whole table."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, table: Table, ids: Ids, padding: int | None) -> Tensor:
        ctx.ids, ctx.padding, ctx.shape = ids, padding, weight.shape
        return table.pull(ids).to(weight.device, non_blocking=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        ids = torch.from_numpy(ctx.ids)
        if (at := ctx.padding) is not None:
            ids, gradient = (torch.cat([each[:at], each[at + 1 :]]) for each in (ids, gradient))
        sparse = torch.sparse_coo_tensor(
            ids[None].to(gradient.device), gradient, ctx.shape, is_coalesced=True, check_invariants=False
        )
        return sparse, None, None, None
