"""Where the rows of a push lie in the memory that a worker shares."""

import numpy as np
import pytest

from paramserver.layout.arena import ArenaLayout
from paramserver.layout.variables import VariableSpec
from paramserver.memory.arena_memory import RowsFile, rows_bytes


def table(rows, width, dtype="float32"):
    return ArenaLayout(dtype, None, (VariableSpec("words", (rows, width), dtype),), is_table=True)


LAYOUTS = [
    (),
    (ArenaLayout("float32", None, (VariableSpec("w", (9,), "float32"),)),),
    (table(5, 3), table(7, 1, "bfloat16")),
    (table(1000, 16),),
]


@pytest.mark.parametrize("layouts", LAYOUTS)
def test_there_is_room_for_all_rows_of_all_tables_and_no_more(layouts):
    file = RowsFile(np.empty(rows_bytes(layouts), np.uint8))
    for layout in layouts:
        if layout.is_table:
            ids = file.next(8 * layout.table_shape[0]).view(np.int64)
            values = file.next(layout.nbytes)
            ids.fill(1)
            values.fill(2)
            assert (ids == 1).all()
    with pytest.raises(ValueError, match="1 bytes of rows from byte"):
        file.next(1)


def test_both_ends_find_the_same_places_in_every_push():
    data = np.zeros(1024, np.uint8)
    ours, theirs = RowsFile(data), RowsFile(data)
    for number in (1, 2):
        ours.rewind()
        theirs.rewind()
        for nbytes in (3, 0, 64, 1):
            ours.next(nbytes).fill(number)
            assert theirs.next(nbytes).tolist() == [number] * nbytes


@pytest.mark.parametrize("nbytes", [-1, 129, 1 << 70])
def test_there_is_no_place_beyond_the_end(nbytes):
    file = RowsFile(np.empty(128, np.uint8))
    with pytest.raises(ValueError, match="of 128 that are shared"):
        file.next(nbytes)
    assert len(file.next(128)) == 128
