"""The shape of a model, as plain values, against the parameters that its modules make of it."""

from dataclasses import replace

import pytest
from models import GPT2, LLAMA, VOCAB

from trivium.config import ModelConfig
from trivium.mesh import Axis
from trivium.model.gpt import GPT
from trivium.model.shape import layer_shape, parameter_shapes
from trivium.ops import Ops
from trivium.parallel.sharding import Sharding

OF_HEADS = replace(LLAMA, num_attention_heads=8, num_query_groups=2, qk_layernorm=True)
CONFIGS = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "tied": replace(LLAMA, untie_embeddings_and_output_weights=False),
    "norms of heads": OF_HEADS,
    "norms of projections": replace(OF_HEADS, qk_layernorm_width="projection"),
    "norms after": replace(GPT2, norm_placement="post", qk_layernorm=True),
    "norms around": replace(LLAMA, norm_placement="both", apply_layernorm_1p=True),
    "some biases": replace(LLAMA, add_qkv_bias=True, add_attn_out_bias=True),
}


def cut_over(tp: int, kv_heads: int) -> Sharding:
    """This rank of `tp`, the last; so many of them hold the same key-value heads."""
    copies = max(1, tp // kv_heads)
    kv = Axis("kv", copies, copies - 1, tuple(range(copies)))
    return Sharding(tp=Axis("tp", tp, tp - 1, tuple(range(tp))), kv=kv)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_a_model_has_the_parameters_that_its_shape_says(config: ModelConfig, tp: int):
    """In this order, with these names, roles and sizes, on every rank of any cut."""
    if config.num_attention_heads % tp:
        pytest.skip(f"{config.num_attention_heads} heads cannot be cut over {tp} ranks")
    sharding = cut_over(tp, config.num_kv_heads)
    model = GPT(config, VOCAB, ops=Ops(), seed=None, sharding=sharding)
    shapes = list(parameter_shapes(config, VOCAB))
    for parameter, shape in zip(model.parameters(), shapes, strict=True):
        parts = parameter.param_layout.parts
        assert [(p.name, p.shape) for p in parts] == [(p.name, p.shape) for p in shape.parts]
        assert {part.role for part in parts} == {shape.role}
        assert parameter.numel() == shape.local_numel(tp)


def test_a_layer_knows_its_window_and_the_spread_of_its_weights():
    config = replace(LLAMA, window_size="4,0", window_attn_skip_freq="2", num_layers=2)
    first, second = layer_shape(config, 0), layer_shape(config, 1)
    assert (first.attention.window, second.attention.window) == (5, None)
    assert first.mlp.up.weight.std == config.init_method_std
    assert first.mlp.down.weight.std == config.init_method_std / 2
