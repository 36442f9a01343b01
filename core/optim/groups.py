"""Parameter groups: which weights decay, told by the role of a parameter and never by its shape."""

from enum import IntEnum

from torch import nn

from ..config import OptimizerConfig
from ..layout import layout_of
from ..role import Role


class Group(IntEnum):
    """Parameters that one update treats alike, in the order in which they lie in a bucket."""

    DECAYED = 0  # matrices, embeddings, positions and the head
    PLAIN = 1  # biases and the weights of norms


_GROUP_OF_ROLE = {
    Role.EMBEDDING: Group.DECAYED,
    Role.HEAD: Group.DECAYED,
    Role.MATRIX: Group.DECAYED,
    Role.BIAS: Group.PLAIN,
    Role.NORM: Group.PLAIN,
}


def group_of(parameter: nn.Parameter) -> Group:
    """Return the group of a parameter; all its parts have one role."""
    return _GROUP_OF_ROLE[layout_of(parameter).parts[0].role]


def weight_decay_of(group: Group, config: OptimizerConfig) -> float:
    """Return the weight decay of a group."""
    return config.weight_decay if group is Group.DECAYED else 0.0
