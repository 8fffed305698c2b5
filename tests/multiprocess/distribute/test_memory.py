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

# As a step's activations do, they come together and go together.
TENSORS_OF_A_FEW_MB = """
import resource, torch
import paramserver as ps

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    tensors = [torch.ones(1 << 20) for _ in range(4)]

strategy = ps.ParameterServerStrategy(session_creation_timeout=60)
with strategy.scope():
    module = torch.nn.Linear(2, 2)
    strategy.prepare(module, torch.optim.SGD(module.parameters(), lr=0.1))
for _ in range(10):
    step()
before = faults()
for _ in range(10):
    step()
print("pages in ten steps:", faults() - before)
"""


def printed(program: str, tmp_path: Path, warm: Warm) -> float:
    """The number that a program prints behind a colon, in a run of its own."""
    (tmp_path / "script.py").write_text(program)
    done = warm.launch("script.py", cwd=tmp_path)
    found = re.search(r": (\S+)$", done.stdout, re.MULTILINE)
    assert found is not None, done.stdout + done.stderr
    return float(found[1])


def test_the_memory_that_a_model_had_before_prepare_is_given_back(tmp_path: Path, warm: Warm) -> None:
    """Left are its values. Its gradients are in shared memory, which is not counted here."""
    assert printed(MANY_SMALL_PARAMETERS, tmp_path, warm) < 1.5


def test_a_step_gets_the_memory_that_the_one_before_has_freed(tmp_path: Path, warm: Warm) -> None:
    """Else each gets 16 MB in 4,096 new pages."""
    assert printed(TENSORS_OF_A_FEW_MB, tmp_path, warm) < 4096
