"""Which policy a buffer has."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import paramserver as ps
from paramserver.distribute.bound.buffer_policies import BufferPolicy, choose
from paramserver.distribute.bound.plan import persistent_buffers
from paramserver.errors import ConfigError

DTYPES = {
    "norm.running_mean": torch.float32,
    "norm.num_batches_tracked": torch.int64,
    "moco.queue": torch.float32,
    "moco.queue_ptr": torch.int64,
    "is_set": torch.bool,
    "num_flags": torch.bool,
}


def chosen(**policies: str) -> dict[str, str]:
    return {name: policy.value for name, policy in choose(DTYPES, policies).items()}


def test_what_counts_or_averages_is_summed_and_of_all_else_the_last_counts() -> None:
    assert chosen() == {
        "norm.running_mean": "sum",
        "norm.num_batches_tracked": "sum",
        "moco.queue": "last",
        "moco.queue_ptr": "last",
        "is_set": "last",
        "num_flags": "last",
    }


@pytest.mark.parametrize("module", [nn.BatchNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=True)], ids=str)
def test_all_statistics_of_torchs_own_layers_are_summed(module: nn.Module) -> None:
    found = choose({name: buffer.dtype for name, buffer, _ in persistent_buffers(module)})
    assert set(found.values()) == {BufferPolicy.SUM}


def test_a_name_counts_before_patterns_and_an_earlier_pattern_before_a_later_one() -> None:
    policies = {"*": "own", "moco.*": "last", "moco.queue": BufferPolicy.MEAN}
    found = choose(DTYPES, policies)
    assert found["moco.queue"] is BufferPolicy.MEAN
    assert found["moco.queue_ptr"] is found["is_set"] is BufferPolicy.OWN


def test_a_name_that_looks_like_a_pattern_is_a_name() -> None:
    assert choose({"a[0]": torch.float32}, {"a[0]": "own"}) == {"a[0]": BufferPolicy.OWN}


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        ({"moco.que_ue": "last"}, r"'moco.que_ue' fits no buffer .*did you mean 'moco.queue'\?"),
        ({"nothing*": "last"}, r"'nothing\*' fits no buffer .*persistent buffers are 'is_set', "),
        ({"is_set": "all"}, r"'is_set': expected one of 'sum', 'mean', 'last', 'own', got 'all'"),
        ({"is_set": "sum"}, r"'is_set' is bool and cannot be summed; choose 'last' or 'own'"),
        ({"moco.*": "mean"}, r"'moco.queue_ptr' is int64, and a mean needs a floating point dtype"),
    ],
)
def test_what_cannot_be_chosen_is_refused(policies: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose(DTYPES, policies)


def test_a_model_without_buffers_is_said_to_have_none() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="persistent buffers are none"):
        ps.ParameterServerStrategy().prepare(
            model, torch.optim.SGD(model.parameters(), lr=0.1), buffers={"queue": "last"}
        )
