"""Number formats of a run: the working dtype, and the loss scale.

The loss scale lives on the device: the host never reads it inside a step.
"""

from typing import Any

import torch

from .config import PrecisionConfig
from .state import StateItem


def working_dtype(precision: PrecisionConfig) -> torch.dtype:
    """Return the dtype of weights and activations.

    Masters, gradients and what the optimizer keeps are fp32 in every case.
    """
    if precision.bf16:
        return torch.bfloat16
    return torch.float16 if precision.fp16 else torch.float32


class LossScaler:
    """The factor on the loss that keeps fp16 gradients above the smallest number; 1 if not fp16.

    Dynamic scaling as Megatron does it (Micikevicius et al. 2018, section 3.2): halve after
    `hysteresis` bad updates, double after `loss_scale_window` good ones in a row.

    scale, good_updates, bad_updates_left: 0-d, on the device.
    """

    def __init__(self, precision: PrecisionConfig, device: torch.device):
        self.dynamic = precision.fp16 and precision.loss_scale is None
        self.window = precision.loss_scale_window
        self.patience = precision.hysteresis
        self.lowest = precision.min_loss_scale
        first = precision.initial_loss_scale if self.dynamic else precision.loss_scale or 1.0
        self.scale = torch.tensor(first, dtype=torch.float32, device=device)
        self.good_updates = torch.tensor(0, dtype=torch.int64, device=device)
        self.bad_updates_left = torch.tensor(self.patience, dtype=torch.int64, device=device)

    def update(self, overflow: torch.Tensor, empty: torch.Tensor) -> None:
        """Move the scale after an update; a constant one stays.

        overflow: 0-d bool, the update had a number that is not finite.
        empty: 0-d bool, the update had nothing to learn from, and does not count.
        """
        if not self.dynamic:
            return
        left = torch.where(overflow, self.bad_updates_left - 1, self.bad_updates_left)
        good = torch.where(overflow, 0, self.good_updates + 1)
        shrinks = overflow & (left <= 0)
        halved = (self.scale * 0.5).clamp(min=self.lowest)
        scale = torch.where(shrinks, halved, self.scale)
        # After a window of good updates: double, and start both counts anew.
        grows = good >= self.window
        scale = torch.where(grows, self.scale * 2, scale)
        good = torch.where(grows, 0, good)
        left = torch.where(grows, self.patience, left)

        self.scale = torch.where(empty, self.scale, scale)
        self.good_updates = torch.where(empty, self.good_updates, good)
        self.bad_updates_left = torch.where(empty, self.bad_updates_left, left)

    def state_items(self) -> list[StateItem]:
        """Return what a run's state says of the loss scale."""
        return [StateItem("loss_scale", self.state, self.load)]

    def state(self) -> dict[str, Any]:
        """Return the state as plain numbers, for a checkpoint."""
        return {
            "dynamic": self.dynamic,
            "scale": self.scale.item(),
            "good_updates": self.good_updates.item(),
            "bad_updates_left": self.bad_updates_left.item(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint, if it too was dynamic.

        A constant scale stays what the flags say.
        """
        if self.dynamic and state["dynamic"]:
            self.scale.fill_(state["scale"])
            self.good_updates.fill_(state["good_updates"])
            self.bad_updates_left.fill_(state["bad_updates_left"])
