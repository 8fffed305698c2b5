"""Embeddings whose tables stay on the ps tasks: only the rows of a batch are pulled, and only their gradients pushed.

Rules
    * A table is a weight in which modules only look up rows: modules ``nn.Embedding`` and ``nn.EmbeddingBag`` with
      ``sparse=True``. A weight with any other use (a tied output layer) is an ordinary parameter.
    * A lookup fetches each row once, however often the batch names it, and the module's own function is computed on
      these rows. If the table's memory is visible here, rows are copied directly to the places of their ids. The
      gradient also has each row once, and is sparse like torch's own.
    * On a worker of a cluster the weight holds no values: it reads as NaN everywhere, and takes no memory.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, NoReturn, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paramserver.errors import ConfigError
from paramserver.memory.rows import Ids, add_up, on_device
from paramserver.memory.torch_internals import is_tracing, is_transformed, parameters_of

Embedding = nn.Embedding | nn.EmbeddingBag

MANY_IDS = 8192
"""Smallest number of ids for which copying their rows takes longer than preparing the copy."""

_FORWARDS = (nn.Embedding.forward, nn.EmbeddingBag.forward)


class Lookup(NamedTuple):
    """The ids of a batch, and the rows that they name.

    Attributes:
        ids: The ids ``[ids]``.
        rows: The rows that the ids name, ascending, each once ``[rows]``.
        order: The positions of the ids in the batch, sorted by row, then by position ``[ids]``.
        numbers: For each of these positions, the index into ``rows`` of the row named there ``[ids]``.
    """

    ids: Ids
    rows: Ids
    order: Ids
    numbers: Ids

    @classmethod
    def of(cls, ids: Ids, loops: ModuleType | None = None) -> Lookup:
        """Return the lookup of ``ids [ids]``, in half of the time of `np.unique`: it sorts numbers, not positions.

        Args:
            ids: Not negative. The largest id and the count of ids must together have at most 63 bits.
            loops: The compiled loops, which take a third of that time; None without them.

        Example:
            >>> lookup = Lookup.of(np.array([7, 2, 7]))
            >>> [each.tolist() for each in lookup]
            [[7, 2, 7], [2, 7], [1, 0, 2], [0, 1, 1]]
        """
        if loops:
            largest = int(ids.max(initial=0))
            return cls(ids, *(each.view(np.int64) for each in loops.arrange(ids.view(np.uint64), largest.bit_length())))
        bits = len(ids).bit_length()
        keys = (ids << bits) | np.arange(len(ids))  # each id, and its position in the lower bits
        keys.sort()
        at = (1 << bits) - 1
        is_new = np.ones(len(ids), dtype=bool)
        np.greater(keys[1:] ^ keys[:-1], at, out=is_new[1:])  # different ids, not only different positions
        return cls(ids, keys[is_new] >> bits, keys & at, np.cumsum(is_new) - 1)

    def places(self) -> Ids:
        """Return for each id of the batch ``[ids]``, in the batch's order, the index of its row in ``rows``."""
        places = np.empty_like(self.numbers)
        places[self.order] = self.numbers
        return places


class Table(Protocol):
    """A source of rows.

    Attributes:
        name: The name of the variable.
        loops: See `paramserver.memory.rows.loops_for`.
    """

    name: str
    loops: ModuleType | None

    def pull(self, ids: Ids) -> Tensor:
        """Return rows ``[ids, width]``, on the CPU or on the device of the table. Blocks.

        Args:
            ids: The ids of the rows, ascending, each once.
        """

    def pull_batch(self, lookup: Lookup) -> Tensor:
        """Return the rows that a batch names, in its order ``[ids, width]``, on the CPU. Blocks."""

    def whole(self, weight: Tensor) -> Tensor | None:
        """Return all rows; None if the module's weight itself holds them. Blocks."""


def tables_of(model: nn.Module) -> dict[int, list[Embedding]]:
    """Return the modules that look up rows in each table, by the id of the weight.

    Raises:
        ConfigError: If one of the modules changes rows when it looks them up.
    """
    holders: dict[int, list[Embedding | None]] = defaultdict(list)
    for module in model.modules():
        for parameter in parameters_of(module).values():
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
    """Return a stand-in for a table's values: of the same shape, all NaN, and without memory for the values."""
    return torch.full((1, 1), torch.nan, dtype=weight.dtype, device=weight.device).expand(weight.shape)


def look_up_in(module: Embedding, table: Table) -> None:
    """Have a module get its rows from ``table``, and its ``state_dict()`` all rows. The module is changed."""
    look_up: Callable[..., Tensor] = _embed if isinstance(module, nn.Embedding) else _embed_bags
    module.forward = _Forward(_forward, look_up, module, table)  # type: ignore[method-assign]
    read_whole = functools.partial(_read_whole, table)
    module.register_state_dict_post_hook(read_whole)  # type: ignore[no-untyped-call]  # torch leaves it unannotated


class _Forward(functools.partial[Tensor]):
    """Replacement of a module's ``forward``."""

    @property
    def __globals__(self) -> NoReturn:  # TorchScript reads it first when it compiles a function
        raise _not_seen(self.args[2], "torch.jit.script and torch.export")


def _forward(look_up: Callable[..., Tensor], module: Embedding, table: Table, *args: Any, **kwargs: Any) -> Tensor:
    if not isinstance(module.weight, nn.Parameter):  # a value of the program's, put there by torch.func.functional_call
        plain: Callable[..., Tensor] = type(module).forward
        return plain(module, *args, **kwargs)
    if torch.compiler.is_compiling():
        look_up = torch.compiler.disable(look_up)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    return look_up(module, table, *args, **kwargs)


def _check_seen(table: Table) -> None:
    """Raise TypeError if the values of ids cannot be read, as under a tracer."""
    if is_tracing():
        raise _not_seen(table, "torch.jit.trace")
    if is_transformed():
        raise _not_seen(table, "a transform of torch.func")


def _not_seen(table: Table, by: str) -> TypeError:
    return TypeError(
        f"looking up rows of {table.name!r}: {by} cannot look rows up on parameter servers; load model.state_dict() "
        "into a model that is not prepared, and use that"
    )


def _read_whole(table: Table, module: nn.Module, state: dict[str, Tensor], prefix: str, _: object) -> None:
    if (weight := table.whole(cast(Tensor, module.weight))) is not None:
        state[f"{prefix}weight"] = weight


def _as_sparse_embedding(module: nn.Module) -> Embedding | None:
    """Return the module if it looks up rows as torch does and has sparse gradients; otherwise None."""
    if not isinstance(module, nn.Embedding | nn.EmbeddingBag) or not module.sparse:
        return None
    return None if type(module).forward not in _FORWARDS or "forward" in vars(module) else module


def _embed(module: nn.Embedding, table: Table, ids: Tensor) -> Tensor:
    lookup, padding = _lookup(module, table, ids)
    if _is_direct(module.weight, table, lookup):
        batch: Tensor = _Batch.apply(module.weight, table, lookup, padding, ids.shape)  # type: ignore[no-untyped-call]
        return batch
    rows: Tensor = _Rows.apply(module.weight, table, lookup.rows, padding)  # type: ignore[no-untyped-call]
    return rows.index_select(0, on_device(lookup.places(), rows)).view(*ids.shape, rows.shape[1])


def _is_direct(weight: Tensor, table: Table, lookup: Lookup) -> bool:
    """Return whether rows are copied in the batch's order. For few ids, or many repeats, NumPy would be slower."""
    is_many = len(lookup.ids) >= MANY_IDS and 2 * len(lookup.rows) >= len(lookup.ids)
    return weight.is_cpu and (table.loops is not None or is_many)


def _embed_bags(
    module: nn.EmbeddingBag,
    table: Table,
    input: Tensor,  # noqa: A002  # the name that nn.EmbeddingBag gives it
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    lookup, padding = _lookup(module, table, input)
    rows: Tensor = _Rows.apply(module.weight, table, lookup.rows, padding)  # type: ignore[no-untyped-call]
    return F.embedding_bag(
        on_device(lookup.places(), rows).view(input.shape),
        rows,
        offsets,
        mode=module.mode,
        per_sample_weights=per_sample_weights,
        include_last_offset=module.include_last_offset,
        padding_idx=padding,
    )


def _lookup(module: Embedding, table: Table, ids: Tensor) -> tuple[Lookup, int | None]:
    """Return the lookup of a batch, and the index of the padding among its rows."""
    _check_seen(table)
    flat = ids.detach().cpu().numpy().reshape(-1).astype(np.int64, copy=False)
    count = len(module.weight)
    if len(flat) and flat.view(np.uint64).max() >= count:  # unsigned, an id below 0 is larger than any other
        worst = least if (least := flat.min()) < 0 else flat.max()
        raise IndexError(f"looking up rows of {table.name!r}: expected ids from 0 to {count - 1}, got {worst}")
    lookup = Lookup.of(flat, table.loops)
    return lookup, _place_of(module.padding_idx, lookup.rows)


def _place_of(wanted: int | None, ids: Ids) -> int | None:
    if wanted is None:
        return None
    at = int(np.searchsorted(ids, wanted))
    return at if at < len(ids) and ids[at] == wanted else None


class _Batch(torch.autograd.Function):
    """Rows of a table, repeated as often as a batch names them: ``[*ids, width]``.

    Like `F.embedding`, whose gradient takes much longer: here the lookup already knows where each row is named.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, table: Table, lookup: Lookup, padding: int | None, ids: torch.Size) -> Tensor:
        ctx.lookup, ctx.loops, ctx.padding, ctx.shape = lookup, table.loops, padding, weight.shape
        return table.pull_batch(lookup).view(*ids, weight.shape[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        lookup: Lookup = ctx.lookup
        if torch.is_grad_enabled():  # double backward: this gradient needs a graph
            sums = gradient.new_zeros(len(lookup.rows), gradient.shape[-1])
            sums = sums.index_add(0, torch.from_numpy(lookup.places()), gradient.reshape(-1, gradient.shape[-1]))
        else:
            sums = add_up(gradient, lookup.order, lookup.numbers, ctx.loops)
        return _sparse(lookup.rows, sums, ctx.padding, ctx.shape), None, None, None, None


class _Rows(torch.autograd.Function):
    """Rows of a table, whose gradient is a sparse gradient of the whole table."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, table: Table, ids: Ids, padding: int | None) -> Tensor:
        ctx.ids, ctx.padding, ctx.shape = ids, padding, weight.shape
        return table.pull(ids).to(weight.device, non_blocking=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _sparse(ctx.ids, gradient, ctx.padding, ctx.shape), None, None, None


def _sparse(rows: Ids, gradient: Tensor, padding: int | None, shape: torch.Size) -> Tensor:
    """Return the sparse gradient of a table of this shape, without the padding row."""
    ids = torch.from_numpy(rows)
    if padding is not None:
        ids, gradient = (torch.cat([each[:padding], each[padding + 1 :]]) for each in (ids, gradient))
    return torch.sparse_coo_tensor(
        ids[None].to(gradient.device), gradient, shape, is_coalesced=True, check_invariants=False
    )
