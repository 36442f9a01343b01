"""The ops of a model and its optimizer, each in several implementations behind one door.

Ops                 every op, bound to the implementations of a run; Ops() is plain PyTorch
select_ops          make the Ops of a run from --kernels, --attention-backend, device and dtype
OPS                 the names of the ops, with the implementations that each has beside PyTorch
AttentionRule       what a layer does to its attention scores
AdamWTerms          what an AdamW update needs beside its buffers
BlockShape          the shape of a block, for a block's step in one native call
BlockStep           that call
keep_freed_memory   let the process keep the memory that it frees
"""

from .attention import AttentionRule
from .cpu import BlockShape, BlockStep, keep_freed_memory
from .ops import OPS, Ops
from .reference import AdamWTerms
from .selection import select_ops

__all__ = [
    "OPS",
    "AdamWTerms",
    "AttentionRule",
    "BlockShape",
    "BlockStep",
    "Ops",
    "keep_freed_memory",
    "select_ops",
]
