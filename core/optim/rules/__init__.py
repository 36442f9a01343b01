"""Update rules: one module each, named as --optimizer names it.

A rule is a module with
- WHOLE_MATRICES: whether it must see a matrix whole, so that no shard may cut one;
- update(memory, step, config, ops): one update of flat memory, in place.

What it keeps of every weight is in config.OPTIMIZER_STATE, which the memory estimate counts with.
To add a rule: a module here, and its choice, state and hyperparameters in config/fields.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

import torch

from ...config import OptimizerConfig
from ...ops import Ops

_OTHER_NAMES = {"adam": "adamw"}


@dataclass(frozen=True)
class FlatMemory:
    """A range of a shard that one call updates: flat tensors of one length.

    masters: the weights, fp32.
    state: what the rule keeps of each weight, fp32, by name; zeros before the first update.
    gradients: fp32, to be multiplied by Step.grad_scale.
    weights: a copy of masters rounded to the working dtype; it may be masters itself.
    weight_decay: of all these weights.
    """

    masters: torch.Tensor
    state: Mapping[str, torch.Tensor]
    gradients: torch.Tensor
    weights: torch.Tensor
    weight_decay: float


@dataclass(frozen=True)
class Step:
    """The numbers of one update, the same for all memory. Tensors are 0-d, on the device.

    lr: learning rate.
    count: how many updates there have been, this one included; int64.
    grad_scale: factor on the gradients; fp32.
    skip: leave everything as it is, whatever the gradients hold; bool.
    """

    lr: float
    count: torch.Tensor
    grad_scale: torch.Tensor
    skip: torch.Tensor


class Rule(Protocol):
    """The interface of a rule's module."""

    WHOLE_MATRICES: bool

    def update(self, memory: FlatMemory, step: Step, config: OptimizerConfig, ops: Ops) -> None:
        """Update masters, state and weights in place."""


def rule_named(name: str) -> Rule:
    """Return the rule that --optimizer calls `name`."""
    return cast(Rule, import_module(f"{__name__}.{_OTHER_NAMES.get(name, name)}"))
