"""A ps's shard of a checkpoint: plain safetensors files, values in one, slots in another.

The names of values are the model's; a slot of variable ``fc.weight`` is called ``fc.weight/exp_avg``. Every part of a
partitioned variable is written into that variable's own two files, where the parts make one tensor. The indexes
that the chief writes beside them (``model.safetensors.index.json``, as Hugging Face's tools read it) say which file
holds what, so that a checkpoint loads into any number of ps tasks, with any partitioning.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from paramserver.arena import Range, Shard, VariableSpec, pieces
from paramserver.checkpoint_files import (
    SLOTS_INDEX,
    VALUES_INDEX,
    Maps,
    Rows,
    StoredTensor,
    merge,
    name_clash,
    read_index,
    rows_files,
    stored_tensors,
    variable_of,
    write_rows,
    write_tensors,
)
from paramserver.errors import CheckpointError
from paramserver.store.store import Store
from paramserver.store.stored_arena import StoredArena, variable_slots


@dataclass(frozen=True, kw_only=True)
class WrittenShard:
    """What `write_shard` wrote: the file of each value and each slot, the bytes, and the seconds pushes may wait."""

    weight_map: dict[str, str]
    slot_map: dict[str, str]
    nbytes: int
    pause: float


# --- writing -----------------------------------------------------------------------------------------------------


def write_shard(store: Store, directory: str, shard: int, num_shards: int) -> WrittenShard:
    """Write the values and slots of a store into files of ``directory``.

    Pushes go on meanwhile: a block is locked only while it is copied.

    Raises:
        CheckpointError: If the directory cannot be written.
    """
    started = time.perf_counter()
    copies = [copy for arena in store.held for copy in _copies(arena)]
    pause = time.perf_counter() - started
    folder, suffix = Path(directory), f"{shard + 1:05d}-of-{num_shards:05d}.safetensors"
    whole = [copy for copy in copies if copy.spec.shard is None]
    parts = [_write_part(folder, copy, copy.spec.shard) for copy in copies if copy.spec.shard is not None]
    weight_map, slot_map = merge([_write_whole(folder, suffix, whole), *parts])
    nbytes = sum(tensor.nbytes for copy in copies for tensor in (copy.value, *copy.slots.values()))
    return WrittenShard(weight_map=weight_map, slot_map=slot_map, nbytes=nbytes, pause=pause)


class _Copy(NamedTuple):
    """A variable, or a part of one, with its slots, as it was at one moment."""

    spec: VariableSpec
    value: torch.Tensor
    slots: dict[str, torch.Tensor]


def _copies(arena: StoredArena) -> Iterator[_Copy]:
    flat, runs = arena.snapshot()
    for spec, value, span in zip(arena.layout.variables, arena.layout.views(flat), arena.layout.ranges, strict=True):
        # Of a scalar variable such a slot keeps its one dimension, or it would look like a counter.
        shape = spec.shape or (1,)
        slots = {name: slot.view(shape) if slot.ndim else slot.clone() for name, slot in variable_slots(span, runs)}
        yield _Copy(spec, value, slots)


def _write_whole(folder: Path, suffix: str, copies: Sequence[_Copy]) -> Maps:
    values_file, slots_file = f"model-{suffix}", f"optimizer-{suffix}"
    values: dict[str, torch.Tensor] = {}
    for copy in copies:
        if values.setdefault(copy.spec.name, copy.value) is not copy.value:
            raise name_clash(copy.spec.name, str(folder / values_file))
    slots = {f"{copy.spec.name}/{name}": slot for copy in copies for name, slot in copy.slots.items()}
    write_tensors(folder / values_file, values)
    write_tensors(folder / slots_file, slots)
    return Maps(dict.fromkeys(values, values_file), dict.fromkeys(slots, slots_file))


def _write_part(folder: Path, copy: _Copy, shard: Shard) -> Maps:
    values_file, slots_file = rows_files(shard.variable)
    write_rows(folder / values_file, {shard.variable: _rows(copy.value, shard)})
    slots = {f"{shard.variable}/{name}": _rows(slot, shard) for name, slot in copy.slots.items()}
    if slots:
        write_rows(folder / slots_file, slots)
    return Maps({shard.variable: values_file}, dict.fromkeys(slots, slots_file))


def _rows(tensor: torch.Tensor, shard: Shard) -> Rows:
    """A part's rows of a whole tensor. Of a counter, which differs by what is under way at most, the first part's."""
    if tensor.ndim == 0:
        return Rows((), 0, tensor.reshape(1)[: int(shard.index == 0)])
    return Rows((shard.rows, *tensor.shape[1:]), shard.start, tensor)


# --- reading -----------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where a variable, or a part of one, lies in a store."""

    arena: StoredArena
    spec: VariableSpec
    span: Range

    @property
    def variable(self) -> str:
        """The name of the whole variable."""
        return self.spec.shard.variable if self.spec.shard else self.spec.name

    @property
    def rows(self) -> Range | None:
        """Which of its rows lie here, None for all."""
        shard = self.spec.shard
        return (shard.start, shard.start + self.spec.shape[0]) if shard else None

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """The shape of the whole variable."""
        shard = self.spec.shard
        return (shard.rows, *self.spec.shape[1:]) if shard else self.spec.shape


_Places = Mapping[str, Sequence[_Place]]
"""By the name of the whole variable; several where a ps holds several parts of one."""


def read_shard(store: Store, directory: str) -> None:
    """Read the variables and slots that a store holds from a whole checkpoint of any number of shards.

    Of a variable that lies here in parts only their rows are read.

    Raises:
        CheckpointError: If the checkpoint is cut short, or belongs to another model or optimizer.
    """
    folder = Path(directory)
    weight_map = read_index(folder / VALUES_INDEX)
    slot_map = read_index(folder / SLOTS_INDEX)
    places = _places(store)
    missing = next((name for name in places if name not in weight_map), None)
    if missing is not None:
        raise CheckpointError(
            f"checkpoint {directory} has no variable {missing!r}; does it belong to another model?", directory
        )
    for tensor in stored_tensors(folder, {name: weight_map[name] for name in places}):
        for place in places[tensor.name]:
            _restore_value(place, tensor, directory)
    _restore_slots(places, slot_map, folder)
    for arena in store.held:
        arena.join_runs()


def _places(store: Store) -> _Places:
    places: dict[str, list[_Place]] = defaultdict(list)
    for arena in store.held:
        for spec, span in zip(arena.layout.variables, arena.layout.ranges, strict=True):
            place = _Place(arena, spec, span)
            places[place.variable].append(place)
    return places


def _restore_value(place: _Place, tensor: StoredTensor, directory: str) -> None:
    spec, shape = place.spec, place.whole_shape
    if (tensor.dtype, tensor.shape) != (spec.dtype, shape):
        raise CheckpointError(
            f"checkpoint {directory}: variable {place.variable!r} is {tensor.dtype}{list(tensor.shape)}, "
            f"this model has {spec.dtype}{list(shape)}; does it belong to another model?",
            directory,
        )
    flat = tensor.read(place.rows).flatten()
    for start, stop in pieces([place.span]):
        place.arena.apply("assign", (start, stop), flat[start - place.span[0] : stop - place.span[0]], None)


def _restore_slots(places: _Places, slot_map: Mapping[str, str], folder: Path) -> None:
    mine = {key: file for key, file in slot_map.items() if variable_of(key) in places}
    states: dict[_Place, dict[str, torch.Tensor]] = defaultdict(dict)
    for tensor in stored_tensors(folder, mine):
        variable, _, slot = tensor.name.rpartition("/")
        for place in places[variable]:
            with _fitting(place, folder):
                states[place][slot] = _slot(place, tensor)
    for place, state in states.items():
        with _fitting(place, folder):
            place.arena.load_slots(place.span, state)


def _slot(place: _Place, tensor: StoredTensor) -> torch.Tensor:
    """A slot of a variable, or of the rows that lie here: flat, or a scalar."""
    expected = place.whole_shape or (1,)
    if tensor.shape not in ((), expected):
        raise ValueError(f"slot {tensor.name!r} must have shape {expected} or be a scalar, got {tensor.shape}")
    slot = tensor.read(place.rows)
    return slot.flatten() if slot.ndim else slot


@contextlib.contextmanager
def _fitting(place: _Place, folder: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise CheckpointError(
            f"checkpoint {folder}: the optimizer state of {place.variable!r} does not fit: {error}; "
            "was it written with another optimizer?",
            str(folder),
        ) from error
