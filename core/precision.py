"""Number formats of a run: the working dtype, and the loss scale as a device value that the host never reads inside a step."""

import torch

from .config import PrecisionConfig
from .state import StateItem


def working_dtype(precision: PrecisionConfig) -> torch.dtype:
    """The dtype of weights and activations; masters, gradients and moments are fp32 in every case."""
    if precision.bf16:
        return torch.bfloat16
    return torch.float16 if precision.fp16 else torch.float32


class LossScaler:
    """The factor on the loss that keeps fp16 gradients above the smallest number. 1 unless the run is fp16.

    Dynamic scaling as Megatron does it (Micikevicius et al. 2018, section 3.2): halve after `hysteresis` bad updates, double after
    `loss_scale_window` good ones in a row. All state is 0-d tensors on the device.
    """

    def __init__(self, precision: PrecisionConfig, device: torch.device):
        self.dynamic = precision.fp16 and precision.loss_scale is None
        first = precision.initial_loss_scale if self.dynamic else precision.loss_scale or 1.0
        self.window, self.patience, self.lowest = (
            precision.loss_scale_window,
            precision.hysteresis,
            precision.min_loss_scale,
        )
        self.scale = torch.tensor(first, dtype=torch.float32, device=device)
        self.good_updates = torch.tensor(0, dtype=torch.int64, device=device)
        self.bad_updates_left = torch.tensor(self.patience, dtype=torch.int64, device=device)

    def update(self, overflow: torch.Tensor, empty: torch.Tensor) -> None:
        """Move on after an update. overflow: 0-d bool, whether it held a number that is not finite; empty: whether it had nothing to learn from."""
        if not self.dynamic:
            return
        before = (self.scale, self.good_updates, self.bad_updates_left)
        left = torch.where(overflow, self.bad_updates_left - 1, self.bad_updates_left)
        good = torch.where(overflow, 0, self.good_updates + 1)
        grow = good >= self.window
        shrunk = torch.where(
            overflow & (left <= 0), (self.scale * 0.5).clamp(min=self.lowest), self.scale
        )
        after = (
            torch.where(grow, self.scale * 2, shrunk),
            torch.where(grow, 0, good),
            torch.where(grow, self.patience, left),
        )
        self.scale, self.good_updates, self.bad_updates_left = (
            torch.where(empty, old, new) for old, new in zip(before, after, strict=True)
        )

    def state_items(self) -> list[StateItem]:
        """Return what a run's state says of the loss scale."""
        return [StateItem("loss_scale", self.state, self.load)]

    def state(self) -> dict[str, float | int]:
        """Plain numbers for a checkpoint."""
        return {
            "dynamic": self.dynamic,
            "scale": self.scale.item(),
            "good_updates": self.good_updates.item(),
            "bad_updates_left": self.bad_updates_left.item(),
        }

    def load(self, state: dict[str, float | int]) -> None:
        """Take up the state of a checkpoint, if it too was dynamic. A constant scale stays what the flags say."""
        if self.dynamic and state["dynamic"]:
            self.scale.fill_(state["scale"])
            self.good_updates.fill_(state["good_updates"])
            self.bad_updates_left.fill_(state["bad_updates_left"])
