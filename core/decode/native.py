"""A block's decoding step as one native call, where the kernels support it."""

from torch import Tensor

from ..model.block import Block
from ..model.shape import LayerShape, NormShape
from ..ops import BlockShape, BlockStep


def native_step(block: Block, sequences: int) -> BlockStep | None:
    """Return what passes one more token of `sequences` sequences through the block in one call.

    None where it must go op by op: for weights or sizes that the kernels do not take, norms whose
    weight is stored as its distance from 1, and blocks that are cut over ranks.
    """
    is_cut = block.attention.qkv.sharding.tp.size > 1
    if is_cut or _norms(block.shape)[0].from_one:
        return None
    ops = block.attention.ops
    return ops.block_step(_native_shape(block.shape), _weights(block), sequences)


def _native_shape(layer: LayerShape) -> BlockShape:
    """Return the shape as the kernel takes it."""
    attention = layer.attention
    mlp = layer.mlp
    q_norm = attention.q_norm
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
        norm_of_projection=q_norm is not None and q_norm.over_projection,
        gated=mlp.gated,
        parallel_residual=layer.parallel_residual,
        activation=mlp.activation,
    )


def _norms(layer: LayerShape) -> list[NormShape]:
    """Return the norms of hidden states, of which every layer has at least one."""
    places = (
        layer.attention_norm,
        layer.attention_post_norm,
        layer.mlp_norm,
        layer.mlp_post_norm,
    )
    return [norm for norm in places if norm is not None]


def _weights(block: Block) -> list[Tensor | None]:
    """Return weight and bias of each part, None where there is none, in the kernel's order."""
    parts = [
        block.attention_norm,
        block.attention.qkv,
        block.attention.q_norm,
        block.attention.k_norm,
        block.attention.out,
        block.attention_post_norm,
        block.mlp_norm,
        block.mlp.up,
        block.mlp.down,
        block.mlp_post_norm,
    ]
    found: list[Tensor | None] = []
    for part in parts:
        # Neither where a layer has no norm, no bias in an RMSNorm.
        found.append(getattr(part, "weight", None))
        found.append(getattr(part, "bias", None))
    return found
