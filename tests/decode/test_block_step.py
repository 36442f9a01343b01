"""A block's step, one native call, against the same block op by op in float64 and plain PyTorch."""

import copy
from dataclasses import replace

import models
import pytest
import torch

from trivium.config import ModelConfig
from trivium.decode.cache import KVCache
from trivium.decode.generate import Decoder, generate
from trivium.decode.native import native_step
from trivium.decode.sampling import Sampling
from trivium.mesh import Axis
from trivium.model.block import Block
from trivium.model.gpt import GPT
from trivium.model.recompute import Recompute
from trivium.model.rotary import Rotary
from trivium.model.shape import layer_shape
from trivium.model.tokens import TokenContext
from trivium.ops import Ops, cpu
from trivium.parallel.sharding import Sharding

pytestmark = pytest.mark.skipif(not cpu.AVAILABLE, reason="built without a compiler")

# Odd sizes: of no vector a multiple.
LLAMA = replace(
    models.LLAMA,
    num_layers=2,
    hidden_size=27,
    ffn_hidden_size=37,
    kv_channels=10,
    max_position_embeddings=64,
    init_method_std=0.3,
)
GPT2 = replace(
    LLAMA,
    group_query_attention=False,
    kv_channels=8,
    position_embedding_type="learned_absolute",
    normalization="LayerNorm",
    swiglu=False,
    disable_bias_linear=False,
)
BLOCKS = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "one key-value head, whole vectors": replace(
        LLAMA, num_query_groups=1, hidden_size=64, kv_channels=64, ffn_hidden_size=128
    ),
    "neox": replace(
        GPT2,
        position_embedding_type="rope",
        rotary_percent=0.5,
        parallel_residual=True,
        exact_gelu=True,
    ),
    "qwen3": replace(LLAMA, qk_layernorm=True, add_qkv_bias=True, rotary_interleaved=True),
    "olmo2": replace(
        LLAMA, qk_layernorm=True, qk_layernorm_width="projection", norm_placement="post"
    ),
    "gemma2": replace(
        LLAMA,
        norm_placement="both",
        swiglu=False,
        geglu=True,
        attn_logit_softcapping=2.0,
        softmax_scale=0.5,
        window_size="4,0",
    ),
    "layer norms": replace(
        GPT2, qk_layernorm=True, norm_placement="both", squared_relu=True, add_attn_out_bias=True
    ),
    "post, parallel": replace(
        GPT2, norm_placement="post", parallel_residual=True, window_size="0,0"
    ),
}
PAST, NEW = 6, 5


def block_of(
    config: ModelConfig, dtype: torch.dtype, ops: Ops, sharding: Sharding | None = None
) -> Block:
    """Make a block whose norms and biases would hide no swap, of values that bf16 holds."""
    shape = layer_shape(config, 0)
    block = Block(shape, sharding or Sharding(), ops, 1, Recompute()).eval()
    noise = torch.Generator().manual_seed(1)
    for p in block.parameters():
        if p.dim() == 1:
            p.data += 0.3 * torch.randn(p.shape, generator=noise)
        p.data = p.data.bfloat16().to(dtype)
    return block


@torch.no_grad()
def outputs(
    block: Block, config: ModelConfig, x: torch.Tensor, steps: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pass the last NEW tokens of x one at a time; return the outputs, and what the cache holds.

    steps: by native calls, else op by op.
    """
    cache = KVCache([block], len(x), PAST + NEW)
    if not steps:
        cache.steps = [None]
    rotary = Rotary(config) if config.position_embedding_type == "rope" else None
    parts, start = [], 0
    for end in range(PAST, PAST + NEW + 1):
        context = cache.context(end - start, x.device)
        angles = rotary and rotary(context.positions, end)
        parts.append(block(x[:, start:end], angles, context))
        cache.advance(end - start)
        start = end
    assert cache.length == PAST + NEW
    return torch.cat(parts[1:], dim=1), torch.stack((cache.keys[0], cache.values[0]))


def inputs(config: ModelConfig, sequences: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(
        sequences, PAST + NEW, config.hidden_size, generator=torch.Generator().manual_seed(2)
    )
    return x.bfloat16().to(dtype)


@pytest.mark.parametrize("sequences", [1, 3, 32])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_step_in_fp32_is_that_of_float64(name, sequences):
    """Sums over at most 128 terms, some ten roundings one after another.

    So 1e-5 of the largest number; measured 1.5e-6.
    """
    config = BLOCKS[name]
    block = block_of(config, torch.float32, Ops("native"))
    exact = block_of(config, torch.float64, Ops())
    assert native_step(block, sequences) is not None
    assert native_step(exact, sequences) is None
    by_step = outputs(block, config, inputs(config, sequences, torch.float32), True)
    op_by_op = outputs(exact, config, inputs(config, sequences, torch.float64), False)
    for found, expected in zip(by_step, op_by_op, strict=True):
        assert (found.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("sequences", [1, 5])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_step_in_bf16_rounds_where_the_block_does(name, sequences):
    """Bit by bit, but where attention comes to lie on the other side of a rounding.

    It is computed in fp32 in both, and summed in another order.
    """
    config = BLOCKS[name]
    block = block_of(config, torch.bfloat16, Ops("native", fp32_matmul=True))
    x = inputs(config, sequences, torch.bfloat16)
    by_step = outputs(block, config, x, True)
    op_by_op = outputs(block, config, x, False)
    for found, expected in zip(by_step, op_by_op, strict=True):
        assert found.dtype == torch.bfloat16 and expected.abs().max() > 0
        assert (found != expected).float().mean() <= 0.02


@pytest.mark.parametrize("scale", [0.0, 40.0, -40.0])
def test_scores_that_decide_everything_or_nothing(scale):
    """Scores of up to 1,300 in size: a rounding of one, 6e-5, is in the weights as it is."""
    config = replace(LLAMA, softmax_scale=scale)
    block = block_of(config, torch.float32, Ops("native"))
    exact = block_of(config, torch.float64, Ops())
    found, _ = outputs(block, config, inputs(config, 2, torch.float32), True)
    expected, _ = outputs(exact, config, inputs(config, 2, torch.float64), False)
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


@pytest.mark.parametrize("size", [0.0, 1e-41, 1e-22, 1e15])
def test_hidden_states_of_any_size(size):
    """Zeros, subnormals, squares below and far above what the weights are."""
    config = LLAMA
    block = block_of(config, torch.float32, Ops("native"))
    exact = block_of(config, torch.float64, Ops())
    x = size * inputs(config, 2, torch.float32)
    found, _ = outputs(block, config, x, True)
    expected, _ = outputs(exact, config, x.double(), False)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_number_of_threads_changes_no_bit():
    config = replace(LLAMA, hidden_size=300, ffn_hidden_size=700)
    block = block_of(config, torch.float32, Ops("native"))
    x = inputs(config, 3, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(torch.cat([t.flatten() for t in outputs(block, config, x, True)]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_step_sees_new_weights_and_does_not_write_past_the_cache():
    block = block_of(LLAMA, torch.float32, Ops("native"))
    step, x = native_step(block, 1), inputs(LLAMA, 1, torch.float32)[:, :1]
    angles, (keys, values) = Rotary(LLAMA)(torch.arange(1), 1), torch.zeros(2, 1, 1, 2, 10)
    with torch.no_grad():
        before = step(x, *angles, keys, values, 0)
        for p in block.parameters():
            p.data = 2 * p.data  # another place, as an optimizer's buffers are
        after = step(x, *angles, keys, values, 0)
        assert not torch.equal(before, after)
        assert (
            after - block(x, angles, TokenContext(torch.arange(1)))
        ).abs().max() <= 1e-5 * after.abs().max()
    with pytest.raises(ValueError, match="a cache of 1 places is full"):
        step(x, *angles, keys, values, 1)
    for tensors in (
        (x.bfloat16(), keys, values),
        (x, keys.bfloat16(), values),
        (x, keys, values.double()),
    ):
        with pytest.raises(TypeError, match="tensors of one dtype"):
            step(tensors[0], *angles, *tensors[1:], 0)


@pytest.mark.parametrize(
    "reason",
    [
        "1p",
        "tensor parallel",
        "float64",
        "float16",
        "two dtypes",
        "gaps",
        "sequences",
        "--kernels torch",
        "rope",
        "backend",
        "itself",
    ],
)
def test_where_there_is_no_step(reason):
    """Then the block goes op by op."""
    kernels = {
        "--kernels torch": Ops(),
        "rope": Ops("native", overrides=(("rope", "torch"),)),
        "backend": Ops("native", "unfused"),
    }
    kernels["itself"] = Ops("native", overrides=(("block_step", "torch"),))
    config = replace(LLAMA, ffn_hidden_size=36, apply_layernorm_1p=reason == "1p")
    sharding = Sharding(tp=Axis("tp", 2, 0)) if reason == "tensor parallel" else None
    dtype = {"float64": torch.float64, "float16": torch.float16}.get(reason, torch.float32)
    block = block_of(config, dtype, kernels.get(reason, Ops("native")), sharding)
    if reason == "two dtypes":
        block.mlp_norm.weight.data = block.mlp_norm.weight.data.bfloat16()
    if reason == "gaps":
        block.mlp.up.weight.data = block.mlp.up.weight.data.t().contiguous().t()
    assert native_step(block, 33 if reason == "sequences" else 32) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_takes_steps_and_a_gradient_goes_op_by_op(dtype, monkeypatch):
    taken, honest = [], cpu.BlockStep.__call__
    monkeypatch.setattr(
        cpu.BlockStep, "__call__", lambda self, *args: (taken.append(1), honest(self, *args))[1]
    )
    model = GPT(LLAMA, 50, ops=Ops("native"), seed=1).to_device(torch.device("cpu"), dtype)
    prompt = torch.tensor([[1, 2, 3]])
    tokens = list(generate(model, prompt, 4, Sampling(temperature=0), torch.Generator()))
    assert len(tokens) == 4 and len(taken) == 3 * LLAMA.num_layers, "all but the prompt's own"
    Decoder(model, 1, 2).logits(prompt[:, :1]).float().sum().backward()
    assert len(taken) == 3 * LLAMA.num_layers and model.layers[0].mlp.up.weight.grad.abs().sum() > 0


def test_every_wrong_weight_is_seen():
    """Each weight, changed in turn, changes the step's output as it does the block's.

    So none is left out, or taken for another.
    """
    config = replace(BLOCKS["layer norms"], parallel_residual=False)
    block, x = block_of(config, torch.float32, Ops("native")), inputs(config, 2, torch.float32)
    first = outputs(block, config, x, True)[0]
    for name, p in block.named_parameters():
        changed = copy.deepcopy(block)
        changed.get_parameter(name).data += 0.1 * torch.randn(
            p.shape, generator=torch.Generator().manual_seed(3)
        )
        found, expected = (
            outputs(changed, config, x, True)[0],
            outputs(changed, config, x, False)[0],
        )
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), name
        # A bias on all keys moves every score of a query alike.
        assert "k_norm.bias" in name or not torch.allclose(found, first, atol=1e-4), name
