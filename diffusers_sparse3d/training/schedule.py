"""Learning-rate schedule, and the clock that a budget of time is measured with."""

import math
import time

from .configuration import TrainingConfig


def learning_rate_factor(config: TrainingConfig, step: int, minutes: float) -> float:
    """Returns the learning rate after `step` steps and `minutes` of training, as a share of the peak."""
    factor = min(1.0, (step + 1) / config.lr_warmup_steps) if config.lr_warmup_steps else 1.0
    if config.lr_scheduler == "constant":
        return factor
    progress = 0.0
    if config.max_train_steps is not None:
        progress = max(progress, step / config.max_train_steps)
    if config.max_train_minutes is not None:
        progress = max(progress, minutes / config.max_train_minutes)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return factor * (config.lr_min_ratio + (1 - config.lr_min_ratio) * cosine)


class Clock:
    """Counts the steps and seconds of training; checkpoints hold both, so that a resumed training counts on."""

    def __init__(self) -> None:
        self.step = 0
        self.seconds = 0.0
        self._last = time.monotonic()

    def start(self) -> None:
        """Starts counting from now."""
        self._last = time.monotonic()

    def tick(self) -> None:
        """Adds the time since the last tick, or since the start."""
        now = time.monotonic()
        self.seconds, self._last = self.seconds + now - self._last, now

    def state_dict(self) -> dict[str, float]:
        return {"step": self.step, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.step, self.seconds = int(state["step"]), state["seconds"]
