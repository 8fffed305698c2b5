"""Writing the shard of a ps: plain safetensors files, some for values and others for slots.

The names of values are the model's; a slot of variable ``fc.weight`` is called ``fc.weight/exp_avg``. The parts of a
partitioned variable are all written into two files of that variable, where they make one tensor. The chief writes the
indexes beside them (``model.safetensors.index.json``, as Hugging Face's tools read it), which name the file of each
tensor, so that a checkpoint loads into any number of ps tasks, with any partitioning.

Rules
    * Pushes go on meanwhile. A block is locked while it is copied, and written after that: a push waits for the copy of
      one block, never for a disk. So the values and slots of a block are of one version.
    * Values that are not finite are not written; `finite` has the details.
    * Memory is taken for one block, for any size of the store.
    * The header of a file comes first, so the file holds the slots that exist when it begins. Variables whose first
      update comes later get a file of their own at the end; this is the only case that takes more memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from paramserver.checkpoint.folder import Steps, Write
from paramserver.checkpoint.index import Maps, merge_maps, name_clash, rows_files
from paramserver.checkpoint.tensor_file import FileLayout, TensorSpec, lay_out
from paramserver.layout.blocks import BLOCK, Range, pieces
from paramserver.memory.arena_memory import tensor_bytes
from paramserver.store.blocks import BlockCopy, SlotKind, StoredBlocks
from paramserver.store.finite import check_finite
from paramserver.store.shards.parts import StoredPart, overlaps, stored_parts
from paramserver.store.store import Store

PAGE = 1 << 16
"""The largest size of a memory page, in which a system caches the content of a file, in bytes."""

_Check = Callable[[StoredBlocks, int, list[tuple[StoredPart, Range]], BlockCopy], None]
"""Raises an error if a value or slot of a block must not be written; see `check_finite`."""

_VALUE = ""
"""The key for the value of a variable among its slots."""


@dataclass(frozen=True, kw_only=True)
class WrittenShard:
    """The result of `write_shard`.

    Attributes:
        weight_map: The file of each value.
        slot_map: The file of each slot.
        nbytes: Bytes of values and slots.
        pause: Seconds for which blocks were locked in total; no push waits longer.
        longest_pause: Seconds for which one block was locked at most.
    """

    weight_map: dict[str, str]
    slot_map: dict[str, str]
    nbytes: int
    pause: float
    longest_pause: float


def write_shard(store: Store, shard: int, num_shards: int) -> Steps[WrittenShard]:
    """Write the values and slots of a store; the caller carries out the steps, see `checkpoint.folder`.

    Raises:
        CheckpointError: If two variables have the same name.
        NotFiniteError: If a trained value or a slot is NaN or infinite; see `finite`.
    """
    check = partial(check_finite, store.task)
    return (yield from _write(stored_parts(store), f"{shard + 1:05d}-of-{num_shards:05d}", check))


def write_slots(store: Store, shard: int, num_shards: int, variables: Collection[str]) -> Steps[WrittenShard]:
    """Write the slots of some variables into the same files as `write_shard` does, without the values.

    ``weight_map`` names the files that the values would be in. Slots that are not finite are written as they are.

    Raises:
        CheckpointError: If two variables have the same name.
    """
    wanted = [place for place in stored_parts(store) if place.variable in variables]
    return (yield from _write(wanted, f"{shard + 1:05d}-of-{num_shards:05d}", lambda *_: None, with_values=False))


def _write(held: Iterable[StoredPart], suffix: str, check: _Check, *, with_values: bool = True) -> Steps[WrittenShard]:
    # Wide dtypes first, in the order of the tensors in a file, so that it is written from beginning to end.
    held = sorted(held, key=lambda place: -place.whole.itemsize)
    named = _Files({place: {_VALUE: SlotKind(place.spec.dtype, False)} for place in held}, _values_file(suffix))
    values = named if with_values else _Files({}, _values_file(suffix))
    slots = _Files(_slots_of(held), _slots_file(suffix))
    yield from values.begin()
    yield from slots.begin()
    copy, late = BlockCopy(), list[_Piece]()
    for arena, here in _by_arena(held).items():
        yield from _write_arena(check, arena, here, values, slots, copy, late)
    later = _Files(_complete((piece.place, piece.span, piece.kinds) for piece in late), _slots_file(f"{suffix}-later"))
    yield from later.begin()
    for piece in late:
        yield from later.write(piece)
    weight_map, slot_map = merge_maps(_maps(held, named, slots, later))
    return WrittenShard(
        weight_map=weight_map,
        slot_map=slot_map,
        nbytes=values.nbytes + slots.nbytes + later.nbytes,
        pause=copy.pause,
        longest_pause=copy.longest,
    )


class _Piece(NamedTuple):
    """The value or the slots of elements ``[start, stop)`` of an arena, which belong to one variable."""

    place: StoredPart
    span: Range
    state: Mapping[str, torch.Tensor]

    @property
    def kinds(self) -> dict[str, SlotKind]:
        return {name: SlotKind.of(slot) for name, slot in self.state.items()}

    def cloned(self) -> _Piece:
        return self._replace(state={name: slot.clone() for name, slot in self.state.items()})


def _write_arena(
    check: _Check,
    arena: StoredBlocks,
    held: Iterable[StoredPart],
    values: _Files,
    slots: _Files,
    copy: BlockCopy,
    late: list[_Piece],
) -> Steps[None]:
    for block, here in _by_block(held).items():
        arena.copy_block(block, copy)
        check(arena, block, here, copy)
        for place, (start, stop) in here:
            value = copy.values[start - block * BLOCK : stop - block * BLOCK]
            yield from values.write(_Piece(place, (start, stop), {_VALUE: value}))
        for piece in _slot_pieces(here, copy):
            if piece.place in slots:
                yield from slots.write(piece)
            else:
                late.append(piece.cloned())


def _slot_pieces(here: list[tuple[StoredPart, Range]], copy: BlockCopy) -> Iterator[_Piece]:
    for which, run, (start, stop) in overlaps([span for _, span in here], [run[:2] for run in copy.runs]):
        first, _, state = copy.runs[run]
        part = {name: slot[start - first : stop - first] if slot.ndim else slot for name, slot in state.items()}
        yield _Piece(here[which][0], (start, stop), part)


# --- what goes where


class _Target(NamedTuple):
    """The file and the name of a tensor."""

    file: str
    tensor: str


class _Files:
    """Files of one kind to write: one for all whole variables, and one for each partitioned variable.

    Args:
        wanted: The tensors of each part: the kind of each slot, or of the value.
        file_of: Returns the name of the file for a part.

    Attributes:
        nbytes: Bytes written into the files, without headers.
    """

    def __init__(
        self, wanted: Mapping[StoredPart, Mapping[str, SlotKind]], file_of: Callable[[StoredPart], str]
    ) -> None:
        self.nbytes = 0
        tensors: dict[str, dict[str, TensorSpec]] = defaultdict(dict)
        names: dict[StoredPart, dict[str, str]] = {}
        for place, kinds in wanted.items():
            in_file = tensors[file_of(place)]
            if place.shard is None and place.variable in in_file:
                raise name_clash(place.variable, file_of(place))
            names[place] = {name: _tensor_name(place, name) for name in sorted(kinds)}
            in_file |= {tensor: _spec(place, name, kinds[name]) for name, tensor in names[place].items()}
        self._layouts: dict[str, FileLayout] = {file: lay_out(held) for file, held in tensors.items() if held}
        self._targets = {
            place: {name: _Target(file_of(place), tensor) for name, tensor in each.items()}
            for place, each in names.items()
        }

    def __contains__(self, place: StoredPart) -> bool:
        return place in self._targets

    def begin(self) -> Iterator[Write]:
        """Yield the writes of the headers."""
        shared = {target.file for place, all_ in self._targets.items() if place.shard for target in all_.values()}
        for file, layout in self._layouts.items():
            yield Write(file, layout.size, file in shared, 0, memoryview(layout.header))

    def write(self, piece: _Piece) -> Iterator[Write]:
        """Yield the writes of the wanted tensors of a piece."""
        place, (start, _), state = piece
        for name, target in self._targets.get(place, {}).items():
            if name in state and (state[name].ndim or (place.is_first and start == place.span[0])):
                content, layout = tensor_bytes(state[name].view(-1)), self._layouts[target.file]
                first, last = _held(layout.begins[target.tensor], place, state[name])
                offset = first + (start - place.span[0]) * state[name].element_size()  # a scalar is in the first piece
                is_shared = place.shard is not None and not _fills_pages(offset, content.nbytes, (first, last))
                self.nbytes += content.nbytes
                yield Write(target.file, layout.size, is_shared, offset, content)

    def files(self, place: StoredPart) -> dict[str, str]:
        """Return the file of each tensor of a part."""
        return {target.tensor: target.file for target in self._targets.get(place, {}).values()}


def _held(begin: int, place: StoredPart, slot: torch.Tensor) -> Range:
    """Return the bytes of a file that a part fills, for a tensor that begins at ``begin``."""
    if not slot.ndim:
        return begin, begin + slot.nbytes
    first = begin + place.skipped * slot.element_size()
    return first, first + place.spec.size * slot.element_size()


def _fills_pages(offset: int, nbytes: int, held: Range) -> bool:
    """Return whether the written bytes are on pages of the file that belong to this part alone."""
    return held[0] <= offset // PAGE * PAGE and -(-(offset + nbytes) // PAGE) * PAGE <= held[1]


def _tensor_name(place: StoredPart, name: str) -> str:
    return f"{place.variable}/{name}" if name else place.variable


def _spec(place: StoredPart, name: str, kind: SlotKind) -> TensorSpec:
    if kind.is_scalar:
        return TensorSpec(kind.dtype, ())
    return TensorSpec(kind.dtype, place.slot_shape if name else place.whole.shape)


def _values_file(suffix: str) -> Callable[[StoredPart], str]:
    return lambda place: rows_files(place.variable)[0] if place.shard else f"model-{suffix}.safetensors"


def _slots_file(suffix: str) -> Callable[[StoredPart], str]:
    return lambda place: rows_files(place.variable)[1] if place.shard else f"optimizer-{suffix}.safetensors"


def _by_arena(held: Iterable[StoredPart]) -> dict[StoredBlocks, list[StoredPart]]:
    found: dict[StoredBlocks, list[StoredPart]] = defaultdict(list)
    for place in held:
        found[place.arena].append(place)
    return found


def _by_block(held: Iterable[StoredPart]) -> dict[int, list[tuple[StoredPart, Range]]]:
    found: dict[int, list[tuple[StoredPart, Range]]] = defaultdict(list)
    for place in held:
        for piece in pieces([place.span]):
            found[piece[0] // BLOCK].append((place, piece))
    return found


def _slots_of(held: Iterable[StoredPart]) -> dict[StoredPart, dict[str, SlotKind]]:
    """Return the present slots of each part."""
    return _complete(
        (here[which], span, runs[run][2])
        for arena, here in _by_arena(held).items()
        for runs in [list(arena.slot_kinds())]
        for which, run, span in overlaps([place.span for place in here], [run[:2] for run in runs])
    )


def _complete(
    runs: Iterable[tuple[StoredPart, Range, Mapping[str, SlotKind]]],
) -> dict[StoredPart, dict[str, SlotKind]]:
    """Return the slots that a part has for all of its elements; during its first update, it has them only for some."""
    covered: dict[tuple[StoredPart, str, SlotKind], int] = defaultdict(int)
    for place, (start, stop), kinds in runs:
        for name, kind in kinds.items():
            covered[place, name, kind] += stop - start
    found: dict[StoredPart, dict[str, SlotKind]] = defaultdict(dict)
    for (place, name, kind), count in covered.items():
        if count == place.spec.size:
            found[place][name] = kind
    return dict(found)


def _maps(held: Iterable[StoredPart], values: _Files, *slots: _Files) -> Iterator[Maps]:
    for place in held:
        slot_files = {tensor: file for files in slots for tensor, file in files.files(place).items()}
        yield Maps(values.files(place), slot_files)
