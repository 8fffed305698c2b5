"""Reading the variables and slots of a ps from a checkpoint of any number of shards.

Rules
    * Only the content of this ps is read: of a partitioned variable, only the rows that are here.
    * Values are read straight into their place, many blocks at once, so that several threads can share the work. The
      blocks are locked meanwhile, which delays no task, because a restore comes before the first step.
    * Slots are read block by block, and take memory for one block. A variable without slots in the checkpoint begins
      anew: its present slots come from other updates.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch

from paramserver.checkpoint.folder import Read, Steps, read_header
from paramserver.checkpoint.index import variable_of
from paramserver.checkpoint.reading import by_file, held_tensor
from paramserver.checkpoint.tensor_file import FileTensor
from paramserver.errors import CheckpointError
from paramserver.layout.blocks import BLOCK, pieces
from paramserver.layout.settings import Setting
from paramserver.layout.variables import DTYPES, shown
from paramserver.memory.arena_memory import tensor_bytes
from paramserver.store.shards.parts import StoredPart, by_variable
from paramserver.store.store import Store

READ_SIZE = 32 * BLOCK
"""Elements of a value that are read at once."""

Located = tuple[str, FileTensor]
"""The name of a file, and a tensor in it."""


def read_shard(store: Store, directory: str, weight_map: Mapping[str, str], slot_map: Mapping[str, str]) -> Steps[None]:
    """Read the variables and slots of a store; the caller carries out the steps, see `checkpoint.folder`.

    Args:
        store: The store to fill.
        directory: The folder of the checkpoint, for messages.
        weight_map: The file of each value.
        slot_map: The file of each slot.

    Raises:
        CheckpointError: If the checkpoint is truncated, or belongs to another model or optimizer.
    """
    held = _found(store, weight_map, directory)
    reader = _Reader(directory)
    for name, value in (yield from _located({name: weight_map[name] for name in held}, directory)).items():
        for place in held[name]:
            yield from reader.read_value(place, value)
    yield from _replace_slots(held, slot_map, reader)
    for arena in store.held:
        arena.join_runs()


def read_slots(
    store: Store, groups: Sequence[tuple[Sequence[str], dict[str, Setting]]], slot_map: Mapping[str, str], source: str
) -> Steps[None]:
    """Replace the slots of variables; a variable without slots in ``slot_map`` begins anew. Values stay as they are.

    Args:
        store: The store to change.
        groups: Names of variables, and the settings with which the slots of these variables were made.
        slot_map: The file of each slot.
        source: The origin of the slots, for messages.

    Raises:
        CheckpointError: If the slots are not those of the rule with these settings.
    """
    held, reader = by_variable(store), _Reader(source)
    wanted = {name: held[name] for names, _ in groups for name in names if name in held}
    for names, settings in groups:
        for place in {id(place.arena): place for name in names for place in held.get(name, ())}.values():
            with reader.fitting(place):
                place.arena.adopt(settings)
    yield from _replace_slots(wanted, slot_map, reader)
    for arena in store.held:
        arena.join_runs()


def _replace_slots(held: Mapping[str, list[StoredPart]], slot_map: Mapping[str, str], reader: _Reader) -> Steps[None]:
    mine = {key: file for key, file in slot_map.items() if variable_of(key) in held}
    found = _by_variable((yield from _located(mine, reader.directory)))
    for name, its_places in held.items():
        for place in its_places:
            yield from reader.read_slots(place, found.get(name, {}))


def _found(store: Store, weight_map: Mapping[str, str], directory: str) -> dict[str, list[StoredPart]]:
    """Return the parts to read.

    One of the program's own variables keeps its value if the checkpoint is older than the variable.
    """
    own = {id(arena) for arena in store.variables.values()}
    held = by_variable(store)
    lacking = [name for name in held if name not in weight_map]
    for name in lacking:
        if id(held[name][0].arena) not in own:
            raise CheckpointError(
                f"checkpoint {directory} has no variable {name!r}; does it belong to another model?", directory
            )
    return {name: places for name, places in held.items() if name in weight_map}


def _located(files: Mapping[str, str], directory: str) -> Steps[dict[str, Located]]:
    found: dict[str, Located] = {}
    for file, names in by_file(files).items():
        held = yield from read_header(directory, file)
        found |= {name: (file, held_tensor(held, name, f"{directory}/{file}")) for name in names}
    return found


def _by_variable(slots: Mapping[str, Located]) -> dict[str, dict[str, Located]]:
    """Group the slots by variable, under the names of the slots alone."""
    found: dict[str, dict[str, Located]] = defaultdict(dict)
    for key, located in slots.items():
        variable, _, name = key.rpartition("/")
        found[variable][name] = located
    return found


class _Reader:
    """Reads the values and slots of parts, block by block, always into the same memory."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self._memory: dict[str, torch.Tensor] = defaultdict(lambda: torch.empty(0, dtype=torch.uint8, device="cpu"))

    def read_value(self, place: StoredPart, value: Located) -> Steps[None]:
        file, tensor = value
        if tensor.spec != place.whole:
            raise CheckpointError(
                f"checkpoint {self.directory}: variable {place.variable!r} is {shown(*tensor.spec)}, this model has "
                f"{place.whole.dtype}{list(place.whole.shape)}; does it belong to another model?",
                self.directory,
            )
        first, end = place.span
        for start in range(first, end, READ_SIZE):
            stop = min(start + READ_SIZE, end)
            offset = tensor.begin + (place.skipped + start - first) * tensor.spec.itemsize
            with place.arena.filling((start, stop)) as room:
                yield Read(file, offset, tensor_bytes(room))

    def read_slots(self, place: StoredPart, slots: Mapping[str, Located]) -> Steps[None]:
        if not slots:
            place.arena.reset_slots(place.span)
            return
        with self.fitting(place):
            _check_shapes(place, slots)
        for start, stop in pieces([place.span]):
            state: dict[str, torch.Tensor] = {}
            for name, (file, tensor) in slots.items():
                skipped, count = (place.skipped + start - place.span[0], stop - start) if tensor.spec.shape else (0, 1)
                slot = yield from self._read(name, file, tensor, skipped, count)
                state[name] = slot if tensor.spec.shape else slot.view(())
            with self.fitting(place):
                place.arena.load_slots((start, stop), state)

    def _read(self, name: str, file: str, tensor: FileTensor, skipped: int, count: int) -> Steps[torch.Tensor]:
        itemsize = tensor.spec.itemsize
        if len(self._memory[name]) < count * itemsize:
            self._memory[name] = torch.empty(BLOCK * itemsize, dtype=torch.uint8, device="cpu")
        elements = self._memory[name][: count * itemsize].view(DTYPES[tensor.spec.dtype])
        yield Read(file, tensor.begin + skipped * itemsize, tensor_bytes(elements))
        return elements

    @contextlib.contextmanager
    def fitting(self, place: StoredPart) -> Iterator[None]:
        """Turn an error about the slots of a part into an error of the checkpoint."""
        try:
            yield
        except ValueError as error:
            raise CheckpointError(
                f"checkpoint {self.directory}: the optimizer state of {place.variable!r} does not fit: {error}; "
                "was it written with another optimizer?",
                self.directory,
            ) from error


def _check_shapes(place: StoredPart, slots: Mapping[str, Located]) -> None:
    for _, tensor in slots.values():
        if tensor.spec.shape not in ((), place.slot_shape):
            raise ValueError(
                f"slot {tensor.name!r} must have shape {place.slot_shape} or be a scalar, got {tensor.spec.shape}"
            )
