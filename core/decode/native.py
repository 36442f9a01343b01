"""A block's decoding step as one native call, where the kernels support it."""

import torch

from ..model.block import Block
from ..model.shape import LayerShape, NormShape
from ..ops import BlockShape, BlockStep


def native_step(block: Block, sequences: int) -> BlockStep | None:
    """Return what passes one more token of `sequences` sequences through the block in one call.

    None where it must go op by op: for weights or sizes that the kernels do not take, norms whose
    weight is stored as its distance from 1, and blocks that are cut over ranks.
    """
    if block.attention.qkv.sharding.tp.size > 1 or _norms(block.shape)[0].from_one:
        return None
    shape = _native_shape(block.shape)
    return block.attention.ops.block_step(shape, _weights(block), sequences)


def _native_shape(layer: LayerShape) -> BlockShape:
    """Return the shape as the kernel takes it."""
    attention, mlp = layer.attention, layer.mlp
    return BlockShape(
        hidden=layer.hidden,
        ffn=mlp.width,
        heads=attention.heads,
        kv_heads=attention.kv_heads,
        size=attention.head_size,
        window=attention.window,
        scale=attention.scale,
        softcap=attention.softcap,
        eps=_norms(layer)[0].epsilon,
        interleaved=attention.interleaved,
        norm_of_projection=attention.q_norm is not None and attention.q_norm.over_projection,
        gated=mlp.gated,
        parallel_residual=layer.parallel_residual,
        activation=mlp.activation,
    )


def _norms(layer: LayerShape) -> list[NormShape]:
    """Return the norms of hidden states, of which every layer has at least one."""
    before = (layer.attention_norm, layer.mlp_norm)
    after = (layer.attention_post_norm, layer.mlp_post_norm)
    return [norm for norm in (*before, *after) if norm is not None]


def _weights(block: Block) -> list[torch.Tensor | None]:
    """Return weight and bias of each part, None where there is none, in the kernel's order."""
    attention, mlp = block.attention, block.mlp
    attends = (block.attention_norm, attention.qkv, attention.q_norm, attention.k_norm)
    feeds = (block.mlp_norm, mlp.up, mlp.down, block.mlp_post_norm)
    parts = (*attends, attention.out, block.attention_post_norm, *feeds)
    return [getattr(part, kind, None) for part in parts for kind in ("weight", "bias")]
