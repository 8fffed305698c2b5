"""``python -m benchmarks.plain MODEL``: the same training in one process with plain PyTorch."""

from __future__ import annotations

import sys

from benchmarks.models import ALL_MODELS, Training
from benchmarks.participant import take_part


def main(model_name: str) -> None:
    """Train until the input ends."""
    model = ALL_MODELS[model_name]
    module = model.build()
    training = Training(model, module, model.optimizer(module))

    def step() -> int:
        training.step()
        return 0

    take_part(step, lambda: training.loss, lambda: 0)


if __name__ == "__main__":
    main(sys.argv[1])
