"""What a lookup asks for."""

import numpy as np
import pytest

from paramserver.distribute.embeddings import unique


@pytest.mark.parametrize("largest", [0, 5, 1 << 40])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 1000])
def test_each_id_is_found_once_and_every_place_of_it(largest, count):
    ids = np.random.default_rng(0).integers(0, largest, count, endpoint=True)
    before = ids.copy()
    wanted, places = unique(ids)
    expected = np.unique(ids, return_inverse=True)
    assert wanted.tolist() == expected[0].tolist()
    assert places.tolist() == expected[1].tolist()
    assert ids.tolist() == before.tolist()
