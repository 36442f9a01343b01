"""A torch_dist checkpoint of megatron-core's own GPT model gives the same logits here."""

import argparse
import enum
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from runs import tool

from trivium.interop.megatron import MegatronDist
from trivium.interop.pretrained import load_pretrained
from trivium.mesh import Mesh
from trivium.testing import run_ranks

pytest.importorskip("megatron.core.dist_checkpointing")

VOCAB, PADDED = 100, 128
LLAMA = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "num_query_groups": 2,
    "qk_layernorm": True,
    "rotary": True,
    "tied": False,
}
GPT = {
    "normalization": "LayerNorm",
    "swiglu": False,
    "add_bias_linear": True,
    "num_query_groups": 4,
    "qk_layernorm": False,
    "rotary": False,
    "tied": True,
}


class ModelType(enum.Enum):
    """As Megatron's arguments hold enums of its own."""

    encoder_or_decoder = 1


def megatron_model(kind: dict):
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state.initialize_model_parallel()
    config = TransformerConfig(
        num_layers=3,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=kind["num_query_groups"],
        init_method_std=0.2,
        use_cpu_initialization=True,
        normalization=kind["normalization"],
        gated_linear_unit=kind["swiglu"],
        add_bias_linear=kind["add_bias_linear"],
        activation_func=torch.nn.functional.silu if kind["swiglu"] else torch.nn.functional.gelu,
        qk_layernorm=kind["qk_layernorm"],
        pipeline_dtype=torch.float32,
        bias_activation_fusion=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    spec = get_gpt_layer_local_spec(
        normalization=kind["normalization"], qk_layernorm=kind["qk_layernorm"]
    )
    return GPTModel(
        config,
        spec,
        PADDED,
        64,
        position_embedding_type="rope" if kind["rotary"] else "learned_absolute",
        share_embeddings_and_output_weights=kind["tied"],
    ).eval()


def write_torch_dist(_: Mesh, folder, kind: dict) -> torch.Tensor:
    """Write the tensors of a model of megatron-core's, under its keys and global shapes.

    They are stored as torch.distributed.checkpoint stores them. Returns the model's logits.
    """
    from megatron.core import parallel_state

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        model = megatron_model(kind)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
        iteration = folder / "iter_0000050"
        dcp.save(whole_tensors(model), checkpoint_id=iteration)
        common = {"args": arguments_of(kind), "checkpoint_version": 3.0, "iteration": 50}
        torch.save(common, iteration / "common.pt")
        (folder / "latest_checkpointed_iteration.txt").write_text("50")
        return logits_of(model)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def whole_tensors(model) -> dict[str, torch.Tensor]:
    """Return the tensors that megatron-core would write, by key, put together from shards."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    sharded = model.sharded_state_dict()
    apply_factories(sharded)
    whole: dict[str, torch.Tensor] = {}
    for item in nested_values(sharded):
        if isinstance(item, ShardedTensor):
            target = whole.setdefault(item.key, torch.zeros(item.global_shape))
            sizes = (1,) * item.prepend_axis_num + item.local_shape
            box = tuple(
                slice(offset, offset + size)
                for offset, size in zip(item.global_offset, sizes, strict=True)
            )
            target[box] = item.data.detach().view(target[box].shape)
    return whole


def arguments_of(kind: dict) -> argparse.Namespace:
    """Return the arguments of Megatron-LM's that describe the model."""
    return argparse.Namespace(
        num_layers=3,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        kv_channels=8,
        num_query_groups=kind["num_query_groups"],
        group_query_attention=kind["num_query_groups"] < 4,
        max_position_embeddings=64,
        rotary_base=10000,
        rotary_percent=1.0,
        position_embedding_type="rope" if kind["rotary"] else "learned_absolute",
        normalization=kind["normalization"],
        norm_epsilon=1e-5,
        swiglu=kind["swiglu"],
        bias_gelu_fusion=False,
        add_bias_linear=kind["add_bias_linear"],
        add_qkv_bias=False,
        num_experts=None,
        qk_layernorm=kind["qk_layernorm"],
        untie_embeddings_and_output_weights=not kind["tied"],
        params_dtype=torch.float32,
        model_type=ModelType.encoder_or_decoder,
    )


def logits_of(model) -> torch.Tensor:
    tokens = torch.arange(64)[None] % VOCAB
    mask = torch.triu(torch.ones(1, 1, 64, 64, dtype=torch.bool), 1)
    # Its tables ask for the current device, and its dropout for that device's generator, wherever
    # the model is and even at dropout 0.
    device = mock.patch.object(torch.cuda, "current_device", lambda: "cpu")
    generators = mock.patch(
        "megatron.core.tensor_parallel.get_cuda_rng_tracker",
        lambda: argparse.Namespace(fork=nullcontext),
    )
    with torch.no_grad(), device, generators:
        return model(tokens, torch.arange(64)[None], mask)[..., :VOCAB].float()


@pytest.mark.parametrize("kind", [LLAMA, GPT], ids=["llama", "gpt"])
def test_logits_are_those_of_megatron_core(kind, tmp_path):
    (expected,) = run_ranks(1, write_torch_dist, tmp_path, kind)
    result = tool(
        "convert_checkpoint",
        "--from",
        "megatron",
        "--to",
        "trivium",
        "--load",
        tmp_path,
        "--save",
        tmp_path / "run",
        "--vocab-size",
        VOCAB,
    )
    assert result.returncode == 0, result.stderr
    model = load_pretrained(tmp_path / "run", device=torch.device("cpu"), dtype=torch.float32).model
    assert model.vocab_size == VOCAB
    with torch.no_grad():
        found = model(torch.arange(64)[None] % VOCAB)[..., :VOCAB]
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max())


def changed(folder, **arguments) -> None:
    """Arguments in common.pt exchanged for others."""
    path = folder / "iter_0000050" / "common.pt"
    held = torch.load(path, weights_only=False)  # written by this test
    vars(held["args"]).update(arguments)
    torch.save(held, path)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"num_layers": 2}, "holds 3 layers, its arguments say 2"),
        ({"swiglu": False, "bias_gelu_fusion": True}, "has 96 rows, the model of its arguments 48"),
        ({"qk_layernorm": False}, "which the model of its arguments does not have"),
        ({"num_experts": 8}, "num_experts is 8: only None can be read"),
        ({"qk_l2_norm": True}, "qk_l2_norm is True"),
        ({"position_embedding_type": "yarn"}, "position_embedding_type is 'yarn'"),
        ({"hidden_size": None}, "lack hidden_size"),
        ({"rotary_base": "x"}, "rotary_base is 'x'"),
    ],
)
def test_a_model_that_means_something_else_is_refused(arguments, expected, tmp_path):
    run_ranks(1, write_torch_dist, tmp_path, LLAMA)
    changed(tmp_path, **arguments)
    result = tool(
        "convert_checkpoint",
        "--from",
        "megatron",
        "--to",
        "trivium",
        "--load",
        tmp_path,
        "--save",
        tmp_path / "run",
        "--vocab-size",
        VOCAB,
    )
    assert (
        result.returncode == 1 and expected in result.stderr and result.stderr.count("\n") == 1
    ), result.stderr
    assert not (tmp_path / "run").exists()


def test_windows_and_scales_of_its_arguments_are_taken_over(tmp_path):
    run_ranks(1, write_torch_dist, tmp_path, LLAMA)
    changed(tmp_path, window_size=(5, 0), window_attn_skip_freq=2, softmax_scale=0.5)
    model = MegatronDist(tmp_path, VOCAB).config
    assert [model.window(layer) for layer in range(3)] == [
        6,
        None,
        6,
    ] and model.softmax_scale == 0.5
