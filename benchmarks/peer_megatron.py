"""Train a GPT with megatron-core's GPTModel of local layers.

Only its attention is replaced, by PyTorch's: Megatron's own asks for CUDA.
"""

from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from benchmarks.engine import vocabulary
from benchmarks.peers import Step, Weights, read_weights, training_step
from trivium.config import Config

MEGATRON = "megatron.core.models.gpt"
# Our names in a layer and Megatron's.
MATRICES = {
    "attention.out": "self_attention.linear_proj",
    "mlp.up": "mlp.linear_fc1",
    "mlp.down": "mlp.linear_fc2",
}
NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "pre_mlp_layernorm"}


def megatron(config: Config, weights: Path, device: torch.device) -> Step:
    """Build the update of megatron-core's model; in bf16 its weights are bf16."""
    start_megatron()
    peer = megatron_model(config)
    peer.to(device, peer.config.params_dtype)
    # Not strict: it has entries of its own that hold no weights.
    peer.load_state_dict(megatron_weights(config, read_weights(weights)), strict=False)

    def loss(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
        return peer(ids, positions, None, labels=labels).mean()

    return training_step(config, peer, device, loss)


def start_megatron() -> None:
    """Make the process groups that megatron-core asks for, of one process."""
    from megatron.core import parallel_state

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()


def megatron_model(config: Config) -> nn.Module:
    """Return megatron-core's model of this shape, its weights not yet set."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    model = config.model
    bf16 = config.precision.bf16
    shape = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        layernorm_epsilon=model.norm_epsilon,
        activation_func=partial(F.gelu, approximate="none" if model.exact_gelu else "tanh"),
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        perform_initialization=False,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
    )
    spec = get_gpt_layer_local_spec(normalization="LayerNorm")
    spec.submodules.self_attention.submodules.core_attention = MegatronAttention
    return GPTModel(
        shape,
        spec,
        vocabulary(config),
        model.max_position_embeddings,
        share_embeddings_and_output_weights=True,
    )


class MegatronAttention(nn.Module):
    """Attention in the place of megatron-core's: q, k, v [T, B, A, D] to [T, B, H]."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, **settings):
        super().__init__()

    def forward(self, q, k, v, mask, **settings):
        """Return causal attention of packed heads."""
        by_head = [part.permute(1, 2, 0, 3) for part in (q, k, v)]
        attended = F.scaled_dot_product_attention(*by_head, is_causal=True)
        return attended.permute(2, 0, 1, 3).flatten(2)


def megatron_weights(config: Config, ours: Weights) -> Weights:
    """Return Trivium's weights under megatron-core's names.

    Queries, keys and values are fused head by head.
    """
    theirs: Weights = {}
    for kind in ("word", "position"):
        theirs[f"embedding.{kind}_embeddings.weight"] = ours[f"embedding.{kind}.weight"]
    for kind in ("weight", "bias"):
        theirs[f"decoder.final_layernorm.{kind}"] = ours[f"final_norm.{kind}"]
    heads = config.model.num_attention_heads
    width = config.model.hidden_size
    for layer in range(config.model.num_layers):
        own = f"layers.{layer}"
        their = f"decoder.layers.{layer}"
        qkv = [ours[f"{own}.attention.{part}.weight"].view(heads, -1, width) for part in "qkv"]
        fused = torch.cat(qkv, dim=1).flatten(0, 1)
        theirs[f"{their}.self_attention.linear_qkv.weight"] = fused
        for part, name in MATRICES.items():
            theirs[f"{their}.{name}.weight"] = ours[f"{own}.{part}.weight"]
        for part, name in NORMS.items():
            for kind in ("weight", "bias"):
                theirs[f"{their}.{name}.{kind}"] = ours[f"{own}.{part}.{kind}"]
    return theirs
