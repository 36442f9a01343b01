"""Small models of tests, and the peer of one with the same weights."""

import pytest
import torch

from trivium.config import ModelConfig
from trivium.interop import families
from trivium.interop.hf_names import hf_correspondences
from trivium.model.gpt import GPT
from trivium.ops import Ops

LLAMA = ModelConfig(
    num_layers=3,
    hidden_size=48,
    ffn_hidden_size=96,
    num_attention_heads=6,
    kv_channels=8,
    group_query_attention=True,
    num_query_groups=2,
    max_position_embeddings=16384,
    position_embedding_type="rope",
    normalization="RMSNorm",
    swiglu=True,
    disable_bias_linear=True,
    untie_embeddings_and_output_weights=True,
    attention_dropout=0.0,
    hidden_dropout=0.0,
    init_method_std=0.1,
)
GPT2 = ModelConfig(
    num_layers=3,
    hidden_size=48,
    ffn_hidden_size=192,
    num_attention_heads=6,
    kv_channels=8,
    max_position_embeddings=40,
    attention_dropout=0.0,
    hidden_dropout=0.0,
    init_method_std=0.1,
)
VOCAB = 101


def model_of(config: ModelConfig) -> GPT:
    return GPT(config, VOCAB, ops=Ops(), seed=3)


def tokens_of(batch: int = 2, length: int = 32) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))


def pieces_of(model: GPT, of=lambda p: p.data) -> dict[str, torch.Tensor]:
    return {
        piece.name: piece.tensor
        for p in model.parameters()
        for piece in p.param_layout.pieces(of(p))
    }


def llama_of(model: GPT, **options):
    """Return transformers' model with the same weights."""
    transformers = pytest.importorskip("transformers")
    values = families.write_config(model.config, VOCAB, {})
    peer = transformers.LlamaForCausalLM._from_config(transformers.LlamaConfig(**values), **options)
    places = hf_correspondences(model.config, VOCAB)
    peer.load_state_dict(
        {places[name].name: tensor for name, tensor in pieces_of(model).items()},
        strict=not model.config.tied,
    )
    return peer
