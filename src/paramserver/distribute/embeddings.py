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
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paramserver.errors import ConfigError
from paramserver.rows import Ids, Rows, on_device

Embedding = nn.Embedding | nn.EmbeddingBag

MANY = 8192
"""Ids of a batch from which on it takes longer to copy their rows than to get ready for it."""

_FORWARDS = (nn.Embedding.forward, nn.EmbeddingBag.forward)


class Lookup(NamedTuple):
    """What the ids of a batch ask for.

    Attributes:
        rows: The ids of the rows ``[rows]``, ascending, none twice.
        places: Which of the rows each id of the batch is ``[ids]``.
        firsts: Where in the batch each row is named first ``[rows]``.
        repeats: Where it is named again ``[ids - rows]``, by rows and places ascending.
    """

    rows: Ids
    places: Ids
    firsts: Ids
    repeats: Ids

    @classmethod
    def of(cls, ids: Ids) -> Lookup:
        """The lookup of ``ids [ids]``, in half of the time of `np.unique`: numbers are sorted, not places.

        Args:
            ids: Not negative; the bits of the largest and of their count are 63 at most.

        Example:
            >>> lookup = Lookup.of(np.array([7, 2, 7]))
            >>> [each.tolist() for each in lookup]
            [[2, 7], [1, 0, 1], [1, 0], [2]]
        """
        bits = len(ids).bit_length()
        at = (1 << bits) - 1
        keys = (ids << bits) | np.arange(len(ids))  # an id, and behind it where it stands
        keys.sort()
        is_new = np.ones(len(ids), dtype=bool)
        np.greater(keys[1:] ^ keys[:-1], at, out=is_new[1:])  # not the same but for where they stand
        places = np.empty_like(keys)
        places[keys & at] = np.cumsum(is_new) - 1
        firsts = keys[is_new]
        return cls(firsts >> bits, places, firsts & at, keys[~is_new] & at)


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
    rows, lookup, _ = _fetched(module, table, ids)
    if len(lookup.places) < MANY or len(lookup.repeats) > len(lookup.firsts):
        spread = rows.index_select(0, on_device(lookup.places, rows))
    else:
        spread = _Spread.apply(rows, lookup)  # type: ignore[no-untyped-call]
    return spread.view(*ids.shape, rows.shape[1])


def _embed_bags(
    module: nn.EmbeddingBag,
    table: Table,
    input: Tensor,  # noqa: A002  # the name that nn.EmbeddingBag gives it
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    rows, lookup, padding = _fetched(module, table, input)
    return F.embedding_bag(
        on_device(lookup.places, rows).view(input.shape),
        rows,
        offsets,
        mode=module.mode,
        per_sample_weights=per_sample_weights,
        include_last_offset=module.include_last_offset,
        padding_idx=padding,
    )


def _fetched(module: Embedding, table: Table, ids: Tensor) -> tuple[Tensor, Lookup, int | None]:
    """The rows of a batch, which of them each of its ids is, and which one is the padding."""
    flat = ids.detach().cpu().numpy().reshape(-1).astype(np.int64, copy=False)
    count = len(module.weight)
    if len(flat) and flat.view(np.uint64).max() >= count:  # as such a number, one below 0 is larger than any other
        worst = least if (least := flat.min()) < 0 else flat.max()
        raise IndexError(f"looking up rows of {table.name!r}: expected ids from 0 to {count - 1}, got {worst}")
    lookup = Lookup.of(flat)
    padding = _place_of(module.padding_idx, lookup.rows)
    rows: Tensor = _Rows.apply(module.weight, table, lookup.rows, padding)  # type: ignore[no-untyped-call]
    return rows, lookup, padding


def _place_of(wanted: int | None, ids: Ids) -> int | None:
    if wanted is None:
        return None
    at = int(np.searchsorted(ids, wanted))
    return at if at < len(ids) and ids[at] == wanted else None


class _Spread(torch.autograd.Function):
    """Rows ``[rows, width]``, as often as a batch names them: ``[ids, width]``.

    What `F.embedding` does, whose gradient takes much longer. Here it is known where each row is named; what is left to
    add up are the repeats, in the order of the batch.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, lookup: Lookup) -> Tensor:
        ctx.lookup = lookup
        return Rows(rows, in_cache=True).take(lookup.places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        lookup: Lookup = ctx.lookup
        if torch.is_grad_enabled():  # this gradient is to have one, too
            sums = gradient.new_zeros(len(lookup.rows), gradient.shape[1])
            return sums.index_add(0, on_device(lookup.places, gradient), gradient), None
        named = Rows(gradient.contiguous(), in_cache=True)
        sums, places = named.take(lookup.firsts), lookup.places[lookup.repeats]
        return sums.index_add_(0, on_device(places, gradient), named.take(lookup.repeats)), None


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
