"""``python -m benchmarks.worker MODEL``: a chief or worker that trains through the public API and is measured."""

from __future__ import annotations

import sys

import paramserver as ps
from benchmarks.models import ALL_MODELS, Training
from benchmarks.participant import take_part

START_LIMIT = 60.0


def main(model_name: str) -> None:
    """Train as the task that TF_CONFIG names until the input ends."""
    strategy = ps.ParameterServerStrategy(session_creation_timeout=START_LIMIT)
    model = ALL_MODELS[model_name]
    with strategy.scope():
        module = model.build()
        module, optimizer = strategy.prepare(module, model.optimizer(module))
    training = Training(model, module, optimizer)

    def step() -> int:
        training.step()
        return optimizer.last_push.staleness if optimizer.last_push else 0

    def store_bytes() -> int:
        assert strategy.client is not None  # prepare has made it
        return sum(status.values_bytes + status.slots_bytes for status in strategy.client.status())

    take_part(step, lambda: training.loss, store_bytes)
    strategy.close()


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except ps.errors.ParameterServerError as error:
        sys.exit(f"error: {error}")
