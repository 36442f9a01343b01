"""The fused operations of a model and its optimizer, each in several implementations behind one door."""

from .attention import AttentionRule
from .door import OPS, Ops
from .native import BlockShape, BlockStep, keep_freed_memory
from .selection import choose

__all__ = ["OPS", "AttentionRule", "BlockShape", "BlockStep", "Ops", "choose", "keep_freed_memory"]
