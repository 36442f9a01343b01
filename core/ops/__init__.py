"""The fused operations of a model and its optimizer, each in several implementations behind one door."""

from .attention import AttentionRule
from .cpu import BlockShape, BlockStep, keep_freed_memory
from .ops import OPS, Ops
from .selection import select_ops

__all__ = [
    "OPS",
    "AttentionRule",
    "BlockShape",
    "BlockStep",
    "Ops",
    "keep_freed_memory",
    "select_ops",
]
