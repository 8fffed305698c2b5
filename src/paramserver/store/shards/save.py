"""How a ps writes its shard of a checkpoint: plain safetensors files, values in some, slots in others.

The names of values are the model's; a slot of variable ``fc.weight`` is called ``fc.weight/exp_avg``. Every part of a
partitioned variable is written into that variable's own two files, where the parts make one tensor. The indexes
that the chief writes beside them (``model.safetensors.index.json``, as Hugging Face's tools read it) say which file
holds what, so that a checkpoint loads into any number of ps tasks, with any partitioning.

Rules
    * Pushes go on meanwhile. A block is locked while it is copied, and written after that: a push waits for the copy
      of one block, never for a disk. So the values and slots of a block are of one version.
    * What is not finite is not written; `finite` says what that is about.
    * Memory is taken for one block, whatever the size of the store.
    * The header of a file comes first, so the slots that there are when it begins are the slots it holds. Variables
      whose first update comes later get a file of their own at the end; this is the one case that takes more memory.
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
"""Bytes of a page of memory, in which a system keeps what it has of a file, where they are largest."""

_Check = Callable[[StoredBlocks, int, list[tuple[StoredPart, Range]], BlockCopy], None]
"""Raises if one of the values or slots of a block must not be written; see `check_finite`."""

_VALUE = ""
"""What the value of a variable is called among its slots."""


@dataclass(frozen=True, kw_only=True)
class WrittenShard:
    """What `write_shard` wrote.

    Attributes:
        weight_map: The file of each value.
        slot_map: The file of each slot.
        nbytes: Of values and slots.
        pause: Seconds for which blocks were locked, in all; no push waits longer.
        longest_pause: Seconds for which one block was locked, at most.
    """

    weight_map: dict[str, str]
    slot_map: dict[str, str]
    nbytes: int
    pause: float
    longest_pause: float


def write_shard(store: Store, shard: int, num_shards: int) -> Steps[WrittenShard]:
    """Write the values and slots of a store; `checkpoint_folder` says who carries out the steps.

    Raises:
        CheckpointError: If two variables have one name.
        NotFiniteError: If a trained value or a slot is NaN or infinite; see `finite`.
    """
    check = partial(check_finite, store.task)
    return (yield from _write(stored_parts(store), f"{shard + 1:05d}-of-{num_shards:05d}", check))


def write_slots(store: Store, shard: int, num_shards: int, variables: Collection[str]) -> Steps[WrittenShard]:
    """Write the slots of some variables into the files that `write_shard` writes them into, and no values.

    ``weight_map`` names the files that the values would be in. What is not finite is written as it is.

    Raises:
        CheckpointError: If two variables have one name.
    """
    wanted = [place for place in stored_parts(store) if place.variable in variables]
    return (yield from _write(wanted, f"{shard + 1:05d}-of-{num_shards:05d}", lambda *_: None, with_values=False))


def _write(held: Iterable[StoredPart], suffix: str, check: _Check, *, with_values: bool = True) -> Steps[WrittenShard]:
    # Wide dtypes first, as they stand in a file, so that it is written from its beginning to its end.
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
    """Where something of a place goes."""

    file: str
    tensor: str


class _Files:
    """Files that are written: of one of them for all whole variables, and one for each that is partitioned.

    Args:
        wanted: What is written of each place: the kind of each slot, or of the value.
        file_of: The name of the file for a place.

    Attributes:
        nbytes: Bytes that were written into it, without headers.
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
        """Write the headers."""
        shared = {target.file for place, all_ in self._targets.items() if place.shard for target in all_.values()}
        for file, layout in self._layouts.items():
            yield Write(file, layout.size, file in shared, 0, memoryview(layout.header))

    def write(self, piece: _Piece) -> Iterator[Write]:
        """Write what is wanted of a piece."""
        place, (start, _), state = piece
        for name, target in self._targets.get(place, {}).items():
            if name in state and (state[name].ndim or (place.is_first and start == place.span[0])):
                content, layout = tensor_bytes(state[name].view(-1)), self._layouts[target.file]
                first, last = _held(layout.begins[target.tensor], place, state[name])
                offset = first + (start - place.span[0]) * state[name].element_size()  # a scalar comes with the first
                is_shared = place.shard is not None and not _fills_pages(offset, content.nbytes, (first, last))
                self.nbytes += content.nbytes
                yield Write(target.file, layout.size, is_shared, offset, content)

    def files(self, place: StoredPart) -> dict[str, str]:
        """The file of each tensor of a place."""
        return {target.tensor: target.file for target in self._targets.get(place, {}).values()}


def _held(begin: int, place: StoredPart, slot: torch.Tensor) -> Range:
    """The bytes of a file that come from a place, of a tensor that begins there."""
    if not slot.ndim:
        return begin, begin + slot.nbytes
    first = begin + place.skipped * slot.element_size()
    return first, first + place.spec.size * slot.element_size()


def _fills_pages(offset: int, nbytes: int, held: Range) -> bool:
    """Whether the pages of a file into which bytes are written lie in what is held here."""
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
    """The slots that each place has by now."""
    return _complete(
        (here[which], span, runs[run][2])
        for arena, here in _by_arena(held).items()
        for runs in [list(arena.slot_kinds())]
        for which, run, span in overlaps([place.span for place in here], [run[:2] for run in runs])
    )


def _complete(
    runs: Iterable[tuple[StoredPart, Range, Mapping[str, SlotKind]]],
) -> dict[StoredPart, dict[str, SlotKind]]:
    """The slots that a place has for all its elements. While its first update is under way, it has them for some."""
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
