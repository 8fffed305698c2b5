"""A checkpoint that was written before a program's variable was made, such as STOP, restores (Y02, N04)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import paramserver as ps
from paramserver.checkpoint.model_dir import CheckpointManager
from paramserver.distribute.checkpoints import write_checkpoint
from paramserver.errors import CheckpointError
from paramserver.estimator.hooks.early_stopping import STOP


def prepared(model: nn.Module) -> ps.ParameterServerStrategy:
    """A strategy of one process, with a model on its ps."""
    strategy = ps.ParameterServerStrategy(ps.SimpleClusterResolver(ps.ClusterSpec({})))
    with strategy.scope():
        strategy.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return strategy


def test_y02_a_variable_that_a_checkpoint_lacks_keeps_its_value(tmp_path: Path) -> None:
    strategy = prepared(nn.Linear(2, 1))
    path = write_checkpoint(strategy.connect(), CheckpointManager(str(tmp_path)), 0, {})
    with strategy.scope():
        stop = ps.Variable(0, name=STOP)
    stop.assign(1)
    strategy.connect().restore(path)
    assert int(stop) == 1


def test_a_variable_of_the_model_that_a_checkpoint_lacks_is_an_error(tmp_path: Path) -> None:
    small = prepared(nn.Linear(2, 1, bias=False))
    path = write_checkpoint(small.connect(), CheckpointManager(str(tmp_path)), 0, {})
    with pytest.raises(CheckpointError, match="has no variable 'bias'; does it belong to another model"):
        prepared(nn.Linear(2, 1)).connect().restore(path)
