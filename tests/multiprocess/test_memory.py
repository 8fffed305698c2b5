"""What a worker's memory is, measured in a process of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.multiprocess.warm import Warm

pytestmark = pytest.mark.multiprocess

# Of parameters that lie among each other in the heap; larger ones have memory of their own, which goes when they do.
MANY_SMALL_PARAMETERS = """
import re, torch
from pathlib import Path
import paramserver as ps

COUNT, ELEMENTS = 500, 16_000

def resident():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

strategy = ps.ParameterServerStrategy(session_creation_timeout=60)
before = resident()
with strategy.scope():
    module = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(ELEMENTS)) for _ in range(COUNT)])
    strategy.prepare(module, torch.optim.SGD(module.parameters(), lr=0.1))
print("copies of the model:", (resident() - before) / (COUNT * ELEMENTS * 4))
"""


def test_the_memory_that_a_model_had_before_prepare_is_given_back(tmp_path: Path, warm: Warm) -> None:
    """Left are its values. Its gradients are in shared memory, which is not counted here."""
    (tmp_path / "script.py").write_text(MANY_SMALL_PARAMETERS)
    done = warm.launch("script.py", cwd=tmp_path)
    found = re.search(r"copies of the model: (\S+)", done.stdout)
    assert found is not None, done.stdout + done.stderr
    assert float(found[1]) < 1.5
