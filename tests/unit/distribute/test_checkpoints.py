"""What a loop of one's own is told of its checkpoints, and of what a run loses."""

from __future__ import annotations

from pathlib import Path

import pytest

from paramserver.distribute.checkpoints import Loss, find_checkpoint
from paramserver.errors import CheckpointError

LOSS = Loss(tasks="ps:1", reached=500, variables=3, own=["seen", "best"])


def test_a_loss_with_a_checkpoint_names_what_is_not_in_it() -> None:
    said = LOSS.with_checkpoint("run/ckpt-401", 401, {"weight", "seen"})
    assert said == (
        "ps:1 came back empty; all ps tasks go back to run/ckpt-401: 99 updates are lost (back from step 500 to 401); "
        "1 ps.Variables go back to their first values: best"
    )


def test_a_loss_without_a_checkpoint_names_all_and_the_way() -> None:
    said = LOSS.without_checkpoint(498)
    assert "the chief's values of step 498, and 2 later updates are lost" in said
    assert "the optimizer state of 3 variables there starts anew; 2 ps.Variables" in said
    assert "seen, best. Call strategy.save(directory)" in said


def test_a_place_means_itself_or_its_latest_checkpoint(tmp_path: Path) -> None:
    assert find_checkpoint(str(tmp_path)) is None
    assert find_checkpoint(str(tmp_path / "none")) is None
    with pytest.raises(CheckpointError, match="ckpt-3 is not there, or is cut short"):
        find_checkpoint(str(tmp_path / "ckpt-3"))
    for name in ("ckpt-3", "ckpt-5"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors.index.json").write_text("{}")
    (tmp_path / "checkpoint").write_text('{"latest": "ckpt-5", "retained": ["ckpt-3", "ckpt-5"]}')
    assert find_checkpoint(str(tmp_path)) == str(tmp_path / "ckpt-5")
    assert find_checkpoint(str(tmp_path / "ckpt-3")) == str(tmp_path / "ckpt-3")
